"""The CRF in torch: sums and maxima over paths, with the gradient written out; any device.

Every sentence of a batch goes through T + 1 steps: at its own end it enters one more tag, STOP = K,
and stays there. So lengths, end scores and padding are all in the scores, and no step masks.
Tensors here are [T + 1, K + 1, B], the batch last, over which a CPU vectorises.

On a CPU the recursions are products of exponentials in float64, two operations a step; where scores
lie too far apart for that, and on other devices, they are logsumexp, exact and K times the work.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..api import without_autocast

REACH = 340.0
"""What the logarithm of a state may span: the product of two states is then above 1e-308."""

LONGEST_DETOUR = 4
"""Steps within which every tag must reach every other for the products to be used."""


class Chain(NamedTuple):
    """A batch of sentences as described above.

    Attributes:
        emissions: [T + 1, K + 1, B]; -inf for STOP within a sentence and for all others past it.
        start: [K + 1].
        transitions: [K + 1, K + 1] (from, to), the end scores in the last column.
    """

    emissions: Tensor
    start: Tensor
    transitions: Tensor


def chain(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor
) -> Chain:
    """Build it from emissions [B, T, K] and what `api` says; in float64 on a CPU."""
    batch, steps, tags = emissions.shape
    dtype = torch.float64 if emissions.device.type == "cpu" else emissions.dtype
    ended = torch.arange(steps + 1, device=emissions.device)[:, None] >= lengths
    emitted = emissions.new_full((steps + 1, tags + 1, batch), -math.inf, dtype=dtype)
    emitted[:steps, :tags] = emissions.permute(1, 2, 0)
    emitted[:steps, :tags].masked_fill_(ended[:steps, None], -math.inf)
    emitted[:, tags].masked_fill_(ended, 0)
    scores = emitted.new_full((tags + 2, tags + 1), -math.inf)
    scores[:tags, :tags], scores[:tags, tags], scores[-1, :tags] = transitions, end, start
    scores[tags, tags] = 0
    return Chain(emitted, scores[-1], scores[:-1])


def stopped(tags: Tensor, lengths: Tensor, num_tags: int) -> Tensor:
    """The gold path [B, T] through the chain, [T + 1, B]: STOP past the end."""
    steps = torch.arange(tags.shape[1] + 1, device=tags.device)[:, None]
    path = torch.nn.functional.pad(tags.T, (0, 0, 0, 1))
    return path.masked_fill(steps >= lengths, num_tags)


def gold_score(model: Chain, path: Tensor) -> Tensor:
    """The score [B] of one path [T + 1, B] of each sentence."""
    emitted = model.emissions.gather(1, path[:, None]).sum((0, 1))
    size = len(model.start)
    moved = model.transitions.flatten()[path[:-1] * size + path[1:]].sum(0)
    return emitted + moved + model.start[path[0]]


class Factors(NamedTuple):
    """The exponentials of a chain, each divided by the largest of its kind.

    Attributes:
        emissions: [T + 1, K + 1, B], by the largest of each step.
        start: [K + 1].
        transitions: [K + 1, K + 1]; 1 from STOP to STOP.
        scale: [B], the logarithm of what all paths were divided by.
        every: steps after which a state must be scaled again.
    """

    emissions: Tensor
    start: Tensor
    transitions: Tensor
    scale: Tensor
    every: int


def factors(model: Chain, lengths: Tensor) -> Factors | None:
    """Take the exponentials, or None where a state could leave the range of a float64.

    A state is 1 at its best tag where it was scaled. Each step, of those until it is scaled again
    and of those in which the best tag reaches every other, costs at most the span of the scores.
    """
    emitted, tags = model.emissions, len(model.start) - 1
    largest = emitted.amax(1, keepdim=True)
    within = largest - emitted[:, :tags].amin(1, keepdim=True)
    scores = torch.cat([model.transitions[:tags].flatten(), model.start[:tags]])
    finite = scores.masked_fill(scores == -math.inf, math.inf)
    spans = torch.stack(
        [
            torch.where(within == math.inf, 0, within).max() + scores.max() - finite.min(),
            scores.max(),
            model.start.max(),
        ]
    )
    span, best_move, best_start = spans.tolist()
    detour = _detour(model.transitions[:tags, :tags])
    if not math.isfinite(span) or detour is None:
        return None
    every = int(REACH / max(span, math.log(tags + 1))) - detour - 1
    if every < 1:
        return None
    moves = (model.transitions - best_move).exp_()
    moves[tags, tags] = 1
    return Factors(
        (emitted - largest).exp_(),
        (model.start - best_start).exp_(),
        moves,
        largest.sum((0, 1)) + best_move * lengths.to(emitted.dtype) + best_start,
        every,
    )


def _detour(transitions: Tensor) -> int | None:
    """Steps within which every tag reaches every other, None if more than `LONGEST_DETOUR`."""
    allowed = (transitions > -math.inf).double()
    reached = allowed
    for steps in range(1, LONGEST_DETOUR + 1):
        if bool(reached.all()):
            return steps
        reached = ((reached @ allowed) > 0).double()
    return None


class Recursion(NamedTuple):
    """States after each step, themselves or their logarithms.

    Attributes:
        messages: [T + 1, K + 1, B], the states without their own emission and not scaled.
        states: [T + 1, K + 1, B].
        scale: [B], the logarithm of what the last state was divided by.
    """

    messages: Tensor
    states: Tensor
    scale: Tensor


def products(given: Factors, reverse: bool) -> Recursion:
    """Run state_t = emission_t * (matrix @ state_{t-1}), or from the end to the start."""
    emitted = given.emissions.unbind()
    matrix = given.transitions if reverse else given.transitions.T.contiguous()
    messages, states = (torch.empty_like(given.emissions) for _ in range(2))
    messages_at, states_at = messages.unbind(), states.unbind()
    order = range(len(emitted))[:: -1 if reverse else 1]
    messages_at[order[0]].copy_(_boundary(given.start, reverse, 1.0)[:, None])
    scale = torch.zeros_like(given.scale)
    for count, t in enumerate(order):
        if count:
            torch.mm(matrix, states_at[order[count - 1]], out=messages_at[t])
        state = torch.mul(messages_at[t], emitted[t], out=states_at[t])
        if count % given.every == 0:
            size = state.amax(0).clamp_(min=torch.finfo(state.dtype).tiny)
            state.div_(size)
            scale += size.log_()
    return Recursion(messages, states, scale)


def logarithms(model: Chain, reverse: bool) -> Recursion:
    """Run state_t = emission_t + logsumexp(transitions + state_{t-1}), or from the end."""
    emitted = model.emissions
    matrix = (model.transitions if reverse else model.transitions.T)[..., None]
    messages, states = torch.empty_like(emitted), torch.empty_like(emitted)
    order = range(len(emitted))[:: -1 if reverse else 1]
    message = _boundary(model.start, reverse, 0.0)[:, None]
    scale = emitted.new_zeros(emitted.shape[-1])
    for count, t in enumerate(order):
        if count:
            message = torch.logsumexp(matrix + states[order[count - 1]], 1)
        messages[t] = message
        state = message + emitted[t]
        size = state.amax(0).clamp_(min=torch.finfo(state.dtype).min)
        states[t] = state - size
        scale += size
    return Recursion(messages, states, scale)


def _boundary(start: Tensor, reverse: bool, certain: float) -> Tensor:
    """The first message, [K + 1]: the start scores, or the certainty of STOP."""
    if not reverse:
        return start
    message = torch.full_like(start, 0.0 if certain else -math.inf)
    message[-1] = certain
    return message


def log_partition(model: Chain, given: Factors | None) -> tuple[Tensor, Tensor]:
    """The logarithm of the sum over all paths [B], and the forward states."""
    if given is not None:
        forward = products(given, reverse=False)
        return forward.states[-1, -1].log() + forward.scale + given.scale, forward.states
    forward = logarithms(model, reverse=False)
    return forward.states[-1, -1] + forward.scale, forward.states


def expectations(
    model: Chain, given: Factors | None, states: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """How probable each tag is, and how often two follow each other.

    Args:
        model: the chain.
        given: its exponentials, if the forward states are products.
        states: those forward states.
        weights: of each row, [B]; None: no pairs.

    Returns:
        Probabilities [T + 1, K + 1, B], and the weighted sum over steps and rows of those of the
        pairs, [K + 1, K + 1] (from, to).
    """
    if given is None:
        backward = logarithms(model, reverse=True)
        marginals = (states + backward.messages).softmax(1)
        return marginals, _pairs(model, states, backward.states, weights)
    backward = products(given, reverse=True)
    marginals = states * backward.messages
    mass = marginals.sum(1, keepdim=True)
    marginals /= mass
    if weights is None:
        return marginals, None
    left = states[:-1] * (weights / mass[:-1])
    pairs = torch.bmm(left, backward.states[1:].mT).sum(0)
    return marginals, pairs * given.transitions


def _pairs(
    model: Chain, forward: Tensor, backward: Tensor, weights: Tensor | None
) -> Tensor | None:
    if weights is None:
        return None
    matrix, total = model.transitions[..., None], torch.zeros_like(model.transitions)
    for before, after in zip(forward[:-1], backward[1:], strict=True):
        scores = before[:, None] + matrix + after
        pairs = scores.flatten(0, 1).softmax(0)
        total += (pairs * weights).sum(-1).view_as(total)
    return total


def _prepare(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor
) -> tuple[Chain, Factors | None]:
    model = chain(emissions, start, transitions, end, lengths)
    # The span of the scores is needed on the host, which would stall an accelerator.
    return model, factors(model, lengths) if emissions.device.type == "cpu" else None


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
    ) -> Tensor:
        model, given = _prepare(emissions, start, transitions, end, lengths)
        value, states = log_partition(model, given)
        path = None if tags is None else stopped(tags, lengths, emissions.shape[-1])
        if path is not None:
            value = gold_score(model, path) - value
        if any(ctx.needs_input_grad):
            ctx.every, ctx.dtype = None if given is None else given.every, emissions.dtype
            ctx.save_for_backward(path, states, *model, *(given or ())[:4])
        return value.to(emissions.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Weight the expectations, less what the gold path holds, by the gradient of each row."""
        if torch.is_grad_enabled():
            raise RuntimeError("the CRF is differentiable once: create_graph=True needs more")
        path, states, emitted, start, moves, *rest = ctx.saved_tensors
        model = Chain(emitted, start, moves)
        given = None if ctx.every is None else Factors(*rest, ctx.every)
        weights = grad.to(states.dtype)
        if path is not None:
            weights = -weights
        with without_autocast(states):
            marginals, pairs = expectations(model, given, states, weights)
        assert pairs is not None
        marginals *= weights
        if path is not None:
            marginals.scatter_add_(1, path[:, None], -weights.expand_as(path)[:, None])
            size = len(pairs)
            followed = path[:-1] * size + path[1:]
            held = -weights.expand_as(followed)
            pairs.view(-1).index_add_(0, followed.flatten(), held.flatten())
        tags = len(pairs) - 1
        d_emissions = marginals[:-1, :tags].permute(2, 0, 1).to(ctx.dtype).contiguous()
        gradients = (marginals[0, :tags].sum(-1), pairs[:tags, :tags], pairs[:tags, tags])
        return d_emissions, *(g.to(ctx.dtype) for g in gradients), None, None


def likelihood(
    emissions: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor,
    tags: Tensor | None,
) -> Tensor:
    """Compute log p(tags) [B], or log Z without tags; differentiable once. Else as `api`."""
    return _Likelihood.apply(emissions, start, transitions, end, lengths, tags)


def marginals(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor
) -> Tensor:
    """The probability of each tag, [B, T, K]."""
    model, given = _prepare(emissions, start, transitions, end, lengths)
    _, states = log_partition(model, given)
    probabilities, _ = expectations(model, given, states, None)
    return probabilities[:-1, :-1].permute(2, 0, 1).to(emissions.dtype).contiguous()


def decode(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """The best path [B, T], -1 past the end, and its score [B].

    The recursion runs from the end to the start and keeps only the scores; the path is then read
    from the start to the end, at each step the best tag of one row of scores.
    """
    model = chain(emissions, start, transitions, end, lengths)
    moves = model.transitions.T[..., None].contiguous()
    messages = torch.full_like(model.emissions, -math.inf)
    messages[-1, -1] = 0
    messages_at, emitted = messages.unbind(), model.emissions.unbind()
    for t in range(len(emitted) - 1, 0, -1):
        rest = messages_at[t] + emitted[t]
        torch.amax(moves + rest[:, None], 0, out=messages_at[t - 1])
    rests = (messages + model.emissions).transpose(1, 2).contiguous()
    score, tag = (model.start + rests[0]).max(-1)
    path = [tag]
    for rest in rests[1:-1].unbind():
        path.append(model.transitions.index_select(0, path[-1]).add_(rest).argmax(-1))
    return _without_stop(torch.stack(path, 1), score, model), score.to(emissions.dtype)


def n_best(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """The n best paths [B, n, T] and their scores [B, n]; -1 and -inf where there are too few.

    Each tag keeps its n best continuations, and where they go.
    """
    if n == 1:
        path, score = decode(emissions, start, transitions, end, lengths)
        return path[:, None], score[:, None]
    model = chain(emissions, start, transitions, end, lengths)
    emitted = model.emissions.permute(0, 2, 1).contiguous()
    messages = emitted.new_full((*emitted.shape[1:], n), -math.inf)
    messages[:, -1, 0] = 0
    pointers: list[Tensor] = []
    for t in range(len(emitted) - 1, 0, -1):
        rest = messages + emitted[t][..., None]
        scores = model.transitions[..., None] + rest[:, None]
        messages, pointer = scores.flatten(2).topk(n, -1)
        pointers.append(pointer.flatten(1))
    rest = messages + (model.start + emitted[0])[..., None]
    score, place = rest.flatten(1).topk(n, -1)
    path = [place // n]
    for pointer in reversed(pointers[1:]):
        place = pointer.gather(1, place)
        path.append(place // n)
    return _without_stop(torch.stack(path, -1), score, model), score.to(emissions.dtype)


def _without_stop(path: Tensor, score: Tensor, model: Chain) -> Tensor:
    """-1 in the place of STOP, and of all paths that do not exist."""
    stop = path == len(model.start) - 1
    return path.masked_fill_(stop | (score == -math.inf)[..., None], -1)
