"""Modules as folders: weights as safetensors, the constructor's arguments as JSON."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import kernels

from .crf import CRF
from .recurrent import GRU, LSTM, RNN
from .stack import RecurrentStack

FORMAT = 1
"""Of the configuration; `load` refuses a later one."""

CONFIGURATION, WEIGHTS = "config.json", "model.safetensors"

CLASSES: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (LSTM, GRU, RNN, RecurrentStack, CRF)
}
"""What can be saved: `load` builds nothing else, so that a folder cannot name code to run."""

Kind = TypeVar("Kind", bound=type[nn.Module])


def saveable(kind: Kind) -> Kind:
    """Decorate a class of modules that `save` and `load` are to know, by its name.

    Its modules remember in `arguments` what their constructor was given: plain data, or tensors
    that are as good as None once the `state_dict` is loaded, and are kept as None.

    Raises:
        ValueError: another class has that name.
    """
    if CLASSES.setdefault(kind.__name__, kind) is not kind:
        raise ValueError(f"there is another class {kind.__name__} that can be saved")
    build = kind.__init__
    signature = inspect.signature(build)

    @functools.wraps(build)
    def build_and_remember(self: Any, *values: Any, **named: Any) -> None:
        build(self, *values, **named)
        given = signature.bind(self, *values, **named)
        given.apply_defaults()
        (_, *rest) = given.arguments.items()
        self.arguments = {name: None if isinstance(v, Tensor) else v for name, v in rest}

    kind.__init__ = build_and_remember  # type: ignore[method-assign]
    return kind


def save(module: nn.Module, folder: str | Path) -> None:
    """Write a module into a folder, as `config.json` and `model.safetensors`.

    Args:
        module: an LSTM, GRU, RNN, RecurrentStack or CRF, or of a class that is `saveable`, as the
            networks of the tagger and of the sequence-to-sequence model are.
        folder: it is made if it is not there; files of an earlier `save` are replaced.

    Raises:
        TypeError: the module is of another class.
    """
    from safetensors.torch import save_file

    name = type(module).__name__
    if CLASSES.get(name) is not type(module):
        raise TypeError(f"module must be one of {', '.join(CLASSES)}, got {name}")
    configuration = {
        "format": FORMAT,
        "version": kernels.__version__,
        "module": type(module).__module__,
        "class": name,
        "arguments": _arguments(module),
    }
    text = json.dumps(configuration, indent=2) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {  # copies: safetensors takes no tensor twice, as tied weights are
        key: value.clone(memory_format=torch.contiguous_format)
        for key, value in module.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS)
    (folder / CONFIGURATION).write_text(text, encoding="utf-8")


def load(folder: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """Build the module that `save` wrote, in evaluation mode, its weights in their own dtype.

    Needs neither Lightning nor the code that trained the module, and runs nothing from the folder.
    The module of a class that is not of this package must have been imported.

    Args:
        folder: what was given to `save`.
        device: where to put the module.

    Returns:
        A module of the class that was saved.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another program or of a later version, or the weights do
            not fit the configuration; the message names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    path, weights_path = folder / CONFIGURATION, folder / WEIGHTS
    for file in (path, weights_path):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; fusedrnn.save writes it")
    module = _build(path)
    try:
        weights = load_file(weights_path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{weights_path}: damaged, or not a safetensors file ({error})") from error
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{weights_path}: {name} is {found.get(name, 'absent')}, but {CONFIGURATION} "
                f"wants {expected.get(name, 'none')}"
            )
    for name, tensor in module.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(weights[name].dtype)
    module.load_state_dict(weights)
    return module.to(device).eval()


def _build(path: Path) -> nn.Module:
    try:
        configuration = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(configuration, dict) or not isinstance(configuration.get("format"), int):
        raise ValueError(f"{path}: not a configuration written by fusedrnn.save")
    if configuration["format"] > FORMAT:
        raise ValueError(
            f"{path}: written by fusedrnn {configuration.get('version')}, newer than "
            f"{kernels.__version__}"
        )
    kind = CLASSES.get(configuration.get("class", ""))
    if kind is None:
        raise ValueError(
            f"{path}: class must be one of {', '.join(CLASSES)}, got {configuration.get('class')!r}"
            f"; if it is your own, first import {configuration.get('module')}"
        )
    try:
        return kind(**configuration["arguments"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: arguments do not fit {kind.__name__}: {error}") from error


def _arguments(module: nn.Module) -> dict[str, Any]:
    """The constructor's arguments but device and dtype, which the weights themselves have."""
    kept = getattr(module, "arguments", None)
    if kept is None:
        names = inspect.signature(type(module)).parameters
        kept = {name: getattr(module, name) for name in names if name not in ("device", "dtype")}
    return kept
