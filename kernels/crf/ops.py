"""The Triton kernels of the CRF as torch operators, and the likelihood as a function of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..persistent.launch import interpreted
from . import paths, sums


def check_device(emissions: Tensor) -> None:
    """Raise ValueError for a device that the kernels cannot run on."""
    if not emissions.is_cuda and not interpreted(sums.crf_forward):
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got emissions on {emissions.device}: use "
            "backend='torch', or set TRITON_INTERPRET=1 to debug"
        )


@torch.library.custom_op("fusedrnn::crf_forward", mutates_args=())
def forward_op(
    emissions: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor,
    tags: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """As `sums.forward`, which see."""
    return sums.forward(emissions, start, transitions, end, lengths, tags, save)


@forward_op.register_fake
def _(
    emissions: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor,
    tags: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    value = emissions.new_empty(emissions.shape[0], dtype=torch.float32)
    shape = emissions.shape if save else (0,)
    return value, emissions.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("fusedrnn::crf_backward", mutates_args=())
def backward_op(
    grad: Tensor | None,
    states: Tensor,
    emissions: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor,
    tags: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `sums.backward`, which see."""
    return sums.backward(grad, states, emissions, transitions, end, lengths, tags)


@backward_op.register_fake
def _(
    grad: Tensor | None,
    states: Tensor,
    emissions: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor,
    tags: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if grad is None:
        return torch.empty_like(states), states.new_empty(0)
    size = emissions.shape[-1]
    return torch.empty_like(emissions), states.new_empty(size + 2, size)


@torch.library.custom_op("fusedrnn::crf_decode", mutates_args=())
def decode_op(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """As `paths.decode`, which see."""
    return paths.decode(emissions, start, transitions, end, lengths, n)


@decode_op.register_fake
def _(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    batch, steps, _ = emissions.shape
    found = lengths.new_empty(batch, n, steps)
    return found, emissions.new_empty(batch, n, dtype=torch.float32)


class _Likelihood(torch.autograd.Function):
    """The forward and the backward operator."""

    @staticmethod
    def forward(
        ctx: Any,
        emissions: Tensor,
        start: Tensor,
        transitions: Tensor,
        end: Tensor,
        lengths: Tensor,
        tags: Tensor | None,
        wanted: bool,
    ) -> Tensor:
        value, states = forward_op(emissions, start, transitions, end, lengths, tags, wanted)
        if wanted:
            ctx.save_for_backward(states, emissions, transitions, end, lengths, tags)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the emissions and of the scores."""
        if torch.is_grad_enabled():
            raise RuntimeError("the CRF is differentiable once: create_graph=True needs more")
        d_emissions, d_scores = backward_op(grad.contiguous(), *ctx.saved_tensors)
        d_start, d_end = d_scores[:2]
        return d_emissions, d_start, d_scores[2:], d_end, None, None, None


def likelihood(
    emissions: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor,
    tags: Tensor | None,
) -> Tensor:
    """Compute log p(tags) [B] float32, or log Z without tags; differentiable once.

    Args:
        emissions: [B, T, K], contiguous, as all here; float32, float16 or bfloat16.
        start: [K] float32.
        transitions: [K, K] float32.
        end: [K] float32.
        lengths: [B] int64.
        tags: [B, T] int64, or None.
    """
    scores = (emissions, start, transitions, end)
    # ctx.needs_input_grad says nothing of no_grad, where the parameters still require gradients.
    wanted = torch.is_grad_enabled() and any(score.requires_grad for score in scores)
    return _Likelihood.apply(*scores, lengths, tags, wanted)


def marginals(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor
) -> Tensor:
    """The probability of each tag, [B, T, K] float32; arguments as in `likelihood`."""
    _, states = forward_op(emissions, start, transitions, end, lengths, None, True)
    return backward_op(None, states, emissions, transitions, end, lengths, None)[0]


def states(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor
) -> Tensor:
    """As `chain.states`, not filled in past the end; arguments as in `likelihood`."""
    return forward_op(emissions, start, transitions, end, lengths, None, True)[1]


def n_best(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """The n best paths [B, n, T] and their scores [B, n]; arguments as in `likelihood`."""
    return decode_op(emissions, start, transitions, end, lengths, n)
