"""Attention decoders with feedback on a CPU against plain autograd loops, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fusedrnn import AttentionDecoder
from fusedrnn.attention_decoder import DecoderState

from .registry import Case, benchmark, interleave, spread

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
    cell = torch.lstm_cell if lstm else torch.gru_cell
    keys, projected, lengths = state.source
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
    }


@benchmark(spread("ratio", "cell", "attention", "feedback", "shape", "name"))
def attention_decoder() -> Iterator[Case]:
    """Compare one call of the decoder with loops that step through the same model.

    The first loop is what `AttentionDecoder` itself does where it has to go step by step, the other
    one has torch's own cells, the fastest plain loop.
    """
    for shape, cell, feedback, attention in itertools.product(
        SHAPES, ("lstm", "gru"), ("features", "context"), ("general", "additive")
    ):
        key = {"shape": shape, "cell": cell, "attention": attention, "feedback": feedback}
        candidates = _candidates(cell, attention, feedback, SHAPES[shape])
        yield key, partial(interleave, candidates, ROUNDS)
