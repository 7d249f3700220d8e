"""The decoder's Triton kernels as torch operators, and the decoder as a function of them.

Two opaque operators, so that `torch.compile` neither traces nor changes the kernels; the products
outside the time loop are plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import DTYPES
from ..persistent.launch import interpreted
from ..torch_loop import product_grad
from . import launch
from .forward import forward_kernel
from .launch import Buffers, Gradients, Incoming, Inputs, Kind, Start, Words
from .sources import AdditiveGrads, AdditiveScore, Asked, chunks, hide_padding, source_grads
from .spec import FEEDBACKS, Decoded, DecoderWeights, LayerWeights, Masks, Problem, Sampling, State


@torch.library.custom_op("fusedrnn::attention_decoder", mutates_args=())
def decoder_op(
    inputs: list[Tensor | None],
    start: list[Tensor | None],
    words: list[Tensor | None],
    layers: int,
    lstm: bool,
    feedback: int,
) -> list[Tensor]:
    """The forward loop: from the tensors of `Inputs` and `Start`, in order, those of `Buffers`.

    `words` holds those of `Words`, or nothing without scheduled sampling.
    """
    kind = Kind(layers, lstm, feedback)
    x, first = Inputs.of(inputs, layers), Start.of(start, layers)
    drawn = Words(*cast(list[Any], words)) if words else None
    return launch.run_forward(x, kind, first, drawn).flat()


@decoder_op.register_fake
def _(
    inputs: list[Tensor | None],
    start: list[Tensor | None],
    words: list[Tensor | None],
    layers: int,
    lstm: bool,
    feedback: int,
) -> list[Tensor]:
    kind = Kind(layers, lstm, feedback)
    return launch.buffers(Inputs.of(inputs, layers), kind, bool(words)).flat()


@torch.library.custom_op("fusedrnn::attention_decoder_backward", mutates_args=())
def backward_op(
    inputs: list[Tensor | None],
    kept: list[Tensor],
    given: list[Tensor | None],
    layers: int,
    lstm: bool,
    feedback: int,
) -> list[Tensor]:
    """The backward loop: `kept` are the tensors of `Buffers`, `given` of `Incoming`, in order.

    Returns:
        Those of `Gradients`.
    """
    x, kind = Inputs.of(inputs, layers), Kind(layers, lstm, feedback)
    saved, incoming = Buffers.of(kept, layers), Incoming.of(given, layers)
    return launch.run_backward(x, kind, saved, incoming).flat()


@backward_op.register_fake
def _(
    inputs: list[Tensor | None],
    kept: list[Tensor],
    given: list[Tensor | None],
    layers: int,
    lstm: bool,
    feedback: int,
) -> list[Tensor]:
    return launch.gradients(Inputs.of(inputs, layers), Kind(layers, lstm, feedback)).flat()


class Decoder(torch.autograd.Function):
    """Attaches the backward operator, and the products around it, to a forward pass."""

    @staticmethod
    def forward(
        ctx: Any, layers: int, lstm: bool, feedback: int, counts: tuple[int, int], *tensors: Any
    ) -> tuple[Tensor, ...]:
        """Features before dropout, context and output joined, weights, then h_n and c_n.

        Args:
            ctx: of autograd.
            layers: as in `Kind`, like the next two.
            lstm: likewise.
            feedback: likewise.
            counts: of the tensors of `Inputs` and `Start`.
            tensors: those, and of `Buffers`, in order.
        """
        kind, (first, second) = Kind(layers, lstm, feedback), counts
        x, start = Inputs.of(tensors[:first], layers), tensors[first : first + second]
        kept = tensors[first + second :]
        out = Buffers.of(kept, layers)
        ctx.save_for_backward(*tensors[:first], *kept)
        ctx.kind, ctx.counts = kind, counts
        ctx.given = [value is not None for value in start[:2]]
        ctx.set_materialize_grads(False)
        features = out.features if x.mask is None or not kind.fed else out.features * x.mask
        dtype = x.keys.dtype
        final = [seen[-1, :, -size:].clone() for seen, size in zip(out.seen, x.hidden, strict=True)]
        final += [cells[-1].to(dtype) for cells in out.cells]
        return features.clone(), out.joined.clone(), out.weights.to(dtype, copy=True), *final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors of `Inputs` and `Start` but masks and lengths."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the backward of backend='triton' is not differentiable: use "
                "backend='reference' for gradients of gradients (create_graph=True)"
            )
        kind, (first, _) = ctx.kind, ctx.counts
        inputs, kept = ctx.saved_tensors[:first], ctx.saved_tensors[first:]
        x, saved = Inputs.of(inputs, kind.layers), Buffers.of(kept, kind.layers)
        incoming = _incoming(saved, x.hidden, grads)
        back = Gradients.of(backward_op([*inputs], [*kept], incoming.flat(), *kind), kind.layers)
        size, dtype = x.hidden[-1], x.keys.dtype
        queries = saved.seen[-1][:-1, :, -size:]
        if FEEDBACKS[kind.feedback] != "context":
            queries = saved.joined[..., -size:]
        seen = saved.coverage[:-1] if x.coverage is not None else None
        d_sources = source_grads(
            Asked(queries, saved.weights.to(dtype), seen),
            back.joined[..., : x.keys.shape[2]].to(dtype),
            back.score.to(dtype),
            back.query,
            _additive(saved, back.score, x),
        )
        d_combine = product_grad(back.features, saved.joined) if kind.fed else None
        d_feed = back.seen[0][:, : x.combine.shape[0]].to(dtype) if ctx.given[0] else None
        pairs = zip(back.seen, x.hidden, strict=True)
        return (
            *(None,) * 4,
            *(None if d is None else d.to(dtype) for d in d_sources),
            d_combine,
            None,
            None,
            *back.gates,
            *map(product_grad, back.gates, (memory[:-1] for memory in saved.seen)),
            *(None for _ in x.between),
            d_feed,
            back.coverage.to(dtype) if ctx.given[1] else None,
            *(d[:, -size:].to(dtype) for d, size in pairs),
            *(d.to(dtype) for d in back.cells if kind.lstm),
            *(None for _ in kept),
        )


def _incoming(saved: Buffers, hidden: list[int], grads: Sequence[Tensor | None]) -> Incoming:
    """The gradients of what `Decoder` returns, zeros where there are none."""
    features, joined, weights, *final = grads
    states = [seen[0, :, -size:] for seen, size in zip(saved.seen, hidden, strict=True)]
    states += [cells[0] for cells in saved.cells]
    final = [torch.zeros_like(s) if d is None else d for s, d in zip(states, final, strict=True)]
    return Incoming(
        torch.zeros_like(saved.features) if features is None else features.contiguous(),
        torch.zeros_like(saved.joined, dtype=torch.float32)
        if joined is None
        else joined.float().contiguous(),
        None if weights is None else weights.contiguous(),
        cast(list[Tensor], final[: len(hidden)]),
        cast(list[Tensor], final[len(hidden) :]),
    )


def _additive(saved: Buffers, score: Tensor, x: Inputs) -> AdditiveGrads | None:
    """What an additive score alone has, in float32."""
    if x.energy is None:
        return None
    projected, energy, weight = x.projected, x.energy, x.coverage
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
    """A whole decoding; arguments and results are those of `reference.decode`.

    Raises:
        ValueError: another dtype, or a device that the kernels cannot run on.
    """
    _check(x)
    masks = Masks() if masks is None else masks
    keys, projected, _ = hide_padding(keys, projected, lengths)
    packed = [pack(problem.cell, layer) for layer in weights.layers]
    kind = Kind(len(packed), problem.cell == "lstm", FEEDBACKS.index(problem.feedback))
    matrix, bias = packed[0]
    given = x if sampling is None else sampling.inputs(sampling.symbols)
    lowest, first = matrix.split((x.shape[2], matrix.shape[1] - x.shape[2]), 1)
    drops = masks.features if kind.fed or sampling is not None else None
    query, energy, covers = (None if w is None else w.contiguous() for w in weights[2:])
    inputs = Inputs(
        keys.contiguous(),
        projected.contiguous(),
        query,
        energy,
        covers,
        weights.combine.contiguous(),
        None if drops is None else drops.contiguous(),
        None if lengths is None else lengths.contiguous(),
        [F.linear(given, lowest, bias), *(b.expand(*x.shape[:2], -1) for _, b in packed[1:])],
        [first.contiguous(), *(matrix for matrix, _ in packed[1:])],
        [mask.contiguous() for mask in masks.between],
    )
    start = Start(
        feed if kind.fed else None,
        coverage,
        [state[0] for state in states],
        [state[1] for state in states if kind.lstm],
    ).flat()
    with torch.no_grad():
        words = [] if sampling is None else [*_words(sampling, lowest, bias)]
        kept = decoder_op(inputs.flat(), start, words, *kind)
    symbols = None
    if sampling is not None:
        symbols = Buffers.of(kept, kind.layers).symbols.clone()
        inputs.gates[0] = F.linear(sampling.inputs(symbols), lowest, bias)
    tensors = inputs.flat()
    features, joined, alpha, *final = Decoder.apply(
        *kind, (len(tensors), len(start)), *tensors, *start, *kept
    )
    if not kind.fed:
        features = torch.tanh(F.linear(joined, weights.combine))
        features = features if masks.features is None else features * masks.features
    context, outputs = joined.split((keys.shape[2], weights.layers[-1].w_hh.shape[1]), -1)
    after = [tuple(final[layer :: kind.layers]) for layer in range(kind.layers)]
    return Decoded(features, outputs, context, alpha, after, symbols)


def _words(sampling: Sampling, lowest: Tensor, bias: Tensor) -> Words:
    """Scheduled sampling as the kernel reads it."""
    mask = sampling.mask
    return Words(
        sampling.replaced.contiguous(),
        sampling.uniform.float().contiguous(),
        sampling.embedding.contiguous(),
        sampling.weight.contiguous(),
        None if sampling.bias is None else sampling.bias.contiguous(),
        None if mask is None else mask.contiguous(),
        lowest.contiguous(),
        bias,
        sampling.symbols,
    )


def _check(x: Tensor) -> None:
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
