"""Validation shared by the functional API and the layers: one line that names the argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .spec import CellSpec

BACKENDS = ("auto", "triton", "torch", "reference")


def check_backend(backend: str, recompute: bool = False) -> None:
    """Raise ValueError unless `backend` is one of `BACKENDS`, and may have `recompute`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if recompute and backend not in ("auto", "triton"):
        raise ValueError(
            f"recompute=True needs backend='triton', which alone has it, got backend={backend!r}"
        )


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= value < 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")


def autocasts(kind: str) -> bool:
    """Whether autocast acts on a kind of device; it does not know meta."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise TypeError for what is no floating point tensor."""
    for name, tensor in tensors.items():
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
    looked_at = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and batch:
        low, high = lengths.aminmax()
        if low >= 1 and high <= steps:
            return
    wrong = (lengths < 1) | (lengths > steps)
    if not looked_at:
        torch._assert_async(~wrong.any(), f"lengths must lie in 1..{steps}")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"lengths must lie in 1..{steps}, row {row} has {int(lengths[row])}")


def _check(name: str, tensor: Tensor, shape: Sequence[int], x: Tensor) -> None:
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
    if tensor.dtype != x.dtype and not autocasts(x.device.type):
        raise ValueError(f"{name} must have dtype {x.dtype} like x, got {tensor.dtype}")


def check_layer(
    spec: CellSpec,
    x: Tensor,
    weights: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
) -> None:
    """Check the tensors of one layer, all with their direction axis.

    Args:
        spec: the cell.
        x: [T, B, I].
        weights: w_ih [D, G*H, I] and w_hh [D, G*H, P]; where given, b_ih and b_hh [D, G*H] and
            w_hr [D, P, H].
        params: extra parameters of the cell, name -> [D, n*H].
        states: initial states where given: h_0 [D, B, P], c_0 [D, B, H].

    Raises:
        ValueError: a shape, dtype or device does not fit.
        RuntimeError: the sequence is empty, as in torch.
    """
    if x.dim() != 3:
        raise ValueError(f"x must have shape [T, B, I], got {list(x.shape)}")
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    shape = weights["w_ih"].shape
    if len(shape) != 3 or shape[0] not in (1, 2) or shape[1] % spec.gates or 0 in shape:
        raise ValueError(
            f"w_ih must have shape [D, {spec.gates}*H, I] or [{spec.gates}*H, I] with D 1 or 2, "
            f"got {list(shape)}"
        )
    directions, rows, _ = shape
    hidden = rows // spec.gates
    size = weights["w_hr"].shape[-2] if "w_hr" in weights else hidden
    shapes = {
        "w_ih": (directions, rows, x.shape[-1]),
        "w_hh": (directions, rows, size),
        "b_ih": (directions, rows),
        "b_hh": (directions, rows),
        "w_hr": (directions, size, hidden),
        "h_0": (directions, x.shape[1], size),
        "c_0": (directions, x.shape[1], hidden),
    } | {name: (directions, multiple * hidden) for name, multiple in spec.parameters.items()}
    for name, tensor in (*weights.items(), *params.items(), *states.items()):
        _check(name, tensor, shapes[name], x)
