"""Averages checkpoints: one model whose weights are the means of several."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.base import CheckpointError, read_checkpoint

SAME = ("task", "arguments", "codec")
"""What the checkpoints must have in common."""

KEPT = ("fusedrnn", "pytorch-lightning_version", "epoch", "global_step")
"""What the average takes from the last of them; states of optimizers would no longer fit."""


def average_checkpoints(paths: Sequence[str | Path], output: str | Path) -> None:
    """Write a checkpoint with the mean of the weights of several (Utans, 1996).

    It makes sense for checkpoints of one run, late in training: their models compute nearly the
    same. The models of different runs have nothing to do with each other weight by weight; use
    those as an ensemble.

    Args:
        paths: checkpoints of the same architecture and vocabulary, at least one.
        output: file to write; it appears under its name only when it is complete.

    Raises:
        CheckpointError: one cannot be read, or is of another model than the first.
        FileNotFoundError: there is no folder for the output.
    """
    output = Path(output)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output: no folder {output.parent}")
    if not paths:
        raise CheckpointError("ckpt_path: expected at least one checkpoint")
    first = last = read_checkpoint(paths[0])
    sums = {name: _wide(value) for name, value in first["state_dict"].items()}
    for path in paths[1:]:
        last = read_checkpoint(path)
        _check(first, last, paths[0], path)
        for name, value in last["state_dict"].items():
            sums[name] = sums[name] + value if value.is_floating_point() else value
    weights = {
        name: (sums[name] / len(paths)).to(value.dtype) if value.is_floating_point() else value
        for name, value in last["state_dict"].items()
    }
    result = {name: last[name] for name in KEPT if name in last} | {"state_dict": weights}
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        torch.save(result, partial)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _check(
    first: dict[str, Any], other: dict[str, Any], first_path: str | Path, path: str | Path
) -> None:
    for name in SAME:
        if first["fusedrnn"][name] != other["fusedrnn"][name]:
            raise CheckpointError(f"{path}: differs from {first_path} in its {name}")
    shapes = [
        {name: value.shape for name, value in one["state_dict"].items()} for one in (first, other)
    ]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{path}: has weights of other shapes than {first_path}")
