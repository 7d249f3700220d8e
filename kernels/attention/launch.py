"""From shapes to launches of the decoder's kernels: their constants, their buffers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Self

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
        HIDDEN: hidden size of each layer. FED: of what it sees beside its h. LAYERS: how many.
        Q: hidden size of the top one. K: size of a key. A: of a projected key. F: of the features.
        LSTM: whether the cell is one, or a GRU. FEEDBACK: index in `FEEDBACKS`.
        R: batch rows. NB, KB: outputs and inputs of a tile of weights.
        SB, AB: source positions and elements of a tile of keys.
        V, E: symbols that may be drawn, and size of an input; zero without scheduled sampling.
        VB: symbols of a tile.
        PRECISION: of float32 products. UPCAST: whether operands are made float32 first.
    """

    HIDDEN: tl.constexpr
    FED: tl.constexpr
    LAYERS: tl.constexpr
    Q: tl.constexpr
    K: tl.constexpr
    A: tl.constexpr
    F: tl.constexpr
    LSTM: tl.constexpr
    FEEDBACK: tl.constexpr
    R: tl.constexpr
    NB: tl.constexpr
    KB: tl.constexpr
    SB: tl.constexpr
    AB: tl.constexpr
    V: tl.constexpr
    E: tl.constexpr
    VB: tl.constexpr
    PRECISION: tl.constexpr
    UPCAST: tl.constexpr


class Kind(NamedTuple):
    """What of a decoder no tensor shows.

    Attributes:
        layers: how many.
        lstm: whether the cell is one, or a GRU.
        feedback: index in `FEEDBACKS`.
    """

    layers: int
    lstm: bool
    feedback: int

    @property
    def fed(self) -> bool:
        """Whether the features are fed back."""
        return FEEDBACKS[self.feedback] == "features"


Tensors = list[Tensor]


class Words(NamedTuple):
    """Scheduled sampling as the forward kernel reads it; shapes as in `spec.Sampling`.

    Attributes:
        replaced: bool [T, B].
        uniform: float32 [T, B].
        embedding: [V, E].
        weight: [V, F].
        bias: [V] or None.
        mask: [T, B, E] or None.
        lowest: the lowest layer's weights of its input [4H, E].
        shift: and its biases [4H].
        symbols: int64 [T, B].
    """

    replaced: Tensor
    uniform: Tensor
    embedding: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    lowest: Tensor
    shift: Tensor
    symbols: Tensor


def tile_of(symbols: int) -> int:
    """Symbols of a tile; wide, because each row of weights is read for it alone."""
    return min(256, max(32, triton.next_power_of_2(symbols)))


@dataclass(frozen=True)
class Flat:
    """Tensors, then lists of one per layer, which an operator takes and returns as one list.

    A subclass says how many of each it has.
    """

    SINGLE: ClassVar[int]
    LISTS: ClassVar[int]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], layers: int) -> Self:
        """The inverse of `flat`; the last list has what is left."""
        rest = iter(tensors)
        single = [*itertools.islice(rest, cls.SINGLE)]
        lists = [[*itertools.islice(rest, layers)] for _ in range(cls.LISTS - 1)]
        return cls(*single, *lists, [*rest])  # type: ignore[call-arg]  # of a subclass

    def flat(self) -> list[Any]:
        """All tensors in order."""
        found: list[Any] = []
        for field in fields(self):
            part = getattr(self, field.name)
            found += part if isinstance(part, list) else [part]
        return found


@dataclass(frozen=True)
class Inputs(Flat):
    """What both passes read; shapes as in spec.py. Lists hold one tensor per layer.

    Attributes:
        keys: [B, S, K].
        projected: [B, S, A].
        query: [A, Q] or None.
        energy: [A] or None.
        coverage: [A] or None.
        combine: [F, K + Q].
        mask: of the features [T, B, F] or None.
        lengths: int64 [B] or None.
        gates: of the four blocks [T, B, 4H] what does not depend on the steps before.
        matrices: [4H, N + H], for what is fed (N) and h.
        between: masks [T, B, H] of all layers but the top one, or empty.
    """

    SINGLE, LISTS = 8, 3
    keys: Tensor
    projected: Tensor
    query: Tensor | None
    energy: Tensor | None
    coverage: Tensor | None
    combine: Tensor
    mask: Tensor | None
    lengths: Tensor | None
    gates: Tensors
    matrices: Tensors
    between: Tensors

    @property
    def sources(self) -> tuple[Tensor | None, ...]:
        """What `attend` reads."""
        return self.keys, self.projected, self.query, self.energy, self.coverage

    @property
    def sizes(self) -> dict[str, int]:
        """The run-time sizes of the kernels."""
        steps, batch, _ = self.gates[0].shape
        return {"T": steps, "B": batch, "S": self.keys.shape[1]}

    @property
    def hidden(self) -> list[int]:
        """Hidden size of each layer."""
        return [matrix.shape[0] // 4 for matrix in self.matrices]

    def config(self, kind: Kind, words: Words | None = None) -> Config:
        """The constants for these tensors."""
        hidden = self.hidden
        symbols, size = (0, 0) if words is None else words.embedding.shape
        fed = [m.shape[1] - size for m, size in zip(self.matrices, hidden, strict=True)]
        values = {
            "HIDDEN": tuple(hidden),
            "FED": tuple(fed),
            "LAYERS": kind.layers,
            "Q": hidden[-1],
            "K": self.keys.shape[2],
            "A": self.projected.shape[2],
            "F": self.combine.shape[0],
            "LSTM": kind.lstm,
            "FEEDBACK": kind.feedback,
            "R": ROWS,
            "NB": 32,
            "KB": 32,
            "SB": 8,
            "AB": 32,
            "V": symbols,
            "E": size,
            "VB": tile_of(symbols),
            "PRECISION": product_precision(self.keys),
            "UPCAST": interpreted(forward_kernel),
        }
        return Config(**{name: tl.constexpr(value) for name, value in values.items()})


@dataclass(frozen=True)
class Start(Flat):
    """What there is before the first step.

    Attributes:
        feed: [B, F], with feedback "features", or None: zeros.
        coverage: [B, S], with coverage, or None: zeros.
        h: of each layer [B, H].
        c: likewise, of an LSTM.
    """

    SINGLE, LISTS = 2, 2
    feed: Tensor | None
    coverage: Tensor | None
    h: Tensors
    c: Tensors


@dataclass(frozen=True)
class Buffers(Flat):
    """What the forward pass leaves; T + 1 slots where a step reads the one before.

    Attributes:
        joined: [T, B, K + Q].
        weights: float32 [T, B, S].
        coverage: float32 [T + 1, B, S], or no slots.
        features: [T, B, F], before dropout if they are fed back, after if they only predict what
            is drawn; else F = 0.
        query: [T, B, A], or A = 0.
        symbols: int64 [T, B], what was fed under scheduled sampling, or no steps.
        seen: of each layer [T + 1, B, N + H].
        gates: likewise [T, B, 4H].
        cells: float32, of each layer of an LSTM [T + 1, B, H], else empty.
    """

    SINGLE, LISTS = 6, 3
    joined: Tensor
    weights: Tensor
    coverage: Tensor
    features: Tensor
    query: Tensor
    symbols: Tensor
    seen: Tensors
    gates: Tensors
    cells: Tensors


def buffers(x: Inputs, kind: Kind, drawn: bool = False) -> Buffers:
    """Memory for a forward pass, not filled in."""
    steps, batch, _ = x.gates[0].shape
    new, source = x.keys.new_empty, x.keys.shape[1]
    wide: dict[str, Any] = {"dtype": torch.float32}
    return Buffers(
        new(steps, batch, x.combine.shape[1]),
        new(steps, batch, source, **wide),
        new(steps + 1 if x.coverage is not None else 0, batch, source, **wide),
        new(steps, batch, x.combine.shape[0] if kind.fed or drawn else 0),
        new(steps, batch, 0 if x.query is None else x.query.shape[0]),
        new(steps if drawn else 0, batch, dtype=torch.int64),
        [new(steps + 1, batch, matrix.shape[1]) for matrix in x.matrices],
        [new(steps, batch, matrix.shape[0]) for matrix in x.matrices],
        [new(steps + 1, batch, size, **wide) for size in x.hidden if kind.lstm],
    )


@dataclass(frozen=True)
class Gradients(Flat):
    """What the backward pass leaves.

    Attributes:
        features: before tanh [T, B, F], or F = 0.
        joined: float32 [T, B, K + Q]; that of the contexts in full.
        score: float32 [T, B, S].
        query: of W_q q, or of q, [T, B, A].
        coverage: float32 [B, S], of the first coverage.
        gates: of each layer [T, B, 4H].
        seen: float32, likewise [B, N + H], of what the first step saw.
        cells: float32, likewise [B, H], of c_0; for the GRU of no meaning.
    """

    SINGLE, LISTS = 5, 3
    features: Tensor
    joined: Tensor
    score: Tensor
    query: Tensor
    coverage: Tensor
    gates: Tensors
    seen: Tensors
    cells: Tensors


def gradients(x: Inputs, kind: Kind) -> Gradients:
    """Memory for a backward pass, not filled in."""
    steps, batch, _ = x.gates[0].shape
    new, source = x.keys.new_empty, x.keys.shape[1]
    wide: dict[str, Any] = {"dtype": torch.float32}
    return Gradients(
        new(steps, batch, x.combine.shape[0] if kind.fed else 0),
        new(steps, batch, x.combine.shape[1], **wide),
        new(steps, batch, source, **wide),
        new(steps, batch, x.projected.shape[2]),
        new(batch, source if x.coverage is not None else 0, **wide),
        [new(steps, batch, matrix.shape[0]) for matrix in x.matrices],
        [new(batch, matrix.shape[1], **wide) for matrix in x.matrices],
        [new(batch, size, **wide) for size in x.hidden],
    )


@dataclass(frozen=True)
class Incoming(Flat):
    """Gradients of what `decode` returns.

    Attributes:
        features: before dropout [T, B, F], or F = 0.
        joined: float32 [T, B, K + Q].
        weights: [T, B, S], or None: zero.
        h: of each layer's last [B, H].
        c: likewise, of an LSTM.
    """

    SINGLE, LISTS = 3, 2
    features: Tensor
    joined: Tensor
    weights: Tensor | None
    h: Tensors
    c: Tensors


def dispatch(kernel: Any, grid: tuple[int], **arguments: object) -> None:
    """Launch once, on the device of the tensors: Triton alone would take the current one."""
    with torch.cuda.device_of(arguments["combine"]):
        kernel[grid](**arguments, num_warps=WARPS, num_stages=1, maxnreg=REGISTERS)


def run_forward(x: Inputs, kind: Kind, start: Start, words: Words | None = None) -> Buffers:
    """The forward kernel."""
    out = buffers(x, kind, words is not None)
    drawing: tuple[Tensor | None, ...] | None = None
    if words is not None:
        symbols, size = words.embedding.shape
        batch, tiles = x.sizes["B"], triton.cdiv(symbols, tile_of(symbols))
        sums = x.keys.new_empty(batch, tiles, dtype=torch.float32)
        drawing = (
            words.replaced.view(torch.uint8), *words[1:-1], out.symbols.copy_(words.symbols), sums,
            x.keys.new_empty(batch, size),
        )  # fmt: skip
    for given, gates in zip(x.gates, out.gates, strict=True):
        gates.copy_(given)
    for h, seen in zip(start.h, out.seen, strict=True):
        seen[0, :, -h.shape[1] :] = h
        seen[-1].zero_()  # what would be fed to a step more: results hold no unwritten memory
    for c, cells in zip(start.c, out.cells, strict=True):
        cells[0] = c
    if kind.fed:
        out.seen[0][0, :, : x.combine.shape[0]] = 0 if start.feed is None else start.feed
    if x.coverage is not None:
        out.coverage[0] = 0 if start.coverage is None else start.coverage
    dispatch(
        forward_kernel,
        (triton.cdiv(x.sizes["B"], ROWS),),
        gates=tuple(out.gates),
        matrices=tuple(x.matrices),
        sources=x.sources,
        combine=x.combine,
        buffers=(
            tuple(out.seen), tuple(out.cells), out.joined, out.weights, out.coverage, out.query,
            out.features,
        ),
        between=tuple(x.between),
        mask=x.mask,
        lengths=x.lengths,
        words=drawing,
        C=x.config(kind, words),
        **x.sizes,
    )  # fmt: skip
    return out


def run_backward(x: Inputs, kind: Kind, kept: Buffers, given: Incoming) -> Gradients:
    """The backward kernel."""
    out = gradients(x, kind)
    out.joined.copy_(given.joined)
    out.coverage.zero_()
    for dh, seen in zip(given.h, out.seen, strict=True):
        seen.zero_()
        seen[:, -dh.shape[1] :] = dh
    for index, cells in enumerate(out.cells):
        if kind.lstm:
            cells.copy_(given.c[index])
        else:
            cells.zero_()
    dispatch(
        backward_kernel,
        (triton.cdiv(x.sizes["B"], ROWS),),
        matrices=tuple(x.matrices),
        sources=x.sources,
        combine=x.combine,
        saved=(
            tuple(kept.seen), kept.joined, kept.weights, kept.coverage, kept.features, kept.query,
            tuple(kept.cells), tuple(kept.gates),
        ),
        given=(given.features, given.weights),
        grads=(tuple(out.gates), out.features, out.joined, out.score, out.query),
        carried=(tuple(out.seen), tuple(out.cells), out.coverage),
        between=tuple(x.between),
        mask=x.mask,
        lengths=x.lengths,
        C=x.config(kind),
        **x.sizes,
    )  # fmt: skip
    return out
