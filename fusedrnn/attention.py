"""Attention over encoder states, masked by length: dot, general (Luong) and additive (Bahdanau).

Dimensions: B batch, Q queries (decoder steps), S source length, Dq and Dk the sizes of a query
and of a key. Every attention scores each query against each key, normalises over the source and
averages the keys::

    score[b, q, s]   = how well query q fits key s           (the one thing the classes differ in)
    weights[b, q, :] = softmax(score[b, q, :lengths[b]])     (exactly zero past lengths[b])
    context[b, q]    = sum_s weights[b, q, s] keys[b, s]

The part of the score that depends on the keys alone, `project(keys)`, is worth computing once per
sequence; a caller that decodes step by step passes it back as `projected`.

With coverage (Tu et al. 2016; See et al. 2017) the score also sees how much attention each key was
given before: its projection becomes `projected[b, s] + coverage[b, q, s] w`, w a learned vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.attention.sources import CHUNK, AdditiveScore
from kernels.torch_loop import tanh_

__all__ = [
    "ATTENTIONS",
    "AdditiveAttention",
    "Attention",
    "DotAttention",
    "GeneralAttention",
    "build_attention",
]


def valid_positions(lengths: Tensor, size: int) -> Tensor:
    """Mark the positions that lie inside each sequence.

    Args:
        lengths: integer tensor [B], the length of each sequence.
        size: the padded length.

    Returns:
        Boolean tensor [B, size], true where the position is smaller than the length.
    """
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class Attention(nn.Module):
    """Masked attention; subclasses define `project` and `score`.

    Args:
        query_size: Dq, the last dimension of the queries.
        key_size: Dk, the last dimension of the keys.
        projected_size: P, the last dimension of projected keys.
        coverage: whether the score sees the coverage. Its weight starts at zero, so that training
            starts from what the attention is without.

    Raises:
        ValueError: a size is smaller than one.
    """

    def __init__(
        self, query_size: int, key_size: int, projected_size: int, coverage: bool = False
    ) -> None:
        super().__init__()
        sizes = {"query_size": query_size, "key_size": key_size, "hidden_size": projected_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.query_size, self.key_size = query_size, key_size
        self.coverage = nn.Parameter(torch.zeros(projected_size)) if coverage else None

    def project(self, keys: Tensor) -> Tensor:
        """Compute what the score needs of the keys.

        Args:
            keys: [B, S, Dk].

        Returns:
            [B, S, P], P depending on the kind of attention.
        """
        raise NotImplementedError

    def score(
        self,
        query: Tensor,
        projected: Tensor,
        coverage: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Score every query against every projected key.

        Args:
            query: [B, Q, Dq].
            projected: [B, S, P], the result of `project`.
            coverage: [B, Q, S], with coverage only.
            lengths: int64 [B]; what stands at and past it in the result does not matter.

        Returns:
            [B, Q, S], before masking and softmax.
        """
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        lengths: Tensor | None = None,
        projected: Tensor | None = None,
        coverage: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Average the keys, weighted by how well they fit each query.

        Args:
            query: [B, Q, Dq], decoder states.
            keys: [B, S, Dk], encoder outputs. Finite values past `lengths` change nothing.
            lengths: int64 [B] on the device of the keys; positions at or past it get a weight of
                exactly zero. A row of length 0 gets all-zero weights and context. None: no padding.
            projected: `project(keys)` if the caller has it already; None computes it.
            coverage: [B, Q, S], the attention each key was given before each query; an attention
                with coverage needs it, one without takes None.

        Returns:
            context [B, Q, Dk] and weights [B, Q, S]; each row of weights sums to one.

        Raises:
            ValueError: a shape or a device does not fit.
        """
        self._check(query, keys, lengths)
        if (coverage is None) != (self.coverage is None):
            wanted = (
                "without coverage takes none" if self.coverage is None else "needs its coverage"
            )
            raise ValueError(f"coverage: an attention {wanted}")
        projected = self.project(keys) if projected is None else projected
        weights = self.weigh(query, projected, lengths, coverage)
        return weights.to(keys.dtype) @ keys, weights

    def weigh(
        self,
        query: Tensor,
        projected: Tensor,
        lengths: Tensor | None = None,
        coverage: Tensor | None = None,
    ) -> Tensor:
        """The weights [B, Q, S] alone; arguments as in `forward`."""
        score = self.score(query, projected, coverage, lengths)
        if lengths is None:
            return score.softmax(-1)
        padding = ~valid_positions(lengths, projected.shape[1])[:, None]
        masked = score.masked_fill(padding, torch.finfo(score.dtype).min)
        return masked.softmax(-1).masked_fill(padding, 0.0)

    def _check(self, query: Tensor, keys: Tensor, lengths: Tensor | None) -> None:
        for name, tensor, size in (
            ("query", query, self.query_size),
            ("keys", keys, self.key_size),
        ):
            if tensor.dim() != 3 or tensor.shape[-1] != size:
                raise ValueError(f"{name} must have shape [B, *, {size}], got {list(tensor.shape)}")
        if query.shape[0] != keys.shape[0]:
            raise ValueError(
                f"query has {query.shape[0]} rows, keys have {keys.shape[0]}: expected as many"
            )
        if lengths is None:
            return
        if lengths.shape != (keys.shape[0],) or lengths.is_floating_point():
            raise ValueError(
                f"lengths must be an integer tensor of shape [{keys.shape[0]}], "
                f"got {lengths.dtype} {list(lengths.shape)}"
            )
        if lengths.device != keys.device:
            raise ValueError(
                f"lengths are on {lengths.device}, keys on {keys.device}: expected the same device"
            )

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        coverage = "" if self.coverage is None else ", coverage=True"
        return f"query_size={self.query_size}, key_size={self.key_size}{coverage}"


class _ProductAttention(Attention):
    """Scores a query by its product with projected keys of its own size."""

    def score(
        self,
        query: Tensor,
        projected: Tensor,
        coverage: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Compute `q . (p + coverage w)` [B, Q, S]."""
        score = query @ projected.transpose(1, 2)
        if self.coverage is None or coverage is None:
            return score
        return score + coverage * (query @ self.coverage)[..., None]


class DotAttention(_ProductAttention):
    """Luong's dot score, without parameters: `score = q . k`.

    Luong, Pham and Manning, Effective Approaches to Attention-based Neural Machine Translation,
    2015, equation 8.

    Args:
        query_size: Dq.
        key_size: Dk; must equal `query_size`.
        coverage: as in `Attention`.

    Raises:
        ValueError: the two sizes differ.
    """

    def __init__(self, query_size: int, key_size: int, coverage: bool = False) -> None:
        super().__init__(query_size, key_size, key_size, coverage)
        if query_size != key_size:
            raise ValueError(
                f"dot attention needs query_size == key_size, got {query_size} and {key_size}; "
                "'general' attention joins different sizes"
            )

    def project(self, keys: Tensor) -> Tensor:
        """Return the keys as they are."""
        return keys


class GeneralAttention(_ProductAttention):
    """Luong's general score: `score = q^T W k`, W [Dq, Dk].

    Luong, Pham and Manning, Effective Approaches to Attention-based Neural Machine Translation,
    2015, equation 8.

    Args:
        query_size: Dq.
        key_size: Dk.
        coverage: as in `Attention`.
    """

    def __init__(self, query_size: int, key_size: int, coverage: bool = False) -> None:
        super().__init__(query_size, key_size, query_size, coverage)
        self.key = nn.Linear(key_size, query_size, bias=False)

    def project(self, keys: Tensor) -> Tensor:
        """Compute `W k` [B, S, Dq]."""
        return self.key(keys)


class AdditiveAttention(Attention):
    """Bahdanau's score: `score = v^T tanh(W q + U k + b)`.

    Bahdanau, Cho and Bengio, Neural Machine Translation by Jointly Learning to Align and
    Translate, 2014, appendix A.1.2. Luong's "concat" score is the same function. All queries at
    once take B * Q * S * `hidden_size` numbers.

    Args:
        query_size: Dq.
        key_size: Dk.
        hidden_size: size of v; None takes `query_size`.
        coverage: as in `Attention`.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        hidden_size: int | None = None,
        coverage: bool = False,
    ) -> None:
        hidden_size = query_size if hidden_size is None else hidden_size
        super().__init__(query_size, key_size, hidden_size, coverage)
        self.query = nn.Linear(query_size, hidden_size, bias=False)
        self.key = nn.Linear(key_size, hidden_size)
        self.energy = nn.Linear(hidden_size, 1, bias=False)

    def project(self, keys: Tensor) -> Tensor:
        """Compute `U k + b` [B, S, hidden_size]."""
        return self.key(keys)

    def score(
        self,
        query: Tensor,
        projected: Tensor,
        coverage: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Compute `v . tanh(W q + (U k + b) + coverage w)` [B, Q, S]."""
        asked = self.query(query)
        if undifferentiated(asked):
            return self._score_in_parts(asked, projected, coverage, lengths)
        hidden = asked[:, :, None] + projected[:, None]
        if self.coverage is not None and coverage is not None:
            hidden = hidden + coverage[..., None] * self.coverage
        return self.energy(torch.tanh(hidden)).squeeze(-1)

    def _score_in_parts(
        self, asked: Tensor, projected: Tensor, coverage: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        """Scores from `W q` [B, Q, hidden_size], of as many rows at a time as stay in the cache."""
        batch, queries, width = asked.shape
        most = projected.shape[1]
        rows = max(1, CHUNK // max(1, queries * most * width))
        scores = asked.new_zeros(batch, queries, most)
        for first in range(0, batch, rows):
            part = slice(first, first + rows)
            size = slice(most if lengths is None else int(lengths[part].max()))
            additive = AdditiveScore(
                projected[part, None, size], self.energy.weight[0], self.coverage
            )
            seen = None if coverage is None else coverage[part, :, size]
            scores[part, :, size] = additive.score(additive.sigma(asked[part], seen))
        return scores.sub_(self.energy.weight.sum())


def undifferentiated(x: Tensor) -> bool:
    """Whether x is on a CPU and wants no gradient, so that operations in place are possible."""
    return not (x.requires_grad or x.device.type != "cpu" or torch.compiler.is_compiling())


def fast_tanh(x: Tensor) -> Tensor:
    """Tanh; on a CPU, where no gradient is wanted, in place and in a third of torch's time."""
    return tanh_(x) if undifferentiated(x) else torch.tanh(x)


ATTENTIONS: dict[str, type[DotAttention | GeneralAttention | AdditiveAttention]] = {
    "dot": DotAttention,
    "general": GeneralAttention,
    "additive": AdditiveAttention,
}


def build_attention(
    kind: str, query_size: int, key_size: int, coverage: bool = False
) -> Attention | None:
    """Build an attention by name.

    Args:
        kind: "none", "dot", "general" or "additive".
        query_size: Dq.
        key_size: Dk.
        coverage: whether the score sees how much attention each key was given before.

    Returns:
        The module, or None for "none": the decoder sees the source through its initial state only.

    Raises:
        ValueError: the name is unknown, or the sizes do not fit the kind.
    """
    if kind == "none":
        if coverage:
            raise ValueError("coverage needs an attention, got 'none'")
        return None
    if kind not in ATTENTIONS:
        raise ValueError(f"attention must be one of none, {', '.join(ATTENTIONS)}; got {kind!r}")
    return ATTENTIONS[kind](query_size, key_size, coverage=coverage)
