"""From shape and device to a launch: the only tuning table of the recurrent kernels.

Counts of one time step of an LSTM in 16 bits, one direction, slices of U = 16 units (P = H / 16
programs a group). Forward and backward multiply alike, 2 G H^2 B operations; each program reads h
of its rows, H R values (backward: the gradients of all gates, G H R), and multiplies by its 2 G U H
bytes of weights.

    H     B   | MFLOP | L2 reads MB        | barriers | weights read from shared memory
              |       | forward   backward |          | per program
    256   16  |   8.4 |   0.13       0.52  |    1     |  32 KB
    256   64  |    34 |   0.52       2.1   |    1     |  32 KB
    512   16  |    34 |   0.52       2.1   |    1     |  64 KB
    512   64  |   134 |   2.1        8.4   |    1     |  64 KB
    1024  16  |   134 |   2.1        8.4   |    1     | 128 KB
    1024  64  |   537 |   8.4       34     |    1     | 128 KB

At 5.5 MB/µs of L2, 0.22 MB/µs of shared memory per multiprocessor and 1 µs per barrier: forward is
bound by the barrier up to H = 512 and, with B = 64 at H = 1024, by L2; backward is bound by L2 from
H = 512 with B = 64 and H = 1024 with B = 16 on. Arithmetic never bounds: 537 MFLOP are 0.6 µs on
128 multiprocessors. The reset-before GRU meets twice a step, the layer-norm LSTM three times. All
constants are other people's measurements (H100), none is ours: `python -m benchmarks gpu_exchange`
measures every plan that fits beside its modelled time, and fits the constants.

How backward could be split otherwise, and why it is not:

- Each program multiplies its own gate gradients by its rows of R and the partial dh [H, R] are
  summed over the group (a reduce-scatter): it reads H R float32 values per program instead of G H R
  16-bit ones, half for the LSTM, but writes as many as it reads, where the gather writes next to
  nothing: the same traffic, a larger product tile (M = H, which spills from H = 512 on) and P
  roundings to sum in a fixed order. For float32 it would halve the traffic.
- Splitting the gates among programs as well as the units cuts the reads by G and adds an exchange
  of partial dh: a second barrier of 1 µs saves less than that below H = 1024 with B = 64.
- Gathering h and c and computing all gate gradients in every program reads less, but repeats H R
  gates of arithmetic P times, several µs at H = 1024.
- Larger slices: at H = 512, U = 32 halves the reads but not the barrier, and doubles the time to
  read the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton.language as tl

from ..spec import CELLS, LAYER_NORM_EPS

HOP = 1.0  # µs of one release-acquire hop between programs, with its two program barriers
L2 = 5.5e6  # bytes per µs all multiprocessors together read from L2
L2_PORT = 1.1e5  # bytes per µs one multiprocessor reads from L2
L2_LATENCY = 0.3  # µs until the first byte
SHARED = 2.2e5  # bytes per µs one multiprocessor reads from its shared memory
POINTWISE = 0.25  # µs of gate arithmetic, stores and loop overhead
IEEE = 1.0e5  # float32 multiply-adds per µs of one multiprocessor without tensor cores

GRID = 65_535  # groups of one launch: the most that the second dimension of CUDA's grid takes
TRIES = 1_000_000  # polls of a bounded wait: some tenths of a second
MARGIN = 4096  # bytes of shared memory that the compiler uses for reductions and atomics


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

    Attributes:
        H: hidden size. G: gates. D: directions.
        U: units of a slice. P: slices. PP: the power of two not below P. R: batch rows of a tile.
        K: inner size of a weight tile. CHUNKS: tiles along H. RESIDENT: whether they stay on chip.
        EXCHANGES: barriers a step. PRODUCTS: recurrent products of a step.
        SAVED: blocks the forward saves. STATISTICS: numbers it saves per row.
        SEPARATE: blocks of the input part's gradient where it differs from the recurrent part's,
            else 0.
        PARAMETERS: blocks of extra parameters.
        ZONEOUT: 0 none, 1 the expectation, 2 drawn.
        PRECISION: of float32 products. UPCAST: whether operands are made float32 first.
        BARRIER: variant of the group barrier. TRIES: polls of a bounded one.
        EPS: of normalisations.
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
        separate: blocks of the input part's gradient where it is not the recurrent part's, else 0.
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
def config(plan: LaunchPlan, zoneout: int, upcast: bool, barrier: str, tries: int) -> Config:
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
        "TRIES": tries,
        "EPS": LAYER_NORM_EPS,
    }
    return Config(**{name: tl.constexpr(value) for name, value in values.items()})


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def product_precision(like: torch.Tensor) -> str:
    """How products of this dtype are computed: for float32, torch's setting for CUDA decides."""
    if like.dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def device_of(tensor: torch.Tensor) -> Device:
    """The properties of a tensor's device; not on a GPU, it belongs to the interpreter."""
    return _cuda(tensor.device) if tensor.is_cuda else INTERPRETER


@cache
def _cuda(device: torch.device) -> Device:
    found = torch.cuda.get_device_properties(device)
    return Device(
        found.name,
        (found.major, found.minor),
        found.multi_processor_count,
        getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block),
    )


def _rows_padded(gates: int) -> int:
    """Tile rows per unit: the power of two not below the number of gates."""
    return _power(gates)


def _weight_elements(cell: str, size: int, units: int, chunk: int, backward: bool) -> int:
    """Elements of the weight tiles of one program, padding included."""
    inner = -(-size // chunk) * chunk
    if backward:
        return units * CELLS[cell].gates * inner
    return sum(_rows_padded(count) for _, count in BLOCKS[cell].products) * units * inner


@dataclass(frozen=True)
class _Shape:
    """A candidate: units, rows, chunk, warps, resident."""

    units: int
    rows: int
    chunk: int
    warps: int
    resident: bool


def _candidates(
    cell: str, size: int, itemsize: int, exact: bool, backward: bool
) -> Iterator[_Shape]:
    """Shapes that compile without spilling; benchmarks/compile_facts.py is the proof.

    Tensor cores of sm_90 multiply tiles of 64 rows by `wgmma`, whose operand descriptors, two
    registers for every 32 bytes of K, are hoisted out of the time loop: this bounds K. Fewer rows
    take `mma.sync`. Exact float32 products have no tensor core; their operands pass through
    registers, so K is short and, with four gates, U times R at most 256.
    """
    padded = max(16, _power(size))
    tall = max(_rows_padded(count) for _, count in BLOCKS[cell].products)
    products = len(BLOCKS[cell].products)
    steps = size * itemsize // 32
    normed = cell == "lstm_layernorm"  # holds more tiles at once than the others
    most = 32 if normed else 64
    if exact:
        if padded <= 32:
            yield from (_Shape(padded, rows, padded, 4, True) for rows in (16, 32))
            return
        for units, rows in itertools.product((8, 16), (16, 32)):
            if units * rows <= 256 or CELLS[cell].gates < 4:
                yield _Shape(units, rows, 64 if backward else 32, 8, True)
        for units, rows in itertools.product((16, 32, 64), (16, 32)):
            yield _Shape(units, rows, 32, 8, False)
        return
    if padded <= (64 if normed and backward else 128):
        wide = padded > (16 if normed or backward else 64)
        yield _Shape(padded, 16, padded, 8 if wide else 4, True)
    for rows in (16, 32, 64):
        if backward:
            chunk = 64 if normed or itemsize == 4 else 256
            if not (normed and rows == 16):
                yield _Shape(16, rows, min(chunk, padded), 8, True)
            continue
        short = rows > 16 or normed or tall < 4
        chunk = min(padded, (256 if short else 512) // itemsize)
        for units in (16, 32, 64):
            height = units * tall
            few = height < 64 or steps <= (most if rows <= 32 else 32)
            if few and height <= 256 and products * units <= 32:
                warps = 8 if height > 64 or (products > 1 and steps > 32) else 4
                yield _Shape(units, rows, chunk, warps, True)
        if tall > 1 and steps > most:
            yield _Shape(8, rows, chunk, 4, True)
    for units in (16, 32, 64):
        yield _Shape(units, 16, min(padded, 128 // itemsize), 8 if units > 16 else 4, False)


@cache
def choose(
    cell: str,
    hidden_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    precision: str,
    backward: bool,
    device: Device,
) -> LaunchPlan:
    """The plan with the least modelled time among those that fit the device.

    Args:
        cell: name in `CELLS`.
        hidden_size: H, at least 1.
        batch: B, at least 1.
        directions: 1 or 2.
        dtype: of weights and activations.
        precision: "ieee" or "tf32", for float32.
        backward: which pass.
        device: where it runs.

    Raises:
        ValueError: no plan fits, with what was missing.
    """
    plans = fitting(cell, hidden_size, batch, directions, dtype, precision, backward, device)
    best = min(plans, key=lambda plan: plan.microseconds, default=None)
    if best is None:
        raise ValueError(
            f"no plan for {cell} with hidden_size {hidden_size} on {device.name}: its "
            f"{device.multiprocessors} multiprocessors with {device.shared_memory} bytes of shared "
            "memory each are too few for one batch tile; use backend='torch'"
        )
    return best


def fitting(
    cell: str,
    hidden_size: int,
    batch: int,
    directions: int,
    dtype: torch.dtype,
    precision: str,
    backward: bool,
    device: Device,
) -> Iterator[LaunchPlan]:
    """Every plan that fits the device; arguments as in `choose`."""
    exact = dtype == torch.float32 and precision == "ieee"
    for shape in _candidates(cell, hidden_size, dtype.itemsize, exact, backward):
        slices = -(-hidden_size // shape.units)
        if slices == 1 and not shape.resident:
            continue
        groups = directions * -(-batch // shape.rows)
        together = min(groups, GRID if slices == 1 else device.multiprocessors // slices)
        needed = _shared_bytes(cell, hidden_size, shape, dtype.itemsize, backward)
        if together == 0 or needed > device.shared_memory:
            continue
        plan = LaunchPlan(
            cell,
            hidden_size,
            batch,
            directions,
            dtype,
            precision,
            backward,
            device.name,
            shape.units,
            slices,
            shape.rows,
            shape.chunk,
            shape.warps,
            shape.resident,
            together,
            needed,
            0.0,
            "",
        )
        time, why = _model(plan)
        yield replace(plan, microseconds=time, why=why)


def _shared_bytes(cell: str, size: int, shape: _Shape, itemsize: int, backward: bool) -> int:
    """Shared memory of one program: weights, then a tile of the operand or of the gates."""
    height = 1 if backward else max(_rows_padded(count) for _, count in BLOCKS[cell].products)
    inner = shape.chunk if shape.resident else 2 * shape.chunk
    tile = shape.units * shape.rows
    gates = tile * (4 + 4 * itemsize) if backward else 4 * max(height, 2) * tile
    operand = max(inner * shape.rows * itemsize, gates)
    if not shape.resident:
        return operand + 2 * height * shape.units * shape.chunk * itemsize + MARGIN
    return (
        operand
        + itemsize * _weight_elements(cell, size, shape.units, shape.chunk, backward)
        + MARGIN
    )


@dataclass(frozen=True)
class Work:
    """What the cost model counts of one step of one program.

    Attributes:
        exchanges: meetings with the group's other programs.
        read: bytes from L2.
        weights: bytes of weights.
        multiplied: multiply-adds without tensor cores.
    """

    exchanges: int
    read: int
    weights: int
    multiplied: int


def work(plan: LaunchPlan) -> Work:
    """Count what one step of one program takes."""
    item = plan.dtype.itemsize
    elements = _weight_elements(plan.cell, plan.hidden_size, plan.units, plan.chunk, plan.backward)
    vectors = CELLS[plan.cell].gates if plan.backward else len(BLOCKS[plan.cell].products)
    shared = plan.slices > 1
    read = vectors * plan.rows * plan.hidden_size * item if shared else 0
    exact = plan.dtype == torch.float32 and plan.precision == "ieee"
    return Work(
        CELLS[plan.cell].exchanges if shared else 0,
        read if plan.resident else read + item * elements,
        item * elements,
        elements * plan.rows if exact else 0,
    )


def _model(plan: LaunchPlan) -> tuple[float, str]:
    """Modelled microseconds per step, and in words what bounds them."""
    counted = work(plan)
    read = counted.read
    parts = {
        "exchanges between programs": counted.exchanges * HOP,
        "reads from L2": max(plan.programs * read / L2, read / L2_PORT) + L2_LATENCY
        if read
        else 0.0,
        "reads of weights from shared memory": counted.weights / SHARED,
        "float32 arithmetic without tensor cores": counted.multiplied / IEEE,
        "gate arithmetic": POINTWISE,
    }
    bound = max(parts, key=lambda name: parts[name])
    if plan.slices == 1:
        reason = "One program holds the whole recurrent matrix, so nothing is exchanged"
    elif plan.resident:
        reason = "The recurrent matrix is spread over a group's programs, which exchange every step"
    else:
        reason = "No faster plan keeps the recurrent matrix on chip, so it is read again every step"
    return plan.launches * sum(parts.values()), f"{reason}; most of a step goes to {bound}."
