"""The attention decoder's kernels on a card: real sizes, races."""

import pytest
import torch

from kernels.attention import FEEDBACKS, decode, launch, ops
from tests.kernels.attention_cases import (
    KINDS,
    assert_accurate,
    assert_drawn,
    outputs_and_gradients,
    random_case,
    sampled,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {"steps": 12, "batch": 37, "source": 29, "inputs": 48, "keys": 136, "features": 100}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("hidden", [(130,), (96, 70, 130)], ids=["one-layer", "three-layers"])
def test_agrees_with_float64(cell, feedback, kind, dtype, hidden):
    lengths = [1 + i % 29 for i in range(37)]
    case = random_case(
        cell, feedback, kind, coverage=True, lengths=lengths, hidden=hidden, dropout=0.2, **SIZES
    )
    assert_accurate(ops.decode, case.to(dtype, "cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symbols", [40, 5000])
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_scheduled_sampling(cell, feedback, symbols, dtype):
    """A draw is off by the rounding of features and logits at most."""
    case = random_case(cell, feedback, "product", hidden=(96, 130), dropout=0.2, **SIZES)
    case = sampled(case, symbols, dropout=0.2, gain=0.2).to(dtype, "cuda")
    assert_accurate(ops.decode, case)
    tolerance = {torch.float32: 1e-5}.get(dtype, 8 * torch.finfo(dtype).eps)
    assert_drawn(case, ops.decode(*case.arguments()), tolerance)


@torch.no_grad()
def test_draws_follow_the_softmax():
    """Features of zero leave the bias: 88,000 draws of one distribution, within 5 deviations."""
    case = random_case("gru", "none", "product", **SIZES | {"batch": 8000})
    case = sampled(case, 600, probability=1.0).to(torch.float32, "cuda")
    case.leaves["combine"].zero_()
    drawn = ops.decode(*case.arguments()).symbols[1:]
    p, n = case.sampling.bias.double().softmax(-1), drawn.numel()
    found = drawn.flatten().bincount(minlength=600) / n
    assert ((found - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_auto_takes_the_kernels(monkeypatch):
    launched = []
    real = launch.dispatch
    monkeypatch.setattr(launch, "dispatch", lambda *a, **k: (launched.append(a[0]), real(*a, **k)))
    case = random_case("lstm", "features", "product", hidden=(96, 130), **SIZES)
    decode(*sampled(case).to(torch.float32, "cuda").arguments())
    assert len(launched) == 1


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_a_hundred_runs_are_bitwise_equal(feedback):
    case = random_case("lstm", feedback, "additive", coverage=True, hidden=(64, 130), **SIZES)
    case = sampled(case, 1000).to(torch.bfloat16, "cuda")
    first = outputs_and_gradients(ops.decode, case)
    for _ in range(100):
        again = outputs_and_gradients(ops.decode, case)
        for name, value in first.items():
            assert torch.equal(again[name], value), name
