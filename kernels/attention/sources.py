"""What is attended to: padding, the additive score, and the gradients that need no order in time.

Shared by the backends that write the backward out. Names of dimensions are in spec.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_loop import product_grad

CHUNK = 1 << 18
"""Numbers of one kind of factor that are computed at once: they should still be in the cache when a
step uses them."""


def chunks(steps: int, numbers: int) -> Sequence[tuple[int, int]]:
    """Steps [first, last) whose factors are computed together, the last ones first.

    Args:
        steps: of the whole loop.
        numbers: of the largest factor of one step.
    """
    size = max(1, CHUNK // max(1, numbers))
    return [(max(0, last - size), last) for last in range(steps, 0, -size)]


def hide_padding(
    keys: Tensor, projected: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and projected keys with zeros at padding, whatever stood there, and where it is [B, S].

    Without lengths they are returned as they are, with None.
    """
    if lengths is None:
        return keys, projected, None
    padding = torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None]
    zero = keys.new_zeros(())
    keys, projected = (torch.where(padding[..., None], zero, v) for v in (keys, projected))
    return keys, projected, padding


class AdditiveScore:
    """The score v . tanh(u) with u = W_q q + p_s + coverage_s w_c, and its gradients.

    It is computed as 2 v . sigmoid(2u), which is v . tanh(u) + sum(v): a softmax over s does not
    see the difference, and tanh costs several sigmoids. tanh'(u) is 4 (sigma - sigma^2) at 2u.

    Args:
        projected: p [B, S, A].
        energy: v [A].
        coverage: w_c [A] or None.
    """

    def __init__(self, projected: Tensor, energy: Tensor, coverage: Tensor | None) -> None:
        self.projected, self.coverage = projected, coverage
        self.twice, self.slope = 2 * energy, 4 * energy

    def first(self, count: int) -> AdditiveScore:
        """That of the first rows."""
        found = copy.copy(self)
        found.projected = self.projected[:count]
        return found

    def sigma(self, query: Tensor, seen: Tensor | None, out: Tensor | None = None) -> Tensor:
        """sigmoid(2u) [..., B, S, A], from W_q q [..., B, A] and the coverage [..., B, S]."""
        hidden = torch.add(2 * query[..., None, :], self.projected, alpha=2, out=out)
        if self.coverage is not None:
            assert seen is not None
            hidden.addcmul_(seen[..., None], self.coverage, value=2)
        return hidden.sigmoid_()

    def score(self, sigma: Tensor) -> Tensor:
        """[..., B, S]."""
        return sigma @ self.twice

    def query_grad(self, score: Tensor, slope: Tensor, out: Tensor) -> Tensor:
        """Gradient of W_q q [B, A] at a step, from that of the score and sigma - sigma^2."""
        return torch.mul(torch.bmm(score[:, None], slope).squeeze(1), self.slope, out=out)

    def coverage_grad(self, score: Tensor, slope: Tensor) -> Tensor:
        """Gradient of the coverage [B, S], likewise."""
        assert self.coverage is not None
        return score * (slope @ (self.slope * self.coverage))


class AdditiveGrads:
    """Gradients of projected keys, v and w_c, summed up chunk by chunk."""

    def __init__(self, additive: AdditiveScore) -> None:
        self.additive = additive
        self.projected = torch.zeros_like(additive.projected)
        self.energy = torch.zeros_like(additive.twice)
        self.coverage = None if additive.coverage is None else self.energy.clone()

    def add(self, sigma: Tensor, slope: Tensor, score: Tensor, seen: Tensor | None) -> None:
        """Add n steps of the first R rows.

        Args:
            sigma: [n, R, S, A].
            slope: sigma - sigma^2.
            score: gradient of the scores [n, R, S], zero where a row has no such step.
            seen: the coverage [n, R, S], with coverage.
        """
        self.energy.addmv_(sigma.flatten(0, 2).t(), score.flatten())
        for at, its in zip(slope, score, strict=True):
            self.projected[: at.shape[0]].addcmul_(at, its[..., None])
        if self.coverage is not None and seen is not None:
            self.coverage.addmv_(slope.flatten(0, 2).t(), (score * seen).flatten())

    def total(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of projected keys, v and w_c; once, at the end.

        The scores' gradients add up to zero over s, so that 2 sigma stands for tanh.
        """
        slope = self.additive.slope
        coverage = None if self.coverage is None else self.coverage * slope
        return self.projected.mul_(slope), self.energy * 2, coverage


class Asked(NamedTuple):
    """Who asked, and what came back, at all steps.

    Attributes:
        queries: the states that asked [T, B, Q].
        weights: [T, B, S].
        coverage: attention given before each step [T, B, S], or None.
    """

    queries: Tensor
    weights: Tensor
    coverage: Tensor | None


class SourceGrads(NamedTuple):
    """Gradients of what is attended to and of its weights, named as in `DecoderWeights`."""

    keys: Tensor
    projected: Tensor
    query: Tensor | None
    energy: Tensor | None
    coverage: Tensor | None


def source_grads(
    asked: Asked, context: Tensor, score: Tensor, query: Tensor, additive: AdditiveGrads | None
) -> SourceGrads:
    """Products over all steps.

    Args:
        asked: at each step.
        context: gradient of the contexts [T, B, K].
        score: of the scores [T, B, S].
        query: of W_q q [T, B, A], of an additive score.
        additive: of what an additive score alone has; None for a product.
    """
    keys = torch.bmm(asked.weights.permute(1, 2, 0), context.transpose(0, 1))
    if additive is not None:
        projected, energy, weight = additive.total()
        return SourceGrads(keys, projected, product_grad(query, asked.queries), energy, weight)
    projected, coverage = torch.bmm(score.permute(1, 2, 0), asked.queries.transpose(0, 1)), None
    if asked.coverage is not None:
        seen = (score * asked.coverage).sum(-1)
        coverage = asked.queries.flatten(0, 1).t() @ seen.flatten().to(asked.queries.dtype)
    return SourceGrads(keys, projected, None, None, coverage)
