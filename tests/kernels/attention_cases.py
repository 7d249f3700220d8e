"""Attention decoders with random weights and inputs, and all their results and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import Decoded, DecoderWeights, LayerWeights, Masks, Problem, reference
from tests.kernels.triton_cases import relative_error

KINDS = ("product", "additive")


class Case(NamedTuple):
    """The arguments of `decode` that have gradients, and those that have not."""

    problem: Problem
    leaves: dict[str, Tensor]
    lengths: Tensor | None
    layers: int
    masks: Masks | None

    def arguments(self) -> tuple:
        """As `decode` takes them."""
        v = self.leaves.get
        layers = [
            LayerWeights(*(v(f"{n}_{i}") for n in ("w_ih", "w_hh", "b_ih", "b_hh")))
            for i in range(self.layers)
        ]
        weights = DecoderWeights(
            layers, v("combine"), v("query"), v("energy"), v("coverage_weight")
        )
        names = ("h", "c") if self.problem.cell == "lstm" else ("h",)
        states = [tuple(v(f"{n}_{i}") for n in names) for i in range(self.layers)]
        tensors = (v("x"), v("keys"), v("projected"), self.lengths, weights, states)
        return (self.problem, *tensors, v("feed"), v("coverage"), self.masks)

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Case:
        """The same values in another dtype or elsewhere, as leaves."""
        leaves = {
            k: t.detach().to(device, dtype).requires_grad_(t.requires_grad)
            for k, t in self.leaves.items()
        }
        masks = self.masks
        if masks is not None:
            between = [m.to(device, dtype) for m in masks.between]
            features = masks.features
            masks = Masks(between, None if features is None else features.to(device, dtype))
        lengths = None if self.lengths is None else self.lengths.to(device)
        return self._replace(leaves=leaves, masks=masks, lengths=lengths)


def random_case(
    cell: str = "lstm",
    feedback: str = "features",
    kind: str = "product",
    *,
    steps: int = 3,
    lengths: list[int] | None = None,
    batch: int = 3,
    source: int = 4,
    inputs: int = 3,
    hidden: tuple[int, ...] = (5,),
    keys: int = 4,
    features: int = 6,
    coverage: bool = False,
    dropout: float = 0.0,
    bias: bool = True,
    start: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Random weights of about unit gain; with `start`, initial feed and coverage are given."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, gain: float = 1.0) -> Tensor:
        return (
            gain * torch.randn(shape, generator=generator, dtype=torch.float64)
        ).requires_grad_()

    gates = {"lstm": 4, "gru": 3}[cell]
    width = inputs + {"none": 0, "features": features, "context": keys}[feedback]
    leaves = {"x": random(steps, batch, inputs), "keys": random(batch, source, keys)}
    for i, size in enumerate(hidden):
        leaves[f"w_ih_{i}"] = random(gates * size, width, gain=width**-0.5)
        leaves[f"w_hh_{i}"] = random(gates * size, size, gain=size**-0.5)
        if bias:
            leaves[f"b_ih_{i}"], leaves[f"b_hh_{i}"] = random(gates * size), random(gates * size)
        leaves[f"h_{i}"] = random(batch, size, gain=0.5)
        if cell == "lstm":
            leaves[f"c_{i}"] = random(batch, size)
        width = size
    top = hidden[-1]
    asked = top
    if kind == "additive":
        asked = top + 2
        leaves["query"] = random(asked, top, gain=top**-0.5)
        leaves["energy"] = random(asked)
    leaves["projected"] = random(batch, source, asked)
    leaves["combine"] = random(features, keys + top, gain=(keys + top) ** -0.5)
    if coverage:
        leaves["coverage_weight"] = random(asked)
    if coverage and start:
        given = torch.rand(batch, source, generator=generator, dtype=torch.float64)
        if lengths is not None:
            given *= torch.arange(source) < torch.tensor(lengths)[:, None]
        leaves["coverage"] = given.requires_grad_()
    if feedback == "features" and start:
        leaves["feed"] = random(batch, features, gain=0.5)

    def mask(size: int) -> Tensor:
        kept = torch.rand(steps, batch, size, generator=generator) >= dropout
        return kept.double() / (1 - dropout)

    masks = Masks([mask(n) for n in hidden[:-1]], mask(features)) if dropout else None
    sizes = None if lengths is None else torch.tensor(lengths)
    return Case(Problem(cell, feedback), leaves, sizes, len(hidden), masks).to(dtype)


def flatten(found: Decoded) -> dict[str, Tensor]:
    """The floating point results by name."""
    results = {n: getattr(found, n) for n in ("features", "outputs", "context", "weights")}
    for i, state in enumerate(found.states):
        results |= {f"{n}_n_{i}": s for n, s in zip("hc", state, strict=False)}
    return results


def outputs_and_gradients(
    run: Callable[..., Decoded], case: Case, only: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Results of `run`, and gradients of a random combination of them, or of `only` some."""
    results = flatten(run(*case.arguments()))
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for name, value in results.items():
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if only is None or name in only:
            total = total + (value * weight.to(value)).sum()
    wanted = {k: t for k, t in case.leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    found = {n: v.detach() for n, v in results.items()}
    for (name, leaf), grad in zip(wanted.items(), grads, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


def assert_accurate(run: Callable[..., Decoded], case: Case) -> None:
    """Every result and gradient errs at most twice as much as plain steps in the same dtype do.

    The errors, against float64 on the same rounded inputs, and the budget are those of
    `triton_cases.assert_accurate`; an additive score has one more tanh for each of its A elements.
    """
    device, dtype = case.leaves["x"].device, case.leaves["x"].dtype
    exact = outputs_and_gradients(reference.decode, case.to(torch.float64, device))
    plain = outputs_and_gradients(reference.decode, case)
    actual = outputs_and_gradients(run, case)
    worst = max(relative_error(plain[name], value) for name, value in exact.items())
    budget = 2 * worst + torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
    for name, value in exact.items():
        assert actual[name].dtype == dtype, name
        error = relative_error(actual[name], value)
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
