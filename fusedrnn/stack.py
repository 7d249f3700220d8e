"""RecurrentStack: recurrent layers of their own kinds and sizes over one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from .dropout import Dropout
from .recurrent import GRU, LSTM, RNN
from .streaming import StackStream

LAYERS: dict[str, Callable[..., LSTM | GRU | RNN]] = {
    "lstm": LSTM,
    "lstm_peephole": partial(LSTM, peephole=True),
    "lstm_layernorm": partial(LSTM, layer_norm=True),
    "gru": GRU,
    "gru_reset_before": partial(GRU, reset_after=False),
    "rnn": RNN,
    "rnn_tanh": RNN,
    "rnn_relu": partial(RNN, nonlinearity="relu"),
}
"""A layer for each cell of `kernels.CELLS`, and "rnn" for the tanh one."""

LayerState = Tensor | tuple[Tensor, Tensor]


class RecurrentStack(nn.Module):
    """Layers of their own sizes, with dropout, normalisation and shortcuts between.

    With x_0 the input and d the dropout, x_1 = d(layer_1(x_0)), and for l > 1, with y_l =
    d(layer_l(n(x_{l-1}))):

        x_l = y_l                               plain
        x_l = y_l + P x_{l-1}                   `residual` (He et al. 2016)
        x_l = g y_l + (1 - g) P x_{l-1}         `highway`, g = sigmoid(W x_{l-1} + b) (Srivastava
                                                et al. 2015), b = -1 at first

    n is layer normalisation or nothing, P the identity where the sizes agree and a linear map
    otherwise. Nothing is dropped from the last layer's output.

    An argument that says "of each layer" is one value for all layers, or a list with one for each.

    Args:
        input_size: size of the last dimension of the input.
        hidden_sizes: hidden units H_l of each layer, from the input up.
        cell: of each layer: "lstm", "gru", "rnn", or a name in `kernels.CELLS`.
        bidirectional: of each layer: whether it runs in both directions.
        dropout: probability that an output of a layer but the last is zeroed, in training.
        residual: whether a layer above the first adds its input to its output.
        layer_norm: whether the input of a layer above the first is normalised (Ba et al. 2016). For
            normalisation inside the cell see the cell "lstm_layernorm".
        batch_first: whether input and output are [B, T, *] instead of [T, B, *].
        backend: "auto", "triton", "torch" or "reference".
        variational_dropout: whether `dropout` draws one mask for all time steps of a sequence (Gal
            & Ghahramani 2016) instead of one for each.
        recurrent_dropout: of each layer, as in `LSTM`.
        zoneout: of each layer, as in `LSTM`.
        highway: whether a layer above the first has a gate between its input and its output.
        learned_states: whether initial states that are not given are parameters, zero at first.
        **cell_options: further arguments of all layers: `forget_bias`, `bias`, `recompute`, ...

    Attributes:
        num_directions: of the last layer.
        output_size: size of the last dimension of the output.

    Raises:
        TypeError: `hidden_sizes` is no list, or a layer has no such further argument.
        ValueError: `hidden_sizes` is empty, the cell is unknown, a list has not one value for each
            layer, or `residual` and `highway` are both wanted.
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: Sequence[int],
        cell: str | Sequence[str] = "lstm",
        bidirectional: bool | Sequence[bool] = False,
        dropout: float = 0.0,
        residual: bool = False,
        layer_norm: bool = False,
        batch_first: bool = False,
        backend: str = "auto",
        *,
        variational_dropout: bool = False,
        recurrent_dropout: float | Sequence[float] = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        highway: bool = False,
        learned_states: bool = False,
        **cell_options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(hidden_sizes, Sequence):
            raise TypeError(
                f"hidden_sizes must be a list with one size a layer, got {hidden_sizes!r}"
            )
        if "num_layers" in cell_options:
            raise TypeError("num_layers is not an argument: hidden_sizes names each layer")
        if not hidden_sizes:
            raise ValueError("hidden_sizes must name at least one layer")
        if residual and highway:
            raise ValueError("residual and highway exclude each other: highway=True has both paths")
        count = len(hidden_sizes)
        cells = _each("cell", cell, count)
        for name in cells:
            if name not in LAYERS:
                raise ValueError(f"cell must be one of {', '.join(LAYERS)}, got {name!r}")
        both = _each("bidirectional", bidirectional, count)
        own = zip(
            _each("recurrent_dropout", recurrent_dropout, count),
            _each("zoneout", zoneout, count),
            strict=True,
        )
        self.arguments = {
            "input_size": input_size,
            "hidden_sizes": list(hidden_sizes),
            "cell": _plain(cell),
            "bidirectional": _plain(bidirectional),
            "dropout": dropout,
            "residual": residual,
            "layer_norm": layer_norm,
            "batch_first": batch_first,
            "backend": backend,
            "variational_dropout": variational_dropout,
            "recurrent_dropout": _plain(recurrent_dropout),
            "zoneout": _plain(zoneout),
            "highway": highway,
            "learned_states": learned_states,
        } | {key: v for key, v in cell_options.items() if key not in ("device", "dtype")}
        self.input_size = input_size
        self.hidden_sizes = list(hidden_sizes)
        self.cell = _plain(cell)
        self.bidirectional = _plain(bidirectional)
        self.batch_first = batch_first
        self.residual = residual
        self.highway = highway
        self.variational_dropout = variational_dropout
        self.num_directions = 2 if both[-1] else 1
        sizes = [input_size]
        layers: list[LSTM | GRU | RNN] = []
        for kind, hidden, two, (recurrent, zone) in zip(
            cells, hidden_sizes, both, own, strict=True
        ):
            layers.append(
                LAYERS[kind](
                    sizes[-1],
                    hidden,
                    bidirectional=two,
                    batch_first=batch_first,
                    backend=backend,
                    recurrent_dropout=recurrent,
                    zoneout=zone,
                    **cell_options,
                )
            )
            out = layers[-1].proj_size or hidden
            sizes.append(2 * out if two else out)
        self.layers = nn.ModuleList(layers)
        where = {key: v for key, v in cell_options.items() if key in ("device", "dtype")}
        above = list(pairwise(sizes[1:]))
        self.norms = (
            nn.ModuleList(nn.LayerNorm(size, **where) for size, _ in above) if layer_norm else None
        )
        self.shortcuts = (
            nn.ModuleList(
                nn.Identity() if size == out else nn.Linear(size, out, bias=False, **where)
                for size, out in above
            )
            if residual or highway
            else None
        )
        self.gates = (
            nn.ModuleList(nn.Linear(size, out, **where) for size, out in above) if highway else None
        )
        for gate in self.gates or ():
            nn.init.constant_(cast(nn.Linear, gate).bias, -1.0)
        self.initial_states = (
            nn.ModuleList(_zero_state(layer, where) for layer in layers) if learned_states else None
        )
        self.dropout = Dropout(dropout)
        self.output_size = sizes[-1]

    def forward(
        self,
        x: Tensor,
        states: Sequence[LayerState | None] | None = None,
        lengths: Tensor | None = None,
        return_layers: bool = False,
    ) -> Any:
        """Run over a batch of sequences.

        Args:
            x: [T, B, I], [B, T, I] if `batch_first`, or [T, I] unbatched.
            states: initial state of each layer, h_0 [D, B, H_l] or (h_0, c_0); None, all or one:
                the learned ones, or zeros.
            lengths: valid steps of each row, int64 [B] on x's device, in any order; None: all.
            return_layers: whether the outputs of all layers are wanted.

        Returns:
            The output, last dimension `output_size`, zero past each row's end; the final states as
            a list; and, if asked for, the list of x_1 ... x_L, of which the last is the output.

        Raises:
            TypeError: x is no tensor, such as a PackedSequence.
            ValueError: `states` has not one entry per layer, or a layer finds its arguments wrong.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, with lengths if padded, got {type(x).__name__}")
        batch_dim = 0 if self.batch_first else 1
        states = self.complete(x.shape[batch_dim] if x.dim() == 3 else None, states)
        time = 1 - batch_dim if x.dim() == 3 else 0
        outputs: list[Tensor] = []
        finals: list[LayerState] = []
        for index, layer in enumerate(self.layers):
            y, final = layer(self.below(index, x), states[index], lengths=lengths)
            x = self.join(index, x, self._drop(index, y, time))
            outputs.append(x)
            finals.append(final)
        return (x, finals, outputs) if return_layers else (x, finals)

    def step(
        self, x_t: Tensor, states: Sequence[LayerState | None] | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """Run one time step, for streaming.

        In training every step draws its own dropout, variational or not.

        Args:
            x_t: [B, I] or [I].
            states: as `forward` takes and gives them.

        Returns:
            The output [B, output_size] or [output_size], and the new states.

        Raises:
            RuntimeError: a layer is bidirectional.
            ValueError: as `forward`.
        """
        states = self.complete(x_t.shape[0] if x_t.dim() == 2 else None, states)
        finals: list[LayerState] = []
        for index, layer in enumerate(self.layers):
            step = cast(Callable[..., tuple[Tensor, LayerState]], layer.step)
            y, final = step(self.below(index, x_t), states[index])
            x_t = self.join(index, x_t, self._drop(index, y, None))
            finals.append(final)
        return x_t, finals

    def stream(self, states: Sequence[LayerState | None] | None = None) -> StackStream:
        """Begin a sequence that arrives step by step: faster than `step`, without gradients.

        Args:
            states: initial states as for `forward`.

        Returns:
            What takes each x_t and returns its output at once; it keeps the states.

        Raises:
            RuntimeError: a layer is bidirectional.
            ValueError: `states` has not one entry per layer.
        """
        return StackStream(self, states)

    def complete(
        self, batch: int | None, states: Sequence[LayerState | None] | None
    ) -> list[LayerState | None]:
        """Initial states with one entry for each layer, the learned one where none is given.

        Args:
            batch: number of rows B; None: unbatched.
            states: as for `forward`.

        Raises:
            ValueError: `states` has not one entry per layer.
        """
        if states is not None and len(states) != len(self.layers):
            raise ValueError(
                f"states must have one entry per layer, {len(self.layers)}, got {len(states)}"
            )
        given = list(states or [None] * len(self.layers))
        if self.initial_states is None:
            return given
        return [
            _expand(list(learned.parameters()), batch) if state is None else state
            for state, learned in zip(given, self.initial_states, strict=True)
        ]

    def below(self, index: int, x: Tensor) -> Tensor:
        """What layer `index` (from 0) sees of x, the output of the layer below."""
        return x if index == 0 or self.norms is None else self.norms[index - 1](x)

    def join(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """The output of layer `index` from its input x and its own y, along the shortcut."""
        if index == 0 or self.shortcuts is None:
            return y
        carried = self.shortcuts[index - 1](x)
        if self.gates is None:
            return y + carried
        return torch.lerp(carried, y, torch.sigmoid(self.gates[index - 1](x)))

    def _drop(self, index: int, y: Tensor, time: int | None) -> Tensor:
        """Dropout between layers; `time` is the dimension of y that is time, if it has one."""
        if index == len(self.layers) - 1:
            return y
        if time is None or not self.variational_dropout or not self.training:
            return self.dropout(y)
        return y * self.dropout(torch.ones_like(y.narrow(time, 0, 1)))

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        options = [
            f"{name}=True" for name in ("highway", "variational_dropout") if getattr(self, name)
        ]
        return ", ".join(
            [
                f"{self.input_size}, {self.hidden_sizes}, cell={self.cell!r}",
                f"residual={self.residual}",
                *options,
            ]
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One value for each layer."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must be one value or one per layer, {count}, got {len(value)}")
    return list(value)


def _zero_state(layer: LSTM | GRU | RNN, where: dict[str, Any]) -> nn.ParameterList:
    """One learned row of h and, for the LSTMs, of c, [D, 1, *]."""
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size]
    shapes = [(layer.num_directions, 1, size) for size in sizes[: 2 if layer.mode == "LSTM" else 1]]
    return nn.ParameterList(nn.Parameter(torch.zeros(shape, **where)) for shape in shapes)


def _expand(state: Sequence[Tensor], batch: int | None) -> LayerState:
    rows = [s.squeeze(1) if batch is None else s.expand(-1, batch, -1).contiguous() for s in state]
    return (rows[0], rows[1]) if len(rows) > 1 else rows[0]
