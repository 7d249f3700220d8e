"""A decorator that keeps `torch.compile` out of a function without importing the compiler."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` eagerly under `torch.compile`, as torch.nn's recurrent layers run.

    `torch.compiler.disable` would import the compiler, and triton with it, at once. An export
    traces `function`, because it must be one graph.
    """
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules or torch.compiler.is_exporting():
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call
