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
    """Plans of 16 units a program, or of all of them if `units` is 0; the list fills with those used."""
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


def cast(layer: Layer, dtype: torch.dtype) -> Layer:
    """The same values in another dtype, as leaves."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

    cell, x, w_ih, w_hh, b_ih, b_hh, params, state, w_hr = layer
    return Layer(
        cell,
        *map(leaf, (x, w_ih, w_hh, b_ih, b_hh)),
        {name: leaf(p) for name, p in params.items()},
        [leaf(s) for s in state],
        leaf(w_hr),
    )


def root_mean_square(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_accurate(run: Callable, layer: Layer, **options: object) -> None:
    """Every result and gradient errs at most twice as much as plain steps in the same dtype do.

    Both errors are against float64 on the same (rounded) inputs; one unit of rounding of each tensor's
    own magnitude is granted besides, since a short sum may happen to be exact.
    """
    dtype = layer.x.dtype
    oracle = {k: v for k, v in options.items() if k != "recompute"}
    exact = outputs_and_gradients(reference.recurrence, cast(layer, torch.float64), **oracle)
    plain = outputs_and_gradients(reference.recurrence, layer, **oracle)
    actual = outputs_and_gradients(run, layer, **options)
    assert actual.keys() == exact.keys()
    for name, value in exact.items():
        assert actual[name].dtype == dtype, name
        budget = 2 * root_mean_square(plain[name] - value)
        budget += torch.finfo(dtype).eps * root_mean_square(value)
        error = root_mean_square(actual[name] - value)
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
