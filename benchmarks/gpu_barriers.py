"""What the group barrier alone costs on a GPU: each variant, from two programs to all.

Triton compiles the poll of "atomic", an atomic addition of zero, to an acquiring load by one thread
and two barriers of the program around it, which hand the value on; "load" is an acquiring load by
every thread, without them; "bounded" is "atomic" that gives up.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from kernels.persistent.launch import interpreted
from kernels.persistent.plan import TRIES
from kernels.persistent.primitives import group_barrier

from .gpu_kernels import microseconds
from .registry import Case, Row, benchmark

STEPS = 1024
VARIANTS = ("atomic", "load", "bounded")
GROUPS = ((2, 1), (8, 1), (32, 1), (64, 1), (128, 1), (8, 16), (16, 8), (32, 4), (64, 2))
"""Slices of a group, and groups; one group of 128 is what a barrier of the whole grid would be."""


@dataclass(frozen=True)
class Meeting:
    """The part of `plan.Config` that the barrier reads."""

    P: tl.constexpr
    BARRIER: tl.constexpr
    TRIES: tl.constexpr


@triton.jit(do_not_specialize=("steps",))
def meet_kernel(counters, failed, steps, C: tl.constexpr):
    """The programs of each group meet `steps` times and do nothing else."""
    sync = (counters + tl.program_id(1) * 32, failed)
    for step in range(steps):
        group_barrier(sync, step, C)


def meet(slices: int, groups: int, variant: str, steps: int, device: str) -> None:
    """Launch it with counters at zero, as the time loops do; a bounded wait in vain raises."""
    counters = torch.zeros(groups * 32, dtype=torch.int32, device=device)
    failed = torch.zeros(1, dtype=torch.int32, device=device)
    constants = Meeting(tl.constexpr(slices), tl.constexpr(variant), tl.constexpr(TRIES))
    meet_kernel[(slices, groups)](
        counters, failed, steps, C=constants, num_warps=4, launch_cooperative_grid=slices > 1
    )
    if interpreted(meet_kernel) and counters[0].item() != slices * steps:
        raise RuntimeError(f"{counters[0].item()} arrivals instead of {slices * steps}")


def measure(
    slices: int, groups: int, variant: str, steps: int = STEPS, device: str = "cuda"
) -> Iterator[Row]:
    """Microseconds of one barrier: the difference of two launches, so that launching drops out."""
    times = [
        microseconds(partial(meet, slices, groups, variant, count, device), device=device)
        for count in (steps, 3 * steps)
    ]
    yield {"us_per_barrier": round((times[1] - times[0]) / (2 * steps), 3)}


def by_size(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """The variants side by side, and the better one of the two that the kernels could use."""
    means = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        chosen = [row for row in rows if row["variant"] == variant]
        times = [f"{r['slices']}x{r['groups']} {r['us_per_barrier']}" for r in chosen]
        means[variant] = statistics.fmean(float(row["us_per_barrier"]) for row in chosen)
        yield f"microseconds at slices x groups, {variant}: {', '.join(times)}"
    means.pop("bounded", None)
    if len(means) > 1:
        best = min(means, key=lambda name: means[name])
        yield f"{best} is the cheapest: {means[best]:.3f} on average"


@benchmark(by_size, gpu=True)
def gpu_barriers() -> Iterator[Case]:
    """Microseconds of one group barrier under each variant."""
    for (slices, groups), variant in itertools.product(GROUPS, VARIANTS):
        key = {"slices": slices, "groups": groups, "variant": variant}
        yield key, partial(measure, slices, groups, variant)
