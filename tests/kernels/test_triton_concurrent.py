"""Programs of a group that really wait for each other, in the interpreter."""

import pytest
import torch

from kernels import CELLS, ops
from kernels.persistent import launch, primitives
from tests.kernels.cases import outputs, random_layer
from tests.kernels.concurrent import run_concurrently
from tests.kernels.triton_cases import assert_accurate, force, poison

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the programs run on the GPU")
LENGTHS = torch.tensor([2, 0, 3])


def layer_of(cell, **shape):
    shape = {"steps": 3, "batch": 3, "hidden": 21, "directions": 2} | shape
    return random_layer(cell, dtype=torch.float32, **shape)


@pytest.mark.parametrize("cell", CELLS)
def test_forward_and_backward(cell, monkeypatch):
    force(monkeypatch)
    poison(monkeypatch)
    run_concurrently(monkeypatch)
    assert_accurate(ops.recurrence, layer_of(cell), lengths=LENGTHS)


def test_many_slices_and_tiles_of_different_lengths(monkeypatch):
    used = force(monkeypatch)
    poison(monkeypatch)
    run_concurrently(monkeypatch)
    layer = layer_of("lstm", hidden=45, batch=18, directions=1, steps=4)
    assert_accurate(ops.recurrence, layer, lengths=torch.tensor([4, 1] + 14 * [3] + [2, 0]))
    assert (used[0].slices, used[0].groups) == (3, 2)


def test_streamed(monkeypatch):
    force(monkeypatch, resident=False, chunk=16)
    poison(monkeypatch)
    run_concurrently(monkeypatch)
    assert_accurate(ops.recurrence, layer_of("gru_reset_before"))


def test_bounded_wait_reports_instead_of_hanging(monkeypatch):
    monkeypatch.setattr(launch, "BARRIER", "bounded")
    force(monkeypatch)
    run_concurrently(monkeypatch)
    outputs(ops.recurrence, layer_of("lstm"))
    barrier = primitives.group_barrier
    monkeypatch.setattr(
        primitives, "group_barrier", lambda sync, index, C: barrier(sync, index + 1, C)
    )
    monkeypatch.setattr("kernels.persistent.plan.TRIES", 50)
    with pytest.raises(RuntimeError, match="waited in vain for each other: lstm forward"):
        outputs(ops.recurrence, layer_of("lstm"))


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before", "lstm_layernorm"])
@pytest.mark.parametrize("mutation", ["removed", "one-epoch-early"])
def test_fails_without_the_barrier(cell, mutation, monkeypatch):
    """If this passed with a broken barrier, the tests above would show nothing."""
    force(monkeypatch)
    poison(monkeypatch)
    run_concurrently(monkeypatch, stagger=0.5)
    if mutation == "removed":
        monkeypatch.setattr(launch, "BARRIER", "none")
    else:
        barrier = primitives.group_barrier
        monkeypatch.setattr(
            primitives, "group_barrier", lambda sync, index, C: barrier(sync, index - 1, C)
        )
    y = outputs(ops.recurrence, layer_of(cell, directions=1))["y"]
    assert y.isnan().any()
