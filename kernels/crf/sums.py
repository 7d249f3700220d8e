"""Sums over all paths of a CRF, a program for each sentence: log Z, and its gradient.

States are logarithms in float32, at most 0: what is taken out of them at each step is added up
apart, in float64, since 10,000 steps add up to numbers that leave a float32 three decimals.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import PARTIAL_SUMS, launch_options, padded

LEAST = tl.constexpr(-3.4e38)  # beyond the largest float32 it would be a float64


@triton.jit
def finite_max(scores, axis: tl.constexpr):
    """The maximum; the least finite number where that is -inf, so that no inf - inf arises."""
    return tl.maximum(tl.max(scores, axis), LEAST)


@triton.jit
def log_sum_exp(scores, axis: tl.constexpr):
    """Its logarithm of sums, the maximum taken out, and the exponentials that were summed."""
    largest = finite_max(scores, axis)
    exponentials = tl.exp(scores - tl.expand_dims(largest, axis))
    return largest + tl.log(tl.sum(exponentials, axis)), largest, exponentials


@triton.jit
def load_matrix(scores, row, column, K: tl.constexpr):
    """The scores [K, K] at the given rows and columns; -inf beyond K."""
    real = (row < K) & (column < K)
    return tl.load(scores + row * K + column, mask=real, other=float("-inf")).to(tl.float32)


@triton.jit
def load_vector(scores, tag, K: tl.constexpr):
    """One score for each tag, in float32; -inf beyond K."""
    return tl.load(scores + tag, mask=tag < K, other=float("-inf")).to(tl.float32)


@triton.jit
def _score(scores, index):
    return tl.load(scores + index).to(tl.float64)


@triton.jit(do_not_specialize=("T",))
def crf_forward(
    emissions, start, transitions, end, lengths, tags, value, states,
    T, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Write log Z, or with tags log p(tags); the states [B, T, K] where they are wanted."""
    row = tl.program_id(0).to(tl.int64)
    tag = tl.arange(0, KP)
    length = tl.minimum(tl.load(lengths + row), T).to(tl.int32)
    emissions += row * T * K
    matrix = load_matrix(transitions, tag[:, None], tag[None, :], K)
    state = load_vector(start, tag, K) + load_vector(emissions, tag, K)
    size = finite_max(state, 0)
    state -= size
    total = size.to(tl.float64)
    if states is not None:
        states += row * T * K
        tl.store(states + tag, state, mask=tag < K)
    if tags is not None:
        tags += row * T
        before = tl.load(tags)
        total -= _score(start, before) + _score(emissions, before)
    for t in range(1, length):
        state = log_sum_exp(state[:, None] + matrix, 0)[0] + load_vector(emissions + t * K, tag, K)
        size = finite_max(state, 0)
        state -= size
        total += size
        if states is not None:
            tl.store(states + t * K + tag, state, mask=tag < K)
        if tags is not None:
            now = tl.load(tags + t)
            total -= _score(transitions, before * K + now) + _score(emissions + t * K, now)
            before = now
    total += log_sum_exp(state + load_vector(end, tag, K), 0)[0]
    if tags is not None:
        total = _score(end, before) - total
    tl.store(value + row, total.to(tl.float32))


@triton.jit(do_not_specialize=("T", "B"))
def crf_backward(
    grad, states, emissions, transitions, end, lengths, tags, d_emissions, d_scores,
    T, B, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """The gradient of what `crf_forward` gives, of rows p, p + P, ...; without it the marginals."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tag = tl.arange(0, KP)
    matrix = load_matrix(transitions, tag[:, None], tag[None, :], K)
    ends = load_vector(end, tag, K)
    steps = tl.full([], T, tl.int64)
    d_matrix, d_start, d_end = tl.zeros_like(matrix), tl.zeros_like(ends), tl.zeros_like(ends)
    for row in range(program, B, programs):
        length = tl.minimum(tl.load(lengths + row), T).to(tl.int32)
        origin = row * steps
        weight = 1.0
        if grad is not None:
            weight = tl.load(grad + row).to(tl.float32)
        if tags is not None:
            weight = -weight
        message, largest, pairs = ends, ends, tl.zeros_like(matrix)
        state, gold, after = ends, tag < 0, tag < 0
        for step in range(length):
            here = origin + length - 1 - step
            if step > 0:
                message, largest, pairs = log_sum_exp(matrix + state[None, :], 1)
            before = load_vector(states + here * K, tag, K)
            mass = tl.maximum(log_sum_exp(before + message, 0)[0], LEAST)
            d_tags = weight * tl.exp(before + message - mass)
            if tags is not None:
                gold = tag == tl.load(tags + here)
                d_tags -= tl.where(gold, weight, 0.0)
            tl.store(d_emissions + here * K + tag, d_tags, mask=tag < K)
            if d_scores is not None:
                pairs *= (weight * tl.exp(before + largest - mass))[:, None]
                if tags is not None:
                    pairs -= tl.where(gold[:, None] & after[None, :], weight, 0.0)
                    after = gold
                d_matrix += tl.where(step > 0, pairs, 0.0)
                d_end += tl.where(step == 0, d_tags, 0.0)
                d_start += tl.where(step == length - 1, d_tags, 0.0)
            state = message + load_vector(emissions + here * K, tag, K)
            state -= finite_max(state, 0)
    if d_scores is not None:
        # Padded, or the places and masks of the matrix would stay in registers all the while.
        d_scores += program.to(tl.int64) * (KP + 2) * KP
        tl.store(d_scores + tag, d_start)
        tl.store(d_scores + KP + tag, d_end)
        tl.store(d_scores + (tag[:, None] + 2) * KP + tag[None, :], d_matrix)


def forward(
    emissions: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor,
    tags: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Launch `crf_forward`.

    Args:
        emissions: [B, T, K], contiguous, as all here; float32, float16 or bfloat16.
        start: [K] float32.
        transitions: [K, K] float32.
        end: [K] float32.
        lengths: [B] int64.
        tags: [B, T] int64, or None.
        save: whether the states are wanted.

    Returns:
        float32 log Z, or log p(tags), [B], and the states [B, T, K], empty if not wanted; they are
        not filled in past the end.
    """
    batch, steps, num_tags = emissions.shape
    value = emissions.new_empty(batch, dtype=torch.float32)
    shape = emissions.shape if save else (0,)
    states = emissions.new_empty(shape, dtype=torch.float32)
    size = padded(num_tags)
    with torch.cuda.device_of(emissions):
        crf_forward[(batch,)](
            emissions, start, transitions, end, lengths, tags, value, states if save else None,
            steps, num_tags, size, **launch_options(size),
        )  # fmt: skip
    return value, states


def backward(
    grad: Tensor | None,
    states: Tensor,
    emissions: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor,
    tags: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch `crf_backward`.

    Args:
        grad: of what `forward` gave, float32 [B]; None: the marginals are wanted.
        states: from `forward`.
        emissions: as for `forward`, and so all that follow.
        transitions: as there.
        end: as there.
        lengths: as there.
        tags: as there.

    Returns:
        The gradient of the emissions, [B, T, K] of their dtype, and in float32 [K + 2, K] those of
        start, of end and of the transitions; without `grad` the marginals in float32, and nothing.
    """
    batch, steps, num_tags = emissions.shape
    programs, size = min(batch, PARTIAL_SUMS), padded(num_tags)
    dtype = torch.float32 if grad is None else emissions.dtype
    d_emissions = emissions.new_zeros(emissions.shape, dtype=dtype)
    d_scores = None
    if grad is not None:
        d_scores = emissions.new_empty(programs, size + 2, size, dtype=torch.float32)
    with torch.cuda.device_of(emissions):
        crf_backward[(programs,)](
            grad, states, emissions, transitions, end, lengths, tags, d_emissions, d_scores,
            steps, batch, num_tags, size, **launch_options(size),
        )  # fmt: skip
    if d_scores is None:
        return d_emissions, d_emissions.new_empty(0)
    return d_emissions, d_scores.sum(0)[: num_tags + 2, :num_tags].contiguous()
