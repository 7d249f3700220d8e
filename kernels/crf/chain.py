"""The CRF in torch: sums and maxima over paths, with the gradient written out; any device.

Every sentence of a batch goes through T + 1 steps: at its own end it enters one more tag, STOP = K,
and stays there. So lengths, end scores and padding are all in the scores, and no step masks.
Tensors here are [T + 1, K + 1, B], the batch last, over which a CPU vectorises.

On a CPU the recursions are products of exponentials in float64, two operations a step; where scores
lie too far apart for that, and on other devices, they are logsumexp, exact and K times the work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..api import without_autocast

REACH = 340.0
"""What the logarithm of a state may span: the product of two states is then above 1e-308."""

SHORT = 256
"""Steps over which the scores of paths may add up in float32."""

LOG2_E = math.log2(math.e)

LONGEST_DETOUR = 4
"""Steps within which every tag must reach every other for the products to be used."""


class Chain(NamedTuple):
    """A batch of sentences as described above.

    Attributes:
        emissions: [T + 1, K + 1, B]; -inf for STOP within a sentence and for all others past it.
        start: [K + 1].
        transitions: [K + 1, K + 1] (from, to), the end scores in the last column.
        ended: [T + 1, B] bool, whether the sentence is over.
    """

    emissions: Tensor
    start: Tensor
    transitions: Tensor
    ended: Tensor


def chain(
    emissions: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor,
    dtype: torch.dtype | None = None,
) -> Chain:
    """Build it from what `api` says.

    Args:
        emissions: [B, T, K].
        start: [K].
        transitions: [K, K].
        end: [K].
        lengths: [B].
        dtype: what to compute in; None: float64 on a CPU, that of the emissions elsewhere.
    """
    batch, steps, tags = emissions.shape
    if dtype is None:
        dtype = torch.float64 if emissions.device.type == "cpu" else emissions.dtype
    ended = torch.arange(steps + 1, device=emissions.device)[:, None] >= lengths
    emitted = emissions.new_full((steps + 1, tags + 1, batch), -math.inf, dtype=dtype)
    emitted[:steps, :tags] = emissions.permute(1, 2, 0)
    emitted[:steps, :tags].masked_fill_(ended[:steps, None], -math.inf)
    emitted[:, tags].masked_fill_(ended, 0)
    scores = emitted.new_full((tags + 2, tags + 1), -math.inf)
    scores[:tags, :tags], scores[:tags, tags], scores[-1, :tags] = transitions, end, start
    scores[tags, tags] = 0
    return Chain(emitted, scores[-1], scores[:-1], ended)


def stopped(tags: Tensor, model: Chain) -> Tensor:
    """The gold path [B, T] through the chain, [T + 1, B]: STOP past the end."""
    path = tags.new_empty(model.ended.shape)
    path[:-1] = tags.T
    return path.masked_fill_(model.ended, len(model.start) - 1)


def gold_score(model: Chain, path: Tensor) -> Tensor:
    """The score [B] of one path [T + 1, B] of each sentence."""
    emitted = model.emissions.gather(1, path[:, None]).sum((0, 1))
    size = len(model.start)
    moved = model.transitions.take(torch.add(path[1:], path[:-1], alpha=size)).sum(0)
    return emitted + moved + model.start[path[0]]


class Factors(NamedTuple):
    """The exponentials of a chain, divided by the largest.

    Attributes:
        emissions: [T + 1, K + 1, B], by the largest of each step.
        start: [K + 1].
        transitions: [K + 1, K + 1], by the largest of these and of `start`; 1 from STOP to STOP.
        scale: [B], the logarithm of what each path was divided by.
        every: steps after which a state must be scaled again.
    """

    emissions: Tensor
    start: Tensor
    transitions: Tensor
    scale: Tensor
    every: int


def factors(model: Chain, lengths: Tensor) -> Factors | None:
    """Take the exponentials, or None where a state could leave the range of a float64.

    They take the place of the chain's emissions: copies of them would be too many for a cache.

    A state is 1 at its best tag where it was scaled. Each step, of those until it is scaled again
    and of those in which the best tag reaches every other, costs at most the span of the scores.
    """
    emitted, tags = model.emissions, len(model.start) - 1
    largest = emitted.amax(1)
    spans = largest - emitted[:, :tags].amin(1)
    widest = spans.masked_fill_(model.ended, 0).max().item()
    scores = torch.cat([model.transitions[:tags].flatten(), model.start[:tags]])
    low, high = (bound.item() for bound in scores.aminmax())
    detour: int | None = 1
    if low == -math.inf:
        low = scores.masked_fill(scores == -math.inf, math.inf).min().item()
        detour = _detour(model.transitions[:tags, :tags])
    span = widest + high - low
    if detour is None or not math.isfinite(span):
        return None
    every = int(REACH / max(span, math.log(tags + 1))) - detour - 1
    if every < 1:
        return None
    moves = (model.transitions - high).exp_()
    moves[tags, tags] = 1
    scale = largest.sum(0).add_(lengths + 1, alpha=high)
    exponentials = emitted.sub_(largest[:, None]).mul_(LOG2_E).exp2_()  # half the time of exp_
    return Factors(exponentials, (model.start - high).exp_(), moves, scale, every)


def _detour(transitions: Tensor) -> int | None:
    """Steps within which every tag reaches every other, None if more than `LONGEST_DETOUR`."""
    allowed = (transitions > -math.inf).to(transitions.dtype)
    reached = allowed
    for steps in range(1, LONGEST_DETOUR + 1):
        if bool(reached.all()):
            return steps
        reached = ((reached @ allowed) > 0).to(allowed.dtype)
    return None


class Sums(NamedTuple):
    """Sums over partial paths, or their logarithms, each divided by a number of its row and step.

    Attributes:
        log_z: [B].
        forward: [T + 1, K + 1, B], over the paths that end in a tag.
        backward: over those that begin with a tag; empty if not wanted.
        incoming: over those that begin after a tag: the transitions times the next of `backward`.
    """

    log_z: Tensor
    forward: Tensor
    backward: Tensor
    incoming: Tensor


def products(given: Factors, both: bool) -> Sums:
    """Run state_t = emission_t * (matrix @ state_{t-1}), in `both` directions one by one.

    Of both, the emissions become the states of the second.
    """
    tiny = torch.finfo(given.emissions.dtype).tiny
    forward = torch.empty_like(given.emissions)
    incoming = torch.empty_like(forward[: len(forward) if both else 0])
    matrix, sizes = given.transitions.T.contiguous(), []
    emissions, states, messages = given.emissions.unbind(), forward.unbind(), incoming.unbind()
    with torch.inference_mode():  # a sixth faster; what is kept was made before
        state = torch.mul(given.start[:, None], emissions[0], out=states[0])
        for t, (emission, out) in enumerate(zip(emissions, states, strict=True)):
            if t:
                state = torch.mm(matrix, state, out=out).mul_(emission)
            if t % given.every == 0:
                size = state.amax(0).clamp_(min=tiny)
                state.div_(size)
                sizes.append(size)
        total = torch.stack(sizes).log_().sum(0).add_(states[-1][-1].log())
    log_z = given.scale + total
    if not both:
        return Sums(log_z, forward, forward[:0], incoming)
    matrix = given.transitions
    with torch.inference_mode():
        messages[-1].fill_(0)[-1] = 1
        for t in range(len(states) - 1, 0, -1):
            state = emissions[t].mul_(messages[t])
            if t % given.every == 0:
                state.div_(state.amax(0).clamp_(min=tiny))
            torch.mm(matrix, state, out=messages[t - 1])
    return Sums(log_z, forward, given.emissions, incoming)


def logarithms(model: Chain, both: bool) -> Sums:
    """Run state_t = emission_t + logsumexp(transitions + state_{t-1}), in both directions."""
    _, forward, log_z = _logarithms(model.emissions, model.transitions.T, model.start)
    if not both:
        return Sums(log_z, forward, forward[:0], forward[:0])
    stop = torch.full_like(model.start, -math.inf)
    stop[-1] = 0
    incoming, backward, _ = _logarithms(model.emissions.flip(0), model.transitions, stop)
    return Sums(log_z, forward, backward.flip(0), incoming.flip(0))


def _logarithms(emissions: Tensor, matrix: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Messages, states, and the logarithm of the last state of STOP."""
    messages, states = torch.empty_like(emissions), torch.empty_like(emissions)
    messages[0] = first[:, None]
    scale = emissions.new_zeros(emissions.shape[-1])
    for t, emission in enumerate(emissions):
        if t:
            messages[t] = torch.logsumexp(matrix[..., None] + states[t - 1], 1)
        state = messages[t] + emission
        size = state.amax(0).clamp_(min=torch.finfo(state.dtype).min)
        states[t] = state - size
        scale += size
    return messages, states, states[-1, -1] + scale


def expectations(
    transitions: Tensor, linear: bool, found: Sums, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """How probable each tag is, and how often two follow each other.

    Args:
        transitions: [K + 1, K + 1], or their exponentials.
        linear: whether these are exponentials, and the sums no logarithms.
        found: the sums, in both directions.
        weights: of each row, [B]; None: the pairs are not wanted.

    Returns:
        Probabilities [T + 1, K + 1, B], and the sum over steps and rows of those of the pairs,
        [K + 1, K + 1] (from, to), empty without weights; with them both are weighted.
    """
    _, forward, backward, incoming = found
    if not linear:
        marginals = (forward + incoming).softmax(1)
        if weights is not None:
            marginals *= weights
        return marginals, _pairs(transitions, forward[:-1], backward[1:], weights)
    marginals = forward * incoming
    mass = marginals.sum(1, keepdim=True)
    if weights is None:
        return marginals.div_(mass), mass[:0]
    shares = weights / mass
    left = forward[:-1] * shares[:-1]
    return marginals.mul_(shares), torch.bmm(left, backward[1:].mT).sum(0).mul_(transitions)


def _pairs(transitions: Tensor, before: Tensor, after: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return transitions[:0]
    total = torch.zeros_like(transitions)
    for left, right in zip(before, after, strict=True):
        scores = left[:, None] + transitions[..., None] + right
        pairs = scores.flatten(0, 1).softmax(0)
        total += (pairs * weights).sum(-1).view_as(total)
    return total


def _sums(model: Chain, lengths: Tensor, both: bool) -> tuple[Tensor, bool, Sums]:
    """The transitions, whether they are exponentials, and the sums."""
    # The span of the scores is needed on the host, which would stall an accelerator.
    given = factors(model, lengths) if lengths.device.type == "cpu" else None
    if given is None:
        return model.transitions, False, logarithms(model, both)
    return given.transitions, True, products(given, both)


class _Likelihood(torch.autograd.Function):
    """log Z, or with tags log p(tags), by the forward recursion; the gradient by the other."""

    @staticmethod
    def forward(
        ctx: Any,
        emissions: Tensor,
        start: Tensor,
        transitions: Tensor,
        end: Tensor,
        lengths: Tensor,
        tags: Tensor | None,
        wanted: bool,
    ) -> Tensor:
        model = chain(emissions, start, transitions, end, lengths)
        ctx.dtype = emissions.dtype
        path = None if tags is None else stopped(tags, model)
        gold = None if path is None else gold_score(model, path)
        moves, ctx.linear, found = _sums(model, lengths, both=wanted)
        if wanted:
            ctx.save_for_backward(path, moves, *found)
        value = found.log_z if gold is None else gold - found.log_z
        return value.to(emissions.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Weight the expectations, less what the gold path holds, by the gradient of each row."""
        if torch.is_grad_enabled():
            raise RuntimeError("the CRF is differentiable once: create_graph=True needs more")
        path, moves, *found = ctx.saved_tensors
        weights = grad = grad.to(moves.dtype)
        if path is not None:
            weights = -grad
        with without_autocast(moves):
            marginals, pairs = expectations(moves, ctx.linear, Sums(*found), weights)
        if path is not None:
            held = grad.repeat(len(path), 1)
            marginals.scatter_add_(1, path[:, None], held[:, None])
            followed = torch.add(path[1:], path[:-1], alpha=len(pairs))
            pairs.view(-1).index_add_(0, followed.flatten(), held[1:].flatten())
        tags = len(pairs) - 1
        d_emissions = marginals[:-1, :tags].permute(2, 0, 1).to(ctx.dtype).contiguous()
        gradients = (marginals[0, :tags].sum(-1), pairs[:tags, :tags], pairs[:tags, tags])
        return d_emissions, *(g.to(ctx.dtype) for g in gradients), None, None, None


def likelihood(
    emissions: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor,
    tags: Tensor | None,
) -> Tensor:
    """Compute log p(tags) [B], or log Z without tags; differentiable once. Else as `api`."""
    scores = (emissions, start, transitions, end)
    # ctx.needs_input_grad says nothing of no_grad, where the parameters still require gradients.
    wanted = torch.is_grad_enabled() and any(score.requires_grad for score in scores)
    return _Likelihood.apply(*scores, lengths, tags, wanted)


def marginals(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor
) -> Tensor:
    """The probability of each tag, [B, T, K]."""
    model = chain(emissions, start, transitions, end, lengths)
    moves, linear, found = _sums(model, lengths, both=True)
    probabilities, _ = expectations(moves, linear, found, None)
    return probabilities[:-1, :-1].permute(2, 0, 1).to(emissions.dtype).contiguous()


def states(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor
) -> Tensor:
    """Logarithms of the sums over paths that end in a tag, each step less its own, [B, T, K]."""
    model = chain(emissions, start, transitions, end, lengths)
    _, linear, found = _sums(model, lengths, both=False)
    sums = found.forward[:-1, :-1].permute(2, 0, 1)
    return sums.log() if linear else sums.contiguous()


def decode(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """The best path [B, T], -1 past the end, and its score [B]."""
    dtype = emissions.dtype if emissions.shape[1] <= SHORT else torch.float64
    with torch.inference_mode():  # a tenth faster; what it makes would be refused by autograd
        model = chain(emissions, start, transitions, end, lengths, dtype)
        path, score = _best(model)
        path.masked_fill_(model.ended[:-1] | (score == -math.inf), -1)
    return path.T.clone(memory_format=torch.contiguous_format), score.to(emissions.dtype, copy=True)


def _maxima(moves: Tensor, states: Sequence[Tensor]) -> None:
    """Turn emissions [S, N] into states, in place: state_t += max over b of moves[:, b] + before.

    Args:
        moves: from b, the second, [S, S, N].
        states: in the order in which the paths go.
    """
    pairs, best = torch.empty_like(moves), torch.empty_like(states[0])
    for before, after in pairwise(states):
        torch.add(moves, before, out=pairs)
        after += torch.amax(pairs, 1, out=best)


def _walk(scores: Tensor, states: Tensor, tags: Tensor) -> None:
    """Fill in the tags [T, B] after the first, each the best after the one before.

    Args:
        scores: of going from each tag to each, [S, S].
        states: [T, B, S].
        tags: [T, B].
    """
    row = torch.empty_like(states[0])
    for (before, out), state in zip(pairwise(tags.unbind()), states[1:].unbind(), strict=True):
        torch.index_select(scores, 0, before, out=row).add_(state)
        torch.argmax(row, -1, out=out)


def _rests(model: Chain) -> Tensor:
    """The best score of going on from each tag at each step, with its own, [T + 1, B, K + 1].

    The first step's has the start scores. The emissions of the model become the same.
    """
    moves = model.transitions[..., None].expand(-1, -1, len(model.ended[0])).contiguous()
    _maxima(moves, model.emissions.unbind()[::-1])
    rests = model.emissions.transpose(1, 2).contiguous()
    rests[0] += model.start
    return rests


def _best(model: Chain) -> tuple[Tensor, Tensor]:
    """The best path [T, B] and its score [B].

    The recursion runs from the end to the start and keeps only the scores; the path is then read
    from the start to the end, at each step the best tag of one row of scores.
    """
    rests = _rests(model)[:-1]
    path = torch.empty(rests.shape[:2], dtype=torch.int64, device=rests.device)
    score, path[0] = rests[0].max(-1)
    _walk(model.transitions, rests, path)
    return path, score


def n_best(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """The n best paths [B, n, T] and their scores [B, n]; -1 and -inf where there are too few."""
    if n == 1:
        best, score = decode(emissions, start, transitions, end, lengths)
        return best[:, None], score[:, None]
    with torch.inference_mode():
        model = chain(emissions, start, transitions, end, lengths)
        paths, scores = _ranked(model, n)
        found = paths[:, :-1].permute(2, 0, 1)
        gone = model.ended[:-1].T[:, None] | (scores == -math.inf)[..., None]
        found = found.masked_fill(gone, -1)
    return found.clone(), scores.to(emissions.dtype, copy=True)


def _ranked(model: Chain, n: int) -> tuple[Tensor, Tensor]:
    """The n best paths [n, T + 1, B] and their scores [B, n] (Lawler 1972).

    Each path but the first leaves one before it at some step, then goes on as well as it can. Of
    how to leave each, the best that is left over is next; later steps of the new path are its own.
    """
    states, moves = _rests(model), model.transitions
    steps, batch, size = states.shape
    times, every = (torch.arange(k, device=moves.device) for k in (steps, size))
    row = torch.arange(batch, device=moves.device)
    paths = row.new_zeros(n, steps, batch)
    scores, leaving = states.new_empty(batch, n), states.new_empty(batch, n, steps, size)
    tops, places = states.new_empty(batch, n), row.new_empty(batch, n)
    scores[:, 0], paths[0, 0] = states[0].max(-1)
    at, free = row.new_full((batch,), -1), states
    for k in range(n):
        if k:
            chosen = tops[:, :k].argmax(1)
            scores[:, k], place = tops[row, chosen], places[row, chosen]
            rest = leaving.flatten(2)
            rest[row, chosen, place] = -math.inf
            tops[row, chosen], places[row, chosen] = rest[row, chosen].max(1)
            at = place // size
            kept = paths[chosen, :, row].T.where(times[:, None] != at, place % size)
            bound = (times[:, None] <= at)[..., None] & (kept[..., None] != every)
            free = states.masked_fill(bound, -math.inf)
            paths[k, 0] = free[0].argmax(-1)
        _walk(moves, free, paths[k])
        ways = torch.cat([states[:1], moves[paths[k, :-1]] + states[1:]])
        own = paths[k][..., None]
        ways += scores[:, k, None] - ways.gather(-1, own)
        ways.scatter_(-1, own, -math.inf)
        past = (times[:, None] <= at) | (scores[:, k] == -math.inf)
        leaving[:, k] = ways.masked_fill_(past[..., None], -math.inf).transpose(0, 1)
        tops[:, k], places[:, k] = leaving[:, k].flatten(1).max(1)
    return paths, scores
