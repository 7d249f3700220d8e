"""Attention decoders with random weights and inputs, and all their results and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import (
    Decoded,
    DecoderWeights,
    LayerWeights,
    Masks,
    Problem,
    Sampling,
    reference,
)
from tests.kernels.triton_cases import relative_error

KINDS = ("product", "additive")


class Case(NamedTuple):
    """The arguments of `decode` that have gradients, and those that have not."""

    problem: Problem
    leaves: dict[str, Tensor]
    lengths: Tensor | None
    layers: int
    masks: Masks | None
    sampling: Sampling | None = None

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
        sampling = self.sampling
        if sampling is not None:
            sampling = sampling._replace(embedding=self.leaves["embedding"])
        return (self.problem, *tensors, v("feed"), v("coverage"), self.masks, sampling)

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
        sampling = self.sampling
        if sampling is not None:
            low = {n: getattr(sampling, n) for n in ("embedding", "weight", "bias", "mask")}
            moved = {n: None if v is None else v.to(device, dtype) for n, v in low.items()}
            for name in ("symbols", "replaced", "uniform"):
                moved[name] = getattr(sampling, name).to(device)
            sampling = sampling._replace(**moved)
        return self._replace(leaves=leaves, masks=masks, lengths=lengths, sampling=sampling)


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


def sampled(
    case: Case,
    symbols: int = 7,
    *,
    probability: float = 0.6,
    dropout: float = 0.0,
    bias: bool = True,
    gain: float = 2.0,
) -> Case:
    """The case with scheduled sampling over so many symbols, whose embedding gives the inputs."""
    leaves = dict(case.leaves)
    x = leaves.pop("x").detach()
    shape, size = x.shape[:2], x.shape[2]
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(x)

    leaves["x"] = x
    leaves["embedding"] = random(symbols, size).requires_grad_()
    replaced = torch.rand(shape, generator=generator) < probability
    replaced[0] = False
    kept = torch.rand((*shape, size), generator=generator) >= dropout
    sampling = Sampling(
        torch.randint(symbols, shape, generator=generator),
        replaced,
        torch.rand(shape, generator=generator),
        leaves["embedding"],
        gain * random(symbols, case.leaves["combine"].shape[0]),
        random(symbols) if bias else None,
        kept.to(x) / (1 - dropout) if dropout else None,
        padding_idx=0,
    )
    return case._replace(leaves=leaves, sampling=sampling)


def assert_drawn(case: Case, found: Decoded, tolerance: float) -> None:
    """Each sampled symbol is that whose share of the sums of probabilities holds its number."""
    sampling = case.sampling
    assert sampling is not None and found.symbols is not None
    kept = ~sampling.replaced
    assert torch.equal(found.symbols[kept], sampling.symbols[kept])
    logits = found.features[:-1].detach().double() @ sampling.weight.double().mT
    if sampling.bias is not None:
        logits = logits + sampling.bias.double()
    p = logits.softmax(-1)
    drawn = found.symbols[1:, :, None]
    high = p.cumsum(-1).gather(-1, drawn)
    low = high - p.gather(-1, drawn)
    place = sampling.uniform[1:, :, None].double()
    inside = (low - tolerance <= place) & (place <= high + tolerance)
    assert inside[sampling.replaced[1:]].all()


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
    oracle = case
    if case.sampling is not None:  # near a limit between two symbols, rounding may decide
        symbols = run(*case.arguments()).symbols
        fed = case.sampling._replace(symbols=symbols, replaced=torch.zeros_like(symbols).bool())
        oracle = case._replace(sampling=fed)
    exact = outputs_and_gradients(reference.decode, oracle.to(torch.float64, device))
    plain = outputs_and_gradients(reference.decode, oracle)
    actual = outputs_and_gradients(run, case)
    worst = max(relative_error(plain[name], value) for name, value in exact.items())
    budget = 2 * worst + torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
    for name, value in exact.items():
        assert actual[name].dtype == dtype, name
        error = relative_error(actual[name], value)
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
