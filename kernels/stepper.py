"""One time step at a call, without gradients, for sequences that arrive as they come.

At batch 1 a step costs about as much in calls as in arithmetic. So the weights of input and state
lie side by side and take one product, results go to memory that is laid out once, and every view of
it is made then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .spec import LAYER_NORM_EPS

Weights = Mapping[str, Any]


class Stepper:
    """One direction of a layer, as outside training; it keeps the state.

    Args:
        cell: name in `kernels.CELLS`.
        w: `weight_ih` [G*H, I], `weight_hh` [G*H, P], `bias_ih`, `bias_hh` [G*H] or None,
            `weight_hr` [P, H] or None, and the cell's parameters by name. Weights that change later
            may or may not count.
        state: h [B, P] and, for the LSTMs, c [B, H].
        zoneout: the part of a new state that the old one keeps.

    Attributes:
        state: h and perhaps c so far, overwritten by each step.
    """

    def __init__(
        self, cell: str, w: Weights, state: Sequence[Tensor], zoneout: float = 0.0
    ) -> None:
        h, *c = state
        size = w["weight_ih"].shape[1]
        seen = h.new_empty(len(h), size + h.shape[1])  # x_t and h_{t-1} side by side
        self.state = (seen[:, size:].copy_(h), *(s.clone() for s in c))
        self._advance = STEPS[cell](w, seen, self.state, 1 - zoneout)

    def __call__(self, x: Tensor) -> Tensor:
        """From x_t [B, I] to h_t [B, P], which is `state[0]`."""
        self._advance(x)
        return self.state[0]


State = tuple[Tensor, ...]
Advance = Callable[[Tensor], None]
"""Takes x_t, and replaces the old state by the new one."""


def _bias(w: Weights, *names: str) -> Tensor:
    """The sum of biases, zeros for those that are not there."""
    zero = w["weight_hh"].new_zeros(len(w["weight_hh"]))
    return sum((w[name] for name in names if w[name] is not None), zero)


def _beside(w: Weights, rows: slice = slice(None)) -> Tensor:
    """[I + P, rows] of the weights of x_t over those of h_{t-1}, transposed."""
    return torch.cat([w["weight_ih"][rows], w["weight_hh"][rows]], 1).t()


def _blend(update: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Put a new value in the place of the old, or `update` of it under zoneout."""
    if update == 1:
        return Tensor.copy_
    return lambda old, new: old.lerp_(new, update)


def _rnn(activate: Callable[[Tensor], Tensor]) -> Callable[..., Advance]:
    def build(w: Weights, seen: Tensor, state: State, update: float) -> Advance:
        (h,) = state
        weight, bias, blend = _beside(w), _bias(w, "bias_ih", "bias_hh"), _blend(update)
        new, x_part = torch.empty_like(h), seen[:, : w["weight_ih"].shape[1]]

        def advance(x: Tensor) -> None:
            x_part.copy_(x)
            blend(h, activate(torch.addmm(bias, seen, weight, out=new)))

        return advance

    return build


def _output(w: Weights, state: State, update: float) -> Callable[[Tensor, Tensor], object]:
    """From o and tanh(c_t): o tanh(c_t), projected, is the new h. Overwrites them."""
    weight, h, blend = w["weight_hr"], state[0], _blend(update)
    if weight is None and update == 1:
        return lambda o, squashed: torch.mul(o, squashed, out=h)
    if weight is None:
        return lambda o, squashed: blend(h, squashed.mul_(o))
    return lambda o, squashed: blend(h, squashed.mul_(o) @ weight.t())


def _lstm(w: Weights, seen: Tensor, state: State, update: float) -> Advance:
    """With peepholes or without."""
    c = state[1]
    size, weight, bias = c.shape[1], _beside(w), _bias(w, "bias_ih", "bias_hh")
    z = c.new_empty(len(c), 4 * size)
    i, f, g, o = z.chunk(4, 1)
    both, x_part = z[:, : 2 * size], seen[:, : w["weight_ih"].shape[1]]
    new, squashed = (c if update == 1 else torch.empty_like(c)), torch.empty_like(c)
    pair, old = both.view(len(c), 2, size), c.unsqueeze(1)
    peephole, looks, look = "weight_co" in w, old, old
    if peephole:
        looks, look = torch.stack([w["weight_ci"], w["weight_cf"]]), w["weight_co"]
    output = _output(w, state, update)

    def advance(x: Tensor) -> None:
        x_part.copy_(x)
        torch.addmm(bias, seen, weight, out=z)
        if peephole:
            pair.addcmul_(old, looks)
        both.sigmoid_()
        torch.mul(f, c, out=new).addcmul_(i, g.tanh_())
        if peephole:
            o.addcmul_(new, look)
        output(o.sigmoid_(), torch.tanh(new, out=squashed))
        if update != 1:
            c.lerp_(new, update)

    return advance


def _lstm_layernorm(w: Weights, seen: Tensor, state: State, update: float) -> Advance:
    h, c = state
    size = c.shape[1]
    order = torch.arange(4 * size, device=c.device).view(4, size)[[0, 1, 3, 2]].flatten()
    w_ih, w_hh = w["weight_ih"][order].t(), w["weight_hh"][order].t()
    gain_ih, gain_hh = w["weight_ln_ih"][order], w["weight_ln_hh"][order]
    bias = _bias(w, "bias_ih", "bias_hh")[order]
    gain_c, bias_c = w["weight_ln_c"], w["bias_ln_c"]
    z = c.new_empty(len(c), 4 * size)
    i, f, o, g = z.chunk(4, 1)
    gates = z[:, : 3 * size]
    new, (wide, narrow) = (c if update == 1 else torch.empty_like(c)), ((4 * size,), (size,))
    norm, output = torch.native_layer_norm, _output(w, state, update)

    def advance(x: Tensor) -> None:
        ours = norm(torch.mm(x, w_ih), wide, gain_ih, bias, LAYER_NORM_EPS)[0]
        theirs = norm(torch.mm(h, w_hh), wide, gain_hh, None, LAYER_NORM_EPS)[0]
        torch.add(ours, theirs, out=z)
        gates.sigmoid_()
        torch.mul(f, c, out=new).addcmul_(i, g.tanh_())
        output(o, norm(new, narrow, gain_c, bias_c, LAYER_NORM_EPS)[0].tanh_())
        if update != 1:
            c.lerp_(new, update)

    return advance


def _gru(w: Weights, seen: Tensor, state: State, update: float) -> Advance:
    """The reset gate acts after the product."""
    (h,) = state
    size = h.shape[1]
    w_ih, w_hh = w["weight_ih"].t(), w["weight_hh"].t()
    b_ih, b_hh = _bias(w, "bias_ih"), _bias(w, "bias_hh")
    ours, theirs = h.new_empty(2, len(h), 3 * size)
    both, n = ours.split((2 * size, size), 1)
    r, keep = both.chunk(2, 1)
    other_both, other_n = theirs.split((2 * size, size), 1)
    blend = _blend(update)

    def advance(x: Tensor) -> None:
        torch.addmm(b_ih, x, w_ih, out=ours)
        torch.addmm(b_hh, h, w_hh, out=theirs)
        both.add_(other_both).sigmoid_()
        blend(h, n.addcmul_(r, other_n).tanh_().lerp_(h, keep))

    return advance


def _gru_reset_before(w: Weights, seen: Tensor, state: State, update: float) -> Advance:
    """The reset gate acts before the product."""
    (h,) = state
    size, inputs = h.shape[1], w["weight_ih"].shape[1]
    gates, candidate = slice(2 * size), slice(2 * size, None)
    w_gates, w_n = _beside(w, gates), _beside(w, candidate)
    b_gates, b_n = _bias(w, "bias_ih", "bias_hh").split((2 * size, size))
    both, n = h.new_empty(len(h), 2 * size), torch.empty_like(h)
    r, keep = both.chunk(2, 1)
    reset = torch.empty_like(seen)
    x_parts = (seen[:, :inputs], reset[:, :inputs])
    h_reset = reset[:, inputs:]
    blend = _blend(update)

    def advance(x: Tensor) -> None:
        for part in x_parts:
            part.copy_(x)
        torch.addmm(b_gates, seen, w_gates, out=both).sigmoid_()
        torch.mul(r, h, out=h_reset)
        blend(h, torch.addmm(b_n, reset, w_n, out=n).tanh_().lerp_(h, keep))

    return advance


STEPS: dict[str, Callable[[Weights, Tensor, State, float], Advance]] = {
    "rnn_tanh": _rnn(Tensor.tanh_),
    "rnn_relu": _rnn(Tensor.relu_),
    "lstm": _lstm,
    "lstm_peephole": _lstm,
    "lstm_layernorm": _lstm_layernorm,
    "gru": _gru,
    "gru_reset_before": _gru_reset_before,
}
