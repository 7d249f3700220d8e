"""What an attention decoder computes from, in one place for all backends.

Dimension names: T target steps, B batch rows, S source length, E input size, H hidden size (H_l of
layer l, Q of the top one), K size of an encoder state ("key"), A size of a projected key, F size of
the attentional features, G gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FEEDBACKS = ("none", "features", "context")
"""What the lowest layer is fed beside its input: nothing, the attentional features of the step
before (Luong et al. 2015, input feeding), or the context that the state before this step attends
to (Bahdanau et al. 2014)."""

CELLS = ("lstm", "gru")
State = tuple[Tensor, ...]
"""h [B, H] and, for the LSTM, c [B, H]."""


class LayerWeights(NamedTuple):
    """One recurrent layer, in torch's gate order and shapes.

    Attributes:
        w_ih: [G*H, N]; N is E, or E + F or E + K with feedback, what is fed last; H_{l-1} above the
            lowest layer.
        w_hh: [G*H, H].
        b_ih: [G*H] or None.
        b_hh: [G*H] or None.
    """

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None


class DecoderWeights(NamedTuple):
    """All weights of a decoder but those that project the keys.

    Attributes:
        layers: from the lowest to the top one.
        combine: [F, K + Q], of the attentional features.
        query: [A, Q] of the additive score; None where A = Q and the score is a product.
        energy: [A], v of the additive score, else None.
        coverage: [A], or None for an attention without coverage.
    """

    layers: Sequence[LayerWeights]
    combine: Tensor
    query: Tensor | None = None
    energy: Tensor | None = None
    coverage: Tensor | None = None


class Masks(NamedTuple):
    """Dropout, drawn beforehand: each mask holds 0 or 1 / (1 - p).

    Attributes:
        between: [T, B, H_l] of each layer's output on its way up, for all layers but the top one;
            empty without dropout.
        features: [T, B, F] of the attentional features, fed back and returned, or None.
    """

    between: Sequence[Tensor] = ()
    features: Tensor | None = None


class Sampling(NamedTuple):
    """Scheduled sampling: some inputs are the decoder's own predictions (Bengio et al. 2015).

    A symbol is drawn by inverse transform: of the sums of the probabilities in order of the
    symbols, the first above the given uniform number says which. So all backends draw the same.

    Attributes:
        symbols: int64 [T, B], what to feed where nothing is sampled.
        replaced: bool [T, B], where a sample takes its place; the first step has none.
        uniform: [T, B] in [0, 1), what decides a draw;
        embedding: [V, E], the inputs of the symbols; differentiated at what was fed.
        weight: [V, F], from features to logits; not differentiated, nor is the draw.
        bias: [V] of the logits, or None.
        mask: dropout of the inputs [T, B, E], or None.
        padding_idx: the symbol whose embedding has no gradient, as in torch.nn.Embedding, or None.
    """

    symbols: Tensor
    replaced: Tensor
    uniform: Tensor
    embedding: Tensor
    weight: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    padding_idx: int | None = None

    @torch.no_grad()
    def draw(self, t: int, features: Tensor) -> Tensor:
        """The symbols [B] to feed at step t.

        Args:
            t: the step.
            features: [B, F] of the step before; unused at the first.
        """
        symbols = self.symbols[t]
        rows = self.replaced[t].nonzero().squeeze(-1)
        if t == 0 or len(rows) == 0:
            return symbols
        logits = F.linear(features[rows], self.weight, self.bias)
        wide = torch.promote_types(logits.dtype, torch.float32)
        sums = logits.softmax(-1, dtype=wide).cumsum(-1)
        wanted = self.uniform[t, rows, None].to(wide) * sums[:, -1:]
        drawn = torch.searchsorted(sums, wanted, right=True).squeeze(-1)
        return symbols.index_put((rows,), drawn.clamp_(max=len(self.weight) - 1))

    def inputs(self, symbols: Tensor, t: int | slice = slice(None)) -> Tensor:
        """The inputs [B, E] of the symbols [B] at step t, or of all steps with one more axis."""
        embedded = F.embedding(symbols, self.embedding, self.padding_idx)
        return embedded if self.mask is None else embedded * self.mask[t]


@dataclass(frozen=True)
class Problem:
    """Which decoder.

    Attributes:
        cell: one of `CELLS`.
        feedback: one of `FEEDBACKS`.
    """

    cell: str
    feedback: str


class Decoded(NamedTuple):
    """What a decoder returns; every floating point tensor is differentiable.

    Attributes:
        features: [T, B, F], tanh(W [context; output]) after dropout: what predicts.
        outputs: [T, B, Q], of the top layer.
        context: [T, B, K].
        weights: [T, B, S], of the attention; zero at padding.
        states: of each layer after the last step.
        symbols: int64 [T, B], what was fed under scheduled sampling, else None.
    """

    features: Tensor
    outputs: Tensor
    context: Tensor
    weights: Tensor
    states: list[State]
    symbols: Tensor | None = None
