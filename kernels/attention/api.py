"""The attention decoder on a backend of the caller's choice."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..api import choose_backend, precision, without_autocast
from ..checks import check_lengths
from . import reference, torch_loop
from .spec import CELLS, FEEDBACKS, Decoded, DecoderWeights, Masks, Problem, Sampling, State


def decode(
    problem: Problem,
    x: Tensor,
    keys: Tensor,
    projected: Tensor,
    lengths: Tensor | None,
    weights: DecoderWeights,
    states: Sequence[State],
    feed: Tensor | None = None,
    coverage: Tensor | None = None,
    masks: Masks | None = None,
    sampling: Sampling | None = None,
    backend: str = "auto",
    counts: Sequence[int] | None = None,
) -> Decoded:
    """A whole decoding with attention inside the time loop; equations are in reference.py.

    Args:
        problem: cell and feedback.
        x: [T, B, E], the embedded previous symbols; with `sampling` it is recomputed from what is
            fed, and only its shape and dtype count.
        keys: [B, S, K], encoder states; what stands past the lengths changes nothing.
        projected: [B, S, A], the keys as the score wants them.
        lengths: int64 [B] of the sources, each in 1..S; None: no padding.
        weights: of the decoder.
        states: of each layer before the first step, h [B, H] and for the LSTM c.
        feed: [B, F], features before the first step, with feedback "features"; None: zeros.
        coverage: [B, S], attention given before the first step; None: zeros.
        masks: dropout; None: none.
        sampling: scheduled sampling; None: teacher forcing.
        backend: "torch" (one autograd function, the backward through time written out), "triton"
            (the time loop as one kernel), "reference" (plain steps, differentiable more than once),
            or "auto": triton on a GPU for what it has, torch for everything else. Results have x's
            dtype, or autocast's.
        counts: how many of the first rows mean something at each step, not growing; None: all. The
            backend torch leaves the others out. Not with `sampling`.

    Returns:
        Everything a step computes, for all steps.

    Raises:
        ValueError: an argument does not fit, or the backend cannot compute it; it is named.
    """
    _check(problem, x, keys, projected, lengths, weights, states)
    inside, outside = precision(x)
    if sampling is not None:
        if counts is not None:
            raise ValueError("counts: expected None with sampling")
        _check_sampling(sampling, x, weights)
        names = ("embedding", "weight", "bias", "mask")
        sampling = sampling._replace(**{n: _cast(getattr(sampling, n), inside) for n in names})
    run = _implementation(backend, x)
    if counts is not None and run is torch_loop.decode:
        run = partial(run, counts=counts)
    with without_autocast(x):
        tensors = (x, keys, projected, weights, [*states], feed, coverage, masks)
        x, keys, projected, weights, states, feed, coverage, masks = _cast(tensors, inside)
        found = run(
            problem, x, keys, projected, lengths, weights, states, feed, coverage, masks, sampling
        )
        return _cast(found, outside)


def _implementation(backend: str, x: Tensor) -> Callable[..., Decoded]:
    chosen = choose_backend(backend, x)
    if chosen == "torch":
        return torch_loop.decode
    if chosen == "reference":
        return reference.decode
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("backend='triton' needs the package triton, which is not installed")
    from . import ops

    return ops.decode


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The floating point tensors inside tuples and lists in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list):
        return [_cast(v, dtype) for v in value]
    if isinstance(value, tuple):
        parts = [_cast(v, dtype) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _check(
    problem: Problem,
    x: Tensor,
    keys: Tensor,
    projected: Tensor,
    lengths: Tensor | None,
    weights: DecoderWeights,
    states: Sequence[State],
) -> None:
    for name, value, choices in (
        ("cell", problem.cell, CELLS),
        ("feedback", problem.feedback, FEEDBACKS),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    for name, tensor in (("x", x), ("keys", keys), ("projected", projected)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions, got shape {list(tensor.shape)}")
    steps, batch, size = x.shape
    if steps == 0:
        raise ValueError("x must have at least one time step, got none")
    source = keys.shape[1]
    fed = {"none": 0, "features": weights.combine.shape[0], "context": keys.shape[2]}
    top = weights.layers[-1].w_hh.shape[1]
    expected = {
        "keys": (keys, (batch, source, keys.shape[2])),
        "projected": (projected, (batch, source, projected.shape[2])),
        "combine": (weights.combine, (weights.combine.shape[0], keys.shape[2] + top)),
    }
    width = size + fed[problem.feedback]
    if len(states) != len(weights.layers):
        raise ValueError(f"states must be those of {len(weights.layers)} layers, got {len(states)}")
    gates = {"lstm": 4, "gru": 3}[problem.cell]
    for index, (layer, state) in enumerate(zip(weights.layers, states, strict=True)):
        hidden = layer.w_hh.shape[1]
        expected |= {
            f"w_ih of layer {index}": (layer.w_ih, (gates * hidden, width)),
            f"w_hh of layer {index}": (layer.w_hh, (gates * hidden, hidden)),
            f"h of layer {index}": (state[0], (batch, hidden)),
        }
        width = hidden
    asked = top if weights.query is None else weights.query.shape[0]
    if projected.shape[2] != asked:
        raise ValueError(f"projected must have size {asked}, got {projected.shape[2]}")
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if lengths is not None:
        check_lengths(lengths, source, batch, keys.device)


def _check_sampling(sampling: Sampling, x: Tensor, weights: DecoderWeights) -> None:
    symbols = len(sampling.embedding)
    expected = {
        "symbols": (sampling.symbols, x.shape[:2]),
        "replaced": (sampling.replaced, x.shape[:2]),
        "uniform": (sampling.uniform, x.shape[:2]),
        "embedding": (sampling.embedding, (symbols, x.shape[2])),
        "weight": (sampling.weight, (symbols, weights.combine.shape[0])),
    }
    if sampling.bias is not None:
        expected["bias"] = (sampling.bias, (symbols,))
    if sampling.mask is not None:
        expected["mask"] = (sampling.mask, x.shape)
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"sampling.{name} must have shape {list(shape)}, got {list(tensor.shape)}"
            )
