"""What the compiler makes of the attention decoder's kernels, without a GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
RUNS = {
    "sm_90": "--capabilities 90 --dtypes bf16 --variants 4",
    "others": "--capabilities 80 100 --dtypes bf16 --variants 4",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = []
    for name, options in RUNS.items():
        path = tmp_path_factory.mktemp("compile") / f"{name}.csv"
        path.write_text("triton,cell\n0.0,kept\n")
        command = [sys.executable, "-m", "benchmarks.attention_facts", *options.split()]
        subprocess.run([*command, "--output", path], check=True, cwd=ROOT, env=environment)
        with path.open(newline="") as file:
            kept, *new = csv.DictReader(file)
        assert (kept["triton"], kept["cell"]) == ("0.0", "kept")
        found += new
    return found


def test_every_capability_and_both_passes_are_there(rows):
    assert {row["capability"] for row in rows} == {"80", "90", "100"}
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    assert {row["feedback"] for row in rows} == {"none", "features", "context"}
    assert {row["layers"] for row in rows} == {"1", "2"}
    assert {row["symbols"] for row in rows} == {"0", "5000"}


def test_nothing_spills(rows):
    """But for addresses: sm_100's forward keeps one on the stack, two layers elsewhere a few."""
    allowed = {"80": 0, "90": 0, "100": 2}
    several = {"80": 12, "90": 0, "100": 12}
    for row in rows:
        limits = allowed if row["layers"] == "1" else several
        assert int(row["spills"]) <= limits[row["capability"]], row


def test_shared_memory_is_within_the_limit(rows):
    assert max(int(row["shared"]) for row in rows) <= 166912


def test_tensor_cores_multiply(rows):
    assert not [
        row for row in rows if int(row["mma"]) + int(row["wgmma"]) + int(row["tcgen05"]) == 0
    ]
