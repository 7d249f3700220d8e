"""From shape and device to a launch: the only tuning table of the recurrent kernels.

PLACEHOLDER
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton.language as tl

from ..spec import CELLS, LAYER_NORM_EPS

HOP = 1.0  # µs of one release-acquire hop between programs, with the barriers of the program around it
L2 = 5.5e6  # bytes per µs all multiprocessors together read from L2
L2_PORT = 1.1e5  # bytes per µs one multiprocessor reads from L2
L2_LATENCY = 0.3  # µs until the first byte
SHARED = 2.2e5  # bytes per µs one multiprocessor reads from its shared memory
POINTWISE = 0.25  # µs of gate arithmetic, stores and loop overhead
IEEE = 2.0e5  # float32 multiply-adds per µs of one multiprocessor without tensor cores

SHARED_RESERVE = 2048  # bytes of shared memory that the compiler uses for reductions and atomics


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device.

    Attributes:
        name: for the explanation.
        capability: compute capability, (9, 0) for Hopper.
        multiprocessors: how many programs with resident weights run at once.
        shared_memory: bytes one program may use.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


INTERPRETER = Device("Triton's interpreter", (9, 0), 132, 232448)


@dataclass(frozen=True)
class Config:
    """The compile-time constants of a kernel, `tl.constexpr` each.

    H hidden size, G gates, D directions, U units of a slice, P slices, PP the power of two not below P,
    R batch rows of a tile, K inner size of a weight tile, CHUNKS tiles along H, RESIDENT whether they stay on chip,
    EXCHANGES barriers a step, SAVED blocks the forward saves, STATISTICS numbers per row, SEPARATE blocks of the input part's gradient
    where it is not the recurrent part's (else 0), PRODUCTS of a step, PARAMETERS blocks of extra parameters,
    ZONEOUT 0 none, 1 expected, 2 drawn, PRECISION of float32 products, UPCAST before products, BARRIER variant,
    TRIES of a bounded wait, EPS of normalisations.
    """

    H: tl.constexpr
    G: tl.constexpr
    D: tl.constexpr
    U: tl.constexpr
    P: tl.constexpr
    PP: tl.constexpr
    R: tl.constexpr
    K: tl.constexpr
    CHUNKS: tl.constexpr
    RESIDENT: tl.constexpr
    EXCHANGES: tl.constexpr
    SAVED: tl.constexpr
    STATISTICS: tl.constexpr
    SEPARATE: tl.constexpr
    PRODUCTS: tl.constexpr
    PARAMETERS: tl.constexpr
    ZONEOUT: tl.constexpr
    PRECISION: tl.constexpr
    UPCAST: tl.constexpr
    BARRIER: tl.constexpr
    TRIES: tl.constexpr
    EPS: tl.constexpr


@dataclass(frozen=True)
class Blocks:
    """What a cell's kernels store and multiply, beside `CellSpec`.

    Attributes:
        saved: blocks of H saved for the gradient at each step.
        statistics: float32 numbers saved per row at each step.
        separate: blocks of the input part's gradient where it differs from the recurrent part's, else 0.
        products: gates (first, count) of each recurrent product of a step.
    """

    saved: int
    products: tuple[tuple[int, int], ...]
    statistics: int = 0
    separate: int = 0


BLOCKS = {
    "rnn_tanh": Blocks(1, ((0, 1),)),
    "rnn_relu": Blocks(1, ((0, 1),)),
    "lstm": Blocks(4, ((0, 4),)),
    "lstm_peephole": Blocks(4, ((0, 4),)),
    "lstm_layernorm": Blocks(8, ((0, 4),), statistics=3, separate=5),
    "gru": Blocks(4, ((0, 3),), separate=3),
    "gru_reset_before": Blocks(3, ((0, 2), (2, 1))),
}


def loop_parameters(cell: str) -> dict[str, int]:
    """The extra parameters the time loop reads, name -> blocks of H; the others act outside it."""
    return {name: n for name, n in CELLS[cell].parameters.items() if name != "weight_ln_ih"}


@dataclass(frozen=True)
class LaunchPlan:
    """How one pass of one layer runs; `print(plan)` says it in words.

    Attributes:
        cell, hidden_size, batch, directions, dtype: the problem.
        precision: of float32 products, "ieee", "tf32x3" or "tf32".
        backward: which pass.
        device: the device's name.
        units: hidden units U of one program.
        slices: programs P of a group; 1 means no communication.
        rows: batch rows R of a tile.
        chunk: inner size K of a weight tile.
        warps: of a program.
        resident: whether the weights stay on chip; otherwise they are read again at every step.
        groups_per_launch: how many of the groups run at once.
        shared_bytes: shared memory of one program, modelled.
        microseconds: per time step and launch, modelled, not measured.
        why: what decided.
    """

    cell: str
    hidden_size: int
    batch: int
    directions: int
    dtype: torch.dtype
    precision: str
    backward: bool
    device: str
    units: int
    slices: int
    rows: int
    chunk: int
    warps: int
    resident: bool
    groups_per_launch: int
    shared_bytes: int
    microseconds: float
    why: str

    @property
    def programs(self) -> int:
        """Programs of one launch."""
        return self.slices * self.groups_per_launch

    @property
    def groups(self) -> int:
        """Directions times batch tiles."""
        return self.directions * -(-self.batch // self.rows)

    @property
    def weight_bytes(self) -> int:
        """Bytes of recurrent weights that one program keeps on chip."""
        if not self.resident:
            return 0
        return _weight_elements(
            self.cell, self.hidden_size, self.units, self.chunk, self.backward
        ) * (self.dtype.itemsize)

    @property
    def launches(self) -> int:
        """Launches, one after another."""
        return -(-self.groups // self.groups_per_launch)

    def __str__(self) -> str:
        kept = f"{self.weight_bytes / 1024:.0f} KB of weights" if self.resident else "no weights"
        return (
            f"{self.cell} {'backward' if self.backward else 'forward'}, H={self.hidden_size}, "
            f"B={self.batch}, {str(self.dtype).removeprefix('torch.')}, on {self.device}: "
            f"{self.programs} programs in {self.launches} launch(es), {self.slices} per group with "
            f"{self.units} units each, tiles of {self.rows} rows, {self.warps} warps; {kept} and "
            f"{self.shared_bytes / 1024:.0f} KB of shared memory in each; about "
            f"{self.microseconds:.1f} µs a step by the model (not measured). {self.why}"
        )


@cache
def config(plan: LaunchPlan, zoneout: int, upcast: bool, barrier: str) -> Config:
    """The compile-time constants of a plan."""
    spec, blocks = CELLS[plan.cell], BLOCKS[plan.cell]
    values = {
        "H": plan.hidden_size,
        "G": spec.gates,
        "D": plan.directions,
        "U": plan.units,
        "P": plan.slices,
        "PP": _power(plan.slices),
        "R": plan.rows,
        "K": plan.chunk,
        "CHUNKS": -(-plan.hidden_size // plan.chunk),
        "RESIDENT": plan.resident,
        "EXCHANGES": spec.exchanges,
        "SAVED": blocks.saved,
        "STATISTICS": blocks.statistics,
        "SEPARATE": blocks.separate,
        "PRODUCTS": len(blocks.products),
        "PARAMETERS": sum(loop_parameters(plan.cell).values()),
        "ZONEOUT": zoneout,
        "PRECISION": plan.precision,
        "UPCAST": upcast,
        "BARRIER": barrier,
        "TRIES": 100_000,
        "EPS": LAYER_NORM_EPS,
    }
    return Config(**{name: tl.constexpr(value) for name, value in values.items()})


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
