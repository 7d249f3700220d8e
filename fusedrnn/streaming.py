"""Sequences that arrive step by step: the least work between an input and its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from kernels import CELLS
from kernels.api import precision, without_autocast
from kernels.torch_loop import Stepper

if TYPE_CHECKING:
    from .base import RecurrentBase
    from .stack import RecurrentStack


class Stream:
    """A sequence in progress through one layer; call it with each x_t, [B, I] or [I].

    It computes without gradients and as in evaluation, with the weights that the layer had when the
    sequence began, and gives the outputs that the layer gives for the whole sequence.
    """

    def __init__(self, layer: RecurrentBase, state: Sequence[Tensor] | None = None) -> None:
        layer.check_streaming()
        self._name = type(layer).__name__
        self._size = layer.input_size
        self._dtype = precision(cast(Tensor, layer.weight_ih_l0))[0]
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
        names += CELLS[layer.cell].parameters
        self._steppers = []
        for index in range(layer.num_layers):
            w = {name: getattr(layer, f"{name}_l{index}", None) for name in names}
            held = {
                name: None if v is None else v.detach().to(self._dtype) for name, v in w.items()
            }
            self._steppers.append(Stepper(layer.cell, held, layer.zoneout))
        sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size]
        self._sizes = sizes[: len(CELLS[layer.cell].states)]
        self._shape: torch.Size | None = None
        self._state = None if state is None else self._take(state)
        self._batched = state is None or state[0].dim() == 3

    def _take(self, state: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """For each layer its states [B, *], from states [num_layers, B, *] or [num_layers, *]."""
        for tensor, size in zip(state, self._sizes, strict=True):
            shape = tuple(tensor.shape)
            if len(shape) not in (2, 3) or (shape[0], shape[-1]) != (len(self._steppers), size):
                raise ValueError(
                    f"state must hold [{len(self._steppers)}, B, {size}], got {list(shape)}"
                )
        rows = [s.detach().to(self._dtype) for s in state]
        rows = [s if s.dim() == 3 else s.unsqueeze(1) for s in rows]
        return [[s[index] for s in rows] for index in range(len(self._steppers))]

    @property
    def state(self) -> Any:
        """The state so far, as the layer takes and gives it; None before the first step."""
        if self._state is None:
            return None
        tensors = [torch.stack(s) for s in zip(*self._state, strict=True)]
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
        same = x_t.shape == self._shape and x_t.dtype == self._dtype
        if same and not torch.is_autocast_enabled(x_t.device.type):
            return self._advance(x_t)
        return self._begin(x_t)

    def _begin(self, x_t: Tensor) -> Tensor:
        """A step whose input is not known to have the right shape, or not in the right dtype."""
        rows = x_t if x_t.dim() == 2 else x_t.unsqueeze(0)
        if rows.dim() != 2 or rows.shape[1] != self._size:
            raise ValueError(
                f"x_t must have shape [B, {self._size}] or [{self._size}], got {list(x_t.shape)}"
            )
        if self._state is None:
            zeros: list[Sequence[Tensor]] = [
                [rows.new_zeros(len(rows), n, dtype=self._dtype) for n in self._sizes]
            ]
            self._state, self._batched = zeros * len(self._steppers), x_t.dim() == 2
        if len(rows) != len(self._state[0][0]):
            raise ValueError(
                f"x_t must have {len(self._state[0][0])} rows, as the state has, got {len(rows)}"
            )
        if x_t.dim() == 2:
            self._shape = x_t.shape
        dtype = precision(x_t)[1]
        with without_autocast(x_t):
            y = self._advance(rows.to(self._dtype))
        return (y if x_t.dim() == 2 else y[0]).to(dtype)

    def _advance(self, y: Tensor) -> Tensor:
        state = cast(list[Sequence[Tensor]], self._state)
        for index, stepper in enumerate(self._steppers):
            state[index] = stepper(y, state[index])
            y = state[index][0]
        return y


class StackStream:
    """A sequence in progress through a `RecurrentStack`; as `Stream`."""

    def __init__(self, stack: RecurrentStack, states: Sequence[Any] | None = None) -> None:
        for layer in stack.layers:
            cast("RecurrentBase", layer).check_streaming()
        stack.complete(None, states)
        self._stack = stack
        self._initial = states
        self._streams: list[Stream] = []

    @property
    def state(self) -> Sequence[Any] | None:
        """The states so far, as the stack takes and gives them; at first those that were given."""
        return [stream.state for stream in self._streams] if self._streams else self._initial

    @torch.no_grad()
    def __call__(self, x_t: Tensor) -> Tensor:
        """Take one step: [B, I] or [I] to [B, output_size] or [output_size]."""
        if not self._streams:
            states = self._stack.complete(x_t.shape[0] if x_t.dim() == 2 else None, self._initial)
            begin = [cast(Callable[..., Stream], layer.stream) for layer in self._stack.layers]
            self._streams = [new(state) for new, state in zip(begin, states, strict=True)]
        for index, stream in enumerate(self._streams):
            y = stream(self._stack.below(index, x_t))
            x_t = self._stack.join(index, x_t, y)
        return x_t
