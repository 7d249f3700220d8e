import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_foreign_kernels_package_is_named(tmp_path):
    foreign = tmp_path / "kernels"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("__version__ = '0.18.2'\ndef get_kernel(name): ...\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import fusedrnn"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: fusedrnn needs its own package 'kernels'")
    assert str(foreign) in error
