"""Attention decoders with feedback on a CPU against plain autograd loops, forward and backward."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedrnn import AttentionDecoder
from fusedrnn.attention_decoder import DecoderState

from .registry import Case, Row, benchmark, interleave

ROUNDS = 11
SHAPES = {
    "small": (12, 12, 32, 128),
    "letters": (10, 10, 128, 256),
    "words": (24, 24, 64, 256),
    "long": (60, 60, 32, 512),
}
"""T, S, B, H = E = K: sentences of words, words of letters, long sentences."""


def _cells(decoder: AttentionDecoder, x: Tensor, state: DecoderState) -> Tensor:
    """Features by torch.nn's cell at every step, the weights those of the decoder's one layer."""
    layer, attention = decoder.stack.layers[0], decoder.attention
    assert attention is not None
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    weights = [getattr(layer, name) for name in names]
    lstm = decoder.cell == "lstm"
    cell: Callable[..., Any] = torch.lstm_cell if lstm else torch.gru_cell
    keys, projected, lengths, _ = state.source
    first = state.layers[0]
    now = tuple(s[0] for s in first) if isinstance(first, tuple) else (first[0],)
    fed = None if state.feed is None else state.feed
    features = []
    for x_t in x.unbind(1):
        if fed is None:
            context, _ = attention(now[0][:, None], keys, lengths, projected)
        x_t = torch.cat([x_t, context[:, 0] if fed is None else fed], -1)
        new = cell(x_t, now if lstm else now[0], *weights)
        now = new if lstm else (new,)
        if fed is not None:
            context, _ = attention(now[0][:, None], keys, lengths, projected)
        joined = torch.cat([context[:, 0], now[0]], -1)
        features.append(torch.tanh(decoder.combine(joined)))
        fed = None if fed is None else features[-1]
    return torch.stack(features, 1)


def _products(
    cell: str, attention: str, feedback: str, shape: tuple[int, int, int, int]
) -> Callable[[], None]:
    """All products with weights that the model cannot do without, forwards and backwards, alone."""
    steps, source, batch, size = shape
    gates, rows = {"lstm": 4, "gru": 3}[cell] * size, steps * batch
    fed = feedback == "features"
    loops = [  # inputs, outputs, rows of one product, how many
        (size, gates, rows, 1),  # of x
        (size, gates, batch, steps),  # of what is fed
        (size, gates, batch, steps),  # of h
        (2 * size, size, batch if fed else rows, steps if fed else 1),  # of context and output
        (size, size, source * batch, 1),  # of the keys
    ]
    if attention == "additive":
        loops.append((size, size, batch, steps))  # of the query
    made = []
    for inputs, outputs, n, count in loops:
        x, y = torch.randn(n, inputs), torch.randn(n, outputs)
        whole = torch.randn(n * count, inputs), torch.randn(n * count, outputs)
        made.append((count, x, y, torch.randn(outputs, inputs), *whole))

    def run() -> None:
        for count, x, y, weight, all_x, all_y in made:
            for _ in range(count):
                torch.mm(x, weight.t(), out=y)
            for _ in range(count):
                torch.mm(y, weight, out=x)
            torch.mm(all_y.t(), all_x, out=weight)

    return run


def _candidates(
    cell: str, attention: str, feedback: str, shape: tuple[int, int, int, int]
) -> dict[str, Callable[[], None]]:
    steps, source, batch, size = shape
    torch.manual_seed(0)
    decoder = AttentionDecoder(
        size, [size], size, cell=cell, attention=attention, feedback=feedback
    )
    x = torch.randn(batch, steps, size, requires_grad=True)
    keys = torch.randn(batch, source, size, requires_grad=True)
    lengths = torch.randint(source // 2, source + 1, (batch,))
    zeros = torch.zeros(1, batch, size)
    first = (zeros, zeros) if cell == "lstm" else zeros

    def run(features: Callable[[DecoderState], Tensor]) -> None:
        features(decoder.start(keys, lengths, [first])).sum().backward()

    return {
        "steps of layers": partial(run, lambda state: decoder._steps(x, state, None)[0].features),
        "steps of cells": partial(run, lambda state: _cells(decoder, x, state)),
        "AttentionDecoder": partial(run, lambda state: decoder(x, state)[0].features),
        "products alone": _products(cell, attention, feedback, shape),
    }


def findings(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Say by case how many times faster the decoder is, and how much of it products are."""
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        case = tuple(row[name] for name in ("shape", "cell", "feedback", "attention"))
        cases.setdefault(case, {})[row["name"]] = float(row["ratio"])
    logs: dict[str, list[float]] = {}
    for case, ratio in cases.items():
        ours = ratio["AttentionDecoder"]
        times = {name: ratio[name] / ours for name in ("steps of layers", "steps of cells")}
        for name, value in times.items():
            logs.setdefault(f"{case[0]} {case[1]}: {name}", []).append(math.log(value))
        said = ", ".join(f"{value:.2f} times the speed of {name}" for name, value in times.items())
        share = ratio["products alone"] / ours
        yield f"{' '.join(case)}: {said}; products with weights take {share:.0%} of its time"
    for name, values in logs.items():
        yield f"{name}, geometric mean {math.exp(statistics.fmean(values)):.2f}"


@benchmark(findings)
def attention_decoder() -> Iterator[Case]:
    """Compare one call of the decoder with loops that step through the same model.

    The first loop is what `AttentionDecoder` itself does where it has to go step by step, the other
    one has torch's own cells, the fastest plain loop. The products with weights, alone, are the
    least that any of them takes.
    """
    for shape, cell, feedback, attention in itertools.product(
        SHAPES, ("lstm", "gru"), ("features", "context"), ("general", "additive")
    ):
        key: Row = {"shape": shape, "cell": cell, "attention": attention, "feedback": feedback}
        candidates = _candidates(cell, attention, feedback, SHAPES[shape])
        yield key, partial(interleave, candidates, ROUNDS)
