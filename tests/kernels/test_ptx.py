"""The PTX that Triton makes of the kernels for sm_90, run on the CPU through Triton's own launcher.

What it shows: the arithmetic of the PTX against float64 (the fragments of mma.sync, the matrix
descriptors of wgmma, ldmatrix and stmatrix among it); that every access lies in a tensor of the
call or in shared memory, and is aligned; that branches are uniform in a warp and nothing waits for
ever; and that programs find what others wrote, where warps run in a random order, a store is seen
by another program only after a release that follows it, and the L1 cache keeps what it has loaded
until an acquire. What it does not show: what ptxas makes of the PTX, asynchrony within a program
(wgmma is done at once), the rounding of approximate functions and of tensor cores, the memory of a
real card, and any timing. It takes the place of no GPU: see test_gpu.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.ptx.card import missing
from tests.kernels.ptx.problems import CELL_BY_CELL, CRF, DECODERS, FAULTS, SLOW
from tests.kernels.ptx.translate import Untranslatable, statement, translate

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(bool(missing()), reason=f"not installed: {missing()}")


@pytest.fixture(scope="module")
def ask():
    """Has a process without the interpreter run a problem: what went wrong, and the launches."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.ptx.run"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:

        def run(name):
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, f"the process has ended with {process.wait()}"
            return json.loads(line)

        yield run
        process.stdin.close()


def assert_right(answer):
    assert answer["error"] == ""
    assert answer["launches"]


@needs_compiler
@pytest.mark.parametrize("name", CELL_BY_CELL)
def test_recurrence(name, ask):
    assert_right(ask(name))


@needs_compiler
@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
def test_tensor_cores_are_among_it(dtype, ask):
    products = [launch["products"] for launch in ask(f"recurrence-lstm-{dtype}")["launches"]]
    assert products == [["wgmma.mma_async"], ["mma.sync"]]


@needs_compiler
@pytest.mark.parametrize("name", DECODERS)
def test_attention_decoder(name, ask):
    assert_right(ask(name))


@needs_compiler
@pytest.mark.parametrize("name", CRF)
def test_crf(name, ask):
    assert_right(ask(name))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more(name, ask):
    assert_right(ask(name))


@needs_compiler
@pytest.mark.parametrize(("change", "expected"), FAULTS.items())
def test_a_fault_is_found(change, expected, ask):
    """If this passed with broken PTX, the tests above would show nothing."""
    assert re.match(expected, ask(change.__name__)["error"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("add.s32 \t%r3, %r1, -2", "w.r[3][l] = u32(u64(s32(w.r[1][l])) + u64(s32(-2ll)));"),
        ("@!%p1 mov.b32 \t%r3, 0f3F800000", "EACH if (!w.p[1][l]) { w.r[3][l] = u32("),
        ("@%p2 bra \t$L__BB0_4", "if (branches(w, w.p[2], true, 7)) goto L__BB0_4;"),
        ("ld.global.cg.b32 %r1, [ %rd2 + 16 ]", "u64(w.d[2][l] + 16), q, 4, 7, Cache::coherent)"),
        ("ld.global.b32 %r1, [ %rd2 + 0 ]", "Cache::l1"),
    ],
    ids=["add", "mov", "bra", "cg", "l1"],
)
def test_translation(text, expected):
    assert expected in statement(text, 7)


@pytest.mark.parametrize(
    "text",
    [
        "cp.async.cg.shared.global [ %r1 ], [ %rd1 ], 16",
        "add.f32x2 %rd1, %rd2, %rd3",
        "bar.sync 1",
        "shfl.sync.down.b32 %r1, %r2, 1, 15, -1",
        "mov.b32 %r1, %clock",
    ],
)
def test_what_the_machine_has_not_is_named(text):
    with pytest.raises(Untranslatable, match="line 7 of the PTX") as error:
        statement(text, 7)
    assert text in str(error.value)


def test_registers_of_other_types_are_refused():
    ptx = ".visible .entry f()\n{\n\t.reg .f32 \t%f<3>;\n\tret;\n}\n"
    with pytest.raises(Untranslatable, match="registers"):
        translate(ptx)
