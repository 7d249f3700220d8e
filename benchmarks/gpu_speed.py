"""Our layers on a GPU against the field, input product included on both sides.

The most important points come first, then a spread-out order of the whole grid: a run that is
stopped at any time leaves a useful table.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fusedrnn.base import RecurrentBase
from kernels.persistent.plan import choose

from .compile_facts import DTYPES
from .gpu_compile import Kernel, kernels_of
from .gpu_kernels import (
    Run,
    compare,
    device_properties,
    forward,
    microseconds,
    our_layer,
    relative_error,
    set_precision,
    their_layer,
    training,
)
from .loops import Loop
from .registry import Case, Row, benchmark, spread

ROUNDS = 7
PROFILED = 32  # steps: cuDNN's algorithm does not depend on how many there are


@dataclass(frozen=True)
class Point:
    """One comparison.

    Attributes:
        against: "cuDNN", "cuDNN packed", "compiled loop", or a cell of ours.
    """

    cell: str
    dtype: str
    hidden_size: int
    batch: int
    bidirectional: bool = False
    layers: int = 1
    lengths: bool = False
    steps: int = 512
    against: str = "cuDNN"


CORNER = Point("lstm", "fp16", 768, 16, steps=1024)
FIRST = (
    CORNER,
    *(Point("lstm", "bf16", size, 32) for size in (512, 256, 1024, 128)),
    Point("gru", "bf16", 512, 32),
    *(Point("lstm", dtype, 512, 32) for dtype in ("fp16", "tf32")),
    Point("lstm", "bf16", 512, 32, bidirectional=True),
    Point("lstm_peephole", "bf16", 512, 32, against="lstm"),
    Point("gru_reset_before", "bf16", 512, 32, against="gru"),
    Point("lstm_layernorm", "bf16", 512, 32, against="lstm"),
    Point("lstm", "bf16", 512, 32, lengths=True, against="cuDNN packed"),
    Point("lstm", "bf16", 512, 32, against="compiled loop"),
    Point("lstm", "bf16", 512, 32, layers=3),
    Point("gru", "bf16", 512, 32, layers=3),
)
SECOND = (
    *(Point("lstm_peephole", "bf16", size, 32, against="lstm") for size in (256, 1024)),
    *(Point("gru_reset_before", "bf16", size, 32, against="gru") for size in (256, 1024)),
    *(Point("lstm_layernorm", "bf16", size, 32, against="lstm") for size in (256, 1024)),
    *(
        Point(cell, dtype, size, 64, bidirectional, lengths=True, against="cuDNN packed")
        for cell, dtype, size, bidirectional in (
            ("lstm", "bf16", 256, True),
            ("gru", "bf16", 256, True),
            ("lstm", "fp16", 512, False),
            ("lstm", "tf32", 256, True),
        )
    ),
    Point("lstm", "fp16", 512, 32, bidirectional=True, layers=3),
    Point("gru", "bf16", 256, 16, against="compiled loop"),
)
OTHERS = ("flashrnn", "haste_pytorch")


def grid() -> list[Point]:
    """The issue's grid; 223 is prime to its 360 points, so that steps of it reach all of them."""
    points = [
        Point(*values)
        for values in itertools.product(
            ("lstm", "gru"),
            ("bf16", "fp16", "tf32"),
            (64, 128, 256, 512, 768, 1024),
            (1, 8, 32, 64, 128),
            (False, True),
        )
    ]
    return [points[223 * i % len(points)] for i in range(len(points))]


def points() -> Iterator[Point]:
    """Every comparison once, the most important first."""
    yield from dict.fromkeys((*FIRST, *SECOND, *grid()))


def kernels() -> Iterator[Kernel]:
    """What must be compiled, in the order of the points."""
    device = device_properties("cuda" if torch.cuda.is_available() else "cpu")
    for it in points():
        shape = (it.hidden_size, it.batch, 1 + it.bidirectional, it.dtype, device)
        yield from kernels_of(it.cell, *shape, it.lengths)
        if it.against in ("lstm", "gru"):
            yield from kernels_of(it.against, *shape)


class Packed(nn.Module):
    """A layer of torch over a padded batch with lengths, packed and unpacked as its users must."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor]:
        """Padded output, as ours."""
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        return (pad_packed_sequence(self.layer(packed)[0], total_length=len(x))[0],)


class CompiledLoop(nn.Module):
    """A loop in Python over a step that `torch.compile` has fused, the input product before it."""

    def __init__(self, layer: nn.RNNBase, compiler: str = "inductor") -> None:
        super().__init__()
        self.layer, self.gated = layer, isinstance(layer, nn.GRU)
        self.step = torch.compile(self._gru if self.gated else self._lstm, backend=compiler)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The output of one layer, one direction, from a state of zeros."""
        names = ("weight_ih_l0", "bias_ih_l0", "weight_hh_l0", "bias_hh_l0")
        w_ih, b_ih, w_hh, b_hh = (self.layer.get_parameter(name) for name in names)
        gates = nn.functional.linear(x, w_ih, b_ih)
        h = x.new_zeros(x.shape[1], self.layer.hidden_size)
        c, outputs = h, []
        for gates_t in gates.unbind(0):
            h, c = self.step(gates_t, h, c, w_hh, b_hh)
            outputs.append(h)
        return (torch.stack(outputs),)

    @staticmethod
    def _lstm(gates: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (gates + nn.functional.linear(h, w, b)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    @staticmethod
    def _gru(gates: Tensor, h: Tensor, c: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        recurrent = nn.functional.linear(h, w, b).chunk(3, -1)
        r, z = ((gates.chunk(3, -1)[k] + recurrent[k]).sigmoid() for k in (0, 1))
        n = (gates.chunk(3, -1)[2] + r * recurrent[2]).tanh()
        return (1 - z) * n + z * h, c


def _other(point: Point, ours: RecurrentBase, device: str, backend: str) -> nn.Module:
    """What ours is compared with."""
    shape = {"bidirectional": point.bidirectional, "num_layers": point.layers}
    if point.against in ("lstm", "gru"):
        dtype = DTYPES[point.dtype][0]
        return our_layer(point.against, point.hidden_size, dtype, device, backend, **shape)
    theirs = their_layer(point.cell, ours, **shape)
    if point.against == "cuDNN packed":
        return Packed(theirs)
    return CompiledLoop(theirs) if point.against == "compiled loop" else theirs


def rule(point: Point, backward: bool) -> str:
    """Which of cuDNN's algorithms torch asks for, on Hopper (`get_algo` of its RNN.cpp)."""
    size, one = point.hidden_size, point.layers == 1 and not point.bidirectional
    if point.against == "cuDNN packed":
        return "standard"
    if size <= (128 if backward else 192):
        return "persistent, small H"
    suits = size % 128 == 0 and size <= 1024 and point.batch % 8 == 0 and point.batch <= 128
    persistent = point.cell == "lstm" and point.dtype == "fp16" and one and suits
    return "persistent" if persistent else "standard"


def algorithm(run: Run, expected: str) -> str:
    """The family of kernels that a call launches, by the profiler, or else by torch's rule."""
    if not torch.cuda.is_available():
        return f"{expected} by torch's rule"
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        events = profile.events() or []
    except (RuntimeError, AssertionError):
        events = []
    names = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    if not names:
        return f"{expected} by torch's rule"
    seen = "persistent" if any("persist" in name.lower() for name in names) else "standard"
    return f"{seen}, {len(names)} kernels"


def _loops(point: Point, device: str) -> Row:
    """The time loops of one layer alone, beside the floor that the cost model gives."""
    row: Row = {}
    for what in ("forward", "backward"):
        plan = choose(
            point.cell, point.hidden_size, point.batch, 1 + point.bidirectional,
            *DTYPES[point.dtype], what == "backward", device_properties(device),
        )  # fmt: skip
        loop = Loop(plan, point.steps, device=device, save="nothing")
        measured = microseconds(loop.run, ROUNDS, device) / point.steps
        row |= {
            f"{what}_programs": plan.programs,
            f"{what}_loop_us": round(measured, 3),
            f"{what}_floor_us": round(plan.microseconds, 3),
            f"{what}_over_floor": round(measured / plan.microseconds, 2),
        }
    return row


def measure(
    point: Point, device: str = "cuda", backend: str = "triton", rounds: int = ROUNDS
) -> Iterator[Row]:
    """Microseconds per step of ours and of the other, checked to agree where they compute alike."""
    set_precision(point.dtype)
    dtype, size = DTYPES[point.dtype][0], point.hidden_size
    shape = {"bidirectional": point.bidirectional, "num_layers": point.layers}
    ours = our_layer(point.cell, size, dtype, device, backend, **shape)
    other = _other(point, ours, device, backend)
    x = torch.randn(point.steps, point.batch, size, device=device).to(dtype)
    lengths = torch.randint(point.steps // 4, point.steps + 1, (point.batch,), device=device)
    extra = {"lengths": lengths} if point.lengths else {}
    others = tuple(extra.values())
    if point.against not in ("lstm", "gru"):
        with torch.no_grad():
            _check(ours(x, **extra)[0], other(x, *others)[0])
    row: Row = {}
    mine = (x, None, lengths) if point.lengths else (x,)
    for what, make in (("forward", forward), ("training", training)):
        runs = {"ours": make(ours, *mine), "other": make(other, x, *others)}
        times = compare(runs, rounds, device)
        for name, time in times.items():
            row[f"{what}_{name}_us"] = round(time / point.steps, 3)
        row[f"{what}_ratio"] = round(times["other"] / times["ours"], 3)
        if point.against.startswith("cuDNN"):
            few = (x[:PROFILED], *(length.clamp(max=PROFILED) for length in others))
            run = make(other, *few)
            row[f"{what}_other_algorithm"] = algorithm(run, rule(point, what == "training"))
    if backend == "triton" and not point.lengths:
        row |= _loops(point, device)
    yield row


def _check(ours: Tensor, other: Tensor) -> None:
    """Raise ValueError unless both computed the same thing: no speed is worth telling otherwise."""
    error = relative_error(ours, other)
    if not error < 0.1:  # a fault errs by about 1, the roundings of bf16 by 0.01
        raise ValueError(f"ours differs from the other by {error:.2g} of its norm")


def absent(name: str) -> Iterator[Row]:
    """Whether another project's package is there to compare with."""
    there = importlib.util.find_spec(name) is not None
    yield {"status": "installed, not compared" if there else "not installed"}


NAMES = tuple(field.name for field in fields(Point))


def by_kind(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Ratios (above 1: ours is faster) by what ours was compared with, and the worst points."""
    for against in dict.fromkeys(row["against"] for row in rows):
        same = [row for row in rows if row["against"] == against]
        if same[0].get("status"):
            yield f"{against}: {same[0]['status']}"
            continue
        for what in ("forward_ratio", "training_ratio"):
            for line in spread(what, *NAMES[:-1])(same):
                yield f"against {against}: {line}"
    loops = [float(r["forward_over_floor"]) for r in rows if r.get("forward_over_floor")]
    if loops:
        yield f"forward loop over the model's floor: median {statistics.median(loops):.2f}"


@benchmark(by_kind, gpu=True)
def gpu_speed() -> Iterator[Case]:
    """Microseconds per step of our layers, forward and training, beside the field's."""
    for name in OTHERS:
        yield {"against": name}, partial(absent, name)
    for point in points():
        yield asdict(point), partial(measure, point)
