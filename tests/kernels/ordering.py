"""How the compiler orders the accesses around the group barrier, without a GPU: faults on stdout.

Run as a module, without TRITON_INTERPRET. The concurrent interpreter shows the protocol, on a
processor that orders memory strictly; here stands what a GPU is told to order.
"""

import re
from collections.abc import Iterator

from triton.runtime import driver

from benchmarks.compile_facts import DEVICES, DTYPES, _Driver, dispatched, warmup
from benchmarks.loops import Loop
from kernels.persistent.plan import choose
from kernels.spec import CELLS

ACCESS = re.compile(r"^\s*(?:@!?%p\d+\s+)?((?:bar\.sync|(?:atom|red|ld|st)\.global|cp\.async)\S*)")
CASES = (("lstm", False), ("lstm", True), ("gru_reset_before", False), ("lstm_layernorm", True))


def faults(ptx: str, exchanges: int) -> Iterator[str]:
    """What may go wrong between programs.

    Args:
        ptx: of a kernel whose weights are resident.
        exchanges: meetings of a time step.
    """
    blocks = re.split(r"^\$L__BB\w+:", ptx, flags=re.M)
    arrivals = reads = 0
    for block in blocks:
        met, before = False, ""
        for name in (found[1] for line in block.splitlines() if (found := ACCESS.match(line))):
            if ".nc" in name or "cp.async" in name:
                yield f"{name} is not ordered by the barrier"
            if "release" in name:
                arrivals += 1
                if not before.startswith("bar.sync"):
                    yield f"a program arrives after {before or 'nothing'}, not after bar.sync"
            if ".cg" in name:
                reads += 1
                if not met:
                    yield "what others wrote is read without bar.sync after the poll"
            met, before = met or name.startswith("bar.sync"), name
    if arrivals != exchanges:
        yield f"{arrivals} arrivals that release, not {exchanges}"
    if reads == 0 or "acquire" not in ptx:
        yield "nothing is acquired, or nothing read past the L1 cache"


def main() -> None:
    driver.set_active(_Driver(90))
    for cell, backward in CASES:
        plan = choose(cell, 256, 16, 1, *DTYPES["bf16"], backward, DEVICES[90])

        def look(*launch: object, cell=cell, backward=backward, **arguments: object) -> None:
            ptx = warmup(*launch, **arguments).asm["ptx"]
            for fault in faults(ptx, CELLS[cell].exchanges):
                print(f"{cell} {'backward' if backward else 'forward'}: {fault}")

        with dispatched(look):
            Loop(plan, 2).run()


if __name__ == "__main__":
    main()
