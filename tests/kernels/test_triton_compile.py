"""What the compiler makes of the kernels, without a GPU: a part of compile_facts.csv."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import CELLS

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
RUNS = {
    "sm_90": "--capabilities 90 --dtypes bf16 tf32 --hidden 256 --batches 16",
    "sm_90 fp16": "--capabilities 90 --dtypes fp16 --hidden 64 --batches 16",
    "sm_90 fp32": "--capabilities 90 --dtypes fp32 --hidden 512 --batches 16",
    "masked": "--capabilities 90 --dtypes bf16 --hidden 512 --batches 16 --masked"
    " --cells rnn_relu lstm_layernorm gru_reset_before",
    "others": "--capabilities 80 100 --dtypes bf16 tf32 --hidden 512 --batches 16 --cells lstm gru",
    "largest": "--capabilities 90 --dtypes bf16 --hidden 1024 --batches 64 --cells lstm",
}
SHARED = {"80": 166912, "90": 232448, "100": 232448}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("compile") / "facts.csv"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for options in RUNS.values():
        command = [sys.executable, "-m", "benchmarks.compile_facts", *options.split()]
        subprocess.run([*command, "--output", path], check=True, cwd=ROOT, env=environment)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def plan(row):
    keys = ("capability", "cell", "dtype", "pass", "hidden_size", "rows", "units", "slices")
    return " ".join(f"{key}={row[key]}" for key in keys)


def assert_none(rows):
    assert not [plan(row) for row in rows]


def test_every_cell_and_dtype_is_there(rows):
    on_hopper = {(row["cell"], row["dtype"]) for row in rows if row["capability"] == "90"}
    assert on_hopper == {(cell, d) for cell in CELLS for d in ("bf16", "fp16", "tf32", "fp32")}
    assert len(rows) <= 80


def test_nothing_spills(rows):
    assert_none(row for row in rows if int(row["spills_in_loops"]))
    plain = [row for row in rows if row["masked"] == "False"]
    assert_none(row for row in plain if int(row["stack"]) or int(row["spills"]))


def test_shared_memory_is_within_the_limit_and_the_model(rows):
    assert_none(row for row in rows if int(row["shared"]) > SHARED[row["capability"]])
    assert_none(row for row in rows if int(row["shared"]) > int(row["modelled_shared"]))


def test_weights_stay_on_chip(rows):
    assert_none(row for row in rows if row["resident"] != "True")
    assert_none(row for row in rows if int(row["weights_reloaded"]))


def test_tensor_cores_multiply(rows):
    def missing(row):
        tensor_cores = sum(int(row[kind]) for kind in ("wgmma", "mma", "tcgen05"))
        gates = 1 if row["pass"] == "backward" else {1: 1, 3: 4, 4: 4}[CELLS[row["cell"]].gates]
        tall = gates * int(row["units"]) >= 64 and row["cell"] != "gru_reset_before"
        wanted = "wgmma" if row["capability"] == "90" and tall else None
        return tensor_cores == 0 or (wanted and int(row[wanted]) == 0)

    assert_none(row for row in rows if row["dtype"] != "fp32" and missing(row))


def test_programs_that_meet_are_launched_cooperatively(rows):
    assert {row["slices"] != "1" for row in rows} == {False, True}
    assert_none(row for row in rows if (row["slices"] != "1") != (row["cooperative"] == "True"))


def test_programs_write_before_they_arrive_and_read_after_all_have():
    command = [sys.executable, "-m", "tests.kernels.ordering"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("\tbar.sync 0;\n@%p1 atom", "@%p1 atom"), "arrives after st.global.b32"),
        (("$L__BB0_2:\n\tbar.sync 0;", "$L__BB0_2:"), "read without bar.sync"),
        (("ld.global.cg", "ld.global"), "nothing read past the L1 cache"),
        (("ld.global.cg", "ld.global.nc"), "ld.global.nc.b32 is not ordered"),
        (("atom.global.gpu.release", "atom.global.gpu.relaxed"), "0 arrivals"),
    ],
)
def test_a_fault_in_the_order_is_found(change, fault):
    from tests.kernels.ordering import faults

    ptx = (
        "\tst.global.b32 [%rd1], %r1;\n\tbar.sync 0;\n"
        "@%p1 atom.global.gpu.release.add.u32 %r2, [%rd2], 1;\n"
        "$L__BB0_1:\n@%p1 ld.global.gpu.acquire.b32 %r3, [%rd2];\n@%p2 bra $L__BB0_1;\n"
        "$L__BB0_2:\n\tbar.sync 0;\n\tld.global.cg.b32 %r4, [%rd1];\n"
    )
    assert not [*faults(ptx, 1)]
    assert any(fault in found for found in faults(ptx.replace(*change), 1))


def test_a_reload_is_found():
    from benchmarks.compile_facts import weights_reloaded

    before = "%w = tt.load %p : t\n"
    inside = "scf.for %i = %a to %b {\n%x = tt.load %q : t\n%y = ttg.local_alloc %x : t\n"
    copy = "%z = ttg.local_alloc %w : t\n"
    assert weights_reloaded(before + copy + inside) == 0
    assert weights_reloaded(before + inside + copy) == 1


def test_spills_in_loops_are_told_from_those_around_them():
    from benchmarks.compile_facts import count_spills

    code = ("STL [R1], R6", "LDL R4, [R1]", "@P0 BRA 0x0010", "LDL.LU R2, [R1]", "BRA 0x0060")
    sass = "\n".join(f"  /*{16 * i:04x}*/   {line} ;   /* 0x00 */" for i, line in enumerate(code))
    assert count_spills(sass) == (3, 1)
