"""What the compiler makes of the CRF's kernels, without a GPU: a JSON row for each on stdout.

Run as a module, without TRITON_INTERPRET. What is compiled is the launchers' own call: only the
driver is replaced, by one that claims to be the wanted GPU.
"""

import json
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from triton.runtime import driver

from benchmarks.compile_facts import _Driver, usage
from kernels.crf import paths, sums

CAPABILITIES = {80: (3, 9, 25, 64), 90: (9, 20, 33, 64), 100: (17, 20, 64)}
"""Compute capability -> numbers of tags: some that share no factor with a vector, which need most
registers."""


class Compiler:
    """In the place of a kernel: compiles what would be launched, and keeps the facts."""

    def __init__(self, kernel):
        self.kernel, self.facts = kernel, {}

    def __getitem__(self, grid):
        def compile_(*arguments, **options):
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            self.facts = usage(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}

        return compile_


def launches(num_tags: int) -> Iterator[tuple[object, str, str, Callable[[], object]]]:
    """Module and name of each kernel, what of it is compiled, and the call that does it."""
    emissions = torch.zeros(2, 3, num_tags, dtype=torch.bfloat16)
    start, transitions = torch.zeros(num_tags), torch.zeros(num_tags, num_tags)
    lengths, tags = torch.ones(2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    scores, states = (emissions, start, transitions, start, lengths), emissions.float()
    given = (states, emissions, transitions, start, lengths)
    yield sums, "crf_forward", "training", lambda: sums.forward(*scores, tags, True)
    yield sums, "crf_backward", "training", lambda: sums.backward(start[:2], *given, tags)
    yield sums, "crf_backward", "marginals", lambda: sums.backward(None, *given, None)
    for n in (1, 5):
        yield paths, "crf_decode", f"{n} best", lambda n=n: paths.decode(*scores, n)


def main() -> None:
    for capability, sizes in CAPABILITIES.items():
        driver.set_active(_Driver(capability))
        for num_tags in sizes:
            for module, name, what, call in launches(num_tags):
                compiler = Compiler(getattr(module, name))
                with mock.patch.object(module, name, compiler):
                    call()
                key = {"capability": capability, "num_tags": num_tags, "kernel": name, "what": what}
                print(json.dumps(key | compiler.facts), flush=True)


if __name__ == "__main__":
    main()
