"""Dropout, against its definition and against torch's."""

import pytest
import torch
from torch import nn

from fusedrnn.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_dropped_or_scaled_and_gradients_with_them(p, dtype):
    torch.manual_seed(0)
    x = torch.rand(200, 500).add_(1).to(dtype).requires_grad_()
    y = Dropout(p)(x)
    y.sum().backward()
    kept = y != 0
    scale = torch.tensor(1 / (1 - p), dtype=dtype)
    assert y.dtype == dtype
    assert torch.equal(y, torch.where(kept, x * scale, 0))
    assert torch.equal(x.grad, kept * scale)
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    by_place = kept.double().mean(0) - (1 - p)
    assert by_place.abs().max() < 6 * (p * (1 - p) / len(x)) ** 0.5


def test_a_seed_fixes_what_is_dropped():
    x, masks = torch.ones(64), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(Dropout(0.5)(x))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (1.0, True), (0.5, False)])
def test_what_torch_does_outside_training_and_at_both_ends(p, training):
    x = torch.randn(3, 4)
    assert torch.equal(Dropout(p).train(training)(x), nn.Dropout(p).train(training)(x))
    assert repr(Dropout(p)) == repr(nn.Dropout(p))


def test_in_place():
    x = torch.ones(100)
    y = Dropout(0.5, inplace=True)(x)
    assert y.data_ptr() == x.data_ptr()
    assert set(x.tolist()) == {0.0, 2.0}
