"""What LSTM, GRU and RNN share: the parameters and call conventions of `torch.nn.RNNBase`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from kernels import CELLS, recurrence
from kernels.api import choose_backend, draw_seed, precision, without_autocast
from kernels.checks import check_backend, check_lengths, check_probability
from kernels.native import covers, packed_stack, padded_stack
from kernels.untraced import untraced

if TYPE_CHECKING:
    from kernels.persistent.plan import LaunchPlan

State = tuple[Tensor, ...]


class RecurrentBase(nn.RNNBase):
    """A stack of equal recurrent layers; subclasses choose the cell.

    Parameters, their names, order and initialisation are those of `torch.nn`; the parameters that a
    cell has beyond them come after, named `<name>_l<layer>` and `<name>_l<layer>_reverse`.

    Args:
        mode: torch's name of the kind of layer: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        cell: name in `kernels.CELLS`.
        input_size: size of the last dimension of the input.
        hidden_size: number of hidden units H.
        num_layers: number of layers.
        bias: whether the gates have biases.
        batch_first: whether input and output are [B, T, *] instead of [T, B, *].
        dropout: probability that an output of a layer but the last is zeroed, in training.
        bidirectional: whether a second direction runs from last step to first.
        proj_size: size P of the projection of h; 0: none.
        recurrent_dropout: probability in [0, 1) that the recurrent product does not see a unit of
            h, drawn once per sequence, in training.
        zoneout: probability in [0, 1) that a unit of h or c keeps its old value at a step; outside
            training the expectation is taken.
        backend: "auto", "triton", "torch" or "reference".
        recompute: whether the Triton kernels rebuild the gates for the gradient instead of keeping
            them.
        device: where the parameters are made.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        mode: str,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int = 0,
        *,
        recurrent_dropout: float,
        zoneout: float,
        backend: str,
        recompute: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        check_probability("recurrent_dropout", recurrent_dropout)
        check_probability("zoneout", zoneout)
        check_backend(backend, recompute)
        self.cell = cell
        self.recurrent_dropout = float(recurrent_dropout)
        self.zoneout = float(zoneout)
        self.backend = backend
        self.recompute = recompute
        super().__init__(
            mode,
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
        )
        extra = []
        for index, names in enumerate(self._all_weights):
            suffix = names[0].removeprefix("weight_ih")
            for name, multiple in CELLS[cell].parameters.items():
                empty = torch.empty(multiple * hidden_size, device=device, dtype=dtype)
                extra.append((name + suffix, nn.Parameter(empty)))
                self._all_weights[index] = [*self._all_weights[index], extra[-1][0]]
                self.register_parameter(*extra[-1])
        self._initialise(extra)

    recurrence = staticmethod(recurrence)
    """What runs one layer, unless torch runs all; `fusedrnn.diagnostics` puts a watcher here."""

    @property
    def num_directions(self) -> int:
        """D: 2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as at construction."""
        self._initialise(self.named_parameters())

    def _initialise(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        bound = self.hidden_size**-0.5
        for name, parameter in parameters:
            if "_ln_" in name:
                nn.init.constant_(parameter, float(name.startswith("weight")))
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Do nothing, except for `backend="torch"`: cuDNN wants the weights in one block."""
        if self.backend == "torch":
            super().flatten_parameters()

    def __prepare_scriptable__(self) -> NoReturn:
        """Say to `torch.jit.script`, which asks for this, that it cannot compile the layer."""
        kind = type(self).__name__
        raise TypeError(
            f"torch.jit.script cannot compile a fusedrnn.{kind}: use torch.export or "
            f"torch.jit.trace, or load its state_dict into a torch.nn.{kind}, if that has the cell"
        )

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        defaults = {
            "recurrent_dropout": 0.0,
            "zoneout": 0.0,
            "backend": "auto",
            "recompute": False,
        }
        options = {
            name: getattr(self, name)
            for name, default in defaults.items()
            if getattr(self, name) != default
        }
        return ", ".join(
            [super().extra_repr(), *(f"{name}={value!r}" for name, value in options.items())]
        )

    def _forward(
        self, x: Tensor | PackedSequence, state: Sequence[Tensor] | None, lengths: Tensor | None
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run, in one piece even under `torch.compile` where its kernels are not compiled."""
        data = x.data if isinstance(x, PackedSequence) else x
        compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if compiling and choose_backend(self.backend, data, self.proj_size > 0) == "torch":
            return self._uncompiled(x, state, lengths)
        return self._run(x, state, lengths)

    @untraced
    def _uncompiled(
        self, x: Tensor | PackedSequence, state: Sequence[Tensor] | None, lengths: Tensor | None
    ) -> tuple[Tensor | PackedSequence, State]:
        return self._run(x, state, lengths)

    def _run(
        self, x: Tensor | PackedSequence, state: Sequence[Tensor] | None, lengths: Tensor | None
    ) -> tuple[Tensor | PackedSequence, State]:
        """Check, bring to the batched form, run, and bring back."""
        if isinstance(x, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths must be None for a PackedSequence, which carries its own")
            return self._packed(x, state)
        if x.dim() not in (2, 3):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {x.dim()}D instead"
            )
        if x.dim() == 2 and lengths is not None:
            raise ValueError("lengths must be None for unbatched input")
        return self._padded_or_row(x, state, lengths)

    def _padded_or_row(
        self, x: Tensor, state: Sequence[Tensor] | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Run over a padded batch, or over one row without its batch dimension."""
        batch_dim = 0 if self.batch_first else 1
        if x.dim() == 3:
            if state is not None and any(s.dim() != 3 for s in state):
                raise RuntimeError("For batched 3-D input, hx should also be 3-D")
            return self._padded(x, state, lengths)
        if state is not None:
            if any(s.dim() != 2 for s in state):
                raise RuntimeError("For unbatched 2-D input, hx should also be 2-D")
            state = [s.unsqueeze(1) for s in state]
        y, final = self._padded(x.unsqueeze(batch_dim), state, None)
        return y.squeeze(batch_dim), tuple(s.squeeze(1) for s in final)

    def _initial(self, x: Tensor, batch: int, state: Sequence[Tensor] | None) -> Sequence[Tensor]:
        count = self.num_layers * self.num_directions
        shapes = [
            (count, batch, self.proj_size or self.hidden_size),
            (count, batch, self.hidden_size),
        ]
        shapes = shapes[: len(CELLS[self.cell].states)]
        if state is None:
            return [x.new_zeros(shape) for shape in shapes]
        if len(state) != len(shapes):
            raise ValueError(f"hx must be (h_0, c_0), got {len(state)} tensors")
        for index, (tensor, shape) in enumerate(zip(state, shapes, strict=True)):
            self.check_hidden_size(tensor, shape, f"Expected hidden[{index}] size {{}}, got {{}}")
        return state

    def _padded(
        self, x: Tensor, state: Sequence[Tensor] | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        self.check_input(x, None)
        batch, steps = x.shape[:2] if self.batch_first else (x.shape[1], x.shape[0])
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if lengths is not None:
            check_lengths(lengths, steps, batch, x.device)
        inside, outside = precision(x)
        with without_autocast(x):
            state = [s.to(inside) for s in self._initial(x, batch, state)]
            run = self._native if self._is_native(x, lengths) else self._layers
            y, final = run(x.to(inside), state, lengths)
            return y.to(outside), tuple(s.to(outside) for s in final)

    def _packed(
        self, x: PackedSequence, state: Sequence[Tensor] | None
    ) -> tuple[PackedSequence, State]:
        if not self._is_native(x.data):
            padded, lengths = pad_packed_sequence(x, self.batch_first)
            y, final = self._padded(padded, state, lengths.to(padded.device))
            if x.sorted_indices is not None:
                y = y.index_select(0 if self.batch_first else 1, x.sorted_indices)
                lengths = lengths[x.sorted_indices.cpu()]
            data = pack_padded_sequence(y, lengths, self.batch_first).data
            return x._replace(data=data), final
        self.check_input(x.data, x.batch_sizes)
        inside, outside = precision(x.data)
        with without_autocast(x.data):
            packed, final = packed_stack(
                self.cell,
                x._replace(data=x.data.to(inside)),
                self._weights(inside),
                [s.to(inside) for s in self._initial(x.data, int(x.batch_sizes[0]), state)],
                layers=self.num_layers,
                directions=self.num_directions,
                dropout=self.dropout,
                training=self.training,
            )
            data = packed.data.to(outside)
            return packed._replace(data=data), tuple(s.to(outside) for s in final)

    def plan(self, x: Tensor) -> tuple[LaunchPlan, LaunchPlan]:
        """How `backend="triton"` would run one layer over x; printing a plan says it in words.

        Args:
            x: padded input, as for the layer itself. On a CPU the plan is for an H200.

        Returns:
            The plans of the forward and of the backward pass.

        Raises:
            ValueError: no plan fits the device.
        """
        from kernels.ops import plan

        batch = 1 if x.dim() == 2 else x.shape[0 if self.batch_first else 1]
        like = x.new_empty(0, dtype=precision(x)[0])
        shape = (self.cell, self.hidden_size, batch, self.num_directions, like)
        return plan(*shape, backward=False), plan(*shape, backward=True)

    def _is_native(self, x: Tensor, lengths: Tensor | None = None) -> bool:
        backend = choose_backend(self.backend, x, self.proj_size > 0)
        return backend == "torch" and covers(
            self.cell, self.recurrent_dropout, self.zoneout, self.training, lengths
        )

    def _weights(self, dtype: torch.dtype) -> list[Tensor]:
        return [getattr(self, name).to(dtype) for name in self._flat_weights_names]

    def _native(
        self, x: Tensor, state: Sequence[Tensor], lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        """All layers in one call of torch's kernels."""
        return padded_stack(
            self.cell,
            x,
            self._weights(x.dtype),
            state,
            layers=self.num_layers,
            directions=self.num_directions,
            dropout=self.dropout,
            training=self.training,
            batch_first=self.batch_first,
            lengths=lengths,
        )

    def _stacked(self, name: str, layer: int, dtype: torch.dtype) -> Tensor:
        suffixes = ("", "_reverse")[: self.num_directions]
        return torch.stack(
            [getattr(self, f"{name}_l{layer}{suffix}").to(dtype) for suffix in suffixes]
        )

    def _layers(
        self, x: Tensor, state: Sequence[Tensor], lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        """Layer after layer through `kernels.recurrence`, with dropout between."""
        y = x.transpose(0, 1) if self.batch_first else x
        directions = self.num_directions
        draws = self.training and (self.recurrent_dropout > 0 or self.zoneout > 0)
        finals = []
        for layer in range(self.num_layers):
            y, final = self.recurrence(
                self.cell,
                y,
                self._stacked("weight_ih", layer, x.dtype),
                self._stacked("weight_hh", layer, x.dtype),
                self._stacked("bias_ih", layer, x.dtype) if self.bias else None,
                self._stacked("bias_hh", layer, x.dtype) if self.bias else None,
                {name: self._stacked(name, layer, x.dtype) for name in CELLS[self.cell].parameters},
                [s[layer * directions : (layer + 1) * directions] for s in state],
                w_hr=self._stacked("weight_hr", layer, x.dtype) if self.proj_size else None,
                lengths=lengths,
                recurrent_dropout=self.recurrent_dropout,
                zoneout=self.zoneout,
                training=self.training,
                seed=draw_seed() if draws else 0,
                backend=self.backend,
                recompute=self.recompute,
            )
            finals.append(final)
            if layer < self.num_layers - 1:
                y = F.dropout(y, self.dropout, self.training)
        return (
            y.transpose(0, 1) if self.batch_first else y,
            tuple(torch.cat(s) for s in zip(*finals, strict=True)),
        )

    def check_streaming(self) -> None:
        """Raise a RuntimeError if the layer cannot run step by step."""
        if self.bidirectional:
            raise RuntimeError(
                "a bidirectional layer cannot stream, because its second direction starts at the "
                "last step: call it on the whole sequence, or use bidirectional=False"
            )

    def _step(self, x_t: Tensor, state: Sequence[Tensor] | None) -> tuple[Tensor, State]:
        self.check_streaming()
        if x_t.dim() not in (1, 2):
            raise ValueError(
                f"x_t must have shape [B, {self.input_size}] or [{self.input_size}], "
                f"got {list(x_t.shape)}"
            )
        time = 1 if self.batch_first and x_t.dim() == 2 else 0
        y, final = self._padded_or_row(x_t.unsqueeze(time), state)
        return y.squeeze(time), final
