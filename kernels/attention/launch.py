"""From shapes to launches of the decoder's kernels: their constants, their buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..persistent.launch import interpreted
from ..persistent.plan import product_precision
from .backward import backward_kernel
from .forward import forward_kernel
from .spec import FEEDBACKS

ROWS, WARPS, REGISTERS = 16, 8, 248
"""Batch rows of a program, the fewest that tensor cores multiply; its warps; registers of a thread,
since the compiler, left to itself, would rather spill some than let one program run alone."""


@dataclass(frozen=True)
class Config:
    """The compile-time constants of both kernels, `tl.constexpr` each.

    Attributes:
        H: hidden size. K: size of a key. A: of a projected key. F: of the features.
        N: of what is fed. W: N + H.
        LSTM: whether the cell is one, or a GRU. FEEDBACK: index in `FEEDBACKS`.
        R: batch rows. NB, KB: outputs and inputs of a tile of weights.
        SB, AB: source positions and elements of a tile of keys.
        PRECISION: of float32 products. UPCAST: whether operands are made float32 first.
    """

    H: tl.constexpr
    K: tl.constexpr
    A: tl.constexpr
    F: tl.constexpr
    N: tl.constexpr
    W: tl.constexpr
    LSTM: tl.constexpr
    FEEDBACK: tl.constexpr
    R: tl.constexpr
    NB: tl.constexpr
    KB: tl.constexpr
    SB: tl.constexpr
    AB: tl.constexpr
    PRECISION: tl.constexpr
    UPCAST: tl.constexpr


@dataclass(frozen=True)
class Inputs:
    """What both passes read; shapes as in spec.py, one layer.

    Attributes:
        gates: input part of the four blocks [T, B, 4H].
        matrix: [4H, N + H].
        keys: [B, S, K].
        projected: [B, S, A].
        query: [A, H] or None.
        energy: [A] or None.
        coverage: [A] or None.
        combine: [F, K + H].
        mask: [T, B, F] or None.
        lengths: int64 [B] or None.
        lstm: whether the cell is one.
        feedback: index in `FEEDBACKS`.
    """

    gates: Tensor
    matrix: Tensor
    keys: Tensor
    projected: Tensor
    query: Tensor | None
    energy: Tensor | None
    coverage: Tensor | None
    combine: Tensor
    mask: Tensor | None
    lengths: Tensor | None
    lstm: bool
    feedback: int

    @property
    def sources(self) -> tuple[Tensor | None, ...]:
        """What `attend` reads."""
        return self.keys, self.projected, self.query, self.energy, self.coverage

    @property
    def sizes(self) -> dict[str, int]:
        """The run-time sizes of the kernels."""
        steps, batch, _ = self.gates.shape
        return {"T": steps, "B": batch, "S": self.keys.shape[1]}

    def config(self) -> Config:
        """The constants for these tensors."""
        size, width = self.matrix.shape[0] // 4, self.matrix.shape[1]
        values = {
            "H": size,
            "K": self.keys.shape[2],
            "A": self.projected.shape[2],
            "F": self.combine.shape[0],
            "N": width - size,
            "W": width,
            "LSTM": self.lstm,
            "FEEDBACK": self.feedback,
            "R": ROWS,
            "NB": 32,
            "KB": 32,
            "SB": 8,
            "AB": 32,
            "PRECISION": product_precision(self.gates),
            "UPCAST": interpreted(forward_kernel),
        }
        return Config(**{name: tl.constexpr(value) for name, value in values.items()})


@dataclass(frozen=True)
class Buffers:
    """What the forward pass leaves; T + 1 slots where a step reads the one before.

    Attributes:
        seen: [T + 1, B, N + H].
        joined: [T, B, K + H].
        weights: float32 [T, B, S].
        coverage: float32 [T + 1, B, S], or no slots.
        features: [T, B, F], or F = 0.
        query: [T, B, A], or A = 0.
        cells: float32 [T + 1, B, H], or no slots.
        gates: [T, B, 4H].
    """

    seen: Tensor
    joined: Tensor
    weights: Tensor
    coverage: Tensor
    features: Tensor
    query: Tensor
    cells: Tensor
    gates: Tensor


def buffers(x: Inputs) -> Buffers:
    """Memory for a forward pass, not filled in."""
    steps, batch, rows = x.gates.shape
    new, source = x.gates.new_empty, x.keys.shape[1]
    covers, fed = x.coverage is not None, FEEDBACKS[x.feedback] == "features"
    return Buffers(
        new(steps + 1, batch, x.matrix.shape[1]),
        new(steps, batch, x.combine.shape[1]),
        new(steps, batch, source, dtype=torch.float32),
        new(steps + 1 if covers else 0, batch, source, dtype=torch.float32),
        new(steps, batch, x.combine.shape[0] if fed else 0),
        new(steps, batch, 0 if x.query is None else x.query.shape[0]),
        new(steps + 1 if x.lstm else 0, batch, rows // 4, dtype=torch.float32),
        new(steps, batch, rows),
    )


@dataclass(frozen=True)
class Gradients:
    """What the backward pass leaves.

    Attributes:
        gates: [T, B, 4H].
        features: before tanh [T, B, F], or F = 0.
        joined: float32 [T, B, K + H]; that of the contexts in full.
        score: float32 [T, B, S].
        query: of W_q q, or of q, [T, B, A].
        seen: float32 [B, N + H], of what the first step saw.
        cells: float32 [B, H], of c_0; for the GRU of no meaning.
        coverage: float32 [B, S], of the first coverage.
    """

    gates: Tensor
    features: Tensor
    joined: Tensor
    score: Tensor
    query: Tensor
    seen: Tensor
    cells: Tensor
    coverage: Tensor


def gradients(x: Inputs) -> Gradients:
    """Memory for a backward pass, not filled in."""
    steps, batch, rows = x.gates.shape
    new, source = x.gates.new_empty, x.keys.shape[1]
    fed = FEEDBACKS[x.feedback] == "features"
    wide: dict[str, Any] = {"dtype": torch.float32}
    return Gradients(
        new(steps, batch, rows),
        new(steps, batch, x.combine.shape[0] if fed else 0),
        new(steps, batch, x.combine.shape[1], **wide),
        new(steps, batch, source, **wide),
        new(steps, batch, x.projected.shape[2]),
        new(batch, x.matrix.shape[1], **wide),
        new(batch, rows // 4, **wide),
        new(batch, source if x.coverage is not None else 0, **wide),
    )


def dispatch(kernel: Any, grid: tuple[int], **arguments: object) -> None:
    """Launch once."""
    kernel[grid](**arguments, num_warps=WARPS, num_stages=1, maxnreg=REGISTERS)


def run_forward(
    x: Inputs, h: Tensor, c: Tensor | None, feed: Tensor | None, coverage: Tensor | None
) -> Buffers:
    """The forward kernel, from the states [B, H], the feed [B, F] and the coverage [B, S]."""
    out = buffers(x)
    size = h.shape[1]
    out.gates.copy_(x.gates)
    out.seen[0, :, -size:] = h
    if FEEDBACKS[x.feedback] == "features":
        out.seen[0, :, :-size] = 0 if feed is None else feed
    if c is not None:
        out.cells[0] = c
    if x.coverage is not None:
        out.coverage[0] = 0 if coverage is None else coverage
    dispatch(
        forward_kernel,
        (triton.cdiv(x.gates.shape[1], ROWS),),
        gates=out.gates,
        matrix=x.matrix,
        sources=x.sources,
        combine=x.combine,
        buffers=(
            out.seen, out.cells, out.joined, out.weights, out.coverage, out.query, out.features,
        ),
        mask=x.mask,
        lengths=x.lengths,
        C=x.config(),
        **x.sizes,
    )  # fmt: skip
    return out


def run_backward(
    x: Inputs,
    kept: Buffers,
    d_features: Tensor,
    d_joined: Tensor,
    d_weights: Tensor | None,
    dh: Tensor,
    dc: Tensor | None,
) -> Gradients:
    """The backward kernel, from the gradients of what `decode` returns; d_joined is float32."""
    out = gradients(x)
    size = dh.shape[1]
    out.joined.copy_(d_joined)
    out.seen.zero_()
    out.seen[:, -size:] = dh
    out.coverage.zero_()
    if dc is None:
        out.cells.zero_()
    else:
        out.cells.copy_(dc)
    dispatch(
        backward_kernel,
        (triton.cdiv(x.gates.shape[1], ROWS),),
        matrix=x.matrix,
        sources=x.sources,
        combine=x.combine,
        saved=(
            kept.seen, kept.joined, kept.weights, kept.coverage, kept.features, kept.query,
            kept.cells, kept.gates,
        ),
        given=(d_features, d_weights),
        grads=(out.gates, out.features, out.joined, out.score, out.query),
        carried=(out.seen, out.cells, out.coverage),
        mask=x.mask,
        lengths=x.lengths,
        C=x.config(),
        **x.sizes,
    )  # fmt: skip
    return out
