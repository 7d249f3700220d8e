"""Every cell in plain torch operations, the backward through time written out: the CPU path.

The time loop is written once; a cell is a few functions, a step and its gradient, that fill buffers
in place. What needs no order in time is outside the loop: the input's matrix product, those of all
weight gradients, and the factors of the gradients that need no gradient to come.

Both directions run in lockstep, as lanes: the second lane's rows are turned round beforehand, each
within its length, so that every lane runs forwards and a step is one batched product. Rows are
sorted by length, so that a step works on the first n, those that are that long, and padding costs
nothing.

Shapes: L lanes (directions), T steps, B rows, G*H gates, P features of h (H without projection).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import recurrent_mask, zoneout_masks
from .spec import CELLS, LAYER_NORM_EPS
from .untraced import untraced

State = tuple[Tensor, ...]

CHUNK = 8
"""Steps whose factors are computed at once: many enough to share the cost of a call, few enough to
stay in the cache until their steps come."""

BY_GATE = 16, 256
"""Rows and H from which the recurrent product is made gate by gate, with a copy of h for each: MKL
then reads each matrix from the cache once; the gates in one matrix take up to half as long again.
"""


class Weights(NamedTuple):
    """What the steps compute with.

    Attributes:
        hh: recurrent matrices [L, G*H, P].
        hh_t: the same, transposed; by gate, [L*G, P, H].
        bias: [L, 1, G, H], added by the step where the cell says so, else None.
        hn: bias inside the reset gate of the reset-after GRU, [L, 1, H], or None.
        params: extra parameters of the cell, in the order of its spec, each [L, 1, n*H].
    """

    hh: Tensor
    hh_t: Tensor
    bias: Tensor | None
    hn: Tensor | None
    params: Sequence[Tensor]


class Gates(NamedTuple):
    """The gates of one step, and views of them: made once, because views cost as much as sums.

    Attributes:
        whole: [L, n, G*H]; by gate, [L*G, n, H].
        apart: [L, n, G, H].
        parts: each gate, [L, n, H].
        joint: the first gates, all but one, [L, n, G - 1, H].
        seen: where the product is by gate, memory for h once for each, [L, G, n, P], else None.
    """

    whole: Tensor
    apart: Tensor
    parts: Sequence[Tensor]
    joint: Tensor
    seen: Tensor | None = None


class Saved(NamedTuple):
    """What the gradients read of several steps.

    Attributes:
        gates: activated gates [L, steps, B, G*H]; of an LSTM's g, here and below, the complement
            (1 - g) / 2 = sigmoid of -2 times what g is the tanh of, which spares operations.
        apart: what the cell keeps besides the gates, [L, steps, B, n*H].
        seen: h_{t-1} as the recurrent product sees it, [L, steps, B, P].
        prev: the states at t - 1.
    """

    gates: Tensor
    apart: Tensor
    seen: Tensor
    prev: State


class Step(NamedTuple):
    """One step, forwards and backwards.

    Attributes:
        gates: activated gates.
        apart: what the cell keeps besides them, [L, n, k*H].
        seen: h_{t-1} as the recurrent product sees it, [L, n, P].
        prev: the states at t - 1.
    """

    gates: Gates
    apart: Tensor
    seen: Tensor
    prev: State


class Grads(NamedTuple):
    """What the gradient of a step fills.

    Attributes:
        gates: gradient of the gates before activation, which is that of the input part.
        apart: gradient of what was kept apart, [L, n, k*H].
        params: of each parameter that is used by element, its gradient so far, [L, n, H].
    """

    gates: Gates
    apart: Tensor
    params: Sequence[Tensor]


def _operand(raw: Gates, seen: Tensor) -> Tensor:
    """`seen` [L, n, P] as the product that fills `raw` takes it."""
    return seen if raw.seen is None else raw.seen.copy_(seen.unsqueeze(1)).flatten(0, 1)


def _add_product(raw: Gates, z: Gates, seen: Tensor, w: Weights) -> None:
    """Fill `raw` with z + bias + seen W^T."""
    if w.bias is None:
        raw.apart.copy_(z.apart)
    else:
        torch.add(z.apart, w.bias, out=raw.apart)
    raw.whole.baddbmm_(_operand(raw, seen), w.hh_t)


def _tanh(x: Tensor, out: Tensor) -> Tensor:
    """Tanh as 2 sigmoid(2x) - 1, half the time of torch.tanh on a CPU, 1e-7 off."""
    return torch.mul(x, 2, out=out).sigmoid_().mul_(2).sub_(1)


def tanh_(x: Tensor) -> Tensor:
    """Tanh in place."""
    return _tanh(x, out=x)


def tanh_grad(grad: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient through y = tanh(.): grad (1 - y^2)."""
    return torch.addcmul(grad, grad * y, y, value=-1, out=out)


def _rnn_tanh(raw: Gates, s: Step, new: State, w: Weights) -> None:
    _add_product(raw, s.gates, s.seen, w)
    new[0].copy_(_tanh(raw.whole, out=s.gates.whole))


def _rnn_tanh_grad(
    d: Grads, dh: Tensor, dc: Tensor, s: Step, factors: Sequence[Tensor], w: Weights
) -> tuple[Tensor, Tensor | None]:
    return tanh_grad(dh, s.gates.whole, out=d.gates.whole) @ w.hh, None


def _rnn_relu(raw: Gates, s: Step, new: State, w: Weights) -> None:
    _add_product(raw, s.gates, s.seen, w)
    new[0].copy_(torch.clamp(raw.whole, min=0, out=s.gates.whole))


def _rnn_relu_grad(
    d: Grads, dh: Tensor, dc: Tensor, s: Step, factors: Sequence[Tensor], w: Weights
) -> tuple[Tensor, Tensor | None]:
    return torch.mul(dh, s.gates.whole > 0, out=d.gates.whole) @ w.hh, None


def _update_cell(raw: Gates, s: Step, out: Tensor) -> Tensor:
    """c_t = f c_{t-1} + i g, with i, f and g of `raw` activated; g is kept as its complement."""
    i, f, g, _ = s.gates.parts
    raw.parts[2].mul_(-2)
    torch.sigmoid(raw.joint, out=s.gates.joint)
    return torch.addcmul(i, f, s.prev[1], out=out).addcmul_(i, g, value=-2)


def times_tanh(o: Tensor, complement: Tensor, out: Tensor | None = None) -> Tensor:
    """The product o tanh(x), from the complement of tanh(x), (1 - tanh(x)) / 2 = sigmoid(-2x)."""
    return torch.addcmul(o, o, complement, value=-2, out=out)


def _lstm(raw: Gates, s: Step, new: State, w: Weights) -> None:
    _add_product(raw, s.gates, s.seen, w)
    if w.params:
        raw.parts[0].addcmul_(s.prev[1], w.params[0])
        raw.parts[1].addcmul_(s.prev[1], w.params[1])
    c = _update_cell(raw, s, out=new[1])
    if w.params:
        raw.parts[3].addcmul_(c, w.params[2])
    o = torch.sigmoid(raw.parts[3], out=s.gates.parts[3])
    times_tanh(o, torch.mul(c, -2, out=s.apart).sigmoid_(), out=new[0])


def gate_factors(s: Saved, complement: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d(i, f, g)/dc_t, [..., 3, H], and do/dh_t, before activation; dh_t/dc_t; c_t.

    With the products u = i g, v = f c_{t-1} and h = o tanh(c_t), which several of them share:
    di = u - u i, df = v - v f, dg = i - u g, do = h - h o, dh_t/dc_t = o - h tanh(c_t).
    Of g and tanh(c_t) the complements are known, (1 - g) / 2 and (1 - tanh(c_t)) / 2.
    """
    i, f, g, o = s.gates.chunk(4, -1)
    joint = torch.empty_like(s.gates[..., : 3 * o.shape[-1]]).unflatten(-1, (3, -1))
    di, df, dg = joint.unbind(-2)
    u, v, h = times_tanh(i, g), f * s.prev[1], times_tanh(o, complement)
    torch.addcmul(u, u, i, value=-1, out=di)
    torch.addcmul(v, v, f, value=-1, out=df)
    torch.sub(i, u, out=dg).addcmul_(u, g, value=2)
    through = torch.sub(o, h).addcmul_(h, complement, value=2)
    return joint, h.addcmul_(h, o, value=-1), through, u.add_(v)


def _gates_grad(d: Gates, factors: Sequence[Tensor], dc: Tensor, dh: Tensor) -> None:
    """Fill d: i, f and g have dc_t times their factors, o has dh_t times its own."""
    torch.mul(factors[0], dc.unsqueeze(-2), out=d.joint)
    torch.mul(factors[1], dh, out=d.parts[3])


def _lstm_factors(s: Saved, w: Weights) -> Sequence[Tensor]:
    """Those of the gates, dc_t/dh_t, dc_{t-1}/dc_t and, for peepholes, c_t."""
    joint, do, through, c = gate_factors(s, s.apart)
    f = s.gates.chunk(4, -1)[1]
    if not w.params:
        return joint, do, through, f
    di, df, _ = joint.unbind(-2)
    p_i, p_f, p_o = (p.unsqueeze(1) for p in w.params)
    carried = torch.addcmul(f, di, p_i).addcmul_(df, p_f)
    return joint, do, through.addcmul_(do, p_o), carried, c


def _lstm_grad(
    d: Grads, dh: Tensor, dc: Tensor, s: Step, factors: Sequence[Tensor], w: Weights
) -> tuple[Tensor, Tensor | None]:
    through, carried, *c = factors[2:]
    dc.addcmul_(dh, through)
    _gates_grad(d.gates, factors, dc, dh)
    dc.mul_(carried)
    if c:
        di, df, _, do = d.gates.parts
        d.params[0].addcmul_(di, s.prev[1])
        d.params[1].addcmul_(df, s.prev[1])
        d.params[2].addcmul_(do, c[0])
    return d.gates.whole @ w.hh, None


def _normed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm without gain and bias, mean and 1 / standard deviation."""
    return torch.native_layer_norm(x, x.shape[-1:], None, None, LAYER_NORM_EPS)


def _normed_grad(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    backward = torch.ops.aten.native_layer_norm_backward
    mean, rstd = mean.contiguous(), rstd.contiguous()  # it reads them as if they were
    return backward(grad, x, x.shape[-1:], mean, rstd, None, None, (True, False, False))[0]


def _recurrent_and_cell(apart: Tensor) -> Sequence[Tensor]:
    """What the layer-norm LSTM keeps apart: W h_{t-1}, [..., 4*H], and c_t, before their norms."""
    size = apart.shape[-1] // 5
    return apart.split((4 * size, size), -1)


def _lstm_layernorm(raw: Gates, s: Step, new: State, w: Weights) -> None:
    _, ln_hh, ln_c, ln_c_bias = w.params
    recurrent, cell = _recurrent_and_cell(s.apart)
    torch.bmm(_operand(raw, s.seen), w.hh_t, out=raw.whole)
    recurrent.unflatten(-1, (4, -1)).copy_(raw.apart)
    s.gates.whole.addcmul_(_normed(recurrent)[0], ln_hh)
    cell.copy_(_update_cell(s.gates, s, out=new[1]))
    o = s.gates.parts[3].sigmoid_()
    h = torch.addcmul(ln_c_bias, _normed(cell)[0], ln_c, out=new[0])
    tanh_(h).mul_(o)


def _lstm_layernorm_factors(s: Saved, w: Weights) -> Sequence[Tensor]:
    """Those of the gates, dh_t by the normed c_t, and the statistics of both norms."""
    _, _, ln_c, ln_c_bias = w.params
    recurrent, cell = _recurrent_and_cell(s.apart)
    normed, *of_cell = _normed(cell)
    c = torch.addcmul(ln_c_bias.unsqueeze(1), normed, ln_c.unsqueeze(1))
    return *gate_factors(s, c.mul_(-2).sigmoid_())[:3], *of_cell, *_normed(recurrent)[1:]


def _lstm_layernorm_grad(
    d: Grads, dh: Tensor, dc: Tensor, s: Step, factors: Sequence[Tensor], w: Weights
) -> tuple[Tensor, Tensor | None]:
    _, ln_hh, ln_c, _ = w.params
    (recurrent, cell), (drecurrent, dnormed) = map(_recurrent_and_cell, (s.apart, d.apart))
    through, *statistics = factors[2:]
    torch.mul(dh, through, out=dnormed)
    dc.add_(_normed_grad(dnormed * ln_c, cell, *statistics[:2]))
    _gates_grad(d.gates, factors, dc, dh)
    dc.mul_(s.gates.parts[1])
    grad = _normed_grad(d.gates.whole * ln_hh, recurrent, *statistics[2:])
    drecurrent.copy_(grad)
    return grad @ w.hh, None


def _gru(raw: Gates, s: Step, new: State, w: Weights) -> None:
    r, update, n = s.gates.parts
    torch.bmm(_operand(raw, s.seen), w.hh_t, out=raw.whole)
    torch.sigmoid(raw.joint.add_(s.gates.joint), out=s.gates.joint)
    s.apart.copy_(raw.parts[2])
    if w.hn is not None:
        s.apart.add_(w.hn)
    torch.lerp(tanh_(n.addcmul_(r, s.apart)), s.prev[0], update, out=new[0])


def _interpolation_grad(d: Gates, dh: Tensor, s: Step) -> tuple[Tensor, Tensor]:
    """Fill dz and dn of h_t = n + z (h_{t-1} - n); return dn and what h_{t-1} gets directly."""
    _, update, n = s.gates.parts
    direct = dh * update
    change = (s.prev[0] - n).mul_(direct)
    torch.addcmul(change, change, update, value=-1, out=d.parts[1])
    return tanh_grad(dh - direct, n, out=d.parts[2]), direct


def _gru_grad(
    d: Grads, dh: Tensor, dc: Tensor, s: Step, factors: Sequence[Tensor], w: Weights
) -> tuple[Tensor, Tensor | None]:
    size, r = dh.shape[-1], s.gates.parts[0]
    dn, direct = _interpolation_grad(d.gates, dh, s)
    torch.mul(dn, r, out=d.apart)
    reset = d.apart * s.apart
    torch.addcmul(reset, reset, r, value=-1, out=d.gates.parts[0])
    dseen = d.gates.whole[..., : 2 * size] @ w.hh[:, : 2 * size]
    return dseen.baddbmm_(d.apart, w.hh[:, 2 * size :]), direct


def _gru_reset_before(raw: Gates, s: Step, new: State, w: Weights) -> None:
    size = s.prev[0].shape[-1]
    r, update, n = s.gates.parts
    both = torch.bmm(s.seen, w.hh_t[..., : 2 * size]).unflatten(-1, (2, -1))
    torch.sigmoid(both.add_(s.gates.joint), out=s.gates.joint)
    _tanh(torch.baddbmm(n, r * s.seen, w.hh_t[..., 2 * size :]), out=n)
    torch.lerp(n, s.prev[0], update, out=new[0])


def _gru_reset_before_grad(
    d: Grads, dh: Tensor, dc: Tensor, s: Step, factors: Sequence[Tensor], w: Weights
) -> tuple[Tensor, Tensor | None]:
    size, r = dh.shape[-1], s.gates.parts[0]
    dn, direct = _interpolation_grad(d.gates, dh, s)
    dseen = (dn @ w.hh[:, 2 * size :]).mul_(r)
    reset = dseen * s.seen
    torch.addcmul(reset, reset, r, value=-1, out=d.gates.parts[0])
    return dseen.baddbmm_(d.gates.whole[..., : 2 * size], w.hh[:, : 2 * size]), direct


WeightGrads = tuple[Tensor, Tensor | None, Sequence[Tensor | None]]


def product_grad(dz: Tensor, seen: Tensor) -> Tensor:
    """Gradient of W in z = seen W^T, summed over time and batch, [..., T, B, *]."""
    return dz.flatten(-3, -2).mT @ seen.flatten(-3, -2)


def _kept(gates: Tensor) -> Tensor:
    return gates


def _lstm_activated(gates: Tensor) -> Tensor:
    """Put g in the place of its complement."""
    i, f, g, o = gates.chunk(4, -1)
    return torch.cat([i, f, 1 - 2 * g, o], -1)


def _no_factors(s: Saved, w: Weights) -> Sequence[Tensor]:
    return ()


def _weight_grads(
    dz: Tensor, dapart: Tensor, params: Sequence[Tensor], s: Saved, w: Weights
) -> WeightGrads:
    return product_grad(dz, s.seen), None, [p.sum(1, keepdim=True) for p in params]


def _lstm_layernorm_weight_grads(
    dz: Tensor, dapart: Tensor, params: Sequence[Tensor], s: Saved, w: Weights
) -> WeightGrads:
    (recurrent, cell), (drecurrent, dnormed) = map(_recurrent_and_cell, (s.apart, dapart))
    each = dz * _normed(recurrent)[0], dnormed * _normed(cell)[0], dnormed
    return product_grad(drecurrent, s.seen), None, [None, *(x.sum((1, 2))[:, None] for x in each)]


def _gru_weight_grads(
    dz: Tensor, dapart: Tensor, params: Sequence[Tensor], s: Saved, w: Weights
) -> WeightGrads:
    both = dz[..., : 2 * dapart.shape[-1]]
    dw = torch.cat([product_grad(part, s.seen) for part in (both, dapart)], 1)
    return dw, None if w.hn is None else dapart.sum((1, 2))[:, None], []


def _gru_reset_before_weight_grads(
    dz: Tensor, dapart: Tensor, params: Sequence[Tensor], s: Saved, w: Weights
) -> WeightGrads:
    size = s.seen.shape[-1]
    both, dn = dz.split((2 * size, size), -1)
    reset = product_grad(dn, s.gates[..., :size] * s.seen)
    return torch.cat([product_grad(both, s.seen), reset], 1), None, []


@dataclass(frozen=True)
class Cell:
    """A cell's step and gradient.

    Attributes:
        step: (raw, step, new, weights): turns the input part in `step.gates` into the activated
            gates, fills `new` and `step.apart`; `raw` is its to write in.
        grad: (grads, dh, dc, step, factors, weights): fills `grads`, turns dc_t into dc_{t-1}, and
            returns the gradients of `seen` and of h_{t-1} where the cell uses it directly.
        factors: (saved, weights), several steps at once: what `grad` reads of them, everything in
            the gradients that needs no gradient to come.
        weight_grads: (dgates, dapart, params, saved, weights), all steps at once: the gradients of
            the weights.
        apart: k, the width of `apart` as a multiple of H.
        adds_bias: whether the step adds the bias, which costs nothing where it copies the gates.
        by_element: whether the gradients of the cell's parameters add up in `Grads.params`.
        by_gate: whether `raw` may be laid out by gate, so that its product is made gate by gate.
        activated: turns the gates as they are kept into the activated ones.
    """

    step: Callable[[Gates, Step, State, Weights], None]
    grad: Callable[..., tuple[Tensor, Tensor | None]]
    factors: Callable[[Saved, Weights], Sequence[Tensor]] = _no_factors
    weight_grads: Callable[..., WeightGrads] = _weight_grads
    apart: int = 0
    adds_bias: bool = True
    by_element: bool = False
    by_gate: bool = True
    activated: Callable[[Tensor], Tensor] = _kept


STEPS: dict[str, Cell] = {
    "rnn_tanh": Cell(_rnn_tanh, _rnn_tanh_grad, by_gate=False),
    "rnn_relu": Cell(_rnn_relu, _rnn_relu_grad, by_gate=False),
    "lstm": Cell(_lstm, _lstm_grad, _lstm_factors, apart=1, activated=_lstm_activated),
    "lstm_peephole": Cell(
        _lstm, _lstm_grad, _lstm_factors, apart=1, by_element=True, activated=_lstm_activated
    ),
    "lstm_layernorm": Cell(
        _lstm_layernorm,
        _lstm_layernorm_grad,
        _lstm_layernorm_factors,
        _lstm_layernorm_weight_grads,
        apart=5,
        adds_bias=False,
        activated=_lstm_activated,
    ),
    "gru": Cell(_gru, _gru_grad, weight_grads=_gru_weight_grads, apart=1, adds_bias=False),
    "gru_reset_before": Cell(
        _gru_reset_before,
        _gru_reset_before_grad,
        weight_grads=_gru_reset_before_weight_grads,
        adds_bias=False,
        by_gate=False,
    ),
}


class Options(NamedTuple):
    """How the lanes run.

    Attributes:
        cell: name in `STEPS`.
        lengths: valid steps of each row, longest first, int64 [B], or None.
        counts: for each step, how many rows are that long.
        mask: what the recurrent product multiplies h with, [L, B, P], or None.
        update: for h and c, the part of a new value that zoneout takes, [L, T, B, size] or a
            number; empty without zoneout.
        orders: for each row of a lane, int64 [L, T*B], its place among the rows of the sequence;
            None where they are the same.
        places: for each row of the sequence, its place in each lane, int64 [L, T*B]; or None.
    """

    cell: str
    lengths: Tensor | None
    counts: Sequence[int]
    mask: Tensor | None
    update: Sequence[Tensor | float]
    orders: Tensor | None
    places: Tensor | None

    def buffer(self, like: Tensor, *shape: int) -> Tensor:
        """Memory for all steps, zero where a step may not write it."""
        return like.new_empty(shape) if self.lengths is None else like.new_zeros(shape)

    def rows(self, tensor: Tensor, first: int = 0) -> Sequence[Tensor]:
        """For each step of [L, steps, B, ...], from `first` on, the rows that are that long."""
        steps = tensor.unbind(1)
        if self.lengths is None:
            return steps
        return [rows[:, :n] for rows, n in zip(steps, self.counts[first:], strict=False)]

    def gates(self, tensor: Tensor) -> list[Gates]:
        """For each step of [L, T, B, G*H], the gates of the rows that are that long."""
        apart = tensor.unflatten(-1, (CELLS[self.cell].gates, -1))
        parts = zip(*map(self.rows, apart.unbind(-2)), strict=True)
        joint = self.rows(apart[..., : CELLS[self.cell].gates - 1, :])
        each = zip(self.rows(tensor), self.rows(apart), parts, joint, strict=True)
        return [Gates(*g) for g in each]

    def scratch(self, w: Weights, by_gate: bool) -> list[Gates]:
        """For each step, memory for its gates; it is the same at every step."""
        (lanes, size, features), number = w.hh.shape, CELLS[self.cell].gates
        memory = w.hh.new_empty(lanes * self.counts[0] * size)
        copies = w.hh.new_empty(lanes * self.counts[0] * number * features if by_gate else 0)
        views = {}
        for n in set(self.counts):
            flat, seen = memory[: lanes * n * size], None
            whole = flat.view(lanes, n, size)
            apart = whole.unflatten(-1, (number, -1))
            if by_gate:
                whole = flat.view(lanes * number, n, size // number)
                apart = whole.unflatten(0, (lanes, number)).transpose(1, 2)
                seen = copies[: lanes * number * n * features].view(lanes, number, n, features)
            views[n] = Gates(whole, apart, apart.unbind(-2), apart[..., : number - 1, :], seen)
        return [views[n] for n in self.counts]

    def join(self, states: Tensor) -> Tensor:
        """The output [T, B, L*P], from the slots [L, T + 1, B, P]."""
        lanes, slots, batch, size = states.shape
        if self.places is None:
            return states[0, 1:]
        start = torch.arange(lanes, device=states.device)[:, None] * slots * batch + batch
        rows = states.flatten(0, 2).index_select(0, (self.places + start).t().flatten())
        return rows.view(slots - 1, batch, lanes * size)

    def part(self, y: Tensor) -> Tensor:
        """The output, or its gradient, [T, B, L*P], by lanes, [L, T, B, P]."""
        if self.orders is None:
            return y[None]
        lanes, (steps, batch, _) = len(self.orders), y.shape
        start = torch.arange(lanes, device=y.device)[:, None]
        rows = y.reshape(steps * batch * lanes, -1).index_select(
            0, (self.orders * lanes + start).flatten()
        )
        return rows.view(lanes, steps, batch, -1)

    def zoneout(self) -> Sequence[Sequence[Tensor | float]]:
        """For each step, the part of each new state that is taken."""
        steps = len(self.counts)
        parts = ([u] * steps if isinstance(u, float) else self.rows(u) for u in self.update)
        return list(zip(*parts, strict=True)) or [()] * steps


class _Recurrence(torch.autograd.Function):
    """All lanes. Overwrites `gates`, the input part, with the activated gates."""

    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        gates: Tensor,
        w_hh: Tensor,
        bias: Tensor | None,
        b_hn: Tensor | None,
        w_hr: Tensor | None,
        count: int,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        initial, params = rest[:count], rest[count:]
        lanes, steps, batch, rows = gates.shape
        spec, cell = CELLS[options.cell], STEPS[options.cell]
        hidden = rows // spec.gates
        by_gate = cell.by_gate and batch >= BY_GATE[0] and hidden >= BY_GATE[1]
        blocks = w_hh.unflatten(1, (spec.gates, -1)).flatten(0, 1) if by_gate else w_hh
        by_part = None if bias is None else bias.unflatten(-1, (spec.gates, -1))
        weights = Weights(w_hh, blocks.mT, by_part, b_hn, params)
        if options.lengths is not None:
            times = torch.arange(steps, device=gates.device)[:, None]
            gates.masked_fill_((times >= options.lengths)[..., None], 0.0)
        states = [options.buffer(s, lanes, steps + 1, batch, s.shape[-1]) for s in initial]
        for buffer, value in zip(states, initial, strict=True):
            buffer[:, 0] = value
        apart = options.buffer(gates, lanes, steps, batch, cell.apart * hidden)
        unprojected = options.buffer(gates, lanes, steps, batch, 0 if w_hr is None else hidden)
        z, raw = options.gates(gates), options.scratch(weights, by_gate)
        kept, wide = options.rows(apart), options.rows(unprojected)
        old = list(zip(*(options.rows(s[:, :-1]) for s in states), strict=True))
        new = list(zip(*(options.rows(s[:, 1:]) for s in states), strict=True))
        parts = options.zoneout()
        for t, n in enumerate(options.counts):
            seen = old[t][0]
            if options.mask is not None:
                seen = seen * options.mask[:, :n]
            out = new[t] if w_hr is None else (wide[t], *new[t][1:])
            cell.step(raw[t], Step(z[t], kept[t], seen, old[t]), out, weights)
            if w_hr is not None:
                new[t][0].copy_(wide[t] @ w_hr.mT)
            for part, fresh, stale in zip(parts[t], new[t], old[t], strict=False):
                torch.lerp(stale, fresh, part, out=fresh)
        ctx.save_for_backward(gates, apart, unprojected, w_hh, bias, b_hn, w_hr, *states, *params)
        ctx.options, ctx.count = options, count
        ctx.set_materialize_grads(False)
        row = torch.arange(batch, device=gates.device)
        last = steps if options.lengths is None else options.lengths
        return options.join(states[0]), *(s[:, last, row] for s in states)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the backward of backend='torch' is not differentiable for this cell: use "
                "backend='reference' for gradients of gradients (create_graph=True)"
            )
        gates, apart, unprojected, w_hh, bias, b_hn, w_hr, *rest = ctx.saved_tensors
        options, states, params = ctx.options, rest[: ctx.count], rest[ctx.count :]
        cell, weights = STEPS[options.cell], Weights(w_hh, w_hh.mT, bias, b_hn, params)
        before = tuple(s[:, :-1] for s in states)
        seen = before[0] if options.mask is None else before[0] * options.mask[:, None]
        dstate = [
            torch.zeros_like(s[:, 0]) if d is None else d.clone()
            for s, d in zip(states, dfinal, strict=True)
        ]
        saved = Saved(gates, apart, seen, before)
        dgates, dapart = (options.buffer(gates, *b.shape) for b in (gates, apart))
        totals = [torch.zeros_like(dstate[-1]) for _ in params if cell.by_element]
        dprojected = options.buffer(gates, *gates.shape[:3], 0 if w_hr is None else w_hr.shape[1])
        z, dz = options.gates(gates), options.gates(dgates)
        kept, dkept, dout, see = map(options.rows, (apart, dapart, dprojected, seen))
        old = list(zip(*map(options.rows, before), strict=True))
        dys = None if dy is None else options.rows(options.part(dy))
        parts = options.zoneout()
        now, sums, n = dstate, totals, gates.shape[2]
        for t, factors in _backwards(options, cell, saved, weights):
            if options.counts[t] != n or options.lengths is not None:
                n = options.counts[t]
                now, sums = [d[:, :n] for d in dstate], [d[:, :n] for d in totals]
            if dys is not None:
                now[0].add_(dys[t])
            held = [d * (1 - part) for part, d in zip(parts[t], now, strict=False)]
            for part, d in zip(parts[t], now, strict=False):
                d.mul_(part)
            dh = now[0]
            if w_hr is not None:
                dh = dout[t].copy_(dh) @ w_hr
            grads, step = Grads(dz[t], dkept[t], sums), Step(z[t], kept[t], see[t], old[t])
            dseen, direct = cell.grad(grads, dh, now[-1], step, factors, weights)
            if options.mask is not None:
                dseen.mul_(options.mask[:, :n])
            dh = dseen if direct is None else dseen.add_(direct)
            if options.lengths is None:
                now[0] = dh
            else:
                now[0].copy_(dh)
            for d, part in zip(now, held, strict=False):
                d.add_(part)
        dw_hh, db_hn, dparams = cell.weight_grads(dgates, dapart, totals, saved, weights)
        dbias = None if bias is None else dgates.sum((1, 2))[:, None]
        dw_hr = None if w_hr is None else product_grad(dprojected, unprojected)
        return None, dgates, dw_hh, dbias, db_hn, dw_hr, None, *dstate, *dparams


def _backwards(
    options: Options, cell: Cell, saved: Saved, weights: Weights
) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Steps from the last to the first, each with the factors of its gradient."""
    for end in range(len(options.counts), 0, -CHUNK):
        first = max(0, end - CHUNK)
        gates, apart, seen, *prev = (b[:, first:end] for b in (*saved[:3], *saved.prev))
        factors = cell.factors(Saved(gates, apart, seen, tuple(prev)), weights)
        rows = list(zip(*(options.rows(f, first) for f in factors), strict=True))
        for t in reversed(range(first, end)):
            yield t, rows[t - first] if rows else ()


class _Lanes(torch.autograd.Function):
    """The rows of [N, ...] in each lane's order, [L, N, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, orders: Tensor, places: Tensor) -> Tensor:
        ctx.places = places
        return x.index_select(0, orders.flatten()).unflatten(0, orders.shape)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        total, *others = (d.index_select(0, p) for d, p in zip(dx, ctx.places, strict=True))
        for other in others:
            total.add_(other)
        return total, None, None


def saved_gates(y: Tensor) -> Tensor:
    """The activated gates, from the graph of an output of `recurrence`.

    Args:
        y: an output that wants gradients, whose inputs have no history of this kind of their own.

    Returns:
        [D, T, B, G*H]; past a row's end there is nothing of meaning.
    """
    nodes = [y.grad_fn]
    while not isinstance(nodes[-1], _Recurrence._backward_cls):
        node = nodes.pop()
        if node is not None:
            nodes.extend(parent for parent, _ in node.next_functions)
    options = nodes[-1].options
    gates = STEPS[options.cell].activated(nodes[-1].saved_tensors[0])
    if options.places is None:
        return gates
    rows = zip(gates.flatten(1, 2), options.places, strict=True)
    return torch.stack([g.index_select(0, place) for g, place in rows]).view_as(gates)


def _biases(
    cell: str, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Every bias that can be added outside the loop, [L, 1, G*H], and the one that cannot."""
    left = None
    if b_hh is not None and cell == "gru":
        size = b_hh.shape[1] // 3
        b_hh, left = F.pad(b_hh[:, : 2 * size], (0, size)), b_hh[:, None, 2 * size :]
    bias = b_ih
    if b_hh is not None:
        bias = b_hh if b_ih is None else b_ih + b_hh
    return None if bias is None else bias[:, None], left


def _input_part(x: Tensor, w_ih_t: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    """What the input gives to the gates: [L, N, I] to [L, N, G*H]."""
    if gain is None:
        return torch.bmm(x, w_ih_t) if bias is None else torch.baddbmm(bias, x, w_ih_t)
    gates = torch.bmm(x, w_ih_t)
    normed = F.layer_norm(gates, gates.shape[-1:], eps=LAYER_NORM_EPS)
    return normed * gain if bias is None else torch.addcmul(bias, normed, gain)


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
    steps, batch, lanes = x.shape[0], x.shape[1], w_ih.shape[0]
    counts, row = [batch] * steps, torch.arange(batch, device=x.device)
    if lengths is not None:
        lengths, row = lengths.sort(descending=True, stable=True)
        times = torch.arange(steps, device=x.device)
        counts = (lengths > times[:, None]).sum(1).tolist()
        state = [s.index_select(1, row) for s in state]
    orders = places = None
    if lengths is not None or lanes > 1:
        orders = _orders(steps, lanes, lengths, row)
        places = orders.argsort(1)
    masks, updates = _masks(x, state, row, orders, recurrent_dropout, zoneout, training, seed)
    rows = x.flatten(0, 1)
    rows = rows[None] if orders is None else _Lanes.apply(rows, orders, places)
    by_lane = [params[name][:, None] for name in CELLS[cell].parameters]
    bias, b_hn = _biases(cell, b_ih, b_hh)
    gain = by_lane[0] if cell == "lstm_layernorm" else None
    outside, inside = (None, bias) if STEPS[cell].adds_bias else (bias, None)
    gates = _input_part(rows, w_ih.mT, outside, gain).unflatten(1, (steps, batch))
    options = Options(cell, lengths, counts, masks, updates, orders, places)
    y, *final = _Recurrence.apply(
        options, gates, w_hh, inside, b_hn, w_hr, len(state), *state, *by_lane
    )
    if lengths is not None:
        final = [s.index_select(1, row.argsort()) for s in final]
    y, *final = (r.to(dtype) for r in (y, *final))
    return y, tuple(final)


def _orders(steps: int, lanes: int, lengths: Tensor | None, row: Tensor) -> Tensor:
    """For each row [T, B] of each lane, its place in the sequence; the second lane is turned."""
    times = torch.arange(steps, device=row.device)[:, None]
    last = steps - 1 if lengths is None else lengths - 1
    turned = torch.where(times > last, times, last - times)
    forwards = times.expand(steps, len(row))
    by_lane = torch.stack([forwards, turned.expand_as(forwards)][:lanes])
    return (by_lane * len(row) + row).flatten(1)


def _masks(
    x: Tensor,
    state: Sequence[Tensor],
    row: Tensor,
    orders: Tensor | None,
    recurrent_dropout: float,
    zoneout: float,
    training: bool,
    seed: int,
) -> tuple[Tensor | None, list[Tensor | float]]:
    """The scaled mask of recurrent dropout [L, B, P] and, for each state, what zoneout updates."""
    recurrent = None
    steps, (lanes, batch, size) = x.shape[0], state[0].shape
    if training and recurrent_dropout > 0:
        kept = recurrent_mask(seed, recurrent_dropout, lanes, batch, size, x.device)
        recurrent = kept.index_select(1, row).to(x.dtype) / (1 - recurrent_dropout)
    if not zoneout:
        return recurrent, []
    if not training:
        return recurrent, [1 - zoneout] * len(state)
    times = torch.arange(steps, device=x.device).view(-1, 1, 1, 1)
    updates = []
    drawn = zoneout_masks(seed, zoneout, times, lanes, batch, state[-1].shape[-1], x.device)
    for update, s in zip(drawn, state, strict=False):
        by_lane = update[..., : s.shape[-1]].transpose(0, 1).to(x.dtype).flatten(1, 2)
        if orders is not None:
            by_lane = torch.stack([u[order] for u, order in zip(by_lane, orders, strict=True)])
        updates.append(by_lane.unflatten(1, (steps, batch)))
    return recurrent, updates
