"""The GPU benchmarks on a CPU: in torch, or in Triton's interpreter, at sizes of a few units."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_accuracy, gpu_barriers, gpu_exchange, gpu_kernels, gpu_speed
from benchmarks.compile_facts import DTYPES
from benchmarks.registry import BENCHMARKS
from kernels import CELLS
from kernels.persistent import plan as planning

SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn)


@pytest.fixture(autouse=True)
def precision():
    before = [switch.allow_tf32 for switch in SWITCHES]
    yield
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.allow_tf32 = value


@pytest.mark.parametrize("name", ["tf32", "fp32", "bf16"])
def test_precision_is_that_of_the_kernels(name):
    gpu_kernels.set_precision(name)
    like = torch.empty(0, dtype=DTYPES[name][0])
    assert planning.product_precision(like) == DTYPES[name][1]
    assert torch.backends.cudnn.rnn.fp32_precision == ("tf32" if name == "tf32" else "none")
    assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else "highest")


@pytest.mark.parametrize("name", ["gpu_accuracy", "gpu_barriers", "gpu_exchange", "gpu_speed"])
def test_each_case_has_a_name_of_its_own(name):
    keys = [tuple(key.items()) for key, _ in BENCHMARKS[name].cases()]
    assert len(keys) == len(set(keys)) > 20


def test_accuracy_covers_the_product():
    cases = set(gpu_accuracy.cases())
    assert {case[:2] + case[3:] for case in cases} == {
        (cell, dtype, bidirectional, lengths)
        for cell in CELLS
        for dtype in ("bf16", "fp16", "tf32", "fp32")
        for bidirectional in (False, True)
        for lengths in (False, True)
    }


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("cell", gpu_kernels.LAYERS)
def test_accuracy(cell, lengths, monkeypatch):
    monkeypatch.setattr(gpu_accuracy, "STEPS", 6)
    monkeypatch.setattr(gpu_accuracy, "BATCH", 4)
    (row,) = gpu_accuracy.measure(cell, "fp32", 8, True, lengths, "cpu", "torch")
    native = gpu_kernels.LAYERS[cell].native
    assert row["denominator"] == ("cuDNN" if native else "plain torch operations")
    for name in ("y", "dx", "dw_ih", "dw_hh"):
        assert 0 < float(row[f"{name}_error"]) < 1e-5
        assert 0 < float(row[f"{name}_denominator"]) < 1e-5
        assert row[f"{name}_ratio"] <= row["worst_ratio"] < 20


def test_accuracy_of_the_kernels(monkeypatch):
    monkeypatch.setattr(gpu_accuracy, "STEPS", 3)
    monkeypatch.setattr(gpu_accuracy, "BATCH", 2)
    (row,) = gpu_accuracy.measure("gru_reset_before", "fp16", 8, False, True, "cpu", "triton")
    assert 1e-5 < float(row["y_error"]) < 1e-3
    assert row["worst_ratio"] < 2


@pytest.mark.parametrize("variant", ["atomic", "bounded"])  # "load" is inline assembly
def test_a_barrier_of_one_program(variant):
    (row,) = gpu_barriers.measure(1, 2, variant, 1, "cpu")
    assert isinstance(row["us_per_barrier"], float)


def test_barriers_are_found_by_variant():
    rows = [
        {"slices": "8", "groups": groups, "variant": variant, "us_per_barrier": time}
        for groups, variant, time in (
            ("1", "atomic", "1.5"),
            ("1", "load", "1.0"),
            ("2", "atomic", "1.7"),
            ("1", "bounded", "0.5"),
        )
    ]
    assert list(gpu_barriers.by_size(rows)) == [
        "microseconds at slices x groups, atomic: 8x1 1.5, 8x2 1.7",
        "microseconds at slices x groups, load: 8x1 1.0",
        "microseconds at slices x groups, bounded: 8x1 0.5",
        "load is the cheapest: 1.000 on average",
    ]


def test_every_plan_that_fits_is_timed_and_one_is_chosen():
    shapes = {}
    for key, _, chosen in gpu_exchange.plans():
        shape = tuple(key[name] for name in gpu_exchange.SHAPE)
        shapes.setdefault(shape, []).append(chosen)
    assert len(shapes) == 2 * len(gpu_exchange.GRID)
    assert all(sum(chosen) == 1 for chosen in shapes.values())
    assert sum(map(len, shapes.values())) > 3 * len(shapes)


@pytest.mark.parametrize("backward", [False, True])
def test_a_loop_is_timed(backward, monkeypatch):
    monkeypatch.setattr(gpu_exchange, "STEPS", 2)
    device = planning.INTERPRETER
    plan = planning.choose("gru", 16, 2, 1, torch.float32, "ieee", backward, device)
    (row,) = gpu_exchange.measure(plan, True, "fp32", "cpu")
    assert row["us_per_step"] > 0
    assert (row["programs"], row["launches"], row["exchanges"]) == (1, 1, 0)
    assert row["weight_bytes"] == 4 * 16 * 16 * (3 if backward else 4)


def test_constants_are_found_again():
    rows = []
    for key, plan, chosen in gpu_exchange.plans():
        time = str(plan.microseconds)
        counts = {name: str(value) for name, value in gpu_exchange.counts(plan).items()}
        rows.append(
            {name: str(value) for name, value in key.items()}
            | counts
            | {"us_per_step": time, "model_us": time, "launches": str(plan.launches)}
            | {"chosen": str(chosen)}
        )
    assert gpu_exchange.fit(rows) == pytest.approx(
        {
            "POINTWISE": planning.POINTWISE,
            "HOP": planning.HOP,
            "L2_LATENCY": planning.L2_LATENCY,
            "L2": planning.L2,
            "L2_PORT": planning.L2_PORT,
            "SHARED": planning.SHARED,
            "IEEE": planning.IEEE,
        }
    )
    said = list(gpu_exchange.against_the_model(rows))
    assert "HOP = 1; plan.py has 1" in said
    assert said[-1] == "measured / modelled: 1.00 to 1.00, median 1.00"
    other = next(row for row in rows if row["chosen"] == "False")
    other["us_per_step"] = "0.01"
    last = list(gpu_exchange.against_the_model(rows))[-1]
    assert last.startswith("lstm bf16 512 16 forward: ") and " takes 0.01, the chosen plan " in last


def small(point):
    """The point at a size that takes no time."""
    return replace(point, dtype="fp32", hidden_size=8, batch=4, steps=4)


@pytest.mark.parametrize(
    "point", dict.fromkeys(map(small, (*gpu_speed.FIRST, *gpu_speed.SECOND))), ids=str
)
def test_speed(point, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, backend: compile_(f, backend="eager"))
    (row,) = gpu_speed.measure(point, "cpu", "torch", 1)
    for what in ("forward", "training"):
        ratio = row[f"{what}_other_us"] / row[f"{what}_ours_us"]
        assert row[f"{what}_ratio"] == pytest.approx(ratio, rel=0.02)
        if point.against.startswith("cuDNN"):
            assert row[f"{what}_other_algorithm"].endswith("by torch's rule")


def test_speed_of_the_kernels_beside_the_floor():
    point = replace(small(gpu_speed.CORNER), hidden_size=16, steps=2)
    (row,) = gpu_speed.measure(point, "cpu", "triton", 1)
    assert row["forward_programs"] == row["backward_programs"] == 1
    for what in ("forward", "backward"):
        assert row[f"{what}_over_floor"] > 0


def test_no_speed_is_told_of_a_layer_that_computes_something_else(monkeypatch):
    real = gpu_speed.their_layer

    def wrong(*arguments, **shape):
        layer = real(*arguments, **shape)
        torch.nn.init.zeros_(layer.weight_hh_l0)
        return layer

    monkeypatch.setattr(gpu_speed, "their_layer", wrong)
    point = replace(small(gpu_speed.CORNER), dtype="fp32")
    with pytest.raises(ValueError, match=r"ours differs from the other by 0\.\d+ of its norm"):
        next(gpu_speed.measure(point, "cpu", "torch", 1))


def test_the_grid_is_the_whole_product_spread_out():
    grid = gpu_speed.grid()
    assert len(set(grid)) == len(grid) == 360
    start = grid[:40]
    for name, count in {"cell": 2, "dtype": 3, "hidden_size": 6, "batch": 5}.items():
        assert len({getattr(point, name) for point in start}) == count
    assert next(gpu_speed.points()) == gpu_speed.CORNER


@pytest.mark.parametrize(
    ("changes", "forward", "backward"),
    [
        ({}, "persistent", "persistent"),
        ({"bidirectional": True}, "standard", "standard"),
        ({"layers": 3}, "standard", "standard"),
        ({"dtype": "bf16"}, "standard", "standard"),
        ({"cell": "gru"}, "standard", "standard"),
        ({"batch": 1}, "standard", "standard"),
        ({"hidden_size": 128}, "persistent, small H", "persistent, small H"),
        ({"hidden_size": 192}, "persistent, small H", "standard"),
        ({"against": "cuDNN packed"}, "standard", "standard"),
    ],
)
def test_the_rule_of_torch(changes, forward, backward):
    point = replace(gpu_speed.CORNER, **changes)
    assert (gpu_speed.rule(point, False), gpu_speed.rule(point, True)) == (forward, backward)


def test_findings_of_speed():
    name = {"cell": "lstm", "dtype": "bf16", "hidden_size": "8", "batch": "1", "layers": "1"}
    name |= {"bidirectional": "False", "lengths": "False", "steps": "512"}
    rows = [
        {"against": "flashrnn", "status": "not installed"},
        name | {"against": "cuDNN", "forward_ratio": "2", "training_ratio": "3"}
        | {"forward_over_floor": "1.5"},
    ]  # fmt: skip
    said = list(gpu_speed.by_kind(rows))
    assert said[0] == "flashrnn: not installed"
    assert said[1].startswith("against cuDNN: forward_ratio 2 (cell lstm, dtype bf16,")
    assert said[-1] == "forward loop over the model's floor: median 1.50"
    assert list(gpu_speed.absent("no_such_package")) == [{"status": "not installed"}]
