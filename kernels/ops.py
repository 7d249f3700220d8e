"""The Triton kernels as torch operators, and the recurrence as a differentiable function of them.

Two opaque operators, so that `torch.compile` neither traces nor changes the kernels; the products
outside the time loop (input part, weight gradients) are plain torch and may be fused by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .persistent.backward import backward
from .persistent.forward import Saved, forward, forward_kernel
from .persistent.launch import Masks, interpreted
from .persistent.plan import (
    BLOCKS,
    LaunchPlan,
    choose,
    device_of,
    loop_parameters,
    product_precision,
)
from .persistent.products import parameter_gradients, previous, rebuild, weight_gradient
from .philox import recurrent_mask
from .reference import input_gates
from .spec import CELLS

State = tuple[Tensor, ...]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Options(NamedTuple):
    """What the operators need beside tensors; the probabilities are those of `recurrence`."""

    cell: str
    seed: int
    recurrent_dropout: float
    zoneout: float
    training: bool

    @property
    def masks(self) -> Masks:
        """As the launchers want them."""
        return Masks(self.seed, self.recurrent_dropout, self.zoneout, self.training)


def plan(
    cell: str, hidden_size: int, batch: int, directions: int, like: Tensor, backward: bool
) -> LaunchPlan:
    """How a pass over a batch would be launched; `print` says it in words.

    Args:
        cell: name in `CELLS`.
        hidden_size: H.
        batch: B.
        directions: 1 or 2.
        like: a tensor of the dtype and on the device of the computation.
        backward: which pass.

    Raises:
        ValueError: no plan fits the device.
    """
    precision = product_precision(like)
    return choose(
        cell, hidden_size, batch, directions, like.dtype, precision, backward, device_of(like)
    )


@torch.library.custom_op("fusedrnn::recurrence", mutates_args=())
def recurrence_op(
    x_gates: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    params: Tensor | None,
    state: list[Tensor],
    lengths: Tensor | None,
    cell: str,
    seed: int,
    recurrent_dropout: float,
    zoneout: float,
    training: bool,
    save: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward loop: y, h_n, c_n, then what `save` keeps; empty where absent."""
    steps, batch = x_gates.shape[:2]
    if steps == 0 or batch == 0:
        y, _, c_n, *kept = _outputs(x_gates, w_hh, state, cell, save)
        c_n = state[1].clone() if len(state) == 2 else c_n
        return y, state[0].clone(), c_n, kept[0], kept[1], kept[2]
    launch = plan(cell, w_hh.shape[-1], batch, len(w_hh), x_gates, False)
    masks = Options(cell, seed, recurrent_dropout, zoneout, training).masks
    y, final, saved = forward(
        launch, x_gates.contiguous(), w_hh.contiguous(), _dense(b_hh), _dense(params),
        [s.contiguous() for s in state], _dense(lengths), masks, save,
    )  # fmt: skip
    c_n = final[1] if len(final) == 2 else x_gates.new_empty(0)
    kept = [
        x_gates.new_empty(0) if k is None else k
        for k in (saved.blocks, saved.cell_state, saved.statistics)
    ]
    return y, final[0], c_n, kept[0], kept[1], kept[2]


@recurrence_op.register_fake
def _(
    x_gates: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    params: Tensor | None,
    state: list[Tensor],
    lengths: Tensor | None,
    cell: str,
    seed: int,
    recurrent_dropout: float,
    zoneout: float,
    training: bool,
    save: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x_gates, w_hh, state, cell, save)


def _dense(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, as the kernels read what they are given."""
    return None if tensor is None else tensor.contiguous()


def _outputs(
    x_gates: Tensor, w_hh: Tensor, state: list[Tensor], cell: str, save: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the forward operator, not filled in."""
    steps, batch, directions, _ = x_gates.shape
    size, blocks, new = w_hh.shape[-1], BLOCKS[cell], x_gates.new_empty
    everything, lstm = save == "all", len(state) == 2
    statistics = everything and blocks.statistics
    return (
        new(steps, batch, directions * size),
        new(directions, batch, size),
        new(directions, batch, size) if lstm else new(0),
        new(steps, batch, directions, blocks.saved * size) if everything else new(0),
        new(steps, batch, directions, size) if lstm and save != "nothing" else new(0),
        x_gates.new_empty(steps, batch, directions, blocks.statistics, dtype=torch.float32)
        if statistics
        else new(0),
    )


@torch.library.custom_op("fusedrnn::recurrence_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    d_state: list[Tensor],
    w_hh: Tensor,
    params: Tensor | None,
    state: list[Tensor],
    y: Tensor,
    saved: list[Tensor],
    lengths: Tensor | None,
    cell: str,
    seed: int,
    recurrent_dropout: float,
    zoneout: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward loop: gradients of the gates' recurrent and input parts, of h_0 and c_0."""
    recurrent, separate, _, dc = _gradients(dy, w_hh, state, cell)
    if dy.numel() == 0:
        copies = [d.to(torch.float32, copy=True) for d in d_state]
        return recurrent, separate, copies[0], copies[1] if len(copies) == 2 else dc
    launch = plan(cell, w_hh.shape[-1], dy.shape[1], len(w_hh), dy, True)
    blocks, cell_state, statistics = (s.contiguous() if s.numel() else None for s in saved)
    recurrent, inputs, d_initial = backward(
        launch, dy.contiguous(), [d.contiguous() for d in d_state], w_hh.contiguous(),
        _dense(params), [s.contiguous() for s in state], y.contiguous(),
        Saved(blocks, cell_state, statistics), _dense(lengths),
        Options(cell, seed, recurrent_dropout, zoneout, training).masks,
    )  # fmt: skip
    separate = inputs if BLOCKS[cell].separate else separate
    return recurrent, separate, d_initial[0], d_initial[1] if len(d_initial) == 2 else dc


@backward_op.register_fake
def _(
    dy: Tensor,
    d_state: list[Tensor],
    w_hh: Tensor,
    params: Tensor | None,
    state: list[Tensor],
    y: Tensor,
    saved: list[Tensor],
    lengths: Tensor | None,
    cell: str,
    seed: int,
    recurrent_dropout: float,
    zoneout: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(dy, w_hh, state, cell)


def _gradients(
    dy: Tensor, w_hh: Tensor, state: list[Tensor], cell: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the backward operator, not filled in."""
    steps, batch = dy.shape[:2]
    directions, rows, size = w_hh.shape
    separate = BLOCKS[cell].separate * size
    return (
        dy.new_empty(steps, batch, directions, rows),
        dy.new_empty(steps, batch, directions, separate) if separate else dy.new_empty(0),
        dy.new_empty(state[0].shape, dtype=torch.float32),
        dy.new_empty(state[1].shape if len(state) == 2 else 0, dtype=torch.float32),
    )


class Recurrence(torch.autograd.Function):
    """The forward and the backward operator, and the products around the latter."""

    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        recompute: bool,
        again: tuple[Tensor | None, ...],
        lengths: Tensor | None,
        x_gates: Tensor,
        w_hh: Tensor,
        b_hh: Tensor | None,
        params: Tensor | None,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        """`again` holds the arguments of `_input_part`, from which `recompute` rebuilds x_gates."""
        save = "nothing" if not any(ctx.needs_input_grad) else "state" if recompute else "all"
        y, h_n, c_n, *saved = recurrence_op(
            x_gates, w_hh, b_hh, params, list(state), lengths, *options, save
        )
        ctx.options, ctx.recompute, ctx.count = options, recompute, len(state)
        if save != "nothing":
            ctx.save_for_backward(lengths, w_hh, b_hh, params, y, *saved, *state, *again)
        return (y, h_n) if len(state) == 1 else (y, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *d_state: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x_gates, w_hh, b_hh, params and the initial states."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the backward of backend='triton' is not differentiable: use "
                "backend='reference' for gradients of gradients (create_graph=True)"
            )
        lengths, w_hh, b_hh, params, y, *rest = ctx.saved_tensors
        saved, state, again = rest[:3], rest[3 : 3 + ctx.count], rest[3 + ctx.count :]
        options, (directions, rows, size) = ctx.options, w_hh.shape
        after = (y.unflatten(-1, (directions, size)), saved[1])[: ctx.count]
        empty = y.numel() == 0
        before = [
            a if empty else previous(a, s, lengths) for a, s in zip(after, state, strict=True)
        ]
        mask = _mask(options, state[0])
        seen = before[0] if mask is None else before[0] * mask
        if ctx.recompute and not empty:
            x_gates = _input_part(options.cell, *again)
            scale = 1.0 if mask is None else mask
            kept = rebuild(options.cell, x_gates, w_hh, b_hh, params, seen, before, saved[1], scale)
            saved = [
                kept.blocks,
                saved[1],
                saved[2] if kept.statistics is None else kept.statistics,
            ]
        recurrent, inputs, *d_initial = backward_op(
            dy, list(d_state), w_hh, params, state, y, saved, lengths, *options
        )
        if not BLOCKS[options.cell].separate:
            inputs = recurrent
        reset = None
        if options.cell == "gru_reset_before" and not empty:
            reset = seen * saved[0][..., :size]
        elif options.cell == "gru_reset_before":
            reset = seen
        dw = weight_gradient(recurrent, seen, reset)
        d_gates = inputs[..., :rows]
        db = dp = None
        if b_hh is not None:
            shifted = d_gates if options.cell == "lstm_layernorm" else recurrent
            db = shifted.sum((0, 1), dtype=torch.float32).to(b_hh.dtype)
        if params is not None:
            dp = torch.zeros_like(params)
            if not empty:
                dp = parameter_gradients(options.cell, inputs, before, saved[0], saved[2])
                dp = dp.to(params.dtype)
        d_initial = [d.to(s.dtype) for d, s in zip(d_initial, state, strict=False)]
        return None, None, None, None, d_gates, dw, db, dp, *d_initial


def _mask(options: Options, h: Tensor) -> Tensor | None:
    """Scale of the recurrent dropout [B, D, H] of h [D, B, H], or None."""
    drop = options.recurrent_dropout
    if not options.training or drop == 0:
        return None
    directions, batch, size = h.shape
    kept = recurrent_mask(options.seed, drop, directions, batch, size, h.device)
    return (kept.to(h.dtype) / (1 - drop)).transpose(0, 1)


def _input_part(
    cell: str, x: Tensor, w_ih: Tensor, b_ih: Tensor | None, gain: Tensor | None = None
) -> Tensor:
    """Input part of the gates [T, B, D, G*H]; `gain` is that of the layer norm, [D, G*H]."""
    if gain is None:
        bias = None if b_ih is None else b_ih.flatten()
        return torch.nn.functional.linear(x, w_ih.flatten(0, 1), bias).unflatten(-1, w_ih.shape[:2])
    parts = [
        input_gates(CELLS[cell], x, w, None if b_ih is None else b_ih[d], {"weight_ln_ih": gain[d]})
        for d, w in enumerate(w_ih)
    ]
    return torch.stack(parts, 2)


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
    recompute: bool = False,
) -> tuple[Tensor, State]:
    """One layer, all its directions, by the Triton kernels.

    Args:
        cell: name in `CELLS`.
        x: input [T, B, I]; float32, float16 or bfloat16, on a GPU (or any device under Triton's
            interpreter).
        w_ih: [D, G*H, I].
        w_hh: [D, G*H, H].
        b_ih: [D, G*H] or None.
        b_hh: [D, G*H] or None.
        params: extra parameters of the cell, name -> [D, n*H].
        state: initial h [D, B, H] and, for the LSTMs, c [D, B, H].
        w_hr: must be None.
        lengths: int64 [B] or None.
        recurrent_dropout: probability in [0, 1).
        zoneout: probability in [0, 1).
        training: whether masks are drawn.
        seed: seed of the masks.
        recompute: keep only h and c for the gradient, and rebuild the gates in the backward pass by
            one product: a third of the memory for about one more forward product.

    Returns:
        Output [T, B, D*H] and the final states, shaped as the initial ones.

    Raises:
        ValueError: a projection, another dtype, or a device that the kernels cannot run on.
    """
    _check(x, w_hr)
    names = loop_parameters(cell)
    packed = torch.cat([params[name] for name in names], -1) if names else None
    gain = (params["weight_ln_ih"],) if cell == "lstm_layernorm" else ()
    again = (x, w_ih, b_ih, *gain)
    options = Options(cell, seed, recurrent_dropout, zoneout, training)
    y, *final = Recurrence.apply(
        options,
        recompute,
        tuple(None if a is None else a.detach() for a in again) if recompute else (),
        lengths,
        _input_part(cell, *again),
        w_hh,
        b_hh,
        packed,
        *state,
    )
    return y, tuple(final)


def _check(x: Tensor, w_hr: Tensor | None) -> None:
    if w_hr is not None:
        raise ValueError(
            "proj_size needs backend='torch' or 'reference': backend='triton' has none"
        )
    if x.dtype not in DTYPES:
        raise ValueError(
            f"backend='triton' computes in float32, float16 or bfloat16, not {x.dtype}: use "
            "backend='reference' for float64"
        )
    if not x.is_cuda and not interpreted(forward_kernel):
        raise ValueError(
            f"backend='triton' needs a CUDA tensor, got one on {x.device}: move the layer and its "
            "input to a GPU, choose backend='torch', or set TRITON_INTERPRET=1 to debug"
        )
