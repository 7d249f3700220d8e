"""What the Triton kernels of the CRF take, and with how many warps: the only tuning table."""

from __future__ import annotations

MAX_TAGS = 64
"""[K, K] float32 must fit the registers of a program three times; at 128 the gradient spills."""

MAX_PATHS = 32

WARPS = {16: 1, 32: 2, 64: 8}
"""By K rounded up to a power of two: 8 or 16 scores a thread, with which nothing spills.

A multiprocessor has four units of exponentials, one a warp; more warps wait for each other longer.
"""

REGISTERS = 255
"""The most of a thread, which 8 warps can have. Not told so, ptxas spills a few words, for one
number of tags or another, to keep to a limit that it sets itself."""

PARTIAL_SUMS = 256
"""Programs of the backward pass: each adds up its own rows, so the sum has one order."""


def padded(size: int, least: int = 16) -> int:
    """The power of two that a kernel pads K to, or with `least` 1 the number of paths."""
    return max(least, 1 << (size - 1).bit_length())


def launch_options(size: int) -> dict[str, int]:
    """How to launch a kernel for K padded to `size`."""
    return {"num_warps": WARPS[size], "num_stages": 1, "maxnreg": REGISTERS}


def refusal(num_tags: int, paths: int = 1) -> str | None:
    """Why the kernels cannot take so many tags or paths, or None."""
    if num_tags > MAX_TAGS:
        return f"takes up to {MAX_TAGS} tags, got {num_tags}"
    if paths > MAX_PATHS:
        return f"takes up to {MAX_PATHS} paths, got {paths}"
    return None
