"""Compile the kernels that the GPU benchmarks will launch, on all cores, before anything is timed.

    python -m benchmarks.gpu_compile [gpu_speed ...] [--minutes 4] [--jobs 16]

Triton finds them in its cache by a key of the source, the argument types, the options, the target,
Triton's own files and the version of ptxas; a test shows that launches ask for these keys. So a
cache can be carried to where the same build of Triton runs under the same Python version, if
TRITON_CACHE_DIR is the same absolute path there (the cache holds absolute paths): 20 KB a kernel
with TRITON_STORE_BINARY_ONLY=1 and xz. A cache that does not fit is never used. No GPU is needed.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import NamedTuple

import torch
from triton.runtime import driver

from kernels.persistent.forward import forward_kernel
from kernels.persistent.launch import interpreted
from kernels.persistent.plan import Device, LaunchPlan, choose

from .compile_facts import DTYPES, _Driver, dispatched, warmup
from .loops import Loop

NAMES = ("gpu_accuracy", "gpu_exchange", "gpu_speed")


class Kernel(NamedTuple):
    """What decides how a launch is compiled.

    Attributes:
        plan: the launch; what a compiled kernel does not depend on is blank.
        lengths: whether rows have lengths.
        save: what a forward pass keeps.
    """

    plan: LaunchPlan
    lengths: bool = False
    save: str = "all"


def kernel_of(plan: LaunchPlan, lengths: bool = False, save: str = "all") -> Kernel:
    """The kernel of a launch, equal for all launches that share it."""
    plan = replace(
        plan,
        device="",
        batch=plan.rows,
        groups_per_launch=1,
        shared_bytes=0,
        microseconds=0.0,
        why="",
    )
    return Kernel(plan, lengths, "all" if plan.backward else save)


def kernels_of(
    cell: str,
    size: int,
    batch: int,
    directions: int,
    dtype: str,
    device: Device,
    lengths: bool = False,
    saves: tuple[str, ...] = ("nothing", "all"),
) -> Iterator[Kernel]:
    """Those of one layer: the forward pass, keeping each of `saves`, and the backward pass."""
    shape = (cell, size, batch, directions, *DTYPES[dtype])
    for save in saves:
        yield kernel_of(choose(*shape, False, device), lengths, save)
    yield kernel_of(choose(*shape, True, device), lengths)


def compile_kernel(kernel: Kernel) -> float:
    """Put one kernel into Triton's cache; seconds that it took."""
    start = time.perf_counter()
    lengths = torch.ones(kernel.plan.rows, dtype=torch.int64) if kernel.lengths else None
    loop = Loop(kernel.plan, 1, lengths=lengths, save=kernel.save)
    with dispatched(warmup):
        loop.run()
    return time.perf_counter() - start


def target_of_a_gpu_elsewhere(capability: int) -> None:
    """Let this process compile for a GPU that it does not use."""
    torch.set_num_threads(1)
    driver.set_active(_Driver(capability))


def wanted(names: list[str]) -> list[Kernel]:
    """The kernels of the named benchmarks, each once, the first needed first."""
    modules = [importlib.import_module(f"benchmarks.{name}") for name in names]
    return list(dict.fromkeys(kernel for module in modules for kernel in module.kernels()))


def main(arguments: list[str] | None = None) -> None:
    """Compile them until all are there or the time is up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(NAMES)}")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--first", type=int, help="only so many kernels")
    options = parser.parse_args(arguments)
    if interpreted(forward_kernel):
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no kernels of {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    gpu = torch.cuda.is_available()
    major, minor = torch.cuda.get_device_capability() if gpu else (9, 0)
    every = wanted(options.names or list(NAMES))[: options.first]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the processes compile, and touch no GPU
    start = time.monotonic()
    end = start + 60 * options.minutes
    done, seconds = 0, 0.0
    with ProcessPoolExecutor(
        options.jobs,
        multiprocessing.get_context("spawn"),
        target_of_a_gpu_elsewhere,
        (10 * major + minor,),
    ) as pool:
        futures = {pool.submit(compile_kernel, kernel): kernel for kernel in every}
        for future in as_completed(futures):
            if future.cancelled():
                continue
            done += 1
            try:
                seconds += future.result()
            except Exception as error:
                print(f"failed: {type(error).__name__}: {error}: {futures[future]}", flush=True)
            if done % 50 == 0:
                print(f"{done} of {len(every)}", flush=True)
            if time.monotonic() > end:
                pool.shutdown(wait=False, cancel_futures=True)
    print(
        f"{done} of {len(every)} kernels in {time.monotonic() - start:.0f} s "
        f"({seconds:.0f} s of processes)"
    )


if __name__ == "__main__":
    main()
