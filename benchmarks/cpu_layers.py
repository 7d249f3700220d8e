"""Layers on a CPU against torch.nn, forward and backward, two bidirectional layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn

from .registry import Case, benchmark, interleave, spread

STEPS, BATCH, SIZE = 64, 32, 256
ROUNDS = 15
SHAPE: dict[str, Any] = {"num_layers": 2, "bidirectional": True}


def _padded(layer: nn.Module, x: Tensor, **arguments: Tensor) -> Callable[[], None]:
    def run() -> None:
        layer(x, **arguments)[0].sum().backward()

    return run


def _packed(layer: nn.Module, x: Tensor, lengths: Tensor) -> Callable[[], None]:
    def run() -> None:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        pad_packed_sequence(layer(packed)[0], total_length=STEPS)[0].sum().backward()

    return run


@benchmark(spread("ratio", "name"))
def cpu_layers() -> Iterator[Case]:
    """Compare each layer with the nearest cell of torch.nn.

    The layers of a baseline take turns. "Alone" are a layer and its baseline with no other: without
    the memory that others have freed, nn.LSTM spends a tenth of its time on page faults.
    """
    torch.manual_seed(0)
    x = torch.randn(STEPS, BATCH, SIZE, requires_grad=True)
    lengths = torch.randint(STEPS // 4, STEPS + 1, (BATCH,))
    sizes = (SIZE, SIZE)
    lstm, gru = nn.LSTM(*sizes, **SHAPE), nn.GRU(*sizes, **SHAPE)
    for candidates in (
        {
            "nn.LSTM": _padded(lstm, x),
            "LSTM": _padded(fusedrnn.LSTM(*sizes, **SHAPE), x),
            "LSTM peephole": _padded(fusedrnn.LSTM(*sizes, **SHAPE, peephole=True), x),
            "LSTM layer_norm": _padded(fusedrnn.LSTM(*sizes, **SHAPE, layer_norm=True), x),
        },
        {
            "nn.LSTM alone": _padded(lstm, x),
            "LSTM peephole alone": _padded(fusedrnn.LSTM(*sizes, **SHAPE, peephole=True), x),
        },
        {
            "nn.GRU": _padded(gru, x),
            "GRU": _padded(fusedrnn.GRU(*sizes, **SHAPE), x),
            "GRU reset_before": _padded(fusedrnn.GRU(*sizes, **SHAPE, reset_after=False), x),
        },
        {
            "nn.LSTM packed": _packed(lstm, x, lengths),
            "LSTM lengths": _padded(fusedrnn.LSTM(*sizes, **SHAPE), x, lengths=lengths),
            "LSTM peephole lengths": _padded(
                fusedrnn.LSTM(*sizes, **SHAPE, peephole=True), x, lengths=lengths
            ),
        },
        {
            "nn.GRU packed": _packed(gru, x, lengths),
            "GRU lengths": _padded(fusedrnn.GRU(*sizes, **SHAPE), x, lengths=lengths),
            "GRU reset_before lengths": _padded(
                fusedrnn.GRU(*sizes, **SHAPE, reset_after=False), x, lengths=lengths
            ),
        },
    ):
        yield {"baseline": next(iter(candidates))}, partial(interleave, candidates, ROUNDS)
