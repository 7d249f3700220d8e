"""A card of compute capability 9.0 that is not there: Triton's own compiler, binder and launcher.

Only libcuda is another, fake_cuda.c; its launches come back here, and the machine runs their PTX.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from .translate import translate

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-fPIC", "-w", "-ffp-contract=off"]
HOOK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint,
    ctypes.c_int, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


class Launch(NamedTuple):
    """What one launch asked for, and by which instructions it multiplies matrices."""

    grid: tuple[int, ...]
    warps: int
    shared: int
    cooperative: bool
    products: list[str]


def missing() -> str:
    """What of the tools is not installed, in words, or nothing."""
    found = [tool for tool in ("gcc", "g++") if shutil.which(tool) is None]
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    if not Path(sysconfig.get_paths(scheme)["include"], "Python.h").exists():
        found.append("Python.h")
    return ", ".join(found)


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Those of nested tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


@dataclass
class Card:
    """Runs what is launched.

    Attributes:
        folder: for what is compiled.
        seed: of the order in which warps run and stores become visible.
        mutate: changes the PTX before it is translated.
        launches: those since the list was last emptied.
    """

    folder: Path
    seed: int = 1
    mutate: Callable[[str], str] = str
    launches: list[Launch] = field(default_factory=list)
    _memory: list[int] = field(default_factory=list)
    _errors: list[BaseException] = field(default_factory=list)
    _machines: dict[str, ctypes.CDLL] = field(default_factory=dict)

    def _compile(self, *arguments: str | Path) -> None:
        subprocess.run(["g++", *FLAGS, *arguments], check=True)

    def machine(self, ptx: str) -> ctypes.CDLL:
        """The machine with this kernel; each is compiled once."""
        code = translate(ptx)
        key = hashlib.sha256(code.encode()).hexdigest()[:16]
        if key not in self._machines:
            common = self.folder / "machine.o"
            if not common.exists():
                self._compile("-O2", "-c", HERE / "machine.cpp", "-o", common)
            source, library = self.folder / f"{key}.cpp", self.folder / f"{key}.so"
            source.write_text(code)
            self._compile("-O0", "-shared", f"-I{HERE}", source, common, "-o", library)
            self._machines[key] = ctypes.CDLL(str(library))
            self._machines[key].run.restype = ctypes.c_char_p
        return self._machines[key]

    def run(
        self, ptx: bytes, grid: Any, threads: int, shared: int, meets: int, params: Any
    ) -> None:
        """Run a launch; what goes wrong is kept, since it cannot be raised through C."""
        try:
            text = ptx.decode()
            products = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)", text)))
            self.launches.append(
                Launch(tuple(grid[:3]), threads // 32, shared, bool(meets), products)
            )
            memory = (ctypes.c_uint64 * len(self._memory))(*self._memory)
            size = ctypes.c_uint
            problem = self.machine(self.mutate(text)).run(
                params, grid, size(threads // 32), size(shared), memory, len(memory) // 2,
                ctypes.c_uint64(self.seed),
            )  # fmt: skip
            if problem:
                raise RuntimeError(problem.decode())
        except BaseException as error:
            self._errors.append(error)

    def launching(self, launch: Callable[..., None], arguments: tuple[object, ...]) -> None:
        """Let Triton launch; the kernel may touch the memory of its tensors and no other."""
        storages = [t.untyped_storage() for t in tensors_in(arguments) if t.numel()]
        self._memory = [p for s in storages for p in (s.data_ptr(), s.data_ptr() + s.nbytes())]
        launch(*arguments)
        if self._errors:
            raise self._errors.pop()


@contextlib.contextmanager
def inserted(folder: Path) -> Iterator[Card]:
    """A card in the place of Triton's active one, for tensors on the CPU.

    Args:
        folder: an empty one for what is compiled; it may be deleted afterwards.
    """
    os.environ |= {"TRITON_CACHE_DIR": str(folder / "triton"), "TRITON_LIBCUDA_PATH": str(folder)}
    import triton
    from triton.backends.nvidia import compiler, driver
    from triton.runtime import driver as active

    card = Card(folder)
    include = Path(driver.__file__).parent / "include"
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, HERE / "fake_cuda.c", "-o", library], check=True)
    cuda, hook = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL), HOOK(card.run)
    cuda.set_hook(hook)

    class Launcher(driver.CudaLauncher):
        def __call__(self, *arguments: object) -> None:
            card.launching(super().__call__, arguments)

    class Driver(driver.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = driver.CudaUtils(), Launcher
            self.get_device_capability = lambda device: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device=None: 0
            self.set_current_device = lambda device: None

    def image(self: object, ptx: str, *_: object) -> bytes:
        return ptx.encode() + b"\0"

    def everywhere(_: object) -> bool:
        return True

    assert not triton.knobs.runtime.interpret
    active.set_active(Driver())
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(compiler.CUDABackend, "make_cubin", image))
        for package in ("", ".attention", ".crf"):  # else their operators refuse a CPU's tensors
            patches.enter_context(mock.patch(f"kernels{package}.ops.interpreted", everywhere))
        yield card
