"""The oracle: plain steps of every cell and one time loop, under autograd, in any dtype.

Dimension names: T time steps, B batch rows, I input size, H hidden size, P projected size (H
without projection), G gates, D directions (2: forward, backward).

Nothing here is fast and nothing optimised imports it. Gate blocks are in torch's order: i f g o for
the LSTMs, r z n for the GRUs. Superscripts of the equations: x for the input part W_ih x + b_ih, h
for the recurrent part W_hh h + b_hh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import recurrent_mask, zoneout_masks
from .spec import CELLS, LAYER_NORM_EPS, CellSpec

State = tuple[Tensor, ...]
Recur = Callable[[Tensor, int], Tensor]
"""`recur(h, gate)` -> the recurrent part of one gate block, [B, H], or, for gate -1, of all."""


def rnn_tanh(x: Tensor, state: State, recur: Recur, p: Mapping[str, Tensor]) -> State:
    """h_t = tanh(x + h) (Elman 1990)."""
    return (torch.tanh(x + recur(state[0], -1)),)


def rnn_relu(x: Tensor, state: State, recur: Recur, p: Mapping[str, Tensor]) -> State:
    """h_t = relu(x + h)."""
    return (torch.relu(x + recur(state[0], -1)),)


def lstm(x: Tensor, state: State, recur: Recur, p: Mapping[str, Tensor]) -> State:
    """c_t = f c_{t-1} + i g, h_t = o tanh(c_t) (Hochreiter & Schmidhuber 1997)."""
    h, c = state
    i, f, g, o = (x + recur(h, -1)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm_peephole(x: Tensor, state: State, recur: Recur, p: Mapping[str, Tensor]) -> State:
    """The LSTM whose gates i and f see c_{t-1} and whose o sees c_t (Gers & Schmidhuber 2000)."""
    h, c = state
    i, f, g, o = (x + recur(h, -1)).chunk(4, -1)
    i, f = i + p["weight_ci"] * c, f + p["weight_cf"] * c
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o + p["weight_co"] * c) * torch.tanh(c), c


def lstm_layernorm(x: Tensor, state: State, recur: Recur, p: Mapping[str, Tensor]) -> State:
    """The layer-norm LSTM of Ba et al. 2016, equations 20-22.

    (i f g o) = LN(W_ih x) + b_ih + LN(W_hh h) + b_hh, each LN over all 4H rows with a gain;
    c_t = f c_{t-1} + i g; h_t = o tanh(LN(c_t)). The carried c is not normalised, so that
    dc_t/dc_{t-1} = f_t holds as in the plain LSTM; of the published definitions only this one (and
    Haste's, which drops one gain) keeps that.
    """
    h, c = state
    i, f, g, o = (x + recur(h, -1)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    normed = F.layer_norm(c, c.shape[-1:], p["weight_ln_c"], p["bias_ln_c"], LAYER_NORM_EPS)
    return torch.sigmoid(o) * torch.tanh(normed), c


def gru(x: Tensor, state: State, recur: Recur, p: Mapping[str, Tensor]) -> State:
    """h_t = (1 - z) n + z h_{t-1}, n = tanh(n^x + r n^h): torch's, Keras's `reset_after=True`."""
    (h,) = state
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), recur(h, -1).chunk(3, -1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return ((1 - z) * n + z * h,)


def gru_reset_before(x: Tensor, state: State, recur: Recur, p: Mapping[str, Tensor]) -> State:
    """h_t = (1 - z) n + z h_{t-1}, n = tanh(n^x + W_hn (r h_{t-1}) + b_hn) (Cho et al. 2014)."""
    (h,) = state
    xr, xz, xn = x.chunk(3, -1)
    r, z = torch.sigmoid(xr + recur(h, 0)), torch.sigmoid(xz + recur(h, 1))
    n = torch.tanh(xn + recur(r * h, 2))
    return ((1 - z) * n + z * h,)


STEPS: dict[str, Callable[[Tensor, State, Recur, Mapping[str, Tensor]], State]] = {
    step.__name__: step
    for step in (rnn_tanh, rnn_relu, lstm, lstm_peephole, lstm_layernorm, gru, gru_reset_before)
}


def input_gates(
    spec: CellSpec, x: Tensor, w_ih: Tensor, b_ih: Tensor | None, params: Mapping[str, Tensor]
) -> Tensor:
    """The input part of all gates at all time steps, outside the recurrence.

    Args:
        spec: the cell.
        x: input [..., I].
        w_ih: input matrix [G*H, I].
        b_ih: bias [G*H] or None.
        params: the cell's extra parameters of this direction; layer norm uses `weight_ln_ih`.

    Returns:
        Gates [..., G*H].
    """
    if spec.name != "lstm_layernorm":
        return F.linear(x, w_ih, b_ih)
    gates = F.linear(x, w_ih)
    return F.layer_norm(gates, gates.shape[-1:], params["weight_ln_ih"], b_ih, LAYER_NORM_EPS)


def _recurrent_product(
    spec: CellSpec,
    w_hh: Tensor,
    b_hh: Tensor | None,
    params: Mapping[str, Tensor],
    mask: Tensor | None,
) -> Recur:
    size = w_hh.shape[0] // spec.gates

    def recur(h: Tensor, gate: int) -> Tensor:
        rows = slice(None) if gate < 0 else slice(gate * size, (gate + 1) * size)
        h = h if mask is None else h * mask
        bias = None if b_hh is None else b_hh[rows]
        if spec.name != "lstm_layernorm":
            return F.linear(h, w_hh[rows], bias)
        gates = F.linear(h, w_hh)
        return F.layer_norm(gates, gates.shape[-1:], params["weight_ln_hh"], b_hh, LAYER_NORM_EPS)

    return recur


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
    watch: Callable[[int, int, State], None] | None = None,
) -> tuple[Tensor, State]:
    """One layer, all its directions, step by step.

    Args:
        cell: name in `CELLS`.
        x: input [T, B, I].
        w_ih: input matrix [D, G*H, I]; direction 1 runs from each row's last step to its first.
        w_hh: recurrent matrix [D, G*H, P].
        b_ih: bias [D, G*H] or None.
        b_hh: second bias [D, G*H] or None.
        params: extra parameters of the cell, name -> [D, n*H].
        state: initial h [D, B, P] and, for the LSTMs, c [D, B, H].
        w_hr: projection of h, [D, P, H], or None (LSTMs only; Sak et al. 2014).
        lengths: valid steps of each row, int64 [B], or None for T everywhere. Past its end a row's
            output is zero and its state is held.
        recurrent_dropout: probability that the recurrent product does not see a unit of h, drawn
            once per sequence; kept units are scaled by 1 / (1 - p). Only in training.
        zoneout: probability that a unit of h or c keeps its old value, drawn at every step; in
            evaluation the expectation is taken instead.
        training: whether masks are drawn.
        seed: Philox seed of the masks.
        watch: called at every step with the direction, the time and the new state, whose gradients
            are then those along all paths.

    Returns:
        Output [T, B, D*P] and the final states, shaped as the initial ones.
    """
    spec = CELLS[cell]
    step = STEPS[cell]
    steps, batch = x.shape[:2]
    directions, hidden = w_ih.shape[0], w_ih.shape[1] // spec.gates
    mask = None
    if training and recurrent_dropout > 0:
        size = state[0].shape[-1]
        kept = recurrent_mask(seed, recurrent_dropout, directions, batch, size, x.device)
        mask = kept.to(x.dtype) / (1 - recurrent_dropout)
    outputs, finals = [], []
    for d in range(directions):
        p = {name: value[d] for name, value in params.items()}
        gates = input_gates(spec, x, w_ih[d], None if b_ih is None else b_ih[d], p)
        recur = _recurrent_product(
            spec, w_hh[d], None if b_hh is None else b_hh[d], p, None if mask is None else mask[d]
        )
        now: State = tuple(s[d] for s in state)
        rows: list[Tensor] = [now[0]] * steps
        for t in range(steps) if d == 0 else reversed(range(steps)):
            new = step(gates[t], now, recur, p)
            if w_hr is not None:
                new = (F.linear(new[0], w_hr[d]), *new[1:])
            if zoneout > 0 and training:
                keep = zoneout_masks(seed, zoneout, t, directions, batch, hidden, x.device)
                new = tuple(
                    torch.where(k[d, :, : n.shape[-1]], n, s)
                    for k, n, s in zip(keep, new, now, strict=False)
                )
            elif zoneout > 0:
                new = tuple((1 - zoneout) * n + zoneout * s for n, s in zip(new, now, strict=True))
            if watch is not None:
                watch(d, t, new)
            if lengths is not None:
                alive = (t < lengths)[:, None]
                new = tuple(torch.where(alive, n, s) for n, s in zip(new, now, strict=True))
                rows[t] = torch.where(alive, new[0], torch.zeros_like(new[0]))
            else:
                rows[t] = new[0]
            now = new
        outputs.append(torch.stack(rows) if rows else now[0].new_zeros(0, *now[0].shape))
        finals.append(now)
    return torch.cat(outputs, -1), tuple(torch.stack(s) for s in zip(*finals, strict=True))
