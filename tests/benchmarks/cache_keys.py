"""Do launches ask Triton's cache for what was compiled ahead? Run as a process of its own.

A driver claims to be a Hopper card, and in the place of the compiler stands one that only works out
the key under which Triton would look the kernel up. Launches then go all the way through layers and
operators to that key; what they would run is a dummy. Prints the number of keys, the cases whose
launches asked for a key that nothing had compiled, and, to show that keys do differ, whether a
kernel for another call has the key of a launch. The argument N takes each N-th case.
"""

import json
import sys
from unittest import mock

import torch
import triton.compiler
import triton.compiler.compiler as compiler

from benchmarks import gpu_accuracy, gpu_exchange, gpu_speed
from benchmarks.compile_facts import DTYPES
from benchmarks.gpu_compile import compile_kernel, kernel_of, kernels_of, target_of_a_gpu_elsewhere
from benchmarks.gpu_kernels import device_properties, forward, our_layer, set_precision
from benchmarks.gpu_kernels import training as training_of
from benchmarks.loops import Loop
from kernels.persistent.backward import backward_kernel
from kernels.persistent.forward import forward_kernel

STEPS = 2


class Asked(Exception):
    """Triton looked for a kernel; the argument is the key."""


def ask(key):
    raise Asked(key)


class Keys:
    """In the place of Triton's compiler: the keys it is asked for."""

    def __init__(self):
        self.asked, self.compile = set(), compiler.compile

    def __call__(self, *arguments, **options):
        try:
            self.compile(*arguments, **options)
        except Asked as asked:
            self.asked.add(asked.args[0])
        return mock.MagicMock()

    def of(self, run):
        """Those that a call asks for, whatever was asked before."""
        for kernel in (forward_kernel, backward_kernel):
            kernel.device_caches.clear()
        self.asked = set()
        run()
        return self.asked


def layers():
    """Cell, dtype, H, B, options, lengths or not, modes: as the benchmarks use them."""
    for it in (*gpu_speed.FIRST, *gpu_speed.SECOND, *gpu_speed.grid()[:12]):
        shape = {"bidirectional": it.bidirectional, "num_layers": it.layers}
        yield it.cell, it.dtype, it.hidden_size, it.batch, shape, it.lengths, (False, True)
    for cell, dtype, size, bidirectional, lengths in gpu_accuracy.cases():
        if dtype in ("bf16", "fp32") and size < 1024:
            shape = {"bidirectional": bidirectional, "num_layers": 1}
            yield cell, dtype, size, gpu_accuracy.BATCH, shape, lengths, (True,)


def launch_layer(cell, dtype, size, batch, shape, lengths, modes):
    kind = DTYPES[dtype][0]
    layer = our_layer(cell, size, kind, "cpu", "triton", **shape)
    x = torch.randn(STEPS, batch, size).to(kind)
    inputs = (x, None, torch.full((batch,), STEPS)) if lengths else (x,)
    for training in modes:
        (training_of if training else forward)(layer, *inputs)()


def compile_ahead(cell, dtype, size, batch, shape, lengths, modes):
    saves = tuple("all" if training else "nothing" for training in modes)
    directions = 1 + shape["bidirectional"]
    device = device_properties("cpu")
    for kernel in kernels_of(cell, size, batch, directions, dtype, device, lengths, saves):
        compile_kernel(kernel)


def check(keys, every):
    """The keys of the launches, and the cases that were not compiled ahead."""
    seen, missing = set(), []
    for case in list(layers())[::every]:
        set_precision(case[1])
        launched = keys.of(lambda case=case: launch_layer(*case))
        seen |= launched
        if not launched or launched - keys.of(lambda case=case: compile_ahead(*case)):
            missing.append(str(case))
    for key, plan, _ in list(gpu_exchange.plans())[::every]:
        launched = keys.of(Loop(plan, STEPS, save="nothing").run)
        seen |= launched
        kernel = kernel_of(plan, save="nothing")
        if not launched or launched - keys.of(lambda kernel=kernel: compile_kernel(kernel)):
            missing.append(str(key))
    other = kernel_of(plan, save="state", lengths=True)
    return seen, missing, bool(seen & keys.of(lambda: compile_kernel(other)))


def main():
    target_of_a_gpu_elsewhere(90)
    keys = Keys()
    with (
        mock.patch.object(triton.compiler, "compile", keys),
        mock.patch.object(compiler, "get_cache_manager", ask),
        mock.patch("kernels.ops._check"),
        mock.patch("fusedrnn.base.precision", lambda x: (x.dtype, x.dtype)),
    ):
        seen, missing, alike = check(keys, int(sys.argv[1]))
    json.dump({"keys": len(seen), "missing": missing, "alike": alike}, sys.stdout)


if __name__ == "__main__":
    main()
