"""No kernel of the CRF spills, and all fit: compiled for three generations without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.crf.plan import WARPS, padded

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
SHARED = {80: 166912, 90: 232448, 100: 232448}


@pytest.fixture(scope="module")
def rows():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.crf.compiled"]
    done = subprocess.run(
        command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_each_kernel_is_there(rows):
    assert {row["kernel"] for row in rows} == {"crf_forward", "crf_backward", "crf_decode"}
    assert {row["capability"] for row in rows} == set(SHARED)
    assert {padded(row["num_tags"]) for row in rows if row["capability"] == 90} == set(WARPS)


def test_nothing_spills(rows):
    assert not [row for row in rows if row["stack"] or row["spills"]]


def test_shared_memory_is_within_the_limit(rows):
    assert not [row for row in rows if row["shared"] > SHARED[row["capability"]]]
