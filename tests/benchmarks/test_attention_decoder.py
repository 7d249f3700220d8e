"""The comparison of attention decoders: its loops are one model; findings say the speed."""

import itertools

import pytest
import torch

from benchmarks import attention_decoder as bench
from fusedrnn import AttentionDecoder


@pytest.mark.parametrize(
    ("cell", "feedback", "attention"),
    list(itertools.product(("lstm", "gru"), ("features", "context"), ("general", "additive"))),
)
def test_the_loop_of_cells_is_the_same_model(cell, feedback, attention):
    torch.manual_seed(0)
    decoder = AttentionDecoder(3, [4], 5, 4, cell=cell, attention=attention, feedback=feedback)
    x, keys, zeros = torch.randn(2, 6, 3), torch.randn(2, 7, 5), torch.zeros(1, 2, 4)
    first = [(zeros, zeros) if cell == "lstm" else zeros]
    state = decoder.start(keys, torch.tensor([7, 3]), first)
    torch.testing.assert_close(bench._cells(decoder, x, state), decoder(x, state)[0].features)


def test_products_are_those_of_the_model():
    """Three times the multiplications of the forward pass, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    steps, source, batch, size = shape = (3, 5, 2, 4)
    with FlopCounterMode(display=False) as counter:
        bench._products("gru", "additive", "features", shape)()
    x, fed, h = 3 * (3 * size * size * batch * steps,)
    combine, query = 2 * size * size * batch * steps, size * size * batch * steps
    keys = size * size * batch * source
    assert counter.get_total_flops() == 3 * 2 * (x + fed + h + combine + query + keys)


def test_findings_say_how_many_times_faster():
    case = {"shape": "small", "cell": "gru", "feedback": "context", "attention": "general"}
    ratios = {"steps of layers": 1.0, "steps of cells": 0.8}
    ratios |= {"AttentionDecoder": 0.5, "products alone": 0.25}
    rows = [case | {"name": name, "ratio": str(ratio)} for name, ratio in ratios.items()]
    assert list(bench.findings(rows)) == [
        "small gru context general: 2.00 times the speed of steps of layers, 1.60 times the speed "
        "of steps of cells; products with weights take 50% of its time",
        "small gru: steps of layers, geometric mean 2.00",
        "small gru: steps of cells, geometric mean 1.60",
    ]
