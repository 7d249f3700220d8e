"""Every cell by its Triton kernels against float64; on a CPU, in Triton's interpreter."""

import pytest
import torch

from kernels import CELLS, ops
from tests.kernels.cases import outputs, outputs_and_gradients, random_layer
from tests.kernels.triton_cases import DEVICE, assert_accurate, force, poison, to_device

PROGRAMS = [pytest.param(0, id="one-program"), pytest.param(16, id="programs")]
LENGTHS = [1, 0, 2]
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"  # numpy, where a launch of a single step reads what is not yet written
)


def layer_of(cell, dtype=torch.float32, **shape):
    shape = {"steps": 2, "batch": 3, "hidden": 21} | shape
    return to_device(random_layer(cell, dtype=torch.float32, **shape), DEVICE, dtype)


@pytest.mark.parametrize("units", PROGRAMS)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("directions", [1, 2], ids=["D1", "D2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("cell", CELLS)
def test_agrees_with_float64(cell, dtype, directions, ragged, units, monkeypatch):
    used = force(monkeypatch, units=units)
    lengths = torch.tensor(LENGTHS, device=DEVICE) if ragged else None
    layer = layer_of(cell, dtype, directions=directions)
    assert_accurate(ops.recurrence, layer, lengths=lengths)
    assert [plan.slices for plan in used] == [1 if units == 0 else 2] * 2


@pytest.mark.parametrize("units", PROGRAMS)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"steps": 1}, id="T1"),
        pytest.param({"batch": 1}, id="B1"),
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_edges(cell, shape, units, monkeypatch):
    force(monkeypatch, units=units)
    assert_accurate(ops.recurrence, layer_of(cell, **shape))


@pytest.mark.parametrize("units", PROGRAMS)
def test_two_batch_tiles(units, monkeypatch):
    used = force(monkeypatch, units=units)
    assert_accurate(ops.recurrence, layer_of("lstm", hidden=17, batch=18, directions=2))
    assert used[0].groups == 4


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"resident": False, "chunk": 16}, id="streamed"),
        pytest.param({"chunk": 16}, id="two-chunks"),
        pytest.param({"groups_per_launch": 1}, id="two-launches"),
    ],
)
def test_other_plans(cell, changes, monkeypatch):
    force(monkeypatch, **changes)
    lengths = torch.tensor([1, 2, 2], device=DEVICE)
    assert_accurate(ops.recurrence, layer_of(cell, directions=2), lengths=lengths)


@pytest.mark.parametrize("hidden", [1, 16, 33])
def test_hidden_sizes_by_the_plan_of_the_table(hidden):
    assert_accurate(ops.recurrence, layer_of("lstm", hidden=hidden))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"recurrent_dropout": 0.4, "training": True, "seed": 3}, id="dropout"),
        pytest.param({"zoneout": 0.4, "training": True, "seed": 3}, id="zoneout"),
        pytest.param({"zoneout": 0.4}, id="zoneout-eval"),
        pytest.param(
            {"recurrent_dropout": 0.4, "zoneout": 0.4, "training": True, "seed": 2**40 + 1},
            id="both",
        ),
    ],
)
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("cell", CELLS)
def test_masks_and_recomputed_gates(cell, recompute, options):
    layer = layer_of(cell, directions=2)
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    assert_accurate(ops.recurrence, layer, lengths=lengths, recompute=recompute, **options)


@pytest.mark.parametrize("cell", CELLS)
def test_without_bias(cell, monkeypatch):
    layer = layer_of(cell)._replace(b_ih=None, b_hh=None)
    assert_accurate(ops.recurrence, layer)


def test_bfloat16_through_upcast_products(monkeypatch):
    force(monkeypatch)
    assert_accurate(ops.recurrence, layer_of("lstm", torch.bfloat16, directions=2))


@pytest.mark.parametrize("units", PROGRAMS)
def test_padding_changes_nothing(units, monkeypatch):
    force(monkeypatch, units=units)
    layer = layer_of("gru", directions=2)
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    padding = (torch.arange(2, device=DEVICE)[:, None] >= lengths)[..., None]
    other = layer._replace(x=layer.x.detach().masked_fill(padding, 1e4).requires_grad_())
    layer = layer._replace(x=layer.x.detach().masked_fill(padding, -3.0).requires_grad_())
    first, second = (outputs(ops.recurrence, it, lengths=lengths) for it in (layer, other))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert not first["y"][padding.expand_as(first["y"])].any()


def test_unwritten_memory_is_never_read(monkeypatch):
    force(monkeypatch)
    layer = layer_of("gru_reset_before", directions=2)
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    expected = outputs_and_gradients(ops.recurrence, layer, lengths=lengths)
    poison(monkeypatch)
    actual = outputs_and_gradients(ops.recurrence, layer, lengths=lengths)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [{"steps": 0}, {"batch": 0}], ids=["no-steps", "no-rows"])
def test_empty_input(cell, shape):
    layer = layer_of(cell, **shape)
    results = outputs_and_gradients(ops.recurrence, layer)
    assert results["y"].numel() == 0
    if "steps" in shape:
        assert torch.equal(results["h_n"], layer.state[0])
        assert results["dh_0"].any()
    assert not results["dw_hh"].any()
