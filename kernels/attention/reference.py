"""The oracle of the attention decoder: one plain time loop under autograd, in any dtype.

Nothing here is fast and nothing optimised imports it. Names of dimensions are in spec.py.

One step, from y_t (the embedded previous symbol), the states s and what is fed back::

    features (Luong 2015, section 3.3)          context (Bahdanau 2014, appendix A.2.2)
    s_t = cell([y_t; a_{t-1}], s_{t-1})         alpha_t, c_t = attend(h_{t-1})
    alpha_t, c_t = attend(h_t)                  s_t = cell([y_t; c_t], s_{t-1})
    a_t = tanh(W_a [c_t; h_t])                  a_t = tanh(W_a [c_t; h_t])

"none" is "features" with cell(y_t, s_{t-1}). h is that of the top layer; a_t predicts the symbol.

    attend(q):  alpha = softmax(score(q)) over the first lengths[b] keys,  c = sum_s alpha_s k_s
    score_s = q . p_s                           dot: p = k; general: p = W k (Luong, equation 8)
    score_s = v . tanh(W_q q + p_s)             additive: p = U k + b (Bahdanau, A.1.2)

Coverage (Tu et al. 2016; See et al. 2017, equations 10 and 11) tells the score what was already
attended to: p_s becomes p_s + w_c sum_{t' < t} alpha_{t', s}. Under a product score this adds
(q . w_c) times the coverage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import STEPS
from .spec import Decoded, DecoderWeights, LayerWeights, Masks, Problem, Sampling, State


def attend(
    query: Tensor,
    keys: Tensor,
    projected: Tensor,
    padding: Tensor,
    weights: DecoderWeights,
    coverage: Tensor,
) -> tuple[Tensor, Tensor]:
    """One attention of each row: the context [B, K] and its weights [B, S].

    Args:
        query: [B, Q].
        keys: [B, S, K], finite.
        projected: [B, S, A], finite.
        padding: bool [B, S].
        weights: of the decoder.
        coverage: [B, S]; used where the weights have one.
    """
    if weights.coverage is not None:
        projected = projected + coverage[..., None] * weights.coverage
    if weights.energy is None:
        score = (projected * query[:, None]).sum(-1)
    else:
        assert weights.query is not None
        hidden = F.linear(query, weights.query)[:, None] + projected
        score = torch.tanh(hidden) @ weights.energy
    alpha = score.masked_fill(padding, -torch.inf).softmax(-1)
    return (alpha[..., None] * keys).sum(1), alpha


def _cell(cell: str, layer: LayerWeights, x: Tensor, state: State) -> State:
    """One step of one layer."""
    size = layer.w_hh.shape[1]

    def recur(h: Tensor, gate: int) -> Tensor:
        rows = slice(None) if gate < 0 else slice(gate * size, (gate + 1) * size)
        return F.linear(h, layer.w_hh[rows], None if layer.b_hh is None else layer.b_hh[rows])

    return STEPS[cell](F.linear(x, layer.w_ih, layer.b_ih), state, recur, {})


def decode(
    problem: Problem,
    x: Tensor,
    keys: Tensor,
    projected: Tensor,
    lengths: Tensor | None,
    weights: DecoderWeights,
    states: Sequence[State],
    feed: Tensor | None = None,
    coverage: Tensor | None = None,
    masks: Masks | None = None,
    sampling: Sampling | None = None,
) -> Decoded:
    """A whole decoding, step by step.

    Args:
        problem: which decoder.
        x: [T, B, E], the embedded previous symbols; under scheduled sampling they are embedded from
            what is fed, and only the shape of x counts.
        keys: [B, S, K], encoder states.
        projected: [B, S, A], the keys as the score wants them.
        lengths: int64 [B], at least 1; keys past them change nothing. None: no padding.
        weights: of the decoder.
        states: of each layer before the first step.
        feed: [B, F], the features before the first step, with feedback "features"; None: zeros.
        coverage: [B, S], attention given before the first step; None: zeros.
        masks: dropout; None: none.
        sampling: scheduled sampling, or None.

    Returns:
        Everything a step computes, for all steps.
    """
    masks = Masks() if masks is None else masks
    rows, source = keys.shape[:2]
    padding = torch.zeros(rows, source, dtype=torch.bool, device=keys.device)
    if lengths is not None:
        padding = torch.arange(source, device=keys.device) >= lengths[:, None]
        keys = keys.masked_fill(padding[..., None], 0.0)
        projected = projected.masked_fill(padding[..., None], 0.0)
    before = problem.feedback == "context"
    fed = keys.new_zeros(rows, weights.combine.shape[0]) if feed is None else feed
    seen = keys.new_zeros(rows, source) if coverage is None else coverage
    now = [*states]
    symbols: list[Tensor] = []
    steps: list[tuple[Tensor, ...]] = []
    for t in range(len(x)):
        if sampling is None:
            x_t = x[t]
        else:
            symbols.append(sampling.draw(t, fed))
            x_t = sampling.inputs(symbols[t], t)
        if before:
            context, alpha = attend(now[-1][0], keys, projected, padding, weights, seen)
            x_t = torch.cat([x_t, context], -1)
        elif problem.feedback == "features":
            x_t = torch.cat([x_t, fed], -1)
        for index, layer in enumerate(weights.layers):
            now[index] = _cell(problem.cell, layer, x_t, now[index])
            x_t = now[index][0]
            if index < len(masks.between):
                x_t = x_t * masks.between[index][t]
        h = now[-1][0]
        if not before:
            context, alpha = attend(h, keys, projected, padding, weights, seen)
        seen = seen + alpha
        fed = torch.tanh(F.linear(torch.cat([context, h], -1), weights.combine))
        fed = fed if masks.features is None else fed * masks.features[t]
        steps.append((fed, h, context, alpha))
    features, outputs, context, alpha = (torch.stack(s) for s in zip(*steps, strict=True))
    chosen = torch.stack(symbols) if symbols else None
    return Decoded(features, outputs, context, alpha, now, chosen)
