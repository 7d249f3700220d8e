"""What the benchmarks of the Triton kernels on a GPU share: layers, precisions, timing.

Half an hour with a card, in commands that end before ten minutes; each can be repeated, and goes on
where it stopped as long as the CSV files and the code stay as they are:

    pytest -m gpu tests/kernels/test_gpu.py -k meet     a hang would show here, as an error
    pytest -m gpu tests/kernels/test_gpu.py -n 12       no speed counts before this is green
    python -m benchmarks.gpu_compile                    all kernels of the rest, on all cores
    python -m benchmarks gpu_accuracy gpu_barriers gpu_exchange --minutes 4
    python -m benchmarks gpu_speed --minutes 8
    python -m benchmarks.gpu_targets --figures          anywhere: which targets are met
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn.base import RecurrentBase
from kernels.persistent.plan import Device, device_of

from .compile_facts import DEVICES
from .registry import Findings

Run = Callable[[], object]


@dataclass(frozen=True)
class Layer:
    """One kind of layer.

    Attributes:
        ours: our class.
        options: those that choose the cell.
        theirs: torch's class.
        native: whether torch's class computes this very cell.
    """

    ours: Callable[..., RecurrentBase]
    theirs: Callable[..., nn.RNNBase]
    native: bool = True
    options: tuple[tuple[str, object], ...] = ()


LAYERS = {
    "lstm": Layer(fusedrnn.LSTM, nn.LSTM),
    "gru": Layer(fusedrnn.GRU, nn.GRU),
    "rnn_tanh": Layer(fusedrnn.RNN, nn.RNN),
    "rnn_relu": Layer(fusedrnn.RNN, nn.RNN, options=(("nonlinearity", "relu"),)),
    "lstm_peephole": Layer(fusedrnn.LSTM, nn.LSTM, False, (("peephole", True),)),
    "lstm_layernorm": Layer(fusedrnn.LSTM, nn.LSTM, False, (("layer_norm", True),)),
    "gru_reset_before": Layer(fusedrnn.GRU, nn.GRU, False, (("reset_after", False),)),
}


def set_precision(name: str) -> None:
    """Products of float32 as `name` of `DTYPES` says, in cuBLAS and in cuDNN.

    By torch's older switches: they set the newer ones, too, while torch refuses to compile where
    only the newer ones were set.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"


def our_layer(
    cell: str, size: int, dtype: torch.dtype, device: str, backend: str, **shape: object
) -> RecurrentBase:
    """Our layer with H inputs, its parameters drawn from seed 0."""
    torch.manual_seed(0)
    layer = LAYERS[cell].ours(size, size, **shape, **dict(LAYERS[cell].options), backend=backend)
    return layer.to(device, dtype)


def their_layer(cell: str, ours: RecurrentBase, **shape: object) -> nn.RNNBase:
    """Torch's class with our parameters, as far as it has them."""
    options = dict(LAYERS[cell].options) if LAYERS[cell].native else {}
    weight = ours.get_parameter("weight_hh_l0")
    layer = LAYERS[cell].theirs(ours.input_size, ours.hidden_size, **shape, **options)
    layer.load_state_dict(ours.state_dict(), strict=LAYERS[cell].native)
    return layer.to(weight.device, weight.dtype)


def device_properties(device: str) -> Device:
    """What plans depend on: the GPU's properties, an H200's where there is none."""
    return device_of(torch.empty(0, device=device)) if device == "cuda" else DEVICES[90]


def forward(layer: nn.Module, *inputs: object) -> Run:
    """A call that only computes the output, as at inference: cuDNN then keeps nothing."""
    layer.eval()

    def run() -> None:
        with torch.no_grad():
            layer(*inputs)

    return run


def training(layer: nn.Module, x: Tensor, *others: object) -> Run:
    """A call that also computes the gradients of x and of all parameters."""
    layer.train()
    x = x.detach().requires_grad_()
    y = layer(x, *others)[0]
    leaves, cotangent = [x, *layer.parameters()], torch.randn_like(y)

    def run() -> None:
        torch.autograd.grad(layer(x, *others)[0], leaves, cotangent, allow_unused=True)

    return run


def elapsed(run: Run, calls: int, device: str) -> float:
    """Microseconds of one of `calls` calls in a row: between two events on a GPU, else by clock."""
    if device != "cuda":
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return 1e6 * (time.perf_counter() - begin) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / calls


def microseconds(run: Run, rounds: int = 11, device: str = "cuda") -> float:
    """Median time of a call, after two calls that compile and warm up."""
    return compare({"": run}, rounds, device)[""]


def compare(candidates: Mapping[str, Run], rounds: int, device: str) -> dict[str, float]:
    """Median microseconds of a call of each candidate, timed in turn.

    Two calls of each warm up; then as many in a row are timed as take 3 ms, so that the launches of
    one hide behind the work of the one before, as in a model of several layers.
    """
    calls = {}
    for name, run in candidates.items():
        elapsed(run, 2, device)
        calls[name] = max(1, min(50, round(3000 / elapsed(run, 1, device))))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(elapsed(run, calls[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the error, relative to that of the exact values."""
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def joined(*findings: Findings) -> Findings:
    """One after another."""

    def both(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
        for finding in findings:
            yield from finding(rows)

    return both
