"""The reverse-time loop of every cell, which yields the gates' gradients, and its launcher."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import CELLS
from . import cells
from .forward import Saved
from .launch import UNSPECIALISED, Masks, interpreted, run, workspace
from .plan import BLOCKS, LaunchPlan, config
from .primitives import backward_weights, kept, load_blocks, store_blocks


@triton.jit(
    repr=lambda s: f"rnn_backward_{s.constants['CELL'].__name__}", do_not_specialize=UNSPECIALISED
)
def backward_kernel(
    dy, w, extra, initial, history, saved, grads, state_in, state_out, buffers, sync, lengths,
    masks, T, B, seed, origin, first, last,
    CELL: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Steps first .. last, counted from the end, of one slice of one group; forward's grid."""
    slice_, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    direction, top = (origin + group) % C.D, (origin + group) // C.D * C.R
    w += direction.to(tl.int64) * (C.G * C.H * C.H)
    unit = (slice_ * C.U + tl.arange(0, C.U))[:, None]
    row = tl.arange(0, C.R)[None, :]
    real = (unit < C.H) & (top + row < B)
    length = T
    steps = T
    if lengths is not None:
        length = tl.load(lengths + top + row, mask=top + row < B, other=0).to(tl.int32)
        steps = tl.max(tl.max(length, 1), 0)

    weights = backward_weights(w, slice_, C)
    params, keep = (), ()
    if extra is not None:
        N: tl.constexpr = C.PARAMETERS
        params = load_blocks(extra + direction * (N * C.H), unit, unit < C.H, N, C)
    dropped, scale = masks[0], masks[1]
    here = direction * B + top + row
    if scale is not None:
        keep = (tl.where(kept(seed, 0, here, unit, 0, dropped)[0], scale, 0.0),)

    resting = (direction * B + top).to(tl.int64) * C.H + row * C.H + unit
    d, start = (), ()
    for i in tl.static_range(len(state_in)):
        d = d + (tl.load(state_in[i] + resting, mask=real, other=0.0).to(tl.float32),)
        start = start + (tl.load(initial[i] + resting, mask=real, other=0.0).to(tl.float32),)
    pitch = row * (C.D * C.H)
    peers = (pitch * C.G, top + row < B)
    counter = sync[0] + (origin + group) * 32
    at = (direction, top, row, unit, real, length, steps)
    now = _recall(dy, saved, history, start, at, first, T, B, C)
    for step in range(first, tl.minimum(last, steps)):
        coming = _recall(dy, saved, history, start, at, step + 1, T, B, C)
        t, alive = _time(at, step)
        base = ((t.to(tl.int64) * B + top) * C.D + direction) * C.H
        link = (
            (slice_, group, groups), weights, w, keep, grads[0] + base * C.G, pitch * C.G + unit,
            real, peers, buffers, (counter, sync[1]), step,
        )  # fmt: skip
        dy_t, blocks, statistics, previous = now
        share_, held = _divide((d[0] + dy_t,) + d[1:], alive, masks, seed, t, here, unit, C)
        gates, d = CELL(share_, blocks, statistics, previous, params, link, C)
        if C.SEPARATE > 0:
            store_blocks(grads[1] + base * C.SEPARATE, pitch * C.SEPARATE + unit, gates, real, C)
        total = ()
        for i in tl.static_range(len(held)):
            total = total + (d[i] + held[i],)
        d = total
        now = coming
    for i in tl.static_range(len(d)):
        tl.store(state_out[i] + resting, d[i].to(state_out[i].dtype.element_ty), mask=real)


@triton.jit
def _time(at, step):
    """The time index of a backward step, and which rows and units it concerns."""
    direction, real, length, steps = at[0], at[4], at[5], at[6]
    t = tl.where(direction == 1, step, steps - 1 - step)
    return t, real & (t < length) & (step < steps)


@triton.jit
def _recall(dy, saved, history, start, at, step, T, B, C: tl.constexpr):
    """What the backward step needs from memory: asked for one step early, to be there in time."""
    direction, top, row, unit, _, length, steps = at
    t, alive = _time(at, step)
    before = tl.where(direction == 1, t + 1, t - 1)
    known = alive & (before >= 0) & (before < length)
    base = ((t.to(tl.int64) * B + top) * C.D + direction) * C.H
    last = ((before.to(tl.int64) * B + top) * C.D + direction) * C.H
    offsets = row * (C.D * C.H) + unit
    dy_t = tl.load(dy + base + offsets, mask=alive, other=0.0).to(tl.float32)
    blocks = load_blocks(
        saved[0] + base * C.SAVED, row * (C.D * C.H * C.SAVED) + unit, alive, C.SAVED, C
    )
    previous = ()
    for i in tl.static_range(len(history)):
        value = tl.load(history[i] + last + offsets, mask=known, other=0.0).to(tl.float32)
        previous = previous + (tl.where(known, value, start[i]),)
    statistics = ()
    for i in tl.static_range(C.STATISTICS):
        one = saved[1] + base // C.H * C.STATISTICS + i + row * (C.D * C.STATISTICS)
        here = (top + row < B) & (t < length) & (step < steps)
        statistics = statistics + (tl.load(one, mask=here, other=0.0),)
    return dy_t, blocks, statistics, previous


@triton.jit
def _divide(d, alive, masks, seed, t, here, unit, C: tl.constexpr):
    """Splits the gradients of the state into what the step computed and what it kept."""
    zoned, zoneout = masks[2], masks[3]
    computed, held = (), ()
    if C.ZONEOUT == 2:
        updated = kept(seed, t, here, unit, 1, zoned)
    for i in tl.static_range(len(d)):
        part = tl.where(alive, d[i], 0.0)
        if C.ZONEOUT == 1:
            part = part * (1.0 - zoneout)
        elif C.ZONEOUT == 2:
            part = tl.where(updated[i], part, 0.0)
        computed = computed + (part,)
        held = held + (d[i] - part,)
    return computed, held


def backward(
    plan: LaunchPlan,
    dy: Tensor,
    d_state: Sequence[Tensor],
    w_hh: Tensor,
    params: Tensor | None,
    initial: Sequence[Tensor],
    y: Tensor,
    saved: Saved,
    lengths: Tensor | None,
    masks: Masks,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Run the backward loop.

    Args:
        plan: the launch.
        dy: gradient of the output [T, B, D*H], contiguous.
        d_state: gradients of the final states [D, B, H].
        w_hh: [D, G*H, H].
        params: as in `forward`.
        initial: initial states [D, B, H].
        y: output of the forward loop.
        saved: what it kept; `blocks` must be there.
        lengths: int64 [B] or None.
        masks: as in `forward`.

    Returns:
        Gradient of the recurrent part of the gates [T, B, D, G*H]; that of their input part, the
        same tensor or one of its own, [T, B, D, SEPARATE*H]; gradients of the initial states,
        float32.
    """
    steps, batch = dy.shape[:2]
    cell, size = BLOCKS[plan.cell], plan.hidden_size
    new = dy.new_empty if lengths is None else dy.new_zeros
    recurrent = new(steps, batch, plan.directions, CELLS[plan.cell].gates * size)
    inputs = recurrent
    if cell.separate:
        inputs = new(steps, batch, plan.directions, cell.separate * size)
    space = workspace(plan, 0, CELLS[plan.cell].exchanges, dy)
    d_initial = run(
        backward_kernel,
        plan,
        steps,
        d_state,
        torch.float32,
        partial(config, plan, masks.zoneout_mode, interpreted(backward_kernel)),
        dy=dy,
        w=w_hh,
        extra=params,
        initial=tuple(initial),
        history=(y,) if saved.cell_state is None else (y, saved.cell_state),
        saved=(saved.blocks, saved.statistics),
        grads=(recurrent, inputs),
        buffers=space.buffers,
        sync=space.sync,
        lengths=lengths,
        masks=masks.arguments,
        seed=masks.seed,
        T=steps,
        B=batch,
        CELL=getattr(cells, f"{plan.cell}_grad"),
    )
    return recurrent, inputs, d_initial
