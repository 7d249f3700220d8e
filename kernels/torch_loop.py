"""Every cell in plain torch operations, the backward through time written out: the CPU path.

The time loop is written once; a cell is a pair of functions, a step and its gradient, that fill
buffers in place. Matrix products that need no order in time (the input's, and those of all weight
gradients) are outside the loop. Rows are sorted by length, so that a step works on the first n
rows, those that are that long, and padding costs nothing.

Buffers of states have T + 1 slots in the order of time: the step at t reads slot t and writes slot
t + 1, or in the reverse direction reads t + 1 and writes t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import recurrent_mask, zoneout_masks
from .spec import CELLS, LAYER_NORM_EPS
from .untraced import untraced

State = tuple[Tensor, ...]


class Weights(NamedTuple):
    """What the steps of one direction multiply with.

    Attributes:
        hh: recurrent matrix [G*H, P].
        hn: bias inside the reset gate of the reset-after GRU, [H], or None.
        params: extra parameters of the cell, in the order of its spec, each [n*H].
    """

    hh: Tensor
    hn: Tensor | None
    params: Sequence[Tensor]


class Saved(NamedTuple):
    """What the gradient of a step reads, at one time or at all times.

    Attributes:
        gates: activated gates [..., G*H].
        apart: what the cell keeps besides the gates, [..., n*H].
        seen: h_{t-1} as the recurrent product sees it, [..., P].
        prev: the states at t - 1.
    """

    gates: Tensor
    apart: Tensor
    seen: Tensor
    prev: State


class Grads(NamedTuple):
    """What the gradient of a step fills, at one time or at all times.

    Attributes:
        gates: gradient of the gates before activation, which is that of the input part, [..., G*H].
        apart: gradient of what was kept apart, [..., n*H].
        params: gradient of each extra parameter so far, row by row, [B, n*H].
    """

    gates: Tensor
    apart: Tensor
    params: Sequence[Tensor]


def tanh_(x: Tensor) -> Tensor:
    """Tanh in place as 2 sigmoid(2x) - 1, half the time of torch.tanh on a CPU, 1e-7 off."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


def tanh_grad(grad: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient through y = tanh(.): grad (1 - y^2)."""
    return torch.addcmul(grad, grad * y, y, value=-1, out=out)


def _rnn_tanh(z: Tensor, seen: Tensor, prev: State, new: State, apart: Tensor, w: Weights) -> None:
    new[0].copy_(tanh_(z.addmm_(seen, w.hh.t())))


def _rnn_tanh_grad(
    d: Grads, dh: Tensor, dc: Tensor, s: Saved, w: Weights
) -> tuple[Tensor, Tensor | None]:
    return tanh_grad(dh, s.gates, out=d.gates) @ w.hh, None


def _rnn_relu(z: Tensor, seen: Tensor, prev: State, new: State, apart: Tensor, w: Weights) -> None:
    new[0].copy_(z.addmm_(seen, w.hh.t()).relu_())


def _rnn_relu_grad(
    d: Grads, dh: Tensor, dc: Tensor, s: Saved, w: Weights
) -> tuple[Tensor, Tensor | None]:
    return torch.mul(dh, s.gates > 0, out=d.gates) @ w.hh, None


def update_cell(z: Tensor, c_prev: Tensor, out: Tensor) -> Tensor:
    """c_t = f c_{t-1} + i g, activating i, f and g."""
    i, f, g, _ = z.chunk(4, 1)
    g.mul_(2)
    z[:, : 3 * c_prev.shape[1]].sigmoid_()
    g.mul_(2).sub_(1)
    return torch.mul(f, c_prev, out=out).addcmul_(i, g)


def _gates_grad(d: Sequence[Tensor], gates: Sequence[Tensor], dc: Tensor, c_prev: Tensor) -> None:
    """From dc_t: di, df and dg, where d holds z - z^2 on entry, and dc_{t-1} in place of dc_t."""
    i, f, g, _ = gates
    di, df, dg, _ = d
    di.mul_(g).mul_(dc)
    df.mul_(c_prev).mul_(dc)
    tanh_grad(dc * i, g, out=dg)
    dc.mul_(f)


def _lstm(z: Tensor, seen: Tensor, prev: State, new: State, apart: Tensor, w: Weights) -> None:
    i, f, _, o = z.addmm_(seen, w.hh.t()).chunk(4, 1)
    if w.params:
        i.addcmul_(prev[1], w.params[0])
        f.addcmul_(prev[1], w.params[1])
    c = update_cell(z, prev[1], out=new[1])
    if w.params:
        o.addcmul_(c, w.params[2])
    torch.mul(o.sigmoid_(), tanh_(apart.copy_(c)), out=new[0])


def _lstm_grad(
    d: Grads, dh: Tensor, dc: Tensor, s: Saved, w: Weights
) -> tuple[Tensor, Tensor | None]:
    gates, c_prev, tanh_c = s.gates.chunk(4, 1), s.prev[1], s.apart
    dgates = torch.addcmul(s.gates, s.gates, s.gates, value=-1, out=d.gates).chunk(4, 1)
    (i, f, g, o), (di, df, _, do) = gates, dgates
    do.mul_(tanh_c).mul_(dh)
    dc.add_(tanh_grad(dh * o, tanh_c))
    if w.params:
        dc.addcmul_(do, w.params[2])
        d.params[2].addcmul_(do, (f * c_prev).addcmul_(i, g))
    _gates_grad(dgates, gates, dc, c_prev)
    if w.params:
        dc.addcmul_(di, w.params[0]).addcmul_(df, w.params[1])
        d.params[0].addcmul_(di, c_prev)
        d.params[1].addcmul_(df, c_prev)
    return d.gates @ w.hh, None


def _layer_norm(
    x: Tensor, gain: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(x, x.shape[-1:], gain, bias, LAYER_NORM_EPS)


def _layer_norm_grad(
    grad: Tensor, x: Tensor, gain: Tensor, bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    _, mean, rstd = _layer_norm(x, gain, bias)
    backward = torch.ops.aten.native_layer_norm_backward
    return backward(grad, x, x.shape[-1:], mean, rstd, gain, bias, wanted)


def _lstm_layernorm(
    z: Tensor, seen: Tensor, prev: State, new: State, apart: Tensor, w: Weights
) -> None:
    _, ln_hh, ln_c, ln_c_bias = w.params
    recurrent, cell = apart.split((z.shape[1], prev[1].shape[1]), 1)
    torch.mm(seen, w.hh.t(), out=recurrent)
    z.add_(_layer_norm(recurrent, ln_hh)[0])
    cell.copy_(update_cell(z, prev[1], out=new[1]))
    o = z.chunk(4, 1)[3].sigmoid_()
    torch.mul(o, tanh_(_layer_norm(cell, ln_c, ln_c_bias)[0]), out=new[0])


def _lstm_layernorm_grad(
    d: Grads, dh: Tensor, dc: Tensor, s: Saved, w: Weights
) -> tuple[Tensor, Tensor | None]:
    _, ln_hh, ln_c, ln_c_bias = w.params
    sizes = (d.gates.shape[1], dc.shape[1])
    (recurrent, cell), (drecurrent, dnormed) = s.apart.split(sizes, 1), d.apart.split(sizes, 1)
    gates = s.gates.chunk(4, 1)
    dgates = torch.addcmul(s.gates, s.gates, s.gates, value=-1, out=d.gates).chunk(4, 1)
    o, do = gates[3], dgates[3]
    tanh_c = tanh_(_layer_norm(cell, ln_c, ln_c_bias)[0])
    do.mul_(tanh_c).mul_(dh)
    tanh_grad(dh * o, tanh_c, out=dnormed)
    dc.add_(_layer_norm_grad(dnormed, cell, ln_c, ln_c_bias, (True, False, False))[0])
    _gates_grad(dgates, gates, dc, s.prev[1])
    drecurrent.copy_(_layer_norm_grad(d.gates, recurrent, ln_hh, None, (True, False, False))[0])
    return drecurrent @ w.hh, None


def _gru(z: Tensor, seen: Tensor, prev: State, new: State, apart: Tensor, w: Weights) -> None:
    size = apart.shape[1]
    r, update, n = z.chunk(3, 1)
    z[:, : 2 * size].addmm_(seen, w.hh[: 2 * size].t()).sigmoid_()
    torch.mm(seen, w.hh[2 * size :].t(), out=apart)
    if w.hn is not None:
        apart.add_(w.hn)
    torch.lerp(tanh_(n.addcmul_(r, apart)), prev[0], update, out=new[0])


def _interpolation_grad(dz: Tensor, dh: Tensor, s: Saved) -> tuple[Tensor, Tensor]:
    """Fill dz and dn of h_t = n + z (h_{t-1} - n); return dn and what h_{t-1} gets directly."""
    _, update, n = s.gates.chunk(3, 1)
    _, dupdate, dn = dz.chunk(3, 1)
    direct = dh * update
    change = (s.prev[0] - n).mul_(direct)
    torch.addcmul(change, change, update, value=-1, out=dupdate)
    return tanh_grad(dh - direct, n, out=dn), direct


def _gru_grad(
    d: Grads, dh: Tensor, dc: Tensor, s: Saved, w: Weights
) -> tuple[Tensor, Tensor | None]:
    size = dh.shape[1]
    r, dboth = s.gates[:, :size], d.gates[:, : 2 * size]
    dn, direct = _interpolation_grad(d.gates, dh, s)
    torch.mul(dn, r, out=d.apart)
    reset = d.apart * s.apart
    torch.addcmul(reset, reset, r, value=-1, out=dboth[:, :size])
    return (dboth @ w.hh[: 2 * size]).addmm_(d.apart, w.hh[2 * size :]), direct


def _gru_reset_before(
    z: Tensor, seen: Tensor, prev: State, new: State, apart: Tensor, w: Weights
) -> None:
    size = prev[0].shape[1]
    r, update, n = z.chunk(3, 1)
    z[:, : 2 * size].addmm_(seen, w.hh[: 2 * size].t()).sigmoid_()
    n.addmm_(r * seen, w.hh[2 * size :].t())
    torch.lerp(tanh_(n), prev[0], update, out=new[0])


def _gru_reset_before_grad(
    d: Grads, dh: Tensor, dc: Tensor, s: Saved, w: Weights
) -> tuple[Tensor, Tensor | None]:
    size = dh.shape[1]
    r, dboth = s.gates[:, :size], d.gates[:, : 2 * size]
    dn, direct = _interpolation_grad(d.gates, dh, s)
    dseen = (dn @ w.hh[2 * size :]).mul_(r)
    reset = dseen * s.seen
    torch.addcmul(reset, reset, r, value=-1, out=dboth[:, :size])
    return dseen.addmm_(dboth, w.hh[: 2 * size]), direct


WeightGrads = tuple[Tensor, Tensor | None, list[Tensor | None]]


def product_grad(dz: Tensor, seen: Tensor) -> Tensor:
    """Gradient of W in z = seen W^T, summed over time and batch."""
    return dz.flatten(0, 1).t() @ seen.flatten(0, 1)


def _weight_grads(d: Grads, s: Saved, w: Weights) -> WeightGrads:
    return product_grad(d.gates, s.seen), None, [p.sum(0) for p in d.params]


def _lstm_layernorm_weight_grads(d: Grads, s: Saved, w: Weights) -> WeightGrads:
    _, ln_hh, ln_c, ln_c_bias = w.params
    sizes = (d.gates.shape[-1], s.prev[1].shape[-1])
    (recurrent, cell), (drecurrent, dnormed) = s.apart.split(sizes, -1), d.apart.split(sizes, -1)
    _, gain_hh, _ = _layer_norm_grad(d.gates, recurrent, ln_hh, None, (False, True, False))
    _, gain_c, bias_c = _layer_norm_grad(dnormed, cell, ln_c, ln_c_bias, (False, True, True))
    return product_grad(drecurrent, s.seen), None, [None, gain_hh, gain_c, bias_c]


def _gru_weight_grads(d: Grads, s: Saved, w: Weights) -> WeightGrads:
    both = d.gates[..., : 2 * d.apart.shape[-1]]
    dw = torch.cat([product_grad(part, s.seen) for part in (both, d.apart)])
    return dw, None if w.hn is None else d.apart.sum((0, 1)), []


def _gru_reset_before_weight_grads(d: Grads, s: Saved, w: Weights) -> WeightGrads:
    size = s.seen.shape[-1]
    both, dn = d.gates.split((2 * size, size), -1)
    reset = product_grad(dn, s.gates[..., :size] * s.seen)
    return torch.cat([product_grad(both, s.seen), reset]), None, []


@dataclass(frozen=True)
class Cell:
    """A cell's step and gradient.

    Attributes:
        step: (gates, seen, prev, new, apart, weights): turns the input part of the gates into the
            activated gates, fills `new` and `apart`.
        grad: (grads, dh, dc, saved, weights): fills `grads`, turns dc_t into dc_{t-1}, and returns
            the gradients of `seen` and of h_{t-1} where the cell uses it directly.
        weight_grads: (grads, saved, weights), all times at once: the gradients of the weights.
        apart: n, the width of `apart` as a multiple of H.
    """

    step: Callable[[Tensor, Tensor, State, State, Tensor, Weights], None]
    grad: Callable[[Grads, Tensor, Tensor, Saved, Weights], tuple[Tensor, Tensor | None]]
    weight_grads: Callable[[Grads, Saved, Weights], WeightGrads] = _weight_grads
    apart: int = 0


STEPS: dict[str, Cell] = {
    "rnn_tanh": Cell(_rnn_tanh, _rnn_tanh_grad),
    "rnn_relu": Cell(_rnn_relu, _rnn_relu_grad),
    "lstm": Cell(_lstm, _lstm_grad, apart=1),
    "lstm_peephole": Cell(_lstm, _lstm_grad, apart=1),
    "lstm_layernorm": Cell(
        _lstm_layernorm, _lstm_layernorm_grad, _lstm_layernorm_weight_grads, apart=5
    ),
    "gru": Cell(_gru, _gru_grad, _gru_weight_grads, apart=1),
    "gru_reset_before": Cell(
        _gru_reset_before, _gru_reset_before_grad, _gru_reset_before_weight_grads
    ),
}


class Options(NamedTuple):
    """How one direction runs.

    Attributes:
        cell: name in `STEPS`.
        reverse: whether it runs from last step to first.
        lengths: valid steps of each row, longest first, int64 [B], or None.
        counts: for each time, how many rows are that long.
        mask: what the recurrent product multiplies h with, [B, P], or None.
        update: for h and c, the part of a new value that zoneout takes, [T, B, size] or a number;
            empty without zoneout.
    """

    cell: str
    reverse: bool
    lengths: Tensor | None
    counts: Sequence[int]
    mask: Tensor | None
    update: Sequence[Tensor | float]

    def order(self) -> Sequence[int]:
        """Times in the order of the recurrence."""
        times = range(len(self.counts))
        return times[::-1] if self.reverse else times

    def before_and_after(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Of T + 1 slots, those that the steps read and those that they write, by time."""
        return (states[1:], states[:-1]) if self.reverse else (states[:-1], states[1:])

    def buffer(self, like: Tensor, *shape: int) -> Tensor:
        """Memory for all times, zero where a step may not write it."""
        return like.new_empty(shape) if self.lengths is None else like.new_zeros(shape)

    def rows(self, tensor: Tensor) -> Sequence[Tensor]:
        """For each time of [T, B, ...], the rows that are that long."""
        times = tensor.unbind(0)
        if self.lengths is None:
            return times
        return [rows[:n] for rows, n in zip(times, self.counts, strict=True)]

    def zoneout(self) -> Sequence[Sequence[Tensor | float]]:
        """For each time, the part of each new state that is taken."""
        steps = len(self.counts)
        parts = ([u] * steps if isinstance(u, float) else self.rows(u) for u in self.update)
        return list(zip(*parts, strict=True)) or [()] * steps


class _Recurrence(torch.autograd.Function):
    """One direction. Overwrites `gates`, the input part, with the activated gates."""

    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        gates: Tensor,
        w_hh: Tensor,
        b_hn: Tensor | None,
        w_hr: Tensor | None,
        count: int,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        initial, params = rest[:count], rest[count:]
        steps, batch, rows = gates.shape
        spec, cell = CELLS[options.cell], STEPS[options.cell]
        hidden = rows // spec.gates
        weights = Weights(w_hh, b_hn, params)
        last = steps if options.lengths is None else options.lengths
        first, last = (last, 0) if options.reverse else (0, last)
        row = torch.arange(batch, device=gates.device)
        states = [options.buffer(s, steps + 1, *s.shape) for s in initial]
        for buffer, value in zip(states, initial, strict=True):
            buffer[first, row] = value
        before, after = zip(*(options.before_and_after(s) for s in states), strict=True)
        apart = options.buffer(gates, steps, batch, cell.apart * hidden)
        unprojected = options.buffer(gates, steps, batch, 0 if w_hr is None else hidden)
        z, kept = options.rows(gates), options.rows(apart)
        old, new = (list(zip(*map(options.rows, s), strict=True)) for s in (before, after))
        raw = options.rows(unprojected)
        parts = options.zoneout()
        for t in options.order():
            seen = old[t][0]
            if options.mask is not None:
                seen = seen * options.mask[: options.counts[t]]
            out = new[t] if w_hr is None else (raw[t], *new[t][1:])
            cell.step(z[t], seen, old[t], out, kept[t], weights)
            if w_hr is not None:
                torch.mm(raw[t], w_hr.t(), out=new[t][0])
            for part, fresh, stale in zip(parts[t], new[t], old[t], strict=False):
                torch.lerp(stale, fresh, part, out=fresh)
        ctx.save_for_backward(gates, apart, unprojected, w_hh, b_hn, w_hr, *states, *params)
        ctx.options, ctx.count = options, count
        ctx.set_materialize_grads(False)
        y = after[0]
        if options.reverse and options.lengths is not None:
            beyond = torch.arange(steps, device=y.device)[:, None] >= options.lengths
            y = y.masked_fill(beyond[..., None], 0.0)
        return y, *(s[last, row] for s in states)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the backward of backend='torch' is not differentiable for this cell: use "
                "backend='reference' for gradients of gradients (create_graph=True)"
            )
        gates, apart, unprojected, w_hh, b_hn, w_hr, *rest = ctx.saved_tensors
        options, states, params = ctx.options, rest[: ctx.count], rest[ctx.count :]
        cell, weights = STEPS[options.cell], Weights(w_hh, b_hn, params)
        before = tuple(options.before_and_after(s)[0] for s in states)
        seen = before[0] if options.mask is None else before[0] * options.mask
        saved = Saved(gates, apart, seen, before)
        dstate = [
            torch.zeros_like(s[0]) if d is None else d.clone()
            for s, d in zip(states, dfinal, strict=True)
        ]
        grads = Grads(
            options.buffer(gates, *gates.shape),
            options.buffer(gates, *apart.shape),
            [gates.new_zeros(gates.shape[1], p.shape[0]) for p in params],
        )
        size = 0 if w_hr is None else w_hr.shape[0]
        dprojected = options.buffer(gates, *gates.shape[:2], size)
        z, kept, see = (options.rows(b) for b in (gates, apart, seen))
        dz, dkept = options.rows(grads.gates), options.rows(grads.apart)
        old = list(zip(*map(options.rows, before), strict=True))
        dys = None if dy is None else options.rows(dy)
        parts = options.zoneout()
        for t in reversed(options.order()):
            n = options.counts[t]
            now = [d[:n] for d in dstate]
            if dys is not None:
                now[0].add_(dys[t])
            held = [d * (1 - part) for part, d in zip(parts[t], now, strict=False)]
            for part, d in zip(parts[t], now, strict=False):
                d.mul_(part)
            dh = now[0]
            if w_hr is not None:
                dprojected[t, :n] = dh
                dh = dh @ w_hr
            step = Grads(dz[t], dkept[t], [p[:n] for p in grads.params])
            then = Saved(z[t], kept[t], see[t], old[t])
            dseen, direct = cell.grad(step, dh, now[-1], then, weights)
            if options.mask is not None:
                dseen.mul_(options.mask[:n])
            now[0].copy_(dseen if direct is None else dseen.add_(direct))
            for d, part in zip(now, held, strict=False):
                d.add_(part)
        dw_hh, db_hn, dparams = cell.weight_grads(grads, saved, weights)
        dw_hr = None if w_hr is None else product_grad(dprojected, unprojected)
        return None, grads.gates, dw_hh, db_hn, dw_hr, None, *dstate, *dparams


def saved_gates(y: Tensor) -> list[Tensor]:
    """The activated gates of each direction, from the graph of an output of `recurrence`.

    Args:
        y: an output that wants gradients, whose inputs have no history of this kind of their own.

    Returns:
        For each direction [T, B, G*H], rows from the longest to the shortest (ties as they were);
        past a row's end there is nothing of meaning.
    """
    nodes, found = [y.grad_fn], {}
    while nodes:
        node = nodes.pop()
        if isinstance(node, _Recurrence._backward_cls):
            found[node.options.reverse] = node.saved_tensors[0]
        elif node is not None:
            nodes.extend(parent for parent, _ in node.next_functions)
    return [found[reverse] for reverse in sorted(found)]


def _input_part(cell: str, x: Tensor, w: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The gates' input part with every bias that can be added outside, and the one that cannot."""
    bias, b_hh, left = w["b_ih"], w["b_hh"], None
    if b_hh is not None:
        outside = b_hh
        if cell == "gru":
            size = b_hh.shape[0] // 3
            outside, left = F.pad(b_hh[: 2 * size], (0, size)), b_hh[2 * size :]
        bias = outside if bias is None else bias + outside
    if cell != "lstm_layernorm":
        return F.linear(x, w["w_ih"], bias), left
    gates = F.linear(x, w["w_ih"])
    return F.layer_norm(gates, gates.shape[-1:], w["weight_ln_ih"], bias, LAYER_NORM_EPS), left


class Stepper:
    """One direction without gradients, a step at a call, as outside training.

    Args:
        cell: name in `kernels.CELLS`.
        w: `weight_ih` [G*H, I], `weight_hh` [G*H, P], `bias_ih`, `bias_hh` [G*H] or None,
            `weight_hr` [P, H] or None, and the cell's parameters by name.
        zoneout: the part of a new state that the old one keeps.
    """

    def __init__(self, cell: str, w: Mapping[str, Any], zoneout: float = 0.0) -> None:
        spec = CELLS[cell]
        short = {"weight_ih": "w_ih", "weight_hh": "w_hh", "weight_hr": "w_hr"}
        short |= {"bias_ih": "b_ih", "bias_hh": "b_hh"}
        self.cell = cell
        self.w = {short.get(name, name): value for name, value in w.items()}
        self.update = 1 - zoneout
        self.native = None
        if spec.torch_name is not None and not zoneout and self.w["w_hr"] is None:
            self.native = getattr(torch, f"{spec.torch_name}_cell")
        self.params = [self.w[name] for name in spec.parameters]
        if self.native is None and cell != "gru" and self.w["b_hh"] is not None:
            self.w["b_ih"], self.w["b_hh"] = self.w["b_ih"] + self.w["b_hh"], None

    def __call__(self, x: Tensor, state: Sequence[Tensor]) -> State:
        """From x_t [B, I] and the old state, h [B, P] and perhaps c [B, H], to the new one."""
        w = self.w
        if self.native is not None:
            old = state[0] if len(state) == 1 else state
            new = self.native(x, old, w["w_ih"], w["w_hh"], w["b_ih"], w["b_hh"])
            return new if isinstance(new, tuple) else (new,)
        z, b_hn = _input_part(self.cell, x, w)
        cell, hidden = STEPS[self.cell], z.shape[1] // CELLS[self.cell].gates
        fresh = tuple(z.new_empty(len(z), hidden) for _ in state)
        apart = z.new_empty(len(z), cell.apart * hidden)
        cell.step(z, state[0], tuple(state), fresh, apart, Weights(w["w_hh"], b_hn, self.params))
        if w["w_hr"] is not None:
            fresh = (fresh[0] @ w["w_hr"].t(), *fresh[1:])
        if self.update == 1:
            return fresh
        return tuple(torch.lerp(o, f, self.update) for o, f in zip(state, fresh, strict=True))


@untraced
def recurrence(
    cell: str,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    params: Mapping[str, Tensor],
    state: Sequence[Tensor],
    *,
    w_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    training: bool = False,
    seed: int = 0,
) -> tuple[Tensor, State]:
    """One layer, all its directions; arguments and results are those of `reference.recurrence`."""
    dtype = x.dtype
    if dtype in (torch.bfloat16, torch.float16):
        x, w_ih, w_hh = x.float(), w_ih.float(), w_hh.float()
        b_ih, b_hh, w_hr = (None if v is None else v.float() for v in (b_ih, b_hh, w_hr))
        params, state = {k: v.float() for k, v in params.items()}, [s.float() for s in state]
    steps, batch, directions = x.shape[0], x.shape[1], w_ih.shape[0]
    counts, order = [batch] * steps, None
    if lengths is not None:
        lengths, order = lengths.sort(descending=True, stable=True)
        times = torch.arange(steps, device=x.device)
        counts = (lengths > times[:, None]).sum(1).tolist()
        x = x.index_select(1, order)
        state = [s.index_select(1, order) for s in state]
    masks, updates = _masks(x, state, order, recurrent_dropout, zoneout, training, seed)
    named = {"w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh, "w_hr": w_hr, **params}
    by_direction = {k: [None] * directions if v is None else v.unbind(0) for k, v in named.items()}
    initial = list(zip(*(s.unbind(0) for s in state), strict=True))
    outputs, finals = [], []
    for d in range(directions):
        w = {name: values[d] for name, values in by_direction.items()}
        gates, b_hn = _input_part(cell, x, w)
        mask = None if masks is None else masks[d]
        update = [u if isinstance(u, float) else u[:, d] for u in updates]
        y, *final = _Recurrence.apply(
            Options(cell, d == 1, lengths, counts, mask, update),
            gates,
            w["w_hh"],
            b_hn,
            w["w_hr"],
            len(state),
            *initial[d],
            *(w[name] for name in params),
        )
        outputs.append(y)
        finals.append(final)
    results = [torch.cat(outputs, -1), *(torch.stack(s) for s in zip(*finals, strict=True))]
    if order is not None:
        inverse = order.argsort()
        results = [r.index_select(1, inverse) for r in results]
    y, *final = (r.to(dtype) for r in results)
    return y, tuple(final)


def _masks(
    x: Tensor,
    state: Sequence[Tensor],
    order: Tensor | None,
    recurrent_dropout: float,
    zoneout: float,
    training: bool,
    seed: int,
) -> tuple[Tensor | None, list[Tensor | float]]:
    """The scaled mask of recurrent dropout [D, B, P] and, for each state, what zoneout updates."""

    def rows(mask: Tensor) -> Tensor:
        mask = mask if order is None else mask.index_select(-2, order)
        return mask.to(x.dtype)

    recurrent = None
    if training and recurrent_dropout > 0:
        directions, batch, size = state[0].shape
        kept = recurrent_mask(seed, recurrent_dropout, directions, batch, size, x.device)
        recurrent = rows(kept) / (1 - recurrent_dropout)
    if not zoneout:
        return recurrent, []
    if not training:
        return recurrent, [1 - zoneout] * len(state)
    times = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1)
    directions, batch, hidden = state[-1].shape
    updates = zoneout_masks(seed, zoneout, times, directions, batch, hidden, x.device)
    return recurrent, [rows(u[..., : s.shape[-1]]) for u, s in zip(updates, state, strict=False)]
