"""Counter-based random numbers: the same masks in torch and in a Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF


def _mul_hi_lo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 that must not overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: int, *counter: Tensor | int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Philox4x32-10 of Salmon et al. 2011, equal to `tl.philox` bit for bit.

    Args:
        seed: 64-bit seed; its low and high halves are the key.
        counter: four counters below 2**32, int64 tensors or ints that broadcast together.
        device: where ints become tensors.

    Returns:
        Four int64 tensors of uniform values in [0, 2**32), of the broadcast shape.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(
        *(torch.as_tensor(c, dtype=torch.int64, device=device) for c in counter)
    )
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        hi_a, lo_a = _mul_hi_lo(c0, _ROUND_A)
        hi_b, lo_b = _mul_hi_lo(c2, _ROUND_B)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + _KEY_A) & _MASK32, (k1 + _KEY_B) & _MASK32
    return [c0, c1, c2, c3]


def _keep(bits: Tensor, drop: float) -> Tensor:
    return bits >= round(drop * 2**32)


def _row_unit(d: int, batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.arange(d * batch, device=device).view(d, batch, 1)
    return rows, torch.arange(size, device=device).view(1, 1, size)


def recurrent_mask(
    seed: int, drop: float, directions: int, batch: int, size: int, device: torch.device
) -> Tensor:
    """Which hidden units the recurrent product sees, one draw per sequence (Gal & Ghahramani 2016).

    Counter (0, d * B + b, unit, 0), first output; kept where it is at least `drop` * 2**32.

    Returns:
        Boolean [D, B, H], True where the unit is kept.
    """
    rows, units = _row_unit(directions, batch, size, device)
    return _keep(philox(seed, 0, rows, units, 0, device=device)[0], drop)


def zoneout_masks(
    seed: int,
    drop: float,
    t: Tensor | int,
    directions: int,
    batch: int,
    size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Which units of h and of c take their new value at time index `t` (Krueger et al. 2016).

    Counter (t, d * B + b, unit, 1); the first output decides for h, the second for c.

    Returns:
        Two boolean [D, B, H], True where the unit is updated, False where it keeps its old value.
    """
    rows, units = _row_unit(directions, batch, size, device)
    h_bits, c_bits, _, _ = philox(seed, t, rows, units, 1, device=device)
    return _keep(h_bits, drop), _keep(c_bits, drop)
