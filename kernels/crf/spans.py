"""The probability of a span of tags, such as those of an entity, from the forward sums alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def probabilities(
    states: Tensor,
    marginals: Tensor,
    transitions: Tensor,
    continued: Tensor,
    tags: Tensor,
    spans: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Compute the probability [N] of each span (Culotta and McCallum 2004).

    Given its successor, a tag depends on nothing behind it, so that a path read from its end is a
    Markov chain: p(y_t | y_t+1) is the softmax over tags of state_t + transitions[:, y_t+1].

    Args:
        states: [B, T, K], logarithms of the sums over the paths that end in a tag, each step less a
            number of its own.
        marginals: [B, T, K].
        transitions: [K, K] (from, to).
        continued: [K] int64, the tag by which the span that a tag is in would go on, -1 for none.
        tags: [B, T] int64.
        spans: [N, 3] int64, row, first step and the step after the last.
        lengths: [B] int64.
    """
    rows, first, stop = spans.unbind(1)
    last = stop - 1
    tags = tags.clamp(0, len(continued) - 1)

    def before(row: Tensor, step: Tensor, after: Tensor) -> Tensor:
        """Log p(y_step | y_step+1 = after), [*, K]."""
        return (states[row, step] + transitions.T[after]).log_softmax(-1)

    # Of all words, and then as sums up to each: how long the spans are only the device knows.
    chances = (states[:, :-1] + transitions.T[tags[:, 1:]]).log_softmax(-1)
    links = chances.gather(-1, tags[:, :-1, None])[..., 0]
    within = torch.arange(1, tags.shape[1], device=tags.device) < lengths[:, None]
    possible = links > -torch.inf
    sums = F.pad(links.where(within & possible, 0).double().cumsum(1), (1, 0))
    breaks = F.pad((within & ~possible).cumsum(1), (1, 0))
    whole = breaks[rows, last] == breaks[rows, first]
    inside = (sums[rows, last] - sums[rows, first]).exp().where(whole, 0).to(links.dtype)

    final = tags[rows, last]
    onward = continued[final]
    goes_on = (onward >= 0) & (stop < lengths[rows])
    onward, after = onward.clamp(min=0), stop.clamp(max=tags.shape[1] - 1)
    share = before(rows, last, onward).exp().gather(1, final[:, None])[:, 0]
    longer = torch.where(goes_on, marginals[rows, after, onward] * share, 0)
    ends = (marginals[rows, last, final] - longer).clamp(min=0)

    opening = tags[rows, first]
    joins = (continued == opening[:, None]) & (first > 0)[:, None]
    previous = before(rows, (first - 1).clamp(min=0), opening).exp()
    begins = 1 - torch.where(joins, previous, 0).sum(1)
    return inside * ends * begins.clamp(min=0)
