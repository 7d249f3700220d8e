"""Random layers, and outputs and gradients by name, for comparing backends with each other."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import CELLS


class Layer(NamedTuple):
    cell: str
    x: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    params: dict[str, Tensor]
    state: list[Tensor]
    w_hr: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        tensors = {
            name: getattr(self, name) for name in ("x", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
        }
        tensors |= self.params | dict(zip(("h_0", "c_0"), self.state, strict=False))
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def random_layer(
    cell: str,
    steps: int = 5,
    batch: int = 3,
    inputs: int = 4,
    hidden: int = 5,
    directions: int = 1,
    projected: int = 0,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Layer:
    """A layer whose tensors all want gradients; the same values in every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    spec = CELLS[cell]
    rows, size = spec.gates * hidden, projected or hidden

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (0.5 * values).to(dtype).requires_grad_()

    return Layer(
        cell,
        draw(steps, batch, inputs),
        draw(directions, rows, inputs),
        draw(directions, rows, size),
        draw(directions, rows) if bias else None,
        draw(directions, rows) if bias else None,
        {name: draw(directions, multiple * hidden) for name, multiple in spec.parameters.items()},
        [draw(directions, batch, size if name == "h" else hidden) for name in spec.states],
        draw(directions, projected, hidden) if projected else None,
    )


def outputs(recurrence: Callable, layer: Layer, **options: object) -> dict[str, Tensor]:
    """y and the final states by name."""
    cell, x, w_ih, w_hh, b_ih, b_hh, params, state, w_hr = layer
    y, final = recurrence(cell, x, w_ih, w_hh, b_ih, b_hh, params, state, w_hr=w_hr, **options)
    return {"y": y} | dict(zip(("h_n", "c_n"), final, strict=False))


def outputs_and_gradients(
    recurrence: Callable, layer: Layer, **options: object
) -> dict[str, Tensor]:
    """Also the gradient of every leaf, with random cotangents on y and the final states at once."""
    results = outputs(recurrence, layer, **options)
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r)
        for r in results.values()
    ]
    leaves = layer.leaves()
    gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), cotangents)
    return results | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor within `tolerance` of the expected one's largest magnitude."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            actual[name].double(),
            value.double(),
            rtol=0,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )
