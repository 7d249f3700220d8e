"""Compile the recurrent kernels without a GPU, for a grid of plans, and write down what came out.

    python -m benchmarks.compile_facts [--cells lstm ...] [--capabilities 80 90 100] [--seconds 600]

Rows are appended to benchmarks/results/compile_facts.csv as they come; those that are there for
this version of Triton are not compiled again, so that a run which was cut short goes on. What is
compiled is the launcher's own call: only the driver is replaced, by one that claims to be the
wanted GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.persistent import forward, launch
from kernels.persistent.plan import Device, LaunchPlan, choose
from kernels.spec import CELLS

from .loops import Loop

RESULT = Path(__file__).parent / "results" / "compile_facts.csv"
DEVICES = {
    80: Device("A100", (8, 0), 108, 166912),
    90: Device("H200", (9, 0), 132, 232448),
    100: Device("B200", (10, 0), 148, 232448),
}
DTYPES = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}
HIDDEN = (64, 128, 200, 256, 512, 768, 1024)
BATCHES = (1, 16, 64)
KEY = (
    *("triton", "capability", "cell", "dtype", "pass", "hidden_size"),
    *("rows", "units", "chunk", "warps", "resident", "masked", "barrier"),
)

Row = dict[str, object]


class _Driver:
    """Enough of a driver to compile for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what is compiled is kept by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def usage(cubin: bytes) -> Row:
    """Registers, bytes of stack, and spills: loads and stores of local memory, all and in loops."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what: str) -> str:
            command = [_tool("cuobjdump"), what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        found = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage"))
        spills, looping = count_spills(dump("--dump-sass"))
    if found is None:
        raise RuntimeError("cuobjdump does not say how many registers the kernel uses")
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": spills,
        "spills_in_loops": looping,
    }


def count_spills(sass: str) -> tuple[int, int]:
    """Instructions of a disassembly that load or store local memory: all, and those in loops."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?);", sass)
    code = [(int(address, 16), instruction) for address, instruction in lines]
    jumps = ((at, re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", i)) for at, i in code)
    back = [(int(to[1], 16), at) for at, to in jumps if to is not None and int(to[1], 16) < at]
    spills = [at for at, instruction in code if re.search(r"\b(?:LDL|STL)\b", instruction)]
    return len(spills), sum(any(first <= at <= last for first, last in back) for at in spills)


def weights_reloaded(ttgir: str) -> int:
    """How often the time loop copies to shared memory what was loaded before it: the weights."""
    lines = ttgir.splitlines()
    start = next(i for i, line in enumerate(lines) if "scf.for" in line)
    before = {m[1] for line in lines[:start] if (m := re.match(r"\s*(%[\w]+)(?::\d+)? =", line))}
    copies = (re.search(r"ttg\.local_alloc (%[\w]+)", line) for line in lines[start:])
    return sum(m is not None and m[1] in before for m in copies)


def warmup(
    kernel: launch.Kernel, grid: tuple[int, int], plan: LaunchPlan, **arguments: object
) -> Any:
    """Compile one launch, in the place of `launch.dispatch`."""
    return kernel.warmup(
        **arguments,
        grid=grid,
        num_warps=plan.warps,
        num_stages=1,
        launch_cooperative_grid=plan.slices > 1,
    )


@contextlib.contextmanager
def dispatched(dispatch: Any) -> Iterator[None]:
    """Something else in the place of `launch.dispatch`."""
    real, launch.dispatch = launch.dispatch, dispatch
    try:
        yield
    finally:
        launch.dispatch = real


def facts(
    kernel: launch.Kernel, grid: tuple[int, int], plan: LaunchPlan, **arguments: object
) -> Row:
    """What came out of one launch, compiled in the place of `launch.dispatch`."""
    start = time.perf_counter()
    compiled = warmup(kernel, grid, plan, **arguments)
    ptx = compiled.asm["ptx"]
    return usage(compiled.asm["cubin"]) | {
        "shared": compiled.metadata.shared,
        "weights_reloaded": weights_reloaded(compiled.asm["ttgir"]),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "cooperative": compiled.metadata.launch_cooperative_grid,
        "seconds": round(time.perf_counter() - start, 1),
    }


def compile_plan(plan: LaunchPlan, masked: bool = False) -> Row:
    """Facts of the kernel that `plan` launches, from a call of its launcher with two time steps.

    Args:
        plan: what to launch.
        masked: with lengths, recurrent dropout and zoneout.
    """
    found: Row = {}

    def dispatch(*launch_arguments: Any, **arguments: Any) -> None:
        found.update(facts(*launch_arguments, **arguments))

    masks = launch.Masks(1, 0.1, 0.1, True) if masked else None
    lengths = torch.ones(plan.rows, dtype=torch.int64) if masked else None
    loop = Loop(plan, 2, plan.rows, lengths=lengths, masks=masks)
    with dispatched(dispatch):
        loop.run()
    return found


def grid(options: argparse.Namespace) -> Iterator[tuple[int, str, LaunchPlan]]:
    """Capability, name of the dtype and plan, each kernel once."""
    seen = set()
    for capability, name, size, cell, batch, backwards in itertools.product(
        options.capabilities,
        options.dtypes,
        options.hidden,
        options.cells,
        options.batches,
        (False, True),
    ):
        dtype, precision = DTYPES[name]
        plan = choose(cell, size, batch, 1, dtype, precision, backwards, DEVICES[capability])
        key = (capability, name, size, cell, plan.rows, backwards)
        if key not in seen:
            seen.add(key)
            yield capability, name, plan


def main(arguments: list[str] | None = None) -> None:
    """Compile what is missing from the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--capabilities", nargs="+", type=int, default=list(DEVICES))
    parser.add_argument("--hidden", nargs="+", type=int, default=list(HIDDEN))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--masked", action="store_true", help="with lengths, dropout and zoneout")
    parser.add_argument("--barrier", default=launch.BARRIER, choices=("atomic", "load", "bounded"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if launch.interpreted(forward.forward_kernel):
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    done = set()
    if options.output.exists():
        with options.output.open(newline="") as file:
            done = {tuple(row[k] for k in KEY) for row in csv.DictReader(file)}
    launch.BARRIER = options.barrier
    end = time.monotonic() + options.seconds
    for capability, name, plan in grid(options):
        row: Row = {
            "triton": triton.__version__,
            "capability": capability,
            "cell": plan.cell,
            "dtype": name,
            "pass": "backward" if plan.backward else "forward",
            "hidden_size": plan.hidden_size,
            "rows": plan.rows,
            "units": plan.units,
            "slices": plan.slices,
            "chunk": plan.chunk,
            "warps": plan.warps,
            "resident": plan.resident,
            "masked": options.masked,
            "barrier": options.barrier,
            "modelled_shared": plan.shared_bytes,
        }
        if tuple(str(row[k]) for k in KEY) in done:
            continue
        if time.monotonic() > end:
            print("time is up; run again to go on")
            return
        driver.set_active(_Driver(capability))
        row |= compile_plan(plan, options.masked)
        print(*row.values(), flush=True)
        options.output.parent.mkdir(exist_ok=True)
        fresh = not options.output.exists()
        with options.output.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if fresh:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
