"""The Triton recurrence under a plan of the test's choice, and a budget for its error."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import ops, reference
from kernels.persistent import plan as planning
from tests.kernels.cases import Layer, outputs_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def force(monkeypatch: pytest.MonkeyPatch, **changes: object) -> list[planning.LaunchPlan]:
    """Plans of 16 units a program, or of all if `units` is 0; the list fills with those used."""
    used = []

    def choose(cell: str, hidden: int, *rest: object) -> planning.LaunchPlan:
        plan = planning.choose(cell, hidden, *rest)
        whole = 1 << max(4, (hidden - 1).bit_length())
        units = changes.get("units", 16) or whole
        slices = -(-hidden // units)
        plan = replace(
            plan,
            **(
                {"rows": 16, "chunk": units if slices == 1 else 32, "resident": True}
                | changes
                | {"units": units, "slices": slices}
            ),
        )
        plan = replace(plan, groups_per_launch=changes.get("groups_per_launch", plan.groups))
        used.append(plan)
        return plan

    monkeypatch.setattr(ops, "choose", choose)
    return used


def to_device(layer: Layer, device: torch.device | str, dtype: torch.dtype) -> Layer:
    """The same values in another dtype or on another device, as leaves."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(device, dtype).requires_grad_()

    cell, x, w_ih, w_hh, b_ih, b_hh, params, state, w_hr = layer
    return Layer(
        cell,
        *map(leaf, (x, w_ih, w_hh, b_ih, b_hh)),
        {name: leaf(p) for name, p in params.items()},
        [leaf(s) for s in state],
        leaf(w_hr),
    )


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of the error, relative to that of the exact values; NaN stays NaN."""
    size = exact.square().mean().sqrt().item() if exact.numel() else 0.0
    error = (actual.double() - exact).square().mean().sqrt().item() if exact.numel() else 0.0
    return error / size if size else error


def assert_accurate(run: Callable, layer: Layer, **options: object) -> None:
    """Every result and gradient errs at most twice as much as plain steps in the same dtype do.

    Both errors are against float64 on the same (rounded) inputs and relative to the tensor's
    magnitude. That of the plain steps is the worst of all tensors: a tensor of few elements may
    happen to be exact. Two tanh a step, as 2 sigmoid(2x) - 1, each add a unit of float32 to the
    absolute error.
    """
    dtype = layer.x.dtype
    oracle = {k: v for k, v in options.items() if k != "recompute"}
    exact = outputs_and_gradients(
        reference.recurrence, to_device(layer, layer.x.device, torch.float64), **oracle
    )
    plain = outputs_and_gradients(reference.recurrence, layer, **oracle)
    actual = outputs_and_gradients(run, layer, **options)
    assert actual.keys() == exact.keys()
    plain_error = max(relative_error(plain[name], value) for name, value in exact.items())
    tanh = 2 * torch.finfo(torch.float32).eps
    budget = 2 * plain_error + torch.finfo(dtype).eps + tanh
    for name, value in exact.items():
        assert actual[name].dtype == dtype, name
        error = relative_error(actual[name], value)
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors that nobody has filled hold NaN."""

    def poisoned(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def new(*arguments: object, **options: object) -> Tensor:
            out = real(*arguments, **options)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return new

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
