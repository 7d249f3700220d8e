"""Validation shared by the functional API and the layers: one line that names the argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .spec import CellSpec

BACKENDS = ("auto", "triton", "torch", "reference")


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= value < 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")


def check_tensors(**tensors: Tensor | None) -> None:
    """Raise TypeError for what is neither None nor a floating point tensor."""
    for name, tensor in tensors.items():
        if tensor is None and name not in ("x", "w_ih", "w_hh"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating point tensor, got {tensor.dtype}")


def check_lengths(lengths: Tensor, steps: int, batch: int, device: torch.device) -> None:
    """Check the lengths of a padded batch; a GPU does it without a host synchronisation.

    Args:
        lengths: valid steps of each row, int64 [B] on `device`, each in 1..T.
        steps: T.
        batch: B.
        device: the input's.

    Raises:
        TypeError: `lengths` is not an int64 tensor.
        ValueError: its shape, device or a value is wrong.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(
            f"lengths must be an int64 tensor of shape [{batch}], got {type(lengths).__name__}"
        )
    if lengths.dtype != torch.int64:
        raise TypeError(f"lengths must have dtype torch.int64, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(
            f"lengths must have shape [{batch}], one per batch row, got {list(lengths.shape)}"
        )
    if lengths.device != device:
        raise ValueError(f"lengths must be on {device} like the input, got {lengths.device}")
    wrong = (lengths < 1) | (lengths > steps)
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~wrong.any(), f"lengths must lie in 1..{steps}")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"lengths must lie in 1..{steps}, row {row} has {int(lengths[row])}")


def _check(name: str, tensor: Tensor, shape: Sequence[int], x: Tensor) -> None:
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
    if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{name} must have dtype {x.dtype} like x, got {tensor.dtype}")


def check_layer(
    spec: CellSpec,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    params: Mapping[str, Tensor],
    w_hr: Tensor | None,
    states: Mapping[str, Tensor],
) -> None:
    """Check the tensors of one layer, weights and states with their direction axis.

    Args:
        spec: the cell.
        x: [T, B, I].
        w_ih: [D, G*H, I].
        w_hh: [D, G*H, P].
        b_ih: [D, G*H] or None.
        b_hh: [D, G*H] or None.
        params: extra parameters of the cell, name -> [D, n*H].
        w_hr: [D, P, H] or None.
        states: initial states that were given, name -> [D, B, P or H].

    Raises:
        ValueError: a shape, dtype or device does not fit; RuntimeError on an empty sequence, as in
            torch.
    """
    if x.dim() != 3:
        raise ValueError(f"x must have shape [T, B, I], got {list(x.shape)}")
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if (
        w_ih.dim() != 3
        or w_ih.shape[0] not in (1, 2)
        or w_ih.shape[1] % spec.gates
        or 0 in w_ih.shape
    ):
        raise ValueError(
            f"w_ih must have shape [D, {spec.gates}*H, I] or [{spec.gates}*H, I] with D 1 or 2, "
            f"got {list(w_ih.shape)}"
        )
    directions, rows, _ = w_ih.shape
    hidden = rows // spec.gates
    size = hidden if w_hr is None else w_hr.shape[-2]
    _check("w_ih", w_ih, (directions, rows, x.shape[-1]), x)
    _check("w_hh", w_hh, (directions, rows, size), x)
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            _check(name, bias, (directions, rows), x)
    for name, value in params.items():
        _check(name, value, (directions, spec.parameters[name] * hidden), x)
    if w_hr is not None:
        _check("w_hr", w_hr, (directions, size, hidden), x)
    for name, state in states.items():
        _check(name, state, (directions, x.shape[1], size if name == "h_0" else hidden), x)
