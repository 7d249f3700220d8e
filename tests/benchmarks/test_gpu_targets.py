from dataclasses import asdict

import pytest

from benchmarks import gpu_targets
from benchmarks.gpu_speed import CORNER, Point, grid
from benchmarks.registry import write


def speed(point, ratio, **changes):
    """A row in which ours takes 2 microseconds a step."""
    row = asdict(point)
    for what in ("forward", "training"):
        row |= {f"{what}_ours_us": 2.0, f"{what}_other_us": 2.0 * ratio, f"{what}_ratio": ratio}
        row[f"{what}_other_algorithm"] = "standard, 9 kernels"
    for what in ("forward", "backward"):
        row |= {f"{what}_loop_us": 1.2, f"{what}_floor_us": 1.0, f"{what}_over_floor": 1.2}
    return row | changes


@pytest.fixture
def results(tmp_path):
    first, second, *_ = grid()
    others = [
        {"against": "flashrnn", "status": "not installed"},
        speed(CORNER, 1.1, training_ratio=0.95, forward_other_algorithm="persistent, 3 kernels"),
        speed(first, 2.0, forward_other_algorithm="persistent, 3 kernels"),
        speed(second, 8.0, training_ratio=0.8, backward_over_floor=1.7),
        speed(Point("lstm_peephole", "bf16", 512, 32, against="lstm"), 1 / 1.04),
        speed(Point("gru_reset_before", "bf16", 512, 32, against="gru"), 1 / 1.7),
        speed(Point("lstm", "bf16", 512, 32, lengths=True, against="cuDNN packed"), 6.0),
    ]
    write(tmp_path / "gpu_speed.csv", others)
    write(tmp_path / "gpu_barriers.csv", [{"status": "no GPU has run this"}])
    case = {"cell": "gru", "dtype": "fp16", "hidden_size": 256, "bidirectional": False}
    case |= {"lengths": True, "denominator": "cuDNN"}
    write(tmp_path / "gpu_accuracy.csv", [case | {"worst_ratio": r} for r in (1.5, "nan", 0.9)])
    return tmp_path


def test_each_target_has_a_verdict(results):
    met = {verdict.target: verdict for verdict in gpu_targets.verdicts(results)}
    assert {target: verdict.met for target, verdict in met.items()} == {
        "error at most 2 x that of torch's kernels": "no",
        "forward at least 1.0 x cuDNN at its best corner": "yes",
        "training at least 1.0 x cuDNN at its best corner": "no",
        "forward at least 3 x cuDNN, geometric mean of the grid": "yes",
        "training at least 3 x cuDNN, geometric mean of the grid": "no",
        "forward nowhere below 0.9 x cuDNN": "yes",
        "training nowhere below 0.9 x cuDNN": "no",
        "forward at least 5 x packed sequences": "yes",
        "training at least 5 x packed sequences": "yes",
        "forward with peepholes at most 1.05 x the LSTM": "yes",
        "training with peepholes at most 1.05 x the LSTM": "yes",
        "forward of the reset-before GRU at most 1.6 x the GRU": "no",
        "training of the reset-before GRU at most 1.6 x the GRU": "no",
        "forward at least 20 x a compiled loop": "-",
        "training at least 20 x a compiled loop": "-",
        "forward loop at most 1.5 x the model's floor": "yes",
        "backward loop at most 1.5 x the model's floor": "no",
    }
    mean = met["forward at least 3 x cuDNN, geometric mean of the grid"].measured
    assert mean == ("4.00 over 2 of 360 points; 8.00 over the 1 of cuDNN's standard algorithm")
    error = met["error at most 2 x that of torch's kernels"].measured
    assert error.startswith("worst nan at cell=gru dtype=fp16") and "2 of 3 within" in error
    corner = met["training at least 1.0 x cuDNN at its best corner"].measured
    assert corner.startswith("0.95 at cell=lstm dtype=fp16 hidden_size=768 batch=16")
    said = ", where a step takes 2.00 µs, the loops 2.40, by the model 2.00"
    assert corner.endswith(said)
    peephole = met["forward with peepholes at most 1.05 x the LSTM"].measured
    assert peephole.startswith("1.04 at cell=lstm_peephole dtype=bf16 hidden_size=512")
    assert "µs" not in peephole


def test_without_measurements_nothing_is_met(tmp_path, capsys):
    write(tmp_path / "gpu_speed.csv", [{"status": "no GPU has run this"}])
    gpu_targets.main(["--results", str(tmp_path), "--figures"])
    head, rule, *lines = capsys.readouterr().out.strip().splitlines()
    assert (head, rule) == ("| target | measured | met |", "|---|---|---|")
    assert len(lines) == 17
    assert all(line.endswith("| not measured | - |") for line in lines)


def test_what_was_measured_is_drawn(results, capsys):
    gpu_targets.main(["--results", str(results), "--figures"])
    names = ["gpu_ratio_one_direction", "gpu_ratio_both_directions", "gpu_steps"]
    assert capsys.readouterr().out.splitlines()[-3:] == [str(results / f"{n}.png") for n in names]
    assert all((results / f"{name}.png").stat().st_size > 0 for name in names)


def test_lines_of_the_figures():
    rows = [
        {key: str(value) for key, value in speed(Point("lstm", "bf16", size, batch), 3.0).items()}
        for size in (512, 64)
        for batch in (8, 1)
    ]
    ratios = gpu_targets.ratios(rows, False).axes
    assert [len(axis.lines) for axis in ratios] == [5, 1, 1, 1, 1, 1]
    line = ratios[0].lines[0]
    assert line.get_label() == "forward B=1"
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([64, 512], [3.0, 3.0])
    assert [len(axis.lines) for axis in gpu_targets.ratios(rows, True).axes] == [1] * 6
    assert [len(axis.lines) for axis in gpu_targets.steps(rows).axes] == [4, 4, 0, 0]
    barriers = [
        {"slices": n, "groups": g, "variant": v, "us_per_barrier": "1"}
        for v in ("atomic", "load")
        for n, g in (("8", "1"), ("2", "1"), ("8", "16"))
    ]
    lines = gpu_targets.barriers(barriers).axes[0].lines
    assert [(line.get_label(), list(line.get_xdata())) for line in lines] == [
        ("atomic", [2, 8]),
        ("load", [2, 8]),
    ]
