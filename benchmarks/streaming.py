"""One step at a time on a CPU, batch 1: `layer.stream()` against torch.nn's cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

import fusedrnn

from .registry import Case, benchmark, interleave, spread

SIZES = (128, 256, 512, 1024)
STEPS, ROUNDS = 20, 41


def _cell(cell: nn.Module, size: int) -> Callable[[], None]:
    state = None
    x = torch.randn(1, size)

    @torch.no_grad()
    def run() -> None:
        nonlocal state
        for _ in range(STEPS):
            state = cell(x, state)

    return run


def _stream(layer: fusedrnn.LSTM | fusedrnn.GRU, size: int) -> Callable[[], None]:
    stream, x = layer.stream(), torch.randn(1, size)

    def run() -> None:
        for _ in range(STEPS):
            stream(x)

    return run


@benchmark(spread("ratio", "name", "hidden_size"))
def streaming() -> Iterator[Case]:
    """Compare 20 steps of each layer with those of the nearest cell of torch.nn."""
    torch.manual_seed(0)
    for size in SIZES:
        both = (size, size)
        for candidates in (
            {
                "nn.LSTMCell": _cell(nn.LSTMCell(*both), size),
                "LSTM": _stream(fusedrnn.LSTM(*both), size),
                "LSTM peephole": _stream(fusedrnn.LSTM(*both, peephole=True), size),
                "LSTM layer_norm": _stream(fusedrnn.LSTM(*both, layer_norm=True), size),
            },
            {
                "nn.GRUCell": _cell(nn.GRUCell(*both), size),
                "GRU": _stream(fusedrnn.GRU(*both), size),
                "GRU reset_before": _stream(fusedrnn.GRU(*both, reset_after=False), size),
            },
        ):
            key = {"hidden_size": size, "baseline": next(iter(candidates))}
            yield key, partial(interleave, candidates, ROUNDS)
