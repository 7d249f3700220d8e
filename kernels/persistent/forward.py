"""The forward time loop of every cell, and its launcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import CELLS
from . import cells
from .launch import UNSPECIALISED, Masks, interpreted, run, workspace
from .plan import BLOCKS, LaunchPlan, config
from .primitives import forward_weights, kept, load_blocks, store_blocks


@triton.jit(
    repr=lambda s: f"rnn_forward_{s.constants['CELL'].__name__}", do_not_specialize=UNSPECIALISED
)
def forward_kernel(
    x, w, bias, extra, state_in, state_out, y, saved, buffers, sync, lengths, masks,
    T, B, seed, origin, first, last,
    CELL: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Steps first .. last of one slice of one group; the grid is slices x (directions x tiles)."""
    slice_, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    place = (slice_, group, groups)
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

    if C.PRODUCTS == 1:
        weights = (forward_weights(w, slice_, 0, C.G, C),)
    else:
        weights = (forward_weights(w, slice_, 0, 2, C), forward_weights(w, slice_, 2, 1, C))
    shift, params, keep = (), (), ()
    if bias is not None:
        shift = load_blocks(bias + direction * (C.G * C.H), unit, unit < C.H, C.G, C)
    if extra is not None:
        N: tl.constexpr = C.PARAMETERS
        params = load_blocks(extra + direction * (N * C.H), unit, unit < C.H, N, C)
    dropped, scale = masks[0], masks[1]
    here = direction * B + top + row
    if scale is not None:
        keep = (tl.where(kept(seed, 0, here, unit, 0, dropped)[0], scale, 0.0),)

    state = ()
    resting = (direction * B + top).to(tl.int64) * C.H + row * C.H + unit
    for i in tl.static_range(len(state_in)):
        state = state + (tl.load(state_in[i] + resting, mask=real, other=0.0).to(tl.float32),)
    counter = sync[0] + (origin + group) * 32
    for step in range(first, tl.minimum(last, steps)):
        t = tl.where(direction == 1, steps - 1 - step, step)
        alive = real & (t < length)
        base = ((t.to(tl.int64) * B + top) * C.D + direction) * C.H
        pitch = row * (C.D * C.H)
        x_t = load_blocks(x + base * C.G, pitch * C.G + unit, alive, C.G, C)
        link = (place, weights, w, shift, keep, buffers, (counter, sync[1]), step)
        new, blocks, statistics = CELL(x_t, state, params, link, C)
        state = _advance(state, new, alive, masks, seed, t, here, unit, C)
        h = tl.where(alive, state[0], 0.0).to(y.dtype.element_ty)
        tl.store(y + base + pitch + unit, h, mask=real)
        if saved[1] is not None:
            store_blocks(saved[1] + base, pitch + unit, (state[1],), real, C)
        if saved[0] is not None:
            store_blocks(saved[0] + base * C.SAVED, pitch * C.SAVED + unit, blocks, real, C)
            for i in tl.static_range(len(statistics)):
                one = saved[2] + base // C.H * len(statistics) + i
                one += row * (C.D * len(statistics))
                tl.store(one, statistics[i], mask=(top + row < B) & (slice_ == 0))
    for i in tl.static_range(len(state)):
        value = state[i].to(state_out[i].dtype.element_ty)
        tl.store(state_out[i] + resting, value, mask=real)


@triton.jit
def _advance(state, new, alive, masks, seed, t, here, unit, C: tl.constexpr):
    """The state after the step: zoneout, and rows that rest keep theirs."""
    zoned, zoneout = masks[2], masks[3]
    out = ()
    if C.ZONEOUT == 2:
        updated = kept(seed, t, here, unit, 1, zoned)
    for i in tl.static_range(len(new)):
        value = new[i]
        if C.ZONEOUT == 1:
            value = zoneout * state[i] + (1.0 - zoneout) * value
        elif C.ZONEOUT == 2:
            value = tl.where(updated[i], value, state[i])
        out = out + (tl.where(alive, value, state[i]),)
    return out


@dataclass(frozen=True)
class Saved:
    """What the forward pass keeps for the gradient.

    Attributes:
        blocks: [T, B, D, SAVED*H], the cell's activations, or None.
        cell_state: c after each step [T, B, D, H], or None.
        statistics: float32 [T, B, D, n] of normalisations, or None.
    """

    blocks: Tensor | None = None
    cell_state: Tensor | None = None
    statistics: Tensor | None = None


def forward(
    plan: LaunchPlan,
    x_gates: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    params: Tensor | None,
    state: Sequence[Tensor],
    lengths: Tensor | None,
    masks: Masks,
    save: str,
) -> tuple[Tensor, tuple[Tensor, ...], Saved]:
    """Run the forward loop.

    Args:
        plan: the launch.
        x_gates: input part of the gates [T, B, D, G*H], T and B at least 1.
        w_hh: [D, G*H, H], of x_gates's dtype.
        b_hh: [D, G*H] or None.
        params: extra parameters one after another [D, n*H], or None.
        state: initial states [D, B, H].
        lengths: int64 [B] or None.
        masks: dropout and zoneout.
        save: what to keep for the gradient: "all", only the cell "state", or "nothing".

    Returns:
        Output [T, B, D*H], final states, and what the gradient needs.
    """
    steps, batch, directions, _ = x_gates.shape
    blocks, size = BLOCKS[plan.cell], plan.hidden_size
    space = workspace(plan, len(blocks.products), CELLS[plan.cell].exchanges, x_gates)
    # The loop of a tile ends with its longest row; what it does not reach must read as zero.
    new = x_gates.new_empty if lengths is None else x_gates.new_zeros
    y = new(steps, batch, directions * size)
    shape = (steps, batch, directions)
    everything = save == "all"
    saved = Saved(
        new(*shape, blocks.saved * size) if everything else None,
        new(*shape, size) if len(state) == 2 and save != "nothing" else None,
        new(*shape, blocks.statistics, dtype=torch.float32)
        if everything and blocks.statistics
        else None,
    )
    final = run(
        forward_kernel,
        plan,
        steps,
        state,
        x_gates.dtype,
        partial(config, plan, masks.zoneout_mode, interpreted(forward_kernel)),
        x=x_gates,
        w=w_hh,
        bias=b_hh,
        extra=params,
        y=y,
        saved=(saved.blocks, saved.cell_state, saved.statistics),
        buffers=space.buffers,
        sync=space.sync,
        lengths=lengths,
        masks=masks.arguments,
        seed=masks.seed,
        T=steps,
        B=batch,
        CELL=getattr(cells, plan.cell),
    )
    return y, final, saved
