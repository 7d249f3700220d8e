"""What surrounds the backward loop, in torch: rebuilt activations, gradients of parameters.

Everything here is a matrix product or a reduction over time and batch: deterministic, no float
atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import LAYER_NORM_EPS
from .forward import Saved


def previous(after: Tensor, initial: Tensor, lengths: Tensor | None) -> Tensor:
    """The state before each step.

    Args:
        after: state after each step [T, B, D, H]; anything at padding.
        initial: [D, B, H].
        lengths: int64 [B] or None.

    Returns:
        [T, B, D, H]; anything at padding. Direction 1 runs backward from each row's last step.
    """
    before = torch.empty_like(after)
    before[0, :, 0], before[1:, :, 0] = initial[0], after[:-1, :, 0]
    if after.shape[2] == 2:
        before[-1, :, 1], before[:-1, :, 1] = initial[1], after[1:, :, 1]
        if lengths is not None:
            steps = torch.arange(1, len(after) + 1, device=after.device)[:, None]
            first = (steps == lengths)[..., None]
            before[:, :, 1] = torch.where(first, initial[1], before[:, :, 1])
    return before


def _multiply(h: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> Tensor:
    """[T, B, D, H] by [D, n, H] to float32 [T, B, D, n]."""
    out = torch.stack([h[:, :, d] @ w.t() for d, w in enumerate(w_hh)], 2).float()
    return out if b_hh is None else out + b_hh.float()


def _normalise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True)
    rstd = (x.var(-1, correction=0, keepdim=True) + LAYER_NORM_EPS).rsqrt()
    return (x - mean) * rstd, mean, rstd


def rebuild(
    cell: str,
    x_gates: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    params: Tensor | None,
    seen: Tensor,
    before: list[Tensor],
    cell_state: Tensor | None,
    mask: Tensor | float,
) -> Saved:
    """The activations that the forward loop would have saved, by one product over all time steps.

    Args:
        cell: name of the cell.
        x_gates: input part of the gates [T, B, D, G*H].
        w_hh: [D, G*H, H].
        b_hh: [D, G*H] or None.
        params: extra parameters [D, n*H] or None.
        seen: what the recurrent product saw at each step, [T, B, D, H]: h, with its dropout.
        before: states before each step, [T, B, D, H].
        cell_state: c after each step, kept as it is.
        mask: scale of the dropout [B, D, H], or 1.

    Returns:
        What `forward` saves.
    """
    size, x = w_hh.shape[-1], x_gates.float()
    p = [] if params is None else list(params.float().split(size, -1))
    statistics = None
    if cell == "gru_reset_before":
        two, bias = 2 * size, (None, None) if b_hh is None else b_hh.split([2 * size, size], -1)
        rz = torch.sigmoid(x[..., :two] + _multiply(seen, w_hh[:, :two], bias[0]))
        reset = (rz[..., :size] * before[0].float() * mask).to(seen.dtype)
        n = torch.tanh(x[..., two:] + _multiply(reset, w_hh[:, two:], bias[1]))
        blocks = torch.cat([rz, n], -1)
    elif cell == "gru":
        r = _multiply(seen, w_hh, b_hh)
        two = 2 * size
        rz, hn = torch.sigmoid(x[..., :two] + r[..., :two]), r[..., two:]
        blocks = torch.cat([rz, torch.tanh(x[..., two:] + rz[..., :size] * hn), hn], -1)
    elif cell.startswith("rnn"):
        blocks = (torch.tanh if cell == "rnn_tanh" else torch.relu)(x + _multiply(seen, w_hh, b_hh))
    else:
        c = before[1].float()
        if cell == "lstm_layernorm":
            normed, _, rstd = _normalise(_multiply(seen, w_hh, None))
            z = x + normed * torch.cat(p[:4], -1) + (0 if b_hh is None else b_hh.float())
        else:
            z = x + _multiply(seen, w_hh, b_hh)
        i, f, g, o = z.split(size, -1)
        if cell == "lstm_peephole":
            i, f = i + p[0] * c, f + p[1] * c
        i, f, g = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g)
        c = f * c + i * g
        o = torch.sigmoid(o + p[2] * c if cell == "lstm_peephole" else o)
        blocks = torch.cat([i, f, g, o], -1)
        if cell == "lstm_layernorm":
            _, mean_c, rstd_c = _normalise(c)
            blocks = torch.cat([blocks, normed], -1)
            statistics = torch.cat([rstd, mean_c, rstd_c], -1)
    return Saved(blocks.to(x_gates.dtype), cell_state, statistics)


def weight_gradient(recurrent: Tensor, seen: Tensor, reset: Tensor | None) -> Tensor:
    """Gradient of w_hh [D, G*H, H].

    Args:
        recurrent: gradient of the recurrent part of the gates [T, B, D, G*H], zero at padding.
        seen: what the product saw [T, B, D, H], finite everywhere.
        reset: what the product of the reset-before GRU's n saw, or None.
    """
    size = seen.shape[-1]
    out = []
    for d in range(seen.shape[2]):
        grads = recurrent[:, :, d].flatten(0, 1).t()
        h = seen[:, :, d].flatten(0, 1)
        if reset is None:
            out.append(grads @ h)
        else:
            n = grads[2 * size :] @ reset[:, :, d].flatten(0, 1)
            out.append(torch.cat([grads[: 2 * size] @ h, n]))
    return torch.stack(out)


def parameter_gradients(
    cell: str, inputs: Tensor, before: list[Tensor], blocks: Tensor, statistics: Tensor
) -> Tensor:
    """Gradient of the extra parameters [D, n*H], in float32.

    Args:
        cell: lstm_peephole or lstm_layernorm.
        inputs: gradient of the input part of the gates, for the layer norm followed by that of
            LN(c).
        before: states before each step, [T, B, D, H].
        blocks: what the forward loop saved of the cell's activations.
        statistics: what it saved of the normalisations; used for the layer norm only.
    """
    size = before[1].shape[-1]
    i, f, g = (b.float() for b in blocks[..., : 3 * size].split(size, -1))
    old = before[1].float()
    new = f * old + i * g
    if cell == "lstm_peephole":
        di, df, _, do = inputs.float().split(size, -1)
        terms = [di * old, df * old, do * new]
    else:
        _, mean, rstd = statistics.split(1, -1)
        gates, normed_c = inputs[..., 4 * size :].float(), (new - mean) * rstd
        gains = inputs[..., : 4 * size].float() * blocks[..., 4 * size :].float()
        terms = [gains, gates * normed_c, gates]
    return torch.cat([term.sum((0, 1)) for term in terms], -1)
