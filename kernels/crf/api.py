"""The functional API of the CRF: validation, and the choice of backend."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..api import without_autocast
from ..checks import check_lengths
from ..untraced import untraced
from . import chain, spans
from .plan import refusal

BACKENDS = ("auto", "triton", "torch")

PADDING = -1
"""What stands in a decoded path past the end of its sentence."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of emissions that the Triton kernels take."""


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Compute log p(tags | emissions) of each row (Lafferty et al. 2001).

    Differentiable once, by the forward-backward algorithm. float32 inside, on a CPU float64.

    Args:
        emissions: [B, T, K], unnormalised scores of each tag.
        tags: [B, T] int64; whatever it holds past the end of a row is not looked at.
        start: [K], scores of the first tag.
        transitions: [K, K], scores of each tag (column) after each other (row).
        end: [K], scores of the last tag.
        lengths: [B] int64 on the device of `emissions`, 1 <= length <= T; None: all T.
            An accelerator checks the values by itself, without a stop.
        backend: "auto" (triton on a GPU for what its kernels take, else torch), "triton" or
            "torch". An explicit choice never falls back.

    Returns:
        [B], float64 for float64 emissions, else float32; -inf where a score along `tags` is.

    Raises:
        TypeError: `lengths` is not an int64 tensor.
        ValueError: shapes, devices, lengths or (on a CPU) tags that are not as said, or a backend
            that cannot take them; the message names it.
        RuntimeError: backend="triton" without the package.
    """
    lengths = _check(emissions, start, transitions, end, lengths)
    _check_tags(emissions, tags, lengths)
    return _likelihood(emissions, start, transitions, end, lengths, tags.contiguous(), backend)


def log_partition(
    emissions: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Compute log Z, the logsumexp of the scores of all paths.

    Differentiable once; its gradient with respect to the emissions is the marginals. Arguments,
    result and errors as `log_likelihood`.
    """
    lengths = _check(emissions, start, transitions, end, lengths)
    return _likelihood(emissions, start, transitions, end, lengths, None, backend)


def marginals(
    emissions: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Compute p(y_t = k | emissions). Not differentiable.

    Arguments and errors as `log_likelihood`.

    Returns:
        [B, T, K], summing to 1 over tags, zero past the end.
    """
    lengths = _check(emissions, start, transitions, end, lengths)
    with torch.no_grad(), without_autocast(emissions):
        module, tensors = _prepare(backend, emissions, start, transitions, end)
        return module.marginals(*tensors, lengths)


def span_marginals(
    emissions: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    continued: Tensor,
    tags: Tensor,
    places: Tensor,
    lengths: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Compute the probability that spans have their tags and no word more. Not differentiable.

    Arguments and errors as `log_likelihood`, but:

    Args:
        emissions: as there.
        start: as there.
        transitions: as there.
        end: as there.
        continued: [K] int64, the tag by which a span that ends in a tag would go on; -1 for none.
            A span that opens with a tag that continues the one before it is no span either.
        tags: as there; only those in spans are looked at.
        places: [N, 3] int64 on the device of `emissions`: row, first step, the step after the last.
        lengths: as there.
        backend: as there.

    Returns:
        [N], within [0, 1].
    """
    lengths = _check(emissions, start, transitions, end, lengths)
    with torch.no_grad(), without_autocast(emissions):
        module, tensors = _prepare(backend, emissions, start, transitions, end)
        found = module.states(*tensors, lengths), module.marginals(*tensors, lengths)
        return spans.probabilities(*found, tensors[2], continued, tags, places, lengths)


def n_best(
    emissions: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor | None = None,
    *,
    n: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Find the n best paths of each row, exactly; n = 1 is Viterbi's algorithm (1967).

    Arguments and errors as `log_likelihood`, but:

    Args:
        emissions: as there.
        start: as there.
        transitions: as there.
        end: as there.
        lengths: as there.
        n: how many, at least 1.
        backend: as there.

    Returns:
        Paths [B, n, T] int64, best first, `PADDING` past the end, and their scores [B, n]. Where a
        row has fewer than n paths whose score is finite, the others are all `PADDING`, their
        scores -inf.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be an integer of at least 1, got {n!r}")
    lengths = _check(emissions, start, transitions, end, lengths)
    with torch.no_grad(), without_autocast(emissions):
        module, tensors = _prepare(backend, emissions, start, transitions, end, paths=n)
        return module.n_best(*tensors, lengths, n)


def _likelihood(
    emissions: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor,
    tags: Tensor | None,
    backend: str,
) -> Tensor:
    with without_autocast(emissions):
        module, tensors = _prepare(backend, emissions, start, transitions, end)
        return module.likelihood(*tensors, lengths, tags)


class _Torch:
    """`chain`, of which `torch.compile` makes nothing: it looks at values."""

    likelihood = staticmethod(untraced(chain.likelihood))
    marginals = staticmethod(untraced(chain.marginals))
    n_best = staticmethod(untraced(chain.n_best))
    states = staticmethod(untraced(chain.states))


def _prepare(
    backend: str, emissions: Tensor, *scores: Tensor, paths: int = 1
) -> tuple[Any, list[Tensor]]:
    """`_Torch` or `ops`, and the tensors in the dtypes that it takes."""
    check_backend(backend)
    torch_alone = backend == "torch" or (backend == "auto" and not emissions.is_cuda)
    why_not = None if torch_alone else _why_not_triton(emissions, paths)
    if torch_alone or (backend == "auto" and why_not):
        dtype = torch.promote_types(emissions.dtype, torch.float32)
        return _Torch, [tensor.to(dtype) for tensor in (emissions, *scores)]
    if why_not:
        raise ValueError(f"backend='triton' {why_not}: use backend='torch'")
    from . import ops

    ops.check_device(emissions)
    return ops, [emissions.contiguous(), *(score.float().contiguous() for score in scores)]


def _why_not_triton(emissions: Tensor, paths: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if emissions.dtype not in DTYPES:
        return f"computes in float32, not {emissions.dtype}"
    return refusal(emissions.shape[-1], paths)


def _check(
    emissions: Tensor, start: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor | None
) -> Tensor:
    """Validate all but the tags; return the lengths."""
    tags = len(start)
    if emissions.dim() != 3 or emissions.shape[-1] != tags or 0 in emissions.shape:
        raise ValueError(
            f"emissions must be [B, T, K = {tags}] with B, T >= 1, got {list(emissions.shape)}"
        )
    if not emissions.is_floating_point():
        raise ValueError(f"emissions must be floating point, got {emissions.dtype}")
    for name, scores, shape in (
        ("start", start, (tags,)),
        ("transitions", transitions, (tags, tags)),
        ("end", end, (tags,)),
    ):
        if scores.shape != shape or not scores.is_floating_point():
            raise ValueError(
                f"{name} must be floating point {list(shape)}, got {scores.dtype} "
                f"{list(scores.shape)}"
            )
        if scores.device != emissions.device:
            raise ValueError(
                f"{name} must be on {emissions.device} like emissions, got {scores.device}"
            )
    batch, steps, _ = emissions.shape
    if lengths is None:
        return torch.full((batch,), steps, device=emissions.device)
    check_lengths(lengths, steps, batch, emissions.device)
    return lengths.contiguous()


def _check_tags(emissions: Tensor, tags: Tensor, lengths: Tensor) -> None:
    batch, steps, num_tags = emissions.shape
    if tags.shape != (batch, steps) or tags.dtype != torch.int64:
        raise ValueError(
            f"tags must be int64 [B, T] = {[batch, steps]}, got {tags.dtype} {list(tags.shape)}"
        )
    if tags.device != emissions.device:
        raise ValueError(
            f"tags must be on the device of emissions, {emissions.device}, got {tags.device}"
        )
    looked_at = tags.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at:
        low, high = tags.aminmax()
        if low >= 0 and high < num_tags:
            return
    within = torch.arange(steps, device=tags.device) < lengths[:, None]
    wrong = (((tags < 0) | (tags >= num_tags)) & within).any()
    message = f"tags must lie in 0..{num_tags - 1} within lengths"
    if not looked_at:
        torch._assert_async(~wrong, message)
    elif wrong:
        raise ValueError(message)
