import contextlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import __main__, cpu_layers, deep_stacks, registry, streaming
from benchmarks.__main__ import main
from benchmarks.registry import BENCHMARKS, Benchmark, environment, interleave, read, spread


def measure(cases):
    """The rows of all cases."""
    return [key | row for key, run in cases for row in run()]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run benchmarks that stand for themselves in a folder of their own; the rows of each."""

    def run(fail=False, minutes=None, **cases):
        findings = spread("ratio", "size")
        for name, generator in cases.items():
            monkeypatch.setitem(BENCHMARKS, name, Benchmark(generator, findings))
        with pytest.raises(SystemExit) if fail else contextlib.nullcontext() as caught:
            limit = [] if minutes is None else ["--minutes", str(minutes)]
            main([*cases, "--output", str(tmp_path), *limit])
        if fail:
            assert caught.value.code not in (0, None)
        return {name: read(tmp_path / f"{name}.csv") for name in cases}

    return run


class Cases:
    """Two rows for each size, and a record of what was measured."""

    def __init__(self, *sizes, broken=()):
        self.sizes, self.broken, self.measured = sizes, broken, []

    def __call__(self):
        for size in self.sizes:
            yield {"size": size}, partial(self.measure, size)

    def measure(self, size):
        self.measured.append(size)
        for name, ratio in (("a", 1.5), ("b", 1.5 + size)):
            yield {"name": name, "ratio": ratio}
            if size in self.broken:
                raise RuntimeError("out of luck\nand of memory")


def ratios(rows):
    return [(row["size"], row["ratio"]) for row in rows]


def test_rows_reach_the_file_with_what_they_depend_on(run, capsys):
    rows = run(small=Cases(1, 2))["small"]
    assert ratios(rows) == [("1", "1.5"), ("1", "2.5"), ("2", "1.5"), ("2", "3.5")]
    keys = {"machine", "threads", "torch", "triton", "commit"}
    assert rows[0].keys() >= environment().keys() == keys
    lines = capsys.readouterr().out.splitlines()
    assert "small size 2, name b, ratio 3.5" in lines
    assert lines[-1] == ("small: ratio 1.5 (size 1) to 3.5 (size 2), geometric mean 2.11 of 4")


def test_rows_that_are_there_are_not_measured_again(run, capsys):
    first = run(small=Cases(1))["small"]
    again = Cases(1, 2)
    rows = run(small=again)["small"]
    assert again.measured == [2]
    assert rows[:2] == first and len(rows) == 4
    assert "small: 2 rows are there from before" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["machine", "torch", "commit"])
def test_rows_from_elsewhere_are_replaced(column, run, monkeypatch):
    here = environment()
    monkeypatch.setattr(__main__, "environment", lambda: here | {column: "another"})
    assert {row[column] for row in run(small=Cases(1, 3))["small"]} == {"another"}
    monkeypatch.setattr(__main__, "environment", lambda: here)
    cases = Cases(1, 2)
    rows = run(small=cases)["small"]
    assert cases.measured == [1, 2]
    assert [row["size"] for row in rows] == ["1", "1", "2", "2"]
    assert {row[column] for row in rows} == {str(here[column])}


def test_what_raises_is_one_line_and_the_rest_is_measured(run, capsys):
    def broken():
        yield from Cases(1)()
        raise ValueError("no more")

    rows = run(fail=True, small=Cases(1, 2, 3, broken=(2,)), broken=broken, last=Cases(4))
    assert [row["size"] for row in rows["small"]] == ["1", "1", "3", "3"]
    assert len(rows["broken"]) == len(rows["last"]) == 2
    lines = capsys.readouterr().out.splitlines()
    failures = [line for line in lines if " failed: " in line]
    assert failures[0].startswith("small size 2 failed: RuntimeError: out of luck (test_benchmarks")
    assert failures[1].startswith("broken failed: ValueError: no more (test_benchmarks")
    assert len(failures) == 2
    assert [line.partition(":")[0] for line in lines[-3:]] == ["small", "broken", "last"]
    retried = Cases(1, 2, 3)
    assert len(run(small=retried)["small"]) == 6
    assert retried.measured == [2]


def test_an_interrupted_run_leaves_its_rows(run, tmp_path):
    def interrupted():
        yield from Cases(1)()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small=interrupted)
    assert len(read(tmp_path / "small.csv")) == 2


def test_a_run_stops_before_its_time_is_up(run, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(__main__.time, "monotonic", lambda: now[0])

    def slow(self, size):
        now[0] += 25.0
        yield {"name": "a", "ratio": 1.5}

    monkeypatch.setattr(Cases, "measure", slow)
    rows = run(minutes=1, small=Cases(1, 2, 3, 4), other=Cases(5))
    assert [row["size"] for row in rows["small"]] == ["1", "2"]
    assert not rows["other"]
    assert "small: time is up before size 3; run again to go on" in capsys.readouterr().out
    assert [row["size"] for row in run(small=Cases(1, 2, 3, 4))["small"]] == ["1", "2", "3", "4"]


def test_findings_rank_what_is_no_number_last():
    values = {"x": "2.0", "y": "nan", "z": "0.5", "base": "1.0"}
    rows = [{"name": name, "baseline": "base", "ratio": value} for name, value in values.items()]
    assert list(spread("ratio", "name")(rows)) == [
        "ratio 0.5 (name z) to nan (name y), geometric mean nan of 3"
    ]
    assert list(spread("ratio", "name")(rows[:1] + rows[2:])) == [
        "ratio 0.5 (name z) to 2.0 (name x), geometric mean 1.00 of 2"
    ]
    assert list(spread("ratio", "name")([])) == []


@pytest.mark.parametrize("package", ["kernels", "lightning_modules"])
def test_the_code_is_named_by_its_commit_if_that_is_all_of_it(tmp_path, monkeypatch, package):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(registry, "ROOT", tmp_path)
    results, source = tmp_path / "benchmarks" / "results", tmp_path / package / "a.py"
    for folder in (results, source.parent):
        folder.mkdir(parents=True)
    source.write_text("x = 1\n")
    (results / "a.csv").write_text("a\n")
    unknown = environment()["commit"]
    assert unknown.startswith("+")
    monkeypatch.setenv("COMMIT", "abc1234")
    assert environment()["commit"] == "abc1234" + unknown
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = environment()["commit"]
    assert commit.isalnum()
    (results / "a.csv").write_text("b\n")
    assert environment()["commit"] == commit
    source.write_text("x = 2\n")
    changed = environment()["commit"]
    assert changed.startswith(commit) and changed != commit
    source.write_text("x = 3\n")
    assert environment()["commit"] not in (commit, changed)
    source.write_text("x = 1\n")
    assert environment()["commit"] == commit


def test_without_a_gpu_its_results_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    main(["gpu_speed", "--output", str(tmp_path)])
    (row,) = read(tmp_path / "gpu_speed.csv")
    assert row["status"] == "no GPU has run this"
    (tmp_path / "gpu_speed.csv").write_text("machine\na GPU\n")
    main(["gpu_speed", "--output", str(tmp_path)])
    assert read(tmp_path / "gpu_speed.csv") == [{"machine": "a GPU"}]
    assert capsys.readouterr().out.splitlines()[-1] == "gpu_speed: not run, needs a GPU"


def test_gpu_benchmarks_need_only_torch_triton_and_numpy(tmp_path):
    code = f"""
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
needed = [re.match(r"[a-z0-9-]+", it)[0] for it in project["dependencies"]]
others = set(needed) - {{"torch", "triton"}}
assert {{"lightning", "safetensors", "matplotlib"}} <= others
sys.modules |= dict.fromkeys({{*others, "PIL", "pandas", "sklearn", "scipy", "onnx", "pytest"}})
from benchmarks.__main__ import main
from benchmarks import gpu_compile, gpu_targets
main(["gpu_accuracy", "gpu_barriers", "gpu_exchange", "gpu_speed", "--output", {str(tmp_path)!r}])
gpu_compile.wanted(list(gpu_compile.NAMES))
gpu_targets.main(["--results", {str(tmp_path)!r}])
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=environment)
    assert {path.stem for path in tmp_path.iterdir()} == {
        "gpu_accuracy",
        "gpu_barriers",
        "gpu_exchange",
        "gpu_speed",
    }


def test_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "no benchmark nothing; there are" in capsys.readouterr().err


def test_candidates_run_in_turn():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    rows = list(interleave(candidates, rounds=2))
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert [row["name"] for row in rows] == ["a", "b"]
    assert rows[0]["ratio"] == 1


def test_cpu_layers_runs(monkeypatch):
    for name, value in {"STEPS": 4, "BATCH": 2, "SIZE": 3, "ROUNDS": 2}.items():
        monkeypatch.setattr(cpu_layers, name, value)
    rows = measure(cpu_layers.cpu_layers())
    assert {row["baseline"] for row in rows} == {
        "nn.LSTM",
        "nn.LSTM alone",
        "nn.GRU",
        "nn.LSTM packed",
        "nn.GRU packed",
    }
    assert {"LSTM peephole", "GRU reset_before"} <= {row["name"] for row in rows}


def test_streaming_runs(monkeypatch):
    for name, value in {"SIZES": (3, 4), "STEPS": 2, "ROUNDS": 2}.items():
        monkeypatch.setattr(streaming, name, value)
    rows = measure(streaming.streaming())
    assert [(row["hidden_size"], row["baseline"]) for row in rows[::7]] == [
        (3, "nn.LSTMCell"),
        (4, "nn.LSTMCell"),
    ]
    assert {"LSTM peephole", "GRU reset_before"} <= {row["name"] for row in rows}


def test_deep_stacks_run_and_are_drawn(tmp_path, monkeypatch):
    sizes = {"LAYERS": 3, "HIDDEN": 4, "BATCH": 3, "STEPS": 4, "EVERY": 2, "SEEDS": (0, 1)}
    for name, value in sizes.items():
        monkeypatch.setattr(deep_stacks, name, value)
    main(["deep_stacks", "--output", str(tmp_path)])
    rows = read(tmp_path / "deep_stacks.csv")
    assert [(row["seed"], row["variant"], row["step"]) for row in rows] == [
        (seed, variant, step)
        for seed in "01"
        for variant in ("plain", "residual + layer norm")
        for step in "24"
    ]
    assert all(float(row["loss"]) > 0 for row in rows)
    assert deep_stacks.draw(tmp_path / "deep_stacks.csv").stat().st_size > 0
