"""The interpreter with its programs at the same time: a process each, tensors in shared memory.

What it shows is the protocol of the group barrier: epochs, deadlocks, slices read before they are
written. A processor orders its memory accesses more strictly than a GPU, so fences it cannot show.
"""

import multiprocessing
import random
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from triton.runtime import interpreter

from kernels.persistent import launch, primitives

SECONDS = 120


def share(value: object, shared: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> object:
    """The same arguments with tensors that other processes see; `shared` remembers both."""
    if isinstance(value, tuple):
        return tuple(share(v, shared) for v in value)
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) not in shared:
        shared[id(value)] = (
            value,
            value.clone(memory_format=torch.contiguous_format).share_memory_(),
        )
    return shared[id(value)][1]


def _sleepy(barrier: Callable, seconds: float, chance: random.Random) -> Callable:
    def wait(*arguments: object) -> None:
        time.sleep(seconds * chance.random())
        barrier(*arguments)
        time.sleep(seconds * chance.random())

    return wait


def _program(
    kernel: launch.Kernel,
    size: tuple[int, int],
    index: tuple[int, int],
    arguments: dict[str, object],
    seconds: float,
    stagger: float,
) -> None:
    """Run one program of the grid.

    Args:
        kernel: what to run.
        size: the grid. index: the program.
        arguments: of the kernel, in shared memory.
        seconds: bound of the random pauses around each barrier.
        stagger: how much later than the slice before it a slice starts.
    """
    builder = interpreter.interpreter_builder
    builder.grid_dim, builder.grid_idx = (*size, 1), (*index, 0)
    builder.set_grid_dim = builder.set_grid_idx = lambda *_: None
    interpreter.GridExecutor._restore_args_dev = lambda *_: None  # it would write stale values
    chance = random.Random(1000 * index[0] + index[1])
    primitives.group_barrier = _sleepy(primitives.group_barrier, seconds, chance)
    time.sleep(10 * seconds * chance.random() + stagger * index[0])
    kernel[(1, 1)](**arguments)


def dispatch(
    kernel: launch.Kernel,
    grid: tuple[int, int],
    plan: object,
    *,
    seconds: float,
    stagger: float,
    **arguments: object,
) -> None:
    """Take the place of `launch.dispatch`."""
    shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    arguments = {name: share(value, shared) for name, value in arguments.items()}
    fork = multiprocessing.get_context("fork")
    programs = [
        fork.Process(
            target=_program, args=(kernel, grid, (p, g), arguments, seconds, stagger), daemon=True
        )
        for p in range(grid[0])
        for g in range(grid[1])
    ]
    for program in programs:
        program.start()
    end = time.monotonic() + SECONDS
    for program in programs:
        program.join(max(0.0, end - time.monotonic()))
    codes = [program.exitcode for program in programs]
    for program in programs:
        program.kill()
    if any(codes) or None in codes:
        raise RuntimeError(f"programs ended with {codes}; None is one that waited for {SECONDS} s")
    for original, copy in shared.values():
        original.copy_(copy)


def run_concurrently(monkeypatch: pytest.MonkeyPatch, stagger: float = 0.0) -> None:
    """From here on every launch runs its programs at the same time, with the real barrier."""
    monkeypatch.setattr(launch, "INTERPRET_SERIALLY", False)
    monkeypatch.setattr(launch, "dispatch", partial(dispatch, seconds=0.002, stagger=stagger))
