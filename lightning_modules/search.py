"""Greedy search, sampling and beam search over any model that predicts the next symbol.

Dimensions: B rows to decode, W beam width, N hypotheses returned per row, K symbols, L output
length. A hypothesis is the symbols after the begin symbol, the end symbol included where it was
reached. With log-probability s and n symbols its score is `s / penalty(n)`,
`penalty(n) = ((5 + n) / 6)^alpha` (Wu et al., Google's Neural Machine Translation System, 2016,
equation 14); `alpha` 0 leaves s itself. Rows do not see each other: which rows share a batch
changes nothing but rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

__all__ = [
    "Constraints",
    "Hypotheses",
    "SearchOptions",
    "SearchState",
    "beam_search",
    "ensemble",
    "greedy_search",
    "sample",
]


class SearchState(Protocol):
    """What a model carries from one symbol to the next, one entry per row."""

    def select(self, rows: Tensor, sources: Tensor | None = None) -> Self:
        """Keep, repeat or reorder rows.

        Args:
            rows: int64 [N], indices into the rows.
            sources: int64 [M], ascending, which of the rows that decoding began with stay. Row i
                belongs to source i // (N / M), so that what the hypotheses of one source have in
                common needs no copy for each. None: each row becomes a source of its own.
        """


State = TypeVar("State", bound=SearchState)
Step = Callable[[Tensor, State], tuple[Tensor, State]]
"""`step(symbols [N], state) -> (log-probabilities [N, K] of the next symbol, new state)`."""


class Hypotheses(NamedTuple):
    """Search results, the best first.

    Attributes:
        symbols: int64 [B, N, L], 0 past the length.
        lengths: int64 [B, N], the end symbol counted; 0 where a row has fewer than N hypotheses.
        scores: float [B, N], length-normalised log-probabilities; -inf where there is none.
    """

    symbols: Tensor
    lengths: Tensor
    scores: Tensor

    def sequences(self, end: int) -> list[list[list[int]]]:
        """List the hypotheses of each row without the end symbol.

        Args:
            end: number of the end symbol.
        """
        symbols, lengths = self.symbols.tolist(), self.lengths.tolist()
        return [
            [
                [symbol for symbol in hypothesis[:length] if symbol != end]
                for hypothesis, length in zip(row, row_lengths, strict=True)
                if length > 0
            ]
            for row, row_lengths in zip(symbols, lengths, strict=True)
        ]


@dataclass(frozen=True)
class Constraints:
    """What a hypothesis must not do. Its score stays that of the model.

    Where nothing would be left to choose, the row's next symbol is free of them.

    Attributes:
        min_length: fewest symbols before the end symbol, where the row's limit allows as many.
        no_repeat_ngram_size: n, for no n symbols in a row to come twice; 0 for no such rule.

    Raises:
        ValueError: an attribute is negative.
    """

    min_length: int = 0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")

    def apply(self, log_probs: Tensor, written: Tensor, end: int) -> Tensor:
        """Set to -inf what must not come next.

        Args:
            log_probs: [N, K] of the next symbol.
            written: int64 [N, t], the symbols so far.
            end: number of the end symbol.

        Returns:
            [N, K].
        """
        banned = torch.zeros_like(log_probs, dtype=torch.bool)
        if written.shape[1] < self.min_length:
            banned[:, end] = True
        size = self.no_repeat_ngram_size
        if 0 < size <= written.shape[1]:
            ngrams = written.unfold(1, size, 1)
            recent = written[:, written.shape[1] - size + 1 :]
            repeats = (ngrams[..., :-1] == recent[:, None]).all(-1)
            row, place = repeats.nonzero(as_tuple=True)
            banned[row, ngrams[row, place, -1]] = True
        allowed = log_probs.masked_fill(banned, -torch.inf)
        stuck = allowed.isneginf().all(-1, keepdim=True)
        return torch.where(stuck, log_probs, allowed)

    @property
    def empty(self) -> bool:
        """Whether they forbid nothing."""
        return self.min_length == 0 and self.no_repeat_ngram_size == 0


FREE = Constraints()


class _Joint:
    """The states of several models."""

    def __init__(self, states: Sequence[Any]) -> None:
        self.states = states

    def select(self, rows: Tensor, sources: Tensor | None = None) -> _Joint:
        return _Joint([state.select(rows, sources) for state in self.states])


def ensemble(steps: Sequence[Step], states: Sequence[Any]) -> tuple[Step, Any]:
    """Make one model of several, by the mean of their probabilities.

    Args:
        steps: of the models, over the same symbols.
        states: of each, before the first symbol.

    Returns:
        A step and its state; of a single model, its own.
    """
    if len(steps) == 1:
        return steps[0], states[0]

    def step(symbols: Tensor, state: _Joint) -> tuple[Tensor, _Joint]:
        results = [one(symbols, its) for one, its in zip(steps, state.states, strict=True)]
        log_probs = torch.stack([log_probs for log_probs, _ in results])
        mean = log_probs.logsumexp(0) - math.log(len(steps))
        return mean.clamp(max=0.0), _Joint([its for _, its in results])

    return step, _Joint(states)


def normalise(totals: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """Make log-probabilities of hypotheses of different lengths comparable.

    Args:
        totals: log-probabilities, any shape.
        lengths: number of symbols, of a shape that broadcasts to that of `totals`.
        alpha: 0 changes nothing; the larger, the better longer hypotheses fare.

    Returns:
        `totals / ((5 + lengths) / 6)^alpha`.
    """
    return totals / ((5.0 + lengths.to(totals.dtype)) / 6.0) ** alpha


def greedy_search(
    step: Step[State],
    state: State,
    limits: Tensor,
    begin: int,
    end: int,
    alpha: float = 0.0,
    constraints: Constraints = FREE,
) -> Hypotheses:
    """Take the most probable symbol at each step, until the end symbol or the limit.

    Rows that are done leave the batch.

    Args:
        step: the model.
        state: of the B rows before the first symbol.
        limits: int64 [B], the most symbols a row may have, the end symbol counted, at least 1.
        begin: number of the begin symbol.
        end: number of the end symbol.
        alpha: exponent of the length penalty, at least 0; it changes the scores only.
        constraints: what a hypothesis must not do.

    Returns:
        One hypothesis per row.

    Raises:
        ValueError: a limit or alpha is out of range.
    """
    _check(limits, alpha)

    def choose(log_probs: Tensor, rows: Tensor, t: int) -> Tensor:
        return log_probs.argmax(-1)

    symbols, lengths, totals = _walk(step, state, limits, begin, end, constraints, choose)
    scores = normalise(totals, lengths, alpha)
    return Hypotheses(symbols[:, None], lengths[:, None], scores[:, None])


def sample(
    step: Step[State],
    state: State,
    limits: Tensor,
    begin: int,
    end: int,
    draws: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    alpha: float = 0.0,
    constraints: Constraints = FREE,
) -> Hypotheses:
    """Draw each symbol from the model's distribution, until the end symbol or the limit.

    The distribution is sharpened by `temperature` first, cut to the `top_k` most probable symbols
    (Fan et al. 2018) next, and to the fewest of those that together have the probability `top_p`
    last (nucleus sampling, Holtzman et al. 2020). The random numbers are given, one for each symbol
    of each hypothesis, so that a row's results do not depend on the rows beside it.

    Args:
        step: the model.
        state: of the B rows before the first symbol.
        limits: int64 [B], the most symbols a row may have, the end symbol counted, at least 1.
        begin: number of the begin symbol.
        end: number of the end symbol.
        draws: float [B, N, L], uniform in [0, 1), for N hypotheses per row; L at least the largest
            limit.
        temperature: log-probabilities are divided by it; above 0.
        top_k: most symbols to choose among; 0 for all.
        top_p: above 0, at most 1.
        alpha: exponent of the length penalty, at least 0; it changes scores and order only.
        constraints: what a hypothesis must not do.

    Returns:
        N hypotheses per row, drawn independently of each other; some may be equal. Scores are
        those of the model itself, neither sharpened nor cut.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(limits, alpha)
    _check_sampling(temperature, top_k, top_p)
    size, count, longest = draws.shape
    if size != len(limits) or longest < int(limits.max()):
        raise ValueError(
            f"draws: expected [{len(limits)}, N, at least {int(limits.max())}], "
            f"got {list(draws.shape)}"
        )
    numbers = draws.flatten(0, 1)

    def choose(log_probs: Tensor, rows: Tensor, t: int) -> Tensor:
        shares = (log_probs.double() / temperature).softmax(-1)
        shares, order = shares.topk(top_k if 0 < top_k < shares.shape[-1] else shares.shape[-1])
        shares = shares / shares.sum(-1, keepdim=True)
        before = shares.cumsum(-1) - shares
        kept = torch.where(before < top_p, shares, 0.0).cumsum(-1)
        places = (kept <= numbers[rows, t, None].double() * kept[:, -1:]).sum(-1)
        return order.take_along_dim(places[:, None], -1).squeeze(-1)

    if count > 1:
        state = state.select(torch.arange(size, device=limits.device).repeat_interleave(count))
    many = limits.repeat_interleave(count)
    symbols, lengths, totals = _walk(step, state, many, begin, end, constraints, choose)
    scores, order = normalise(totals, lengths, alpha).view(size, count).sort(-1, descending=True)
    symbols = symbols.view(size, count, -1).take_along_dim(order[..., None], 1)
    return Hypotheses(symbols, lengths.view(size, count).take_along_dim(order, 1), scores)


@torch.no_grad()
def _walk(
    step: Step[State],
    state: State,
    limits: Tensor,
    begin: int,
    end: int,
    constraints: Constraints,
    choose: Callable[[Tensor, Tensor, int], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow one hypothesis per row; `choose(log_probs, rows, t)` takes its next symbols.

    Returns:
        Symbols [B, L], lengths [B] and log-probabilities [B].
    """
    size, longest = len(limits), int(limits.max())
    symbols = torch.zeros(size, longest, dtype=torch.int64, device=limits.device)
    lengths = torch.zeros_like(limits)
    rows = torch.arange(size, device=limits.device)
    log_probs, state = step(torch.full_like(rows, begin), state)
    totals = log_probs.new_zeros(size)
    for t in range(longest):
        allowed = log_probs
        if not constraints.empty:
            allowed = constraints.apply(log_probs, symbols[rows, :t], end)
        previous = choose(allowed, rows, t)
        totals[rows] += log_probs.take_along_dim(previous[:, None], -1).squeeze(-1)
        symbols[rows, t] = previous
        lengths[rows] = t + 1
        going = ((previous != end) & (limits[rows] > t + 1)).nonzero().squeeze(-1)
        if len(going) == 0:
            break
        if len(going) < len(rows):
            rows, previous, state = rows[going], previous[going], state.select(going, going)
        log_probs, state = step(previous, state)
    return symbols[:, : int(lengths.max())], lengths, totals


class _Beam(NamedTuple):
    """Live and finished hypotheses of the R rows still searched."""

    rows: Tensor  # [R], their places in the batch
    totals: Tensor  # [R, W] log-probabilities of the live hypotheses, -inf for an empty place
    symbols: Tensor  # [R, W, L] live hypotheses
    done_scores: Tensor  # [R, N] normalised scores of the best finished ones, -inf for none
    done_symbols: Tensor  # [R, N, L]
    done_lengths: Tensor  # [R, N]

    def select(self, rows: Tensor) -> _Beam:
        return _Beam(*(t[rows] for t in self))


@torch.no_grad()
def beam_search(
    step: Step[State],
    state: State,
    limits: Tensor,
    begin: int,
    end: int,
    beam_size: int,
    n_best: int = 1,
    alpha: float = 0.0,
    early_stop: bool = True,
    constraints: Constraints = FREE,
) -> Hypotheses:
    """Keep the `beam_size` most probable hypotheses at each step.

    At each step all one-symbol extensions of a row's live hypotheses compete, and the best
    `beam_size` are kept. Those that end, by the end symbol or at the row's limit, are finished
    and compete by score; the others live on. With `beam_size` 1 this is greedy search.

    A row stops when nothing that is still alive can enter its `n_best`. Let s be the
    log-probability of a live hypothesis, M the row's limit, and let some extension of it finish
    with log-probability s' after n <= M symbols. Each further symbol adds a log-probability <= 0,
    so s' <= s <= 0; the penalty is positive and, for alpha >= 0, does not fall with n. Hence::

        s' / penalty(n)  <=  s / penalty(n)  <=  s / penalty(M)

    the first step because s' <= s, the second because s <= 0 is divided by something at least as
    large. Once the `n_best` finished hypotheses all score at least max(s) / penalty(M), going on
    could not change the result: stopping is exact, not a heuristic. Constraints leave fewer
    extensions and none with another log-probability, so the bound holds under them too.

    Args:
        step: the model; its log-probabilities must not exceed 0.
        state: of the B rows before the first symbol.
        limits: int64 [B], the most symbols a row may have, the end symbol counted, at least 1.
        begin: number of the begin symbol.
        end: number of the end symbol.
        beam_size: W, at least 1.
        n_best: N, hypotheses to return per row, at most `beam_size`.
        alpha: exponent of the length penalty, at least 0.
        early_stop: False searches every row to its limit, with the same result.
        constraints: what a hypothesis must not do.

    Returns:
        The `n_best` finished hypotheses of each row.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(limits, alpha)
    if not 1 <= n_best <= beam_size:
        raise ValueError(
            f"expected 1 <= n_best <= beam_size, got n_best={n_best}, beam_size={beam_size}"
        )
    size, longest, device = len(limits), int(limits.max()), limits.device
    # The first symbol is chosen from a single hypothesis per row; the beam opens after it.
    log_probs, state = step(torch.full_like(limits, begin), state)
    beam = _Beam(
        torch.arange(size, device=device),
        log_probs.new_zeros(size, 1),
        torch.zeros(size, 1, longest, dtype=torch.int64, device=device),
        log_probs.new_full((size, n_best), -torch.inf),
        torch.zeros(size, n_best, longest, dtype=torch.int64, device=device),
        torch.zeros(size, n_best, dtype=torch.int64, device=device),
    )
    results: list[_Beam] = []
    for t in range(longest):
        if not constraints.empty:
            log_probs = constraints.apply(log_probs, beam.symbols.flatten(0, 1)[:, :t], end)
        beam, origins = _extend(beam, log_probs, t, beam_size)
        ended = (beam.symbols[:, :, t] == end) | (limits[beam.rows, None] == t + 1)
        if ended.any():
            beam = _finish(beam, ended, t, alpha)
        going = beam.totals.isfinite().any(-1)
        if early_stop:
            bound = normalise(beam.totals.amax(-1), limits[beam.rows], alpha)
            going &= beam.done_scores[:, -1] < bound
        kept = going.nonzero().squeeze(-1)
        if len(kept) < len(beam.rows):
            results.append(beam.select((~going).nonzero().squeeze(-1)))
            beam, origins = beam.select(kept), origins[kept]
        if len(kept) == 0:
            break
        previous = beam.symbols[:, :, t].flatten()
        log_probs, state = step(previous, state.select(origins.flatten(), kept))
    return _gather(results)


def _extend(beam: _Beam, log_probs: Tensor, t: int, width: int) -> tuple[_Beam, Tensor]:
    """Replace the live hypotheses by their best extensions.

    Returns:
        The beam, and int64 [R, W], for each extension the row of the state it came from.
    """
    rows, live = beam.totals.shape
    size = log_probs.shape[-1]
    candidates = (beam.totals[..., None] + log_probs.view(rows, live, size)).flatten(1)
    totals, places = candidates.topk(min(width, live * size))
    parents = places // size
    symbols = beam.symbols.take_along_dim(parents[..., None], 1)
    symbols[:, :, t] = places % size
    origins = torch.arange(rows, device=parents.device)[:, None] * live + parents
    return beam._replace(totals=totals, symbols=symbols), origins


def _finish(beam: _Beam, ended: Tensor, t: int, alpha: float) -> _Beam:
    """Move hypotheses that ended at step t, bool [R, W], from the live to the finished ones."""
    lengths = torch.full_like(beam.symbols[:, :, t], t + 1)
    scores = normalise(beam.totals, lengths, alpha).masked_fill(~ended, -torch.inf)
    scores = torch.cat([beam.done_scores, scores], 1)
    scores, order = scores.topk(beam.done_scores.shape[1])
    symbols = torch.cat([beam.done_symbols, beam.symbols], 1).take_along_dim(order[..., None], 1)
    lengths = torch.cat([beam.done_lengths, lengths], 1).take_along_dim(order, 1)
    lengths = lengths.masked_fill(scores.isneginf(), 0)
    totals = beam.totals.masked_fill(ended, -torch.inf)
    return beam._replace(
        totals=totals, done_scores=scores, done_symbols=symbols, done_lengths=lengths
    )


def _gather(results: list[_Beam]) -> Hypotheses:
    """Put the rows back in their order."""
    order = torch.cat([r.rows for r in results]).argsort()
    symbols, lengths, scores = (
        torch.cat(parts)[order]
        for parts in zip(
            *((r.done_symbols, r.done_lengths, r.done_scores) for r in results), strict=True
        )
    )
    symbols = symbols[:, :, : int(lengths.max())]
    inside = torch.arange(symbols.shape[-1], device=symbols.device) < lengths[..., None]
    return Hypotheses(symbols.masked_fill(~inside, 0), lengths, scores)


def _check(limits: Tensor, alpha: float) -> None:
    if limits.dim() != 1 or len(limits) == 0 or int(limits.min()) < 1:
        raise ValueError(f"limits must be [B] numbers of at least 1, got {limits.tolist()}")
    if alpha < 0:
        raise ValueError(f"alpha must be at least 0 (the stop rule needs it), got {alpha}")


def _check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature: expected more than 0, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k: expected at least 0, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected 0 < top_p <= 1, got {top_p}")


@dataclass(frozen=True)
class SearchOptions:
    """Which search to run, and how.

    Attributes:
        beam_size: hypotheses kept at each step; 1 for greedy search.
        n_best: hypotheses to return, at most `beam_size`; when sampling, how many to draw.
        length_penalty: `alpha` of the length penalty.
        min_length: see `Constraints`.
        max_length: symbols after which a hypothesis is cut off, where the row's limit allows more.
        no_repeat_ngram_size: see `Constraints`.
        sampling: whether to draw symbols by chance.
        temperature: see `sample`.
        top_k: see `sample`.
        top_p: see `sample`.
        seed: of sampling. What is drawn for a row depends on it and on the row's number alone.

    Raises:
        ValueError: an attribute is out of range, or two of them exclude each other.
    """

    beam_size: int = 1
    n_best: int = 1
    length_penalty: float = 0.0
    min_length: int = 0
    max_length: int | None = None
    no_repeat_ngram_size: int = 0
    sampling: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampling and self.beam_size != 1:
            raise ValueError(f"beam_size: expected 1 when sampling, got {self.beam_size}")
        if not self.sampling and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError("temperature, top_k, top_p: expected only with sampling")
        most = max(self.n_best, 1) if self.sampling else self.beam_size
        if not 1 <= self.n_best <= most:
            raise ValueError(
                "expected 1 <= n_best <= beam_size, "
                f"got n_best={self.n_best}, beam_size={self.beam_size}"
            )
        if self.length_penalty < 0:  # the stop rule of beam search needs it
            raise ValueError(f"length_penalty: expected at least 0, got {self.length_penalty}")
        _check_sampling(self.temperature, self.top_k, self.top_p)
        Constraints(self.min_length, self.no_repeat_ngram_size)  # checks them
        if self.max_length is not None and self.max_length < max(1, self.min_length):
            least = f"the min_length of {self.min_length}" if self.min_length > 1 else "1"
            raise ValueError(f"max_length: expected at least {least}, got {self.max_length}")

    def run(
        self,
        step: Step[State],
        state: State,
        limits: Tensor,
        begin: int,
        end: int,
        numbers: Sequence[int] | None = None,
    ) -> Hypotheses:
        """Search.

        Args:
            step: the model.
            state: of the B rows before the first symbol.
            limits: int64 [B], the most symbols a row may have, the end symbol counted.
            begin: number of the begin symbol.
            end: number of the end symbol.
            numbers: of the B rows, for sampling; by default their places in the batch.

        Returns:
            `n_best` hypotheses for each row.
        """
        if self.max_length is not None:
            limits = limits.clamp(max=self.max_length)
        constraints = Constraints(self.min_length, self.no_repeat_ngram_size)
        options: dict[str, Any] = {"alpha": self.length_penalty, "constraints": constraints}
        if self.sampling:
            draws = self._draws(limits, range(len(limits)) if numbers is None else numbers)
            options |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            return sample(step, state, limits, begin, end, draws, **options)
        if self.beam_size == 1:
            return greedy_search(step, state, limits, begin, end, **options)
        return beam_search(step, state, limits, begin, end, self.beam_size, self.n_best, **options)

    def _draws(self, limits: Tensor, numbers: Sequence[int]) -> Tensor:
        """Random numbers [B, N, L] of each row's own generator."""
        sizes = limits.tolist()
        draws = torch.zeros(len(sizes), self.n_best, max(sizes))
        for row, (number, size) in enumerate(zip(numbers, sizes, strict=True)):
            digest = hashlib.sha256(f"{self.seed}/{number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
            draws[row, :, :size] = torch.rand(self.n_best, size, generator=generator)
        return draws.to(limits.device)
