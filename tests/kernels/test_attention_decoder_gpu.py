"""The attention decoder's kernels on a card: real sizes, races."""

import pytest
import torch

from kernels.attention import FEEDBACKS, ops
from tests.kernels.attention_cases import (
    KINDS,
    assert_accurate,
    outputs_and_gradients,
    random_case,
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


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_a_hundred_runs_are_bitwise_equal(feedback):
    case = random_case("lstm", feedback, "additive", coverage=True, hidden=(64, 130), **SIZES)
    case = case.to(torch.bfloat16, "cuda")
    first = outputs_and_gradients(ops.decode, case)
    for _ in range(100):
        again = outputs_and_gradients(ops.decode, case)
        for name, value in first.items():
            assert torch.equal(again[name], value), name
