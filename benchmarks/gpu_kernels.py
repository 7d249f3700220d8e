"""The Triton kernels on a GPU: accuracy, the variants of the barrier, and speed against cuDNN.

Run `pytest -m gpu` first: a speed counts only for kernels that compute the right thing.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn.base import RecurrentBase
from kernels.persistent import launch

from .registry import Case, Findings, Row, benchmark, spread

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}


@dataclass(frozen=True)
class Layer:
    """One layer: our class and options, and cuDNN's nearest."""

    name: str
    ours: Callable[..., RecurrentBase]
    theirs: Callable[..., nn.RNNBase]
    options: tuple[tuple[str, object], ...] = ()


CASES = {
    case.name: case
    for case in (
        Layer("lstm", fusedrnn.LSTM, nn.LSTM),
        Layer("lstm_peephole", fusedrnn.LSTM, nn.LSTM, (("peephole", True),)),
        Layer("lstm_layernorm", fusedrnn.LSTM, nn.LSTM, (("layer_norm", True),)),
        Layer("gru", fusedrnn.GRU, nn.GRU),
        Layer("gru_reset_before", fusedrnn.GRU, nn.GRU, (("reset_after", False),)),
        Layer("rnn_tanh", fusedrnn.RNN, nn.RNN),
    )
}


def _precision(name: str) -> None:
    kind = "tf32" if name == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = kind
    torch.backends.cudnn.rnn.fp32_precision = kind  # type: ignore[attr-defined]


def _layers(
    case: Layer, size: int, dtype: torch.dtype, **shape: object
) -> tuple[RecurrentBase, nn.RNNBase]:
    torch.manual_seed(0)
    ours = case.ours(size, size, **shape, **dict(case.options), backend="triton")
    theirs = case.theirs(size, size, **shape)
    theirs.load_state_dict(ours.state_dict(), strict=not case.options)
    return ours.to("cuda", dtype), theirs.to("cuda", dtype)


def microseconds(run: Callable[[], object], rounds: int = 11) -> float:
    """Median time between two events, after two calls that compile and warm up."""
    times = []
    for turn in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if turn > 1:
            times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def _forward(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def _training(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    cotangent = torch.randn_like(layer(x)[0])

    def run() -> None:
        layer(x)[0].backward(cotangent)

    return run


def _error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def _both(*findings: Findings) -> Findings:
    def both(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
        for finding in findings:
            yield from finding(rows)

    return both


def _accuracy(cell: str, dtype: str, hidden_size: int) -> Iterator[Row]:
    _precision(dtype)
    ours, theirs = _layers(CASES[cell], hidden_size, DTYPES[dtype])
    exact = CASES[cell].theirs(hidden_size, hidden_size).to("cuda", torch.float64)
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(64, 32, hidden_size, device="cuda").to(DTYPES[dtype])
    results = []
    for layer in (exact, ours, theirs):
        y = layer(x.to(next(layer.parameters()).dtype))[0]
        weight = layer.get_parameter("weight_hh_l0")
        (grad,) = torch.autograd.grad(y.double().square().sum(), weight)
        results.append((y.detach().double(), grad.double()))
    row: Row = {}
    for index, what in enumerate(("y", "dw_hh")):
        mine, cudnn = (_error(r[index], results[0][index]) for r in results[1:])
        row |= {f"{what}_error": f"{mine:.2e}", f"{what}_cudnn": f"{cudnn:.2e}"}
        row |= {f"{what}_ratio": round(mine / cudnn, 2)}
    yield row


LABEL = ("cell", "dtype", "hidden_size")


@benchmark(_both(spread("y_ratio", *LABEL), spread("dw_hh_ratio", *LABEL)), gpu=True)
def gpu_accuracy() -> Iterator[Case]:
    """Relative errors of output and weight gradient against float64, beside cuDNN's own."""
    for values in itertools.product(("lstm", "gru"), DTYPES, (64, 512, 1024)):
        yield dict(zip(LABEL, values, strict=True)), partial(_accuracy, *values)


def _barrier(hidden_size: int, variant: str) -> Iterator[Row]:
    default, steps = launch.BARRIER, 1024
    launch.BARRIER = variant
    try:
        ours, _ = _layers(CASES["lstm"], hidden_size, torch.bfloat16)
        x = torch.randn(steps, 16, hidden_size, device="cuda", dtype=torch.bfloat16)
        yield {"us_per_step": round(microseconds(_forward(ours, x)) / steps, 3)}
    finally:
        launch.BARRIER = default


def _barriers_by_size(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for size in dict.fromkeys(row["hidden_size"] for row in rows):
        times = [
            f"{row['variant']} {row['us_per_step']}" for row in rows if row["hidden_size"] == size
        ]
        yield f"microseconds per step at H {size}: {', '.join(times)}"


@benchmark(_barriers_by_size, gpu=True)
def gpu_barriers() -> Iterator[Case]:
    """Microseconds per step of the forward loop under each variant of the group barrier."""
    for size, variant in itertools.product((256, 512, 1024), ("atomic", "load", "bounded")):
        yield {"hidden_size": size, "variant": variant}, partial(_barrier, size, variant)


def _speed_grid() -> Iterator[tuple[str, str, int, int, bool]]:
    """Cell, dtype, H, B, bidirectional; the most important last, where they are read first."""
    yield from ((cell, "bf16", 512, 32, False) for cell in CASES if cell not in ("lstm", "gru"))
    yield from (("lstm", dtype, 512, 32, False) for dtype in ("fp32", "tf32", "fp16"))
    for cell, size in itertools.product(("gru", "lstm"), (128, 256, 512, 1024)):
        yield from ((cell, "bf16", size, batch, False) for batch in (16, 64))
    yield from (("lstm", "bf16", size, 32, True) for size in (256, 512, 1024))
    yield "lstm", "fp16", 768, 16, False


def _speed(
    cell: str, dtype: str, hidden_size: int, batch: int, bidirectional: bool
) -> Iterator[Row]:
    _precision(dtype)
    steps = 512
    layers = _layers(CASES[cell], hidden_size, DTYPES[dtype], bidirectional=bidirectional)
    x = torch.randn(steps, batch, hidden_size, device="cuda").to(DTYPES[dtype]).requires_grad_()
    forward = [microseconds(_forward(layer, x)) / steps for layer in layers]
    training = [microseconds(_training(layer, x)) / steps for layer in layers]
    plans = layers[0].plan(x)
    yield {
        "programs": plans[0].programs,
        "forward_us": round(forward[0], 2),
        "forward_model_us": round(plans[0].microseconds, 2),
        "forward_cudnn_us": round(forward[1], 2),
        "forward_ratio": round(forward[1] / forward[0], 2),
        "training_us": round(training[0], 2),
        "training_model_us": round(sum(plan.microseconds for plan in plans), 2),
        "training_cudnn_us": round(training[1], 2),
        "training_ratio": round(training[1] / training[0], 2),
    }


SHAPE = (*LABEL, "batch", "bidirectional")


@benchmark(_both(spread("forward_ratio", *SHAPE), spread("training_ratio", *SHAPE)), gpu=True)
def gpu_speed() -> Iterator[Case]:
    """Microseconds per step, input product included: ours, the model, cuDNN's nearest cell."""
    for values in _speed_grid():
        yield dict(zip(SHAPE, values, strict=True)), partial(_speed, *values)
