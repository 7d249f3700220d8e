"""Errors of every cell on a GPU against float64, as ratios to the errors of torch's own kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .compile_facts import DTYPES
from .gpu_compile import Kernel, kernels_of
from .gpu_kernels import (
    LAYERS,
    device_properties,
    joined,
    our_layer,
    relative_error,
    set_precision,
    their_layer,
)
from .registry import Case, Row, benchmark, spread

STEPS, BATCH = 48, 32
NAMES = ("cell", "dtype", "hidden_size", "bidirectional", "lengths")
TENSORS = ("y", "dx", "dw_ih", "dw_hh")


def cases() -> Iterator[tuple[str, str, int, bool, bool]]:
    """Everything at H = 256, where programs meet; then one program and many, without lengths."""
    for bidirectional, lengths in itertools.product((False, True), repeat=2):
        yield from ((c, d, 256, bidirectional, lengths) for c in LAYERS for d in DTYPES)
    for size in (64, 1024):
        yield from ((cell, dtype, size, False, False) for cell in LAYERS for dtype in DTYPES)


def kernels() -> Iterator[Kernel]:
    """What must be compiled, in the order of the cases."""
    device = device_properties("cuda" if torch.cuda.is_available() else "cpu")
    for cell, dtype, size, bidirectional, lengths in cases():
        shape = (cell, size, BATCH, 1 + bidirectional)
        yield from kernels_of(*shape, dtype, device, lengths, saves=("all",))


def _run(
    layer: torch.nn.RNNBase, x: Tensor, cotangent: Tensor, lengths: Tensor | None
) -> dict[str, Tensor]:
    """Output and gradients; lengths by packing where the layer is torch's."""
    dtype = layer.get_parameter("weight_hh_l0").dtype
    x = x.to(dtype).requires_grad_()
    if lengths is None:
        y = layer(x)[0]
    elif hasattr(layer, "backend"):
        y = layer(x, lengths=lengths)[0]
    else:
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        y = pad_packed_sequence(layer(packed)[0], total_length=len(x))[0]
    weights = [layer.get_parameter(f"weight_{name}_l0") for name in ("ih", "hh")]
    gradients = torch.autograd.grad(y, [x, *weights], cotangent.to(dtype))
    return dict(zip(TENSORS, (y.detach(), *gradients), strict=True))


def measure(
    cell: str,
    dtype: str,
    size: int,
    bidirectional: bool,
    lengths: bool,
    device: str = "cuda",
    backend: str = "triton",
) -> Iterator[Row]:
    """Errors of ours and of the denominator: cuDNN's, or plain torch operations in this dtype."""
    set_precision(dtype)
    kind, shape = DTYPES[dtype][0], {"bidirectional": bidirectional}
    ours = our_layer(cell, size, kind, device, backend, **shape)
    exact = our_layer(cell, size, torch.float64, device, "reference", **shape)
    exact.load_state_dict(ours.state_dict())
    if LAYERS[cell].native:
        other, denominator = their_layer(cell, ours, **shape), "cuDNN"
    else:
        other = our_layer(cell, size, kind, device, "reference", **shape)
        denominator = "plain torch operations"
    x = torch.randn(STEPS, BATCH, size, device=device).to(kind)
    cotangent = torch.randn(STEPS, BATCH, (1 + bidirectional) * size, device=device).to(kind)
    counts = torch.randint(1, STEPS + 1, (BATCH,), device=device) if lengths else None
    wanted, mine, plain = (_run(each, x, cotangent, counts) for each in (exact, ours, other))
    row: Row = {"denominator": denominator}
    ratios = []
    for name, value in wanted.items():
        errors = [relative_error(it[name], value) for it in (mine, plain)]
        ratios.append(errors[0] / errors[1])
        row |= {f"{name}_error": f"{errors[0]:.2e}", f"{name}_denominator": f"{errors[1]:.2e}"}
        row |= {f"{name}_ratio": round(ratios[-1], 2)}
    yield row | {"worst_ratio": round(max(ratios), 2)}


@benchmark(joined(*(spread(f"{name}_ratio", *NAMES) for name in TENSORS)), gpu=True)
def gpu_accuracy() -> Iterator[Case]:
    """Relative errors of output and gradients against float64, beside those of torch's kernels."""
    for values in cases():
        yield dict(zip(NAMES, values, strict=True)), partial(measure, *values)
