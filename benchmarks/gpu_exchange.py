"""Every plan that fits, timed without the input product, beside what the cost model says of it.

Slices and batch tiles differ from plan to plan, so that what they cost can be told apart: the
findings fit the model's constants to the times, and say where another plan beats the chosen one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from kernels.persistent import plan as planning
from kernels.persistent.plan import LaunchPlan

from .compile_facts import DTYPES
from .gpu_compile import Kernel, kernel_of
from .gpu_kernels import device_properties, microseconds, set_precision
from .loops import Loop
from .registry import Case, Row, benchmark

STEPS = 256
GRID = (
    *(("lstm", "bf16", size, batch) for size in (512, 1024, 256, 128, 768) for batch in (16, 64)),
    ("gru_reset_before", "bf16", 512, 16),
    ("lstm_layernorm", "bf16", 512, 16),
    ("lstm", "tf32", 512, 16),
    ("lstm", "fp32", 256, 16),
    ("gru", "bf16", 512, 16),
    ("gru", "bf16", 1024, 128),
    ("lstm", "bf16", 1024, 128),
    ("lstm", "bf16", 64, 64),
)
SHAPE = ("cell", "dtype", "hidden_size", "batch", "pass")


def plans() -> Iterator[tuple[Row, LaunchPlan, bool]]:
    """What names a case, its plan, and whether `choose` takes it."""
    device = device_properties("cuda" if torch.cuda.is_available() else "cpu")
    for cell, dtype, size, batch in GRID:
        for backward in (False, True):
            shape = (cell, size, batch, 1, *DTYPES[dtype], backward, device)
            chosen = planning.choose(*shape)
            values = (cell, dtype, size, batch, "backward" if backward else "forward")
            for plan in planning.fitting(*shape):
                key: Row = dict(zip(SHAPE, values, strict=True))
                for name in ("units", "slices", "rows", "chunk", "warps", "resident"):
                    key[name] = getattr(plan, name)
                yield key, plan, plan == chosen


def kernels() -> Iterator[Kernel]:
    """What must be compiled, in the order of the cases."""
    for _, plan, _ in plans():
        yield kernel_of(plan, save="nothing")


def counts(plan: LaunchPlan) -> Row:
    """How often a launch pays each constant of the cost model, per step."""
    work = planning.work(plan)
    everywhere = plan.programs * work.read / planning.L2
    alone = work.read / planning.L2_PORT
    return {
        "exchanges": work.exchanges,
        "waits": int(work.read > 0),
        "l2_bytes": plan.programs * work.read if everywhere >= alone else 0,
        "port_bytes": work.read if everywhere < alone else 0,
        "weight_bytes": work.weights,
        "exact_products": work.multiplied,
    }


def measure(plan: LaunchPlan, chosen: bool, dtype: str, device: str = "cuda") -> Iterator[Row]:
    """Microseconds per step of the loop alone."""
    set_precision(dtype)
    loop = Loop(plan, STEPS, device=device, save="nothing")
    yield {
        "us_per_step": round(microseconds(loop.run, device=device) / STEPS, 3),
        "model_us": round(plan.microseconds, 3),
        "chosen": chosen,
        "programs": plan.programs,
        "launches": plan.launches,
        **counts(plan),
    }


CONSTANTS = {
    "exchanges": ("HOP", planning.HOP),
    "waits": ("L2_LATENCY", planning.L2_LATENCY),
    "l2_bytes": ("L2", planning.L2),
    "port_bytes": ("L2_PORT", planning.L2_PORT),
    "weight_bytes": ("SHARED", planning.SHARED),
    "exact_products": ("IEEE", planning.IEEE),
}
"""Column of counts, and the constant of plan.py with its value: µs each, or so many in a µs."""


def fit(rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """The constants of the cost model by least squares of the relative error over the rows.

    us / launches = POINTWISE + exchanges HOP + waits L2_LATENCY + bytes / rate + ...; columns that
    never count are left out, and what two columns cannot tell apart is shared between them.
    """
    columns = [c for c in CONSTANTS if any(float(row[c]) for row in rows)]
    table = torch.tensor([[1.0, *(float(r[c]) for c in columns)] for r in rows]).double()
    times = [float(row["us_per_step"]) / float(row["launches"]) for row in rows]
    table = table / torch.tensor(times).double()[:, None]
    scale = table.amax(0)
    ones = torch.ones(len(rows), 1).double()
    solved = torch.linalg.lstsq(table / scale, ones, driver="gelsd").solution
    pointwise, *values = (solved[:, 0] / scale).tolist()
    found = {"POINTWISE": pointwise}
    for column, value in zip(columns, values, strict=True):
        name = CONSTANTS[column][0]
        found[name] = value if name in ("HOP", "L2_LATENCY") else 1 / value if value else 0.0
    return found


def against_the_model(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """The fitted constants beside plan.py's, and the shapes where the chosen plan is not best."""
    if rows:
        now = dict(CONSTANTS.values()) | {"POINTWISE": planning.POINTWISE}
        for name, value in fit(rows).items():
            doubt = " (not resolved by these rows)" if value <= 0 else ""
            yield f"{name} = {value:.3g}{doubt}; plan.py has {now[name]:.3g}"
        ratios = sorted(float(row["us_per_step"]) / float(row["model_us"]) for row in rows)
        middle = ratios[len(ratios) // 2]
        yield f"measured / modelled: {ratios[0]:.2f} to {ratios[-1]:.2f}, median {middle:.2f}"
    for shape in dict.fromkeys(tuple(row[name] for name in SHAPE) for row in rows):
        same = [row for row in rows if tuple(row[name] for name in SHAPE) == shape]
        best = min(same, key=lambda row: float(row["us_per_step"]))
        taken = [row for row in same if row["chosen"] == "True"]
        if taken and float(taken[0]["us_per_step"]) > 1.03 * float(best["us_per_step"]):
            what = f"{best['units']} units, {best['rows']} rows, {best['warps']} warps"
            now_, then = taken[0]["us_per_step"], best["us_per_step"]
            yield f"{' '.join(shape)}: {what} takes {then}, the chosen plan {now_}"


@benchmark(against_the_model, gpu=True)
def gpu_exchange() -> Iterator[Case]:
    """Microseconds per step of every plan that fits, beside the cost model."""
    for key, plan, chosen in plans():
        yield key, partial(measure, plan, chosen, str(key["dtype"]))
