"""What the plans promise: they fit the device, cover the layer, and say why."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedrnn
from kernels import CELLS
from kernels.persistent.plan import Device, choose, product_precision

HOPPER = Device("H200", (9, 0), 132, 232448)
DTYPES = {
    "bf16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}


def plan(
    cell="lstm", size=512, batch=32, directions=1, dtype="bf16", backward=False, device=HOPPER
):
    return choose(cell, size, batch, directions, *DTYPES[dtype], backward, device)


@given(
    cell=st.sampled_from(list(CELLS)),
    size=st.integers(1, 4096),
    batch=st.integers(1, 2000),
    directions=st.sampled_from([1, 2]),
    dtype=st.sampled_from(list(DTYPES.values())),
    backward=st.booleans(),
    multiprocessors=st.integers(64, 160),
)
def test_every_plan_fits(cell, size, batch, directions, dtype, backward, multiprocessors):
    device = Device("some GPU", (9, 0), multiprocessors, 166912)
    found = choose(cell, size, batch, directions, *dtype, backward, device)
    assert found.slices * found.units >= size > (found.slices - 1) * found.units
    assert found.groups == directions * -(-batch // found.rows)
    assert found.launches * found.groups_per_launch >= found.groups
    assert found.shared_bytes <= device.shared_memory
    if found.slices > 1:
        assert found.programs <= multiprocessors
    assert found.resident or found.slices > 1
    if found.resident:
        assert 0 < found.weight_bytes < found.shared_bytes
    assert found.microseconds > 0


@pytest.mark.parametrize("size", [1, 31, 64, 128])
def test_small_layers_need_no_communication(size):
    found = plan(size=size)
    assert (found.slices, found.launches) == (1, 1)
    assert "nothing is exchanged" in str(found)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("dtype", "size"), [("bf16", 1024), ("tf32", 768), ("fp32", 768)])
def test_weights_stay_on_chip_up_to_the_promised_size(cell, dtype, size, backward):
    assert plan(cell, size, 16, dtype=dtype, backward=backward).resident


def test_larger_layers_are_streamed():
    found = plan(size=3000)
    assert not found.resident
    assert found.weight_bytes == 0
    assert "read again every step" in str(found)


def test_groups_that_do_not_fit_together_take_turns():
    found = plan(size=1024, batch=512, directions=2)
    assert found.launches > 1
    assert f"in {found.launches} launch(es)" in str(found)


@pytest.mark.parametrize("backward", [False, True])
def test_a_launch_has_no_more_groups_than_a_grid_takes(backward):
    found = plan(size=64, batch=1_500_000, directions=2, backward=backward)
    assert (found.slices, found.groups_per_launch) == (1, 65_535)
    assert found.launches == -(-found.groups // 65_535) > 1


def test_device_that_is_too_small_is_named():
    with pytest.raises(ValueError, match=r"hidden_size 4000 on toy: its 2 multiprocessors"):
        plan(size=4000, device=Device("toy", (8, 0), 2, 40_000))


def test_products_follow_the_setting_of_torch():
    x = torch.zeros(1)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert product_precision(x) == "tf32"
        assert product_precision(x.bfloat16()) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert product_precision(x) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_layer_says_how_it_would_run(batch_first):
    layer = fusedrnn.GRU(3, 200, bidirectional=True, batch_first=batch_first)
    forward, backward = layer.plan(torch.zeros(7, 40, 3))
    assert forward.batch == backward.batch == (7 if batch_first else 40)
    assert (forward.cell, forward.directions, forward.backward) == ("gru", 2, False)
    assert backward.backward
    assert "µs a step by the model (not measured)" in str(forward)
