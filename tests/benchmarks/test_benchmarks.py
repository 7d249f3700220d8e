import csv

import pytest

from benchmarks import cpu_layers, deep_stacks, streaming
from benchmarks.__main__ import main
from benchmarks.registry import BENCHMARKS, environment, interleave


def test_rows_reach_the_file_with_what_they_depend_on(tmp_path, monkeypatch, capsys):
    def small():
        yield {"name": "a", "milliseconds": 1.5}
        yield {"name": "b", "milliseconds": 2.5}

    monkeypatch.setitem(BENCHMARKS, "small", small)
    main(["small", "--output", str(tmp_path)])
    with (tmp_path / "small.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["milliseconds"]) for row in rows] == [("a", "1.5"), ("b", "2.5")]
    assert rows[0].keys() >= environment().keys() == {"machine", "threads", "torch", "commit"}
    assert "milliseconds 2.5" in capsys.readouterr().out


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
    rows = list(cpu_layers.cpu_layers())
    assert {row["baseline"] for row in rows} == {
        "nn.LSTM",
        "nn.GRU",
        "nn.LSTM packed",
        "nn.GRU packed",
    }
    assert {"LSTM peephole", "GRU reset_before"} <= {row["name"] for row in rows}


def test_streaming_runs(monkeypatch):
    for name, value in {"SIZES": (3, 4), "STEPS": 2, "ROUNDS": 2}.items():
        monkeypatch.setattr(streaming, name, value)
    rows = list(streaming.streaming())
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
    with (tmp_path / "deep_stacks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["variant"], row["step"]) for row in rows] == [
        (seed, variant, step)
        for seed in "01"
        for variant in ("plain", "residual + layer norm")
        for step in "24"
    ]
    assert all(float(row["loss"]) > 0 for row in rows)
    assert deep_stacks.draw(tmp_path / "deep_stacks.csv").stat().st_size > 0
