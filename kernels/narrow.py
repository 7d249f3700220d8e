"""Narrow LSTMs over many short rows on a CPU, such as the words of a batch in letters.

Only steps within a row are computed: those of step t of all rows that are that long stand side by
side, as columns, so that vector instructions run over rows, however few the hidden units. Both
directions run in lockstep, the second over rows that are turned round.

Shapes: L lanes (directions), N columns (the lengths of all rows added up), T steps, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .torch_loop import times_tanh

WIDEST, ROWS_A_STEP = 128, 4
"""The most hidden units, and the least rows for each step, with which oneDNN is no faster.

oneDNN plans anew for each number of rows and keeps the plans: with words, that costs memory too.
"""

WIDEST_FORWARD = 64
"""The most hidden units with which torch's packed LSTM is no faster where no gradient follows."""


def short(x: Tensor, hidden: int) -> bool:
    """Whether x [T, B, I] are many short rows for a narrow LSTM, which oneDNN does not suit."""
    return hidden <= WIDEST and x.shape[1] >= ROWS_A_STEP * x.shape[0]


def suits(hidden: int) -> bool:
    """Whether `stack` is faster than packing for many short rows."""
    return hidden <= WIDEST_FORWARD or torch.is_grad_enabled()


class Columns(NamedTuple):
    """Where the steps of padded rows stand.

    Attributes:
        counts: rows that are as long as each step.
        orders: of each lane, the place in [T * B] of each column, [L, N].
        places: of each lane, the column of each place, N in padding, [L, T * B].
        last: the column of each row's last step, [B].
    """

    counts: list[int]
    orders: Tensor
    places: Tensor
    last: Tensor

    @classmethod
    def of(cls, lengths: Tensor, steps: int, lanes: int) -> Columns:
        """Arrange rows of some lengths [B], padded to T steps."""
        sizes, rows = lengths.sort(descending=True, stable=True)
        times = torch.arange(steps)[:, None]
        within = times < sizes
        counts = within.sum(1)
        turned = (times, sizes - 1 - times)[:lanes]
        orders = torch.stack([(t * len(rows) + rows)[within] for t in turned])
        size = orders.shape[1]
        places = orders.new_full((lanes, steps * len(rows)), size)
        places.scatter_(1, orders, torch.arange(size).expand(lanes, -1))
        last = (counts.cumsum(0) - counts)[sizes - 1] + torch.arange(len(rows))
        return cls([n for n in counts.tolist() if n], orders, places, last[rows.argsort()])


class _Lanes(torch.autograd.Function):
    """From the input part of the gates [L, 4H, N] to h and c [L, H, N], initial states zero.

    The rows of g are those of sigmoid(-2x) = (1 - tanh(x)) / 2. Overwrites the input part.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, w_hh: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """All steps; what a step does to the columns that it has not is nothing."""
        parts = gates.unflatten(1, (4, -1)).unbind(1)
        h, c, complement = (torch.empty_like(parts[0]) for _ in range(3))
        steps = zip(*(b.split(counts, -1) for b in (gates, *parts, h, c, complement)), strict=True)
        before: tuple[Tensor, ...] = ()
        for n, (whole, i, f, g, o, h_t, c_t, tanh) in zip(counts, steps, strict=True):
            if before:
                for lane, w, seen in zip(whole, w_hh, before[0], strict=True):
                    lane.addmm_(w, seen[:, :n])
            whole.sigmoid_()
            torch.addcmul(i, i, g, value=-2, out=c_t)
            if before:
                c_t.addcmul_(f, before[1][..., :n])
            times_tanh(o, torch.mul(c_t, -2, out=tanh).sigmoid_(), out=h_t)
            before = h_t, c_t
        ctx.save_for_backward(gates, w_hh, h, c, complement)
        ctx.counts = counts
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dc: Tensor | None) -> tuple[Tensor | None, ...]:
        """Factors that need no gradient to come are made of all steps at once."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "torch's LSTM is differentiable once over padded rows on a CPU: use "
                "backend='reference' for gradients of gradients (create_graph=True)"
            )
        gates, w_hh, h, c, complement = ctx.saved_tensors
        counts, parts = ctx.counts, gates.unflatten(1, (4, -1))
        i, f, g, o = parts.unbind(1)
        h_before, c_before = (_before(s, counts) for s in (h, c))
        grads = torch.empty_like(parts)
        di, df, dg, do = grads.unbind(1)
        u, v = times_tanh(i, g), f * c_before
        torch.addcmul(u, u, i, value=-1, out=di)
        torch.addcmul(v, v, f, value=-1, out=df)
        torch.sub(u, i, out=dg).addcmul_(u, g, value=-2).div_(2)
        torch.addcmul(h, h, o, value=-1, out=do)
        through = torch.sub(o, h).addcmul_(h, complement, value=2)
        whole = grads.flatten(1, 2)
        needed = (whole, grads[:, :3], do, through, f)
        steps = list(zip(*(b.split(counts, -1) for b in needed), strict=True))
        given = [() if d is None else d.split(counts, -1) for d in (dh, dc)]
        now = [torch.zeros_like(h[..., : counts[0]]) for _ in range(2)]
        for t in reversed(range(len(counts))):
            whole_t, joint, do_t, through_t, f_t = steps[t]
            dh_t, dc_t = (d[..., : counts[t]] for d in now)
            for d, more in zip((dh_t, dc_t), given, strict=True):
                if more:
                    d.add_(more[t])
            dc_t.addcmul_(dh_t, through_t)
            joint.mul_(dc_t.unsqueeze(1))
            do_t.mul_(dh_t)
            dc_t.mul_(f_t)
            for lane, w, out in zip(whole_t, w_hh, dh_t, strict=True):
                if t:
                    torch.mm(w.t(), lane, out=out)
        dw = torch.stack([d @ s.t() for d, s in zip(whole, h_before, strict=True)])
        return whole, dw, None


def _before(states: Tensor, counts: list[int]) -> Tensor:
    """The states [L, H, N] of the step before each."""
    kept = [s[..., :n] for s, n in zip(states.split(counts, -1), counts[1:], strict=False)]
    return torch.cat([torch.zeros_like(states[..., : counts[0]]), *kept], -1)


def stack(
    x: Tensor,
    weights: Sequence[Tensor],
    lengths: Tensor,
    directions: int,
    layers: int,
    dropout: float,
    training: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run LSTMs without initial states over a padded batch [T, B, I]; else as `native`."""
    columns = Columns.of(lengths, x.shape[0], directions)
    number = len(weights) // (layers * directions)
    runs = [weights[k : k + number] for k in range(0, len(weights), number)]
    finals = []
    for layer in range(layers):
        x = F.dropout(x, dropout, training) if layer else x
        x, *final = _layer(x, runs[layer * directions : (layer + 1) * directions], columns)
        finals.append(final)
    h, c = map(torch.cat, zip(*finals, strict=True))
    return x, (h, c)


def _layer(
    x: Tensor, weights: Sequence[Sequence[Tensor]], columns: Columns
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer: the output [T, B, L*H] and the final states [L, B, H]."""
    rows = x.flatten(0, 1)
    size = weights[0][1].shape[1]
    scale = x.new_tensor([1, 1, -2, 1]).repeat_interleave(size)[:, None]
    gates = []
    for (w_ih, _, *biases), order in zip(weights, columns.orders, strict=True):
        seen = rows.index_select(0, order).t()
        bias = torch.stack(biases).sum(0)[:, None] if biases else torch.zeros_like(scale)
        gates.append(torch.addmm(bias * scale, w_ih * scale, seen))
    w_hh = torch.stack([own[1] for own in weights]) * scale
    h, c = _Lanes.apply(torch.stack(gates), w_hh, columns.counts)
    last = (s.index_select(2, columns.last).mT for s in (h, c))
    lanes = zip(F.pad(h, (0, 1)).mT.contiguous(), columns.places, strict=True)
    y = torch.cat([lane.index_select(0, place) for lane, place in lanes], -1)
    return y.view(*x.shape[:2], -1), *last
