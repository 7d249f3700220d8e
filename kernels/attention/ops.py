"""The decoder's Triton kernels as torch operators, and the decoder as a function of them.

Two opaque operators, so that `torch.compile` neither traces nor changes the kernels; the products
outside the time loop are plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import DTYPES
from ..persistent.launch import interpreted
from ..torch_loop import product_grad
from . import launch
from .forward import forward_kernel
from .launch import Buffers, Gradients, Inputs
from .spec import FEEDBACKS, Decoded, DecoderWeights, Masks, Problem, Sampling, State
from .torch_loop import AdditiveGrads, Run, Sources, chunks, pack, source_grads


def _tensors(value: Buffers | Gradients) -> list[Tensor]:
    return [getattr(value, field.name) for field in fields(value)]


@torch.library.custom_op("fusedrnn::attention_decoder", mutates_args=())
def decoder_op(
    gates: Tensor,
    matrix: Tensor,
    keys: Tensor,
    projected: Tensor,
    query: Tensor | None,
    energy: Tensor | None,
    coverage_weight: Tensor | None,
    combine: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    lstm: bool,
    feedback: int,
    h: Tensor,
    c: Tensor | None,
    feed: Tensor | None,
    coverage: Tensor | None,
) -> list[Tensor]:
    """The forward loop: the tensors of `Buffers`, in order."""
    x = Inputs(
        gates, matrix, keys, projected, query, energy, coverage_weight, combine, mask, lengths,
        lstm, feedback,
    )  # fmt: skip
    return _tensors(launch.run_forward(x, h, c, feed, coverage))


@decoder_op.register_fake
def _(
    gates: Tensor,
    matrix: Tensor,
    keys: Tensor,
    projected: Tensor,
    query: Tensor | None,
    energy: Tensor | None,
    coverage_weight: Tensor | None,
    combine: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    lstm: bool,
    feedback: int,
    h: Tensor,
    c: Tensor | None,
    feed: Tensor | None,
    coverage: Tensor | None,
) -> list[Tensor]:
    x = Inputs(
        gates, matrix, keys, projected, query, energy, coverage_weight, combine, mask, lengths,
        lstm, feedback,
    )  # fmt: skip
    return _tensors(launch.buffers(x))


@torch.library.custom_op("fusedrnn::attention_decoder_backward", mutates_args=())
def backward_op(
    gates: Tensor,
    matrix: Tensor,
    keys: Tensor,
    projected: Tensor,
    query: Tensor | None,
    energy: Tensor | None,
    coverage_weight: Tensor | None,
    combine: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    lstm: bool,
    feedback: int,
    kept: list[Tensor],
    d_features: Tensor,
    d_joined: Tensor,
    d_weights: Tensor | None,
    dh: Tensor,
    dc: Tensor | None,
) -> list[Tensor]:
    """The backward loop: the tensors of `Gradients`, in order; `kept` are those of `Buffers`."""
    x = Inputs(
        gates, matrix, keys, projected, query, energy, coverage_weight, combine, mask, lengths,
        lstm, feedback,
    )  # fmt: skip
    return _tensors(launch.run_backward(x, Buffers(*kept), d_features, d_joined, d_weights, dh, dc))


@backward_op.register_fake
def _(
    gates: Tensor,
    matrix: Tensor,
    keys: Tensor,
    projected: Tensor,
    query: Tensor | None,
    energy: Tensor | None,
    coverage_weight: Tensor | None,
    combine: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    lstm: bool,
    feedback: int,
    kept: list[Tensor],
    d_features: Tensor,
    d_joined: Tensor,
    d_weights: Tensor | None,
    dh: Tensor,
    dc: Tensor | None,
) -> list[Tensor]:
    x = Inputs(
        gates, matrix, keys, projected, query, energy, coverage_weight, combine, mask, lengths,
        lstm, feedback,
    )  # fmt: skip
    return _tensors(launch.gradients(x))


class Decoder(torch.autograd.Function):
    """The forward and the backward operator, and the products around the latter."""

    @staticmethod
    def forward(
        ctx: Any,
        lstm: bool,
        feedback: int,
        mask: Tensor | None,
        lengths: Tensor | None,
        gates: Tensor,
        matrix: Tensor,
        keys: Tensor,
        projected: Tensor,
        query: Tensor | None,
        energy: Tensor | None,
        coverage_weight: Tensor | None,
        combine: Tensor,
        h: Tensor,
        c: Tensor | None,
        feed: Tensor | None,
        coverage: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Features before dropout, context and output joined, weights, h_n and c_n."""
        inputs = (
            gates, matrix, keys, projected, query, energy, coverage_weight, combine, mask, lengths,
        )  # fmt: skip
        kept = decoder_op(*inputs, lstm, feedback, h, c, feed, coverage)
        out = Buffers(*kept)
        ctx.save_for_backward(*inputs, *kept)
        ctx.lstm, ctx.feedback = lstm, feedback
        ctx.given = (feed is not None, coverage is not None)
        ctx.set_materialize_grads(False)
        final = out.seen[-1, :, -h.shape[1] :].clone()
        c_n = out.cells[-1].to(h.dtype) if lstm else h.new_empty(0)
        weights = out.weights.to(h.dtype)
        features = out.features if mask is None or not out.features.numel() else out.features * mask
        return features.clone(), out.joined.clone(), weights.clone(), final, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors but mask and lengths."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the backward of backend='triton' is not differentiable: use "
                "backend='reference' for gradients of gradients (create_graph=True)"
            )
        inputs, kept = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
        gates, matrix, keys, projected, query, energy, weight, *_ = inputs
        d_features, d_joined, d_weights, dh, dc = grads
        saved, size, dtype = Buffers(*kept), matrix.shape[0] // 4, gates.dtype
        back = Gradients(
            *backward_op(
                *inputs, ctx.lstm, ctx.feedback, list(kept),
                torch.zeros_like(saved.features) if d_features is None else _dense(d_features),
                torch.zeros_like(saved.joined, dtype=torch.float32)
                if d_joined is None else d_joined.float().contiguous(),
                _dense(d_weights),
                torch.zeros_like(saved.seen[0, :, -size:]) if dh is None else dh,
                (saved.cells.new_zeros(saved.cells[0].shape) if dc is None else dc)
                if ctx.lstm else None,
            )
        )  # fmt: skip
        problem = Problem("lstm" if ctx.lstm else "gru", FEEDBACKS[ctx.feedback])
        sources = Sources(keys, projected, keys.new_empty(0), query, energy, weight)
        run = Run(
            [saved.gates], [saved.seen], [], saved.joined, saved.weights.to(dtype), saved.coverage,
            saved.query, saved.features,
        )  # fmt: skip
        d_context = back.joined[..., : keys.shape[2]].to(dtype)
        d_sources = source_grads(
            problem, run, sources, d_context, back.score.to(dtype), back.query,
            _additive(run, sources, back.score),
        )  # fmt: skip
        d_combine = None
        if ctx.feedback == FEEDBACKS.index("features"):
            d_combine = product_grad(back.features, saved.joined)
        d_feed = back.seen[:, :-size].to(dtype) if ctx.given[0] else None
        return (
            *(None,) * 4,
            back.gates,
            product_grad(back.gates, saved.seen[:-1]),
            *(None if d is None else d.to(dtype) for d in d_sources),
            d_combine,
            back.seen[:, -size:].to(dtype),
            back.cells.to(dtype) if ctx.lstm else None,
            d_feed,
            back.coverage.to(dtype) if ctx.given[1] else None,
        )


def _dense(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _additive(run: Run, sources: Sources, score: Tensor) -> AdditiveGrads:
    """What an additive score alone has, in float32."""
    wide = Sources(
        sources.keys, *(None if v is None else v.float() for v in (
            sources.projected, sources.bias, sources.query, sources.energy, sources.coverage,
        ))
    )  # fmt: skip
    out = AdditiveGrads(wide)
    if sources.energy is not None:
        query = replace(run, query=run.query.float())
        for first, last in chunks(run):
            now = slice(first, last)
            hidden, slope = wide.slope(query, now)
            out.add(hidden, slope, score[now], run.coverage[now])
    return out


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
) -> Decoded:
    """A whole decoding of one layer; arguments and results are those of `reference.decode`.

    Raises:
        ValueError: several layers, scheduled sampling, another dtype, or a device that the kernels
            cannot run on.
    """
    _check(x, weights, sampling)
    masks = Masks() if masks is None else masks
    if lengths is not None:
        padding = torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None]
        keys, projected = (v.masked_fill(padding[..., None], 0.0) for v in (keys, projected))
    matrix, bias = pack(problem.cell, weights.layers[0])
    lowest, below = matrix.split((x.shape[2], matrix.shape[1] - x.shape[2]), 1)
    h, *c = states[0]
    fed = problem.feedback == "features"
    features, joined, alpha, h_n, c_n = Decoder.apply(
        problem.cell == "lstm",
        FEEDBACKS.index(problem.feedback),
        masks.features if fed else None,
        lengths,
        F.linear(x, lowest, bias).contiguous(),
        below.contiguous(),
        keys.contiguous(),
        projected.contiguous(),
        *(None if w is None else w.contiguous() for w in weights[2:]),
        weights.combine.contiguous(),
        h,
        c[0] if c else None,
        feed if fed else None,
        coverage,
    )
    if not fed:
        features = torch.tanh(F.linear(joined, weights.combine))
        features = features if masks.features is None else features * masks.features
    context, outputs = joined.split((keys.shape[2], h.shape[1]), -1)
    return Decoded(features, outputs, context, alpha, [(h_n, c_n) if c else (h_n,)])


def _check(x: Tensor, weights: DecoderWeights, sampling: Sampling | None) -> None:
    if len(weights.layers) > 1 or sampling is not None:
        what = "several layers" if sampling is None else "scheduled sampling"
        raise ValueError(
            f"backend='triton' decodes one layer by teacher forcing: {what} need backend='torch'"
        )
    if x.dtype not in DTYPES:
        raise ValueError(
            f"backend='triton' computes in float32, float16 or bfloat16, not {x.dtype}: use "
            "backend='reference' for float64"
        )
    if not x.is_cuda and not interpreted(forward_kernel):
        raise ValueError(
            f"backend='triton' needs a CUDA tensor, got one on {x.device}: move the decoder and "
            "its input to a GPU, choose backend='torch', or set TRITON_INTERPRET=1 to debug"
        )
