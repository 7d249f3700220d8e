import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_compile

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def python(*arguments, **environment):
    run = {"cwd": ROOT, "env": ENVIRONMENT | environment, "check": True}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **run)


def test_launches_ask_for_what_was_compiled_ahead():
    found = json.loads(python("-m", "tests.benchmarks.cache_keys", "25").stdout)
    assert found["keys"] > 20
    assert found["missing"] == []
    assert not found["alike"]


def test_kernels_reach_the_cache(tmp_path):
    command = ["-m", "benchmarks.gpu_compile", "gpu_exchange", "--first", "1", "--jobs", "1"]
    done = python(*command, TRITON_CACHE_DIR=str(tmp_path), TRITON_STORE_BINARY_ONLY="1")
    assert done.stdout.startswith("1 of 1 kernels in ")
    assert len(list(tmp_path.rglob("*.cubin"))) == 1


def test_no_kernel_is_compiled_twice():
    kernels = gpu_compile.wanted(list(gpu_compile.NAMES))
    assert len(set(kernels)) == len(kernels) > 500
    assert all(kernel.save == "all" for kernel in kernels if kernel.plan.backward)
    assert {kernel.save for kernel in kernels} == {"all", "nothing"}
    # The corner's forward pass at inference is what is timed first.
    first = gpu_compile.wanted(["gpu_speed"])[0]
    assert (first.plan.hidden_size, first.save, first.lengths) == (768, "nothing", False)


def test_the_interpreter_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_compile.main([])
    assert "the interpreter compiles nothing" in capsys.readouterr().err


def test_an_unknown_name_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(gpu_compile, "interpreted", lambda kernel: False)
    with pytest.raises(SystemExit):
        gpu_compile.main(["gpu_crf"])
    assert "no kernels of gpu_crf; there are gpu_accuracy" in capsys.readouterr().err
