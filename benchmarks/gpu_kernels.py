"""The Triton kernels on a GPU: accuracy, the variants of the barrier, and speed against cuDNN.

Run `pytest -m gpu` first: a speed counts only for kernels that compute the right thing.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fusedrnn
from kernels.persistent import launch

from .registry import Row, benchmark

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
NO_GPU: Row = {"status": "no GPU has run this"}


@dataclass(frozen=True)
class Case:
    """One layer: our class and options, and cuDNN's nearest."""

    name: str
    ours: type[nn.RNNBase]
    theirs: type[nn.RNNBase]
    options: tuple[tuple[str, object], ...] = ()


CASES = {
    case.name: case
    for case in (
        Case("lstm", fusedrnn.LSTM, nn.LSTM),
        Case("lstm_peephole", fusedrnn.LSTM, nn.LSTM, (("peephole", True),)),
        Case("lstm_layernorm", fusedrnn.LSTM, nn.LSTM, (("layer_norm", True),)),
        Case("gru", fusedrnn.GRU, nn.GRU),
        Case("gru_reset_before", fusedrnn.GRU, nn.GRU, (("reset_after", False),)),
        Case("rnn_tanh", fusedrnn.RNN, nn.RNN),
    )
}


def _precision(name: str) -> None:
    kind = "tf32" if name == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = kind
    torch.backends.cudnn.rnn.fp32_precision = kind


def _layers(case: Case, size: int, dtype: torch.dtype, **shape: object) -> tuple[nn.Module, ...]:
    torch.manual_seed(0)
    ours = case.ours(size, size, **shape, **dict(case.options), backend="triton")
    theirs = case.theirs(size, size, **shape)
    theirs.load_state_dict(ours.state_dict(), strict=not case.options)
    return ours.to("cuda", dtype), theirs.to("cuda", dtype)


def _microseconds(run: Callable[[], object], rounds: int = 11) -> float:
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


@benchmark
def gpu_accuracy() -> Iterator[Row]:
    """Relative errors of output and weight gradient against float64, beside cuDNN's own."""
    if not torch.cuda.is_available():
        yield NO_GPU
        return
    for cell, name, size in itertools.product(("lstm", "gru"), DTYPES, (64, 512, 1024)):
        _precision(name)
        ours, theirs = _layers(CASES[cell], size, DTYPES[name])
        exact = CASES[cell].theirs(size, size).to("cuda", torch.float64)
        exact.load_state_dict(theirs.state_dict())
        x = torch.randn(64, 32, size, device="cuda").to(DTYPES[name])
        results = []
        for layer in (exact, ours, theirs):
            y = layer(x.to(next(layer.parameters()).dtype))[0]
            (grad,) = torch.autograd.grad(y.double().square().sum(), layer.weight_hh_l0)
            results.append((y.detach().double(), grad.double()))
        row: Row = {"cell": cell, "dtype": name, "hidden_size": size}
        for index, what in enumerate(("y", "dw_hh")):
            mine, cudnn = (_error(r[index], results[0][index]) for r in results[1:])
            row |= {f"{what}_error": f"{mine:.2e}", f"{what}_cudnn": f"{cudnn:.2e}"}
            row |= {f"{what}_ratio": round(mine / cudnn, 2)}
        yield row


@benchmark
def gpu_barriers() -> Iterator[Row]:
    """Microseconds per step of the forward loop under each variant of the group barrier."""
    if not torch.cuda.is_available():
        yield NO_GPU
        return
    default, steps = launch.BARRIER, 1024
    for size, variant in itertools.product((256, 512, 1024), ("atomic", "load", "bounded")):
        launch.BARRIER = variant
        ours, _ = _layers(CASES["lstm"], size, torch.bfloat16)
        x = torch.randn(steps, 16, size, device="cuda", dtype=torch.bfloat16)
        time = _microseconds(_forward(ours, x)) / steps
        yield {"variant": variant, "hidden_size": size, "us_per_step": round(time, 3)}
    launch.BARRIER = default


def _speed_grid() -> Iterator[tuple[str, str, int, int, bool]]:
    """Cell, dtype, H, B, bidirectional; the most important last, where they are read first."""
    yield from ((cell, "bf16", 512, 32, False) for cell in CASES if cell not in ("lstm", "gru"))
    yield from (("lstm", dtype, 512, 32, False) for dtype in ("fp32", "tf32", "fp16"))
    for cell, size in itertools.product(("gru", "lstm"), (128, 256, 512, 1024)):
        yield from ((cell, "bf16", size, batch, False) for batch in (16, 64))
    yield from (("lstm", "bf16", size, 32, True) for size in (256, 512, 1024))
    yield "lstm", "fp16", 768, 16, False


@benchmark
def gpu_speed() -> Iterator[Row]:
    """Microseconds per step, input product included: ours, the model, cuDNN's nearest cell."""
    if not torch.cuda.is_available():
        yield NO_GPU
        return
    steps = 512
    for cell, name, size, batch, bidirectional in _speed_grid():
        _precision(name)
        layers = _layers(CASES[cell], size, DTYPES[name], bidirectional=bidirectional)
        x = torch.randn(steps, batch, size, device="cuda").to(DTYPES[name]).requires_grad_()
        forward = [_microseconds(_forward(layer, x)) / steps for layer in layers]
        training = [_microseconds(_training(layer, x)) / steps for layer in layers]
        plans = layers[0].plan(x)
        yield {
            "cell": cell,
            "dtype": name,
            "hidden_size": size,
            "batch": batch,
            "bidirectional": bidirectional,
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
