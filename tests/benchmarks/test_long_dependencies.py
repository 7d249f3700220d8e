import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import long_dependencies as study
from benchmarks.registry import read, write
from fusedrnn import RecurrentStack

lengths = st.integers(10, 60)
seeds = st.integers(0, 2**31)


@settings(deadline=None, max_examples=40)
@given(lengths, seeds)
def test_adding(length, seed):
    torch.manual_seed(seed)
    x, _, target = study.adding(5, length)
    values, marks = x.unbind(-1)
    assert x.shape == (length, 5, 2)
    assert marks.sum(0).tolist() == [2.0] * 5
    assert marks[: length // 2].sum(0).tolist() == [1.0] * 5
    torch.testing.assert_close(target, (values * (marks == 1)).sum(0))
    assert ((values >= 0) & (values <= 1)).all()


def test_chance_of_adding_is_the_variance_of_the_sum():
    target = study.adding(200_000, 10).target
    assert study.make_task("adding-10").chance == pytest.approx(target.var().item(), rel=0.02)


@settings(deadline=None, max_examples=40)
@given(lengths, seeds)
def test_temporal_order(length, seed):
    torch.manual_seed(seed)
    x, sizes, target = study.temporal_order(6, length)
    assert torch.equal(x.sum(-1), torch.ones(x.shape[:2]))
    symbols = x.argmax(-1)
    assert ((sizes >= length) & (sizes <= length + length // 10)).all()
    for row in range(6):
        sequence = symbols[: sizes[row], row].tolist()
        assert (sequence[0], sequence[-1]) == (4, 5)
        (first, a), (second, b) = [(t, s) for t, s in enumerate(sequence) if s >= 6]
        assert length // 10 <= first <= length // 5
        assert length // 2 <= second <= 6 * length // 10
        assert target[row] == 2 * (a - 6) + (b - 6)
        assert all(s < 4 for t, s in enumerate(sequence[1:-1], 1) if t not in (first, second))


@settings(deadline=None, max_examples=40)
@given(lengths, seeds)
def test_copy_memory(length, seed):
    torch.manual_seed(seed)
    x, _, target = study.copy_memory(4, length)
    symbols = x.argmax(-1)
    assert symbols.shape == target.shape == (length + 20, 4)
    assert torch.equal(target[-10:], symbols[:10])
    assert ((symbols[:10] >= 1) & (symbols[:10] <= 8)).all()
    assert not target[:-10].any()
    assert (symbols == 9).nonzero()[:, 0].tolist() == [length + 9] * 4
    assert not symbols[10 : length + 9].any() and not symbols[length + 10 :].any()


@pytest.mark.parametrize(("cell", "gates"), [("lstm", 4), ("lstm_peephole", 4), ("gru", 3)])
def test_carry_biases(cell, gates):
    for bias in study.BIASES:
        stack = RecurrentStack(3, [200], cell)
        study.set_carry_bias(stack, bias, 50)
        (layer,) = stack.layers
        total = (layer.bias_ih_l0 + layer.bias_hh_l0).detach().chunk(gates)
        if bias != "chrono":
            assert (total[1] == float(bias)).all()
            continue
        spans = total[1].exp()
        assert spans.min() >= 1 and spans.max() <= 49 + 1e-3
        assert spans.mean() == pytest.approx(25, abs=4)
        if gates == 4:
            assert torch.equal(total[0], -total[1])


def test_the_carry_bias_of_a_cell_without_one_changes_nothing():
    stack = RecurrentStack(3, [4], "rnn")
    before = stack.layers[0].bias_ih_l0.clone()
    study.set_carry_bias(stack, "chrono", 50)
    assert torch.equal(stack.layers[0].bias_ih_l0, before)


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


@pytest.mark.parametrize("task", ["adding", "adding-9", "sorting-20", "copy-x"])
def test_unknown_tasks_are_refused(task, capsys):
    with pytest.raises(SystemExit):
        study.main(["--tasks", task])
    assert f"with T >= 10, got {task!r}" in capsys.readouterr().err


def test_chance_of_the_other_tasks():
    assert study.make_task("order-100").chance == pytest.approx(math.log(4))
    assert study.make_task("copy-100").chance == pytest.approx(10 * math.log(8) / 120)
