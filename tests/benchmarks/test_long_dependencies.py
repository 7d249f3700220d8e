from pathlib import Path

import pytest

from benchmarks import long_dependencies as study
from benchmarks.registry import read, write


def test_a_study_goes_on_where_it_was_cut_short_and_is_drawn(tmp_path, capsys):
    output = tmp_path / "results" / "study.csv"
    small = ["--batch_size=4", "--hidden_size=5", "--steps=4", "--every=2", f"--output={output}"]
    study.main(["--tasks", "adding-10", "--cells", "rnn_tanh", "lstm", "--biases", "1", *small])
    first = read(output)
    write(output, [*first, first[-1] | {"seed": "1", "finished": "False"}])
    assert [(r["cell"], r["bias"], r["step"], r["finished"]) for r in first] == [
        (cell, bias, step, str(step == "4"))
        for cell, bias in (("rnn_tanh", "none"), ("lstm", "1"))
        for step in ("0", "2", "4")
    ]
    assert all(float(r[f"gradient_h_{place}"]) > 0 for r in first for place in (0, 50, 100))
    assert [r["gradient_c_0"] == "nan" for r in first] == [True] * 3 + [False] * 3
    assert [r["carry_mean"] == "nan" for r in first] == [True] * 3 + [False] * 3
    assert all(float(r["carry_top_tenth"]) >= float(r["carry_mean"]) for r in first[3:])
    more = ["order-10", "adding-10", "copy-10"]
    study.main(["--tasks", *more, "--cells", "lstm", "gru", "--biases", "1", *small])
    again = read(output)
    assert again[: len(first)] == first
    assert {r["learning_rate"] for r in again} == {"0.01"}
    assert {(r["task"], r["cell"]) for r in again[len(first) :]} == {
        ("order-10", "lstm"),
        ("order-10", "gru"),
        ("adding-10", "gru"),
        ("copy-10", "lstm"),
        ("copy-10", "gru"),
    }
    study.main(["--figures", f"--output={output}"])
    drawn = capsys.readouterr().out.splitlines()[-4:]
    claims = ("losses", "steps", "gradients", "gates")
    assert drawn == [str(output.with_name(f"study_{claim}.png")) for claim in claims]
    assert all(Path(path).stat().st_size > 0 for path in drawn)


def test_a_short_adding_problem_is_solved_and_the_run_ends(tmp_path):
    output = tmp_path / "study.csv"
    study.main(
        [
            *("--tasks", "adding-10", "--cells", "gru", "--biases", "1", "--steps", "3000"),
            *("--every", "1000", "--batch_size", "64", "--hidden_size", "32"),
            f"--output={output}",
        ]
    )
    last = read(output)[-1]
    assert (last["solved"], last["finished"]) == ("True", "True")
    assert float(last["loss"]) < 0.01 and int(last["step"]) < 3000


def test_time_is_shared_between_the_runs(tmp_path):
    output = tmp_path / "study.csv"
    study.main(["--quick", "--tasks", "copy-10", "--seconds", "0.5", f"--output={output}"])
    finished = [r for r in read(output) if r["finished"] == "True"]
    assert len(finished) == 5
    assert all(float(r["seconds"]) < 2 for r in finished)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("adding", "task must be adding-T, order-T or copy-T, got 'adding'"),
        ("copy-x", "task must be adding-T, order-T or copy-T, got 'copy-x'"),
        ("adding-9", "a length of at least 10, got 'adding' with 9"),
        ("sorting-20", "problem must be one of adding, order, copy with"),
    ],
)
def test_unknown_tasks_are_refused(task, message, capsys):
    with pytest.raises(SystemExit):
        study.main(["--tasks", task])
    assert message in capsys.readouterr().err
