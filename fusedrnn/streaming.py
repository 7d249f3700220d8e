"""Sequences that arrive step by step: the least work between an input and its output.

On a GPU the second step is captured as a CUDA graph, which takes in one launch what the first took
in many; later steps replay it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from kernels import CELLS
from kernels.api import precision, without_autocast
from kernels.stepper import Stepper

if TYPE_CHECKING:
    from .base import RecurrentBase
    from .stack import RecurrentStack


class Captured:
    """A step as a CUDA graph.

    Args:
        step: from x_t to y_t, in memory that stays where it is; it has run once.
        x: an x_t on the GPU; its values do not matter.

    Raises:
        RuntimeError: the step cannot be captured; nothing has changed then.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._step = step
        self._x = x.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):  # records, computes nothing
            self._y = step(self._x)

    def __call__(self, x: Tensor) -> Tensor:
        """Take a step: replayed where x is as it was when it was captured, else computed."""
        if x.shape != self._x.shape or x.dtype != self._x.dtype or _autocasts(x):
            return self._step(x)
        self._x.copy_(x)
        self._graph.replay()
        return self._y.clone()


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _captured(step: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """The fastest way to take steps like `step`, which has run once on something like x."""
    if not x.is_cuda or _autocasts(x) or torch.cuda.is_current_stream_capturing():
        return step
    try:
        return Captured(step, x)
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        warnings.warn(f"a stream goes on without a CUDA graph: {line}", stacklevel=4)
        return step


class Stream:
    """A sequence in progress through one layer; call it with each x_t, [B, I] or [I].

    It computes without gradients and as in evaluation, with the weights that the layer had when the
    sequence began, and gives the outputs that the layer gives for the whole sequence.
    """

    def __init__(
        self, layer: RecurrentBase, state: Sequence[Tensor] | None = None, graph: bool = True
    ) -> None:
        layer.check_streaming()
        self._cell, self._zoneout = layer.cell, layer.zoneout
        self._size = layer.input_size
        self._dtype = precision(cast(Tensor, layer.weight_ih_l0))[0]
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
        names += CELLS[layer.cell].parameters
        self._weights: list[dict[str, Tensor | None]] = []
        for index in range(layer.num_layers):
            w = {name: getattr(layer, f"{name}_l{index}", None) for name in names}
            self._weights.append(
                {name: None if v is None else v.detach().to(self._dtype) for name, v in w.items()}
            )
        sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size]
        self._sizes = sizes[: len(CELLS[layer.cell].states)]
        self._shape: torch.Size | None = None
        self._advance: Callable[[Tensor], Tensor] = self._first if graph else self._chain
        self._steppers: list[Stepper] = []
        self._batched = state is None or state[0].dim() == 3
        if state is not None:
            self._start(self._take(state))

    def _take(self, state: Sequence[Tensor]) -> list[list[Tensor]]:
        """For each layer its states [B, *], from states [num_layers, B, *] or [num_layers, *]."""
        for tensor, size in zip(state, self._sizes, strict=True):
            shape = tuple(tensor.shape)
            if len(shape) not in (2, 3) or (shape[0], shape[-1]) != (len(self._weights), size):
                raise ValueError(
                    f"state must hold [{len(self._weights)}, B, {size}], got {list(shape)}"
                )
        rows = [s.detach().to(self._dtype, copy=True) for s in state]
        rows = [s if s.dim() == 3 else s.unsqueeze(1) for s in rows]
        return [[s[index] for s in rows] for index in range(len(self._weights))]

    def _start(self, state: Sequence[Sequence[Tensor]]) -> None:
        self._steppers = [
            Stepper(self._cell, w, own, self._zoneout)
            for w, own in zip(self._weights, state, strict=True)
        ]

    @property
    def state(self) -> Any:
        """The state so far, as the layer takes and gives it; None before the first step."""
        if not self._steppers:
            return None
        states = [stepper.state for stepper in self._steppers]
        tensors = [torch.stack(s) for s in zip(*states, strict=True)]
        tensors = tensors if self._batched else [s.squeeze(1) for s in tensors]
        return tuple(tensors) if len(tensors) > 1 else tensors[0]

    def __call__(self, x_t: Tensor) -> Tensor:
        """Take one step.

        Args:
            x_t: [B, I] or [I].

        Returns:
            The output, [B, H] or [H] (P with a projection).

        Raises:
            ValueError: x_t has another shape, or another batch size than before.
        """
        x_t = x_t.detach()  # with it nothing wants gradients: cheaper than torch.no_grad
        if x_t.shape == self._shape and x_t.dtype == self._dtype and not _autocasts(x_t):
            return self._advance(x_t)
        return self._begin(x_t)

    def _begin(self, x_t: Tensor) -> Tensor:
        """A step whose input is not known to have the right shape, or not in the right dtype."""
        rows = x_t if x_t.dim() == 2 else x_t.unsqueeze(0)
        if rows.dim() != 2 or rows.shape[1] != self._size:
            raise ValueError(
                f"x_t must have shape [B, {self._size}] or [{self._size}], got {list(x_t.shape)}"
            )
        if not self._steppers:
            zeros = [rows.new_zeros(len(rows), n, dtype=self._dtype) for n in self._sizes]
            self._start([zeros] * len(self._weights))
            self._batched = x_t.dim() == 2
        batch = len(self._steppers[0].state[0])
        if len(rows) != batch:
            raise ValueError(f"x_t must have {batch} rows, as the state has, got {len(rows)}")
        if x_t.dim() == 2:
            self._shape = x_t.shape
        dtype = precision(x_t)[1]
        with without_autocast(x_t):
            y = self._advance(rows.to(self._dtype))
        return (y if x_t.dim() == 2 else y[0]).to(dtype)

    def _first(self, x: Tensor) -> Tensor:
        """Take the first step, and choose how to take the others."""
        self._advance = self._second if x.is_cuda else self._chain
        return self._chain(x)

    def _second(self, x: Tensor) -> Tensor:
        self._advance = _captured(self._chain, x)
        return self._advance(x)

    def _chain(self, y: Tensor) -> Tensor:
        for stepper in self._steppers:
            y = stepper(y)
        return y.clone()


class StackStream:
    """A sequence in progress through a `RecurrentStack`; as `Stream`."""

    def __init__(self, stack: RecurrentStack, states: Sequence[Any] | None = None) -> None:
        for layer in stack.layers:
            cast("RecurrentBase", layer).check_streaming()
        stack.complete(None, states)
        self._stack = stack
        self._initial = states
        self._streams: list[Stream] = []
        self._advance: Callable[[Tensor], Tensor] = self._chain

    @property
    def state(self) -> Sequence[Any] | None:
        """The states so far, as the stack takes and gives them; at first those that were given."""
        return [stream.state for stream in self._streams] if self._streams else self._initial

    @torch.no_grad()
    def __call__(self, x_t: Tensor) -> Tensor:
        """Take one step: [B, I] or [I] to [B, output_size] or [output_size]."""
        if self._streams:
            return self._advance(x_t)
        states = self._stack.complete(x_t.shape[0] if x_t.dim() == 2 else None, self._initial)
        layers = cast("Iterable[RecurrentBase]", self._stack.layers)
        self._streams = [
            Stream(layer, _states(state), graph=False)
            for layer, state in zip(layers, states, strict=True)
        ]
        self._advance = self._second if x_t.is_cuda else self._chain
        return self._chain(x_t)

    def _second(self, x_t: Tensor) -> Tensor:
        self._advance = _captured(self._chain, x_t)
        return self._advance(x_t)

    def _chain(self, x_t: Tensor) -> Tensor:
        for index, stream in enumerate(self._streams):
            y = stream(self._stack.below(index, x_t))
            x_t = self._stack.join(index, x_t, y)
        return x_t


def _states(state: Any) -> Sequence[Tensor] | None:
    """One tensor or several, as a sequence."""
    return (state,) if isinstance(state, Tensor) else state
