"""One step at a time at batch 1: `layer.stream()` against torch.nn's cells, on a CPU and a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

import fusedrnn

from .registry import Case, benchmark, interleave, spread

SIZES = (128, 256, 512, 1024)
STEPS, ROUNDS = 20, 41


def _timed(step: Callable[[], object], device: str) -> Callable[[], None]:
    """Some steps; on a GPU until it has done them."""

    def run() -> None:
        for _ in range(STEPS):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _cell(cell: nn.Module, size: int, device: str) -> Callable[[], None]:
    cell, state, x = cell.to(device), None, torch.randn(1, size, device=device)

    @torch.no_grad()
    def step() -> None:
        nonlocal state
        state = cell(x, state)

    return _timed(step, device)


def _stream(layer: fusedrnn.LSTM | fusedrnn.GRU, size: int, device: str) -> Callable[[], None]:
    stream, x = layer.to(device).stream(), torch.randn(1, size, device=device)
    return _timed(partial(stream, x), device)


def _cases(device: str) -> Iterator[Case]:
    torch.manual_seed(0)
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    for size in SIZES:
        both, lstm, gru = (size, size), fusedrnn.LSTM, fusedrnn.GRU
        for baseline, layers in (
            (
                nn.LSTMCell(*both),
                {
                    "LSTM": lstm(*both),
                    "LSTM peephole": lstm(*both, peephole=True),
                    "LSTM layer_norm": lstm(*both, layer_norm=True),
                },
            ),
            (
                nn.GRUCell(*both),
                {"GRU": gru(*both), "GRU reset_before": gru(*both, reset_after=False)},
            ),
        ):
            name = f"nn.{type(baseline).__name__}"
            candidates = {name: _cell(baseline, size, device)}
            candidates |= {n: _stream(layer, size, device) for n, layer in layers.items()}
            key = {"hidden_size": size, "baseline": name, "clock": clock.__name__}
            yield key, partial(interleave, candidates, ROUNDS, clock)


@benchmark(spread("ratio", "name", "hidden_size"))
def streaming() -> Iterator[Case]:
    """Compare 20 steps of each layer with those of the nearest cell of torch.nn.

    With one thread its own time is measured, with more the time that passes.
    """
    yield from _cases("cpu")


@benchmark(spread("ratio", "name", "hidden_size"), gpu=True)
def streaming_gpu() -> Iterator[Case]:
    """Compare them on a GPU, where a stream replays a CUDA graph."""
    yield from _cases("cuda")
