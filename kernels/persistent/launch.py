"""What both launchers share: workspaces, masks, and how the groups of a plan are launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from . import plan as planning
from .plan import Config, LaunchPlan

Kernel = Any
UNSPECIALISED = ("T", "B", "seed", "origin", "first", "last")  # change from call to call
BARRIER = "atomic"  # which variant of `group_barrier` the kernels use
INTERPRET_SERIALLY = True  # False where every program has a process of its own


@dataclass(frozen=True)
class Masks:
    """Recurrent dropout and zoneout of one call; probabilities in [0, 1)."""

    seed: int = 0
    recurrent_dropout: float = 0.0
    zoneout: float = 0.0
    training: bool = False

    @property
    def zoneout_mode(self) -> int:
        """0 none, 1 the expectation, 2 drawn: `Config.ZONEOUT`."""
        return 0 if self.zoneout == 0 else 2 if self.training else 1

    @property
    def arguments(self) -> tuple[int, float | None, int, float]:
        """Threshold and scale of the dropout (None: none), threshold and rate of zoneout."""
        drop = self.recurrent_dropout if self.training else 0.0
        return (
            round(drop * 2**32),
            1 / (1 - drop) if drop else None,
            round(self.zoneout * 2**32),
            self.zoneout,
        )


def interpreted(kernel: object) -> bool:
    """Whether Triton interprets the kernel on the CPU instead of compiling it."""
    return not isinstance(kernel, triton.runtime.JITFunction)


@dataclass(frozen=True)
class Workspace:
    """Buffers of one call: exchanged vectors and statistics, barrier counters, error flag."""

    vectors: Tensor
    statistics: Tensor
    counters: Tensor
    failed: Tensor

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """What `recur` and `share` read."""
        return self.vectors, self.statistics

    @property
    def sync(self) -> tuple[Tensor, Tensor]:
        """What `group_barrier` reads."""
        return self.counters, self.failed


def workspace(plan: LaunchPlan, products: int, exchanges: int, like: Tensor) -> Workspace:
    """Allocate the buffers of a plan; every group's counter has a 128-byte line of its own."""
    groups = plan.groups_per_launch
    shared = plan.slices > 1
    vector = products * 2 * groups * plan.rows * plan.slices * plan.units if shared else 1
    statistic = exchanges * 2 * groups * plan.slices * 2 * plan.rows if shared else 1
    return Workspace(
        like.new_empty(vector),
        like.new_empty(statistic, dtype=torch.float32),
        like.new_zeros(plan.groups * 32 if shared else 1, dtype=torch.int32),
        like.new_zeros(1, dtype=torch.int32),
    )


def dispatch(kernel: Kernel, grid: tuple[int, int], plan: LaunchPlan, **arguments: object) -> None:
    """Launch once, on the device of the tensors: Triton alone would take the current one.

    Where programs meet it is a cooperative launch, so that too many are an error, not a hang.
    """
    with torch.cuda.device_of(arguments["w"]):
        kernel[grid](
            **arguments,
            num_warps=plan.warps,
            num_stages=1,
            launch_cooperative_grid=plan.slices > 1,
        )


def run(
    kernel: Kernel,
    plan: LaunchPlan,
    steps: int,
    state: Sequence[Tensor],
    final_dtype: torch.dtype,
    conf: Callable[[str, int], Config],
    sync: tuple[Tensor, Tensor],
    **arguments: object,
) -> tuple[Tensor, ...]:
    """Run `steps` steps of all groups and return the states after them.

    The interpreter runs one program after another, so there a barrier could never be passed. It
    launches single steps instead, without barriers and each one more often than it has exchanges:
    every launch of a step starts from the same state, and finds one exchange more filled in than
    the one before.
    """
    final = tuple(torch.empty_like(s, dtype=final_dtype) for s in state)
    serial = INTERPRET_SERIALLY and plan.slices > 1 and interpreted(kernel)
    constants = conf("none" if serial else BARRIER, planning.TRIES)
    for origin in range(0, plan.groups, plan.groups_per_launch):
        grid = (plan.slices, min(plan.groups_per_launch, plan.groups - origin))
        launch = partial(
            dispatch, kernel, grid, plan, C=constants, origin=origin, sync=sync, **arguments
        )
        if not serial:
            launch(state_in=tuple(state), state_out=final, first=0, last=steps)
            if BARRIER == "bounded" and sync[1].item():
                raise RuntimeError(f"programs waited in vain for each other: {plan}")
            continue
        now = tuple(s.float() for s in state)
        for step in range(steps):
            after = tuple(s.clone() for s in now)
            for _ in range(int(constants.EXCHANGES) + 1):
                launch(state_in=now, state_out=after, first=step, last=step + 1)
            now = after
        for index in range(origin, origin + grid[1]):
            direction, top = index % plan.directions, index // plan.directions * plan.rows
            for out, value in zip(final, now, strict=True):
                out[direction, top : top + plan.rows] = value[direction, top : top + plan.rows]
    return final
