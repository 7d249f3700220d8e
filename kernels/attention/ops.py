"""The decoder's Triton kernels as torch operators, and the decoder as a function of them.

Two opaque operators, so that `torch.compile` neither traces nor changes the kernels; the products
outside the time loop are plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
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
from .sources import AdditiveGrads, AdditiveScore, Asked, chunks, hide_padding, source_grads
from .spec import FEEDBACKS, Decoded, DecoderWeights, LayerWeights, Masks, Problem, Sampling, State


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
        gates, matrix, keys, projected, _, energy, weight, *_ = inputs
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
        queries = saved.seen[:-1, :, -size:]
        if FEEDBACKS[ctx.feedback] != "context":
            queries = saved.joined[..., -size:]
        seen = saved.coverage[:-1] if weight is not None else None
        d_sources = source_grads(
            Asked(queries, saved.weights.to(dtype), seen),
            back.joined[..., : keys.shape[2]].to(dtype),
            back.score.to(dtype),
            back.query,
            _additive(saved, back.score, projected, energy, weight),
        )
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


def _additive(
    saved: Buffers, score: Tensor, projected: Tensor, energy: Tensor | None, weight: Tensor | None
) -> AdditiveGrads | None:
    """What an additive score alone has, in float32."""
    if energy is None:
        return None
    wide = None if weight is None else weight.float()
    additive = AdditiveScore(projected.float(), energy.float(), wide)
    grads = AdditiveGrads(additive)
    for first, last in chunks(len(score), projected.numel()):
        now = slice(first, last)
        seen = None if weight is None else saved.coverage[now]
        sigma = additive.sigma(saved.query[now].float(), seen)
        slope = torch.addcmul(sigma, sigma, sigma, value=-1)
        grads.add(sigma, slope, score[now], seen)
    return grads


def pack(cell: str, layer: LayerWeights) -> tuple[Tensor, Tensor]:
    """One matrix [4H, N + H] of a layer, for its input and h, and its bias [4H].

    The blocks are i f g o of the LSTM; r z n of the GRU, n without its recurrent part, which is the
    fourth.
    """
    w_ih, w_hh, b_ih, b_hh = layer
    zero = w_hh.new_zeros(w_hh.shape[0])
    b_ih, b_hh = zero if b_ih is None else b_ih, zero if b_hh is None else b_hh
    if cell == "lstm":
        return torch.cat([w_ih, w_hh], 1), b_ih + b_hh
    two, size = 2 * w_hh.shape[1], w_hh.shape[1]
    blocks = [
        torch.cat([w_ih[:two], w_hh[:two]], 1),
        F.pad(w_ih[two:], (0, size)),
        F.pad(w_hh[two:], (w_ih.shape[1], 0)),
    ]
    return torch.cat(blocks), torch.cat([b_ih[:two] + b_hh[:two], b_ih[two:], b_hh[two:]])


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
    keys, projected, _ = hide_padding(keys, projected, lengths)
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
