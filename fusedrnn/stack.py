"""RecurrentStack: recurrent layers of different sizes over one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from .recurrent import GRU, LSTM, RNN

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
    """Layers of their own sizes, with dropout, normalisation and residual connections between.

    With x_0 the input and d the dropout, x_1 = d(layer_1(x_0)) and, for l > 1, x_l =
    d(layer_l(n(x_{l-1}))), plus P x_{l-1} if `residual`. n is layer normalisation or nothing, P the
    identity where the sizes agree and a linear map otherwise. Nothing is dropped from the last
    layer's output.

    Args:
        input_size: size of the last dimension of the input.
        hidden_sizes: hidden units H_l of each layer, from the input up.
        cell: "lstm", "gru", "rnn", or a name in `kernels.CELLS`.
        bidirectional: whether every layer runs in both directions.
        dropout: probability that an output of a layer but the last is zeroed, in training.
        residual: whether a layer above the first adds its input to its output.
        layer_norm: whether the input of a layer above the first is normalised (Ba et al. 2016).
        batch_first: whether input and output are [B, T, *] instead of [T, B, *].
        backend: "auto", "triton", "torch" or "reference".
        **cell_options: further arguments of the layers: `recurrent_dropout`, `zoneout`, `peephole`,
        `bias`, ...

    Raises:
        ValueError: `hidden_sizes` is empty, or the cell is unknown.
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: Sequence[int],
        cell: str = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
        residual: bool = False,
        layer_norm: bool = False,
        batch_first: bool = False,
        backend: str = "auto",
        **cell_options: Any,
    ) -> None:
        super().__init__()
        if cell not in LAYERS:
            raise ValueError(f"cell must be one of {', '.join(LAYERS)}, got {cell!r}")
        if not hidden_sizes:
            raise ValueError("hidden_sizes must name at least one layer")
        self.arguments = {
            "input_size": input_size,
            "hidden_sizes": list(hidden_sizes),
            "cell": cell,
            "bidirectional": bidirectional,
            "dropout": dropout,
            "residual": residual,
            "layer_norm": layer_norm,
            "batch_first": batch_first,
            "backend": backend,
        } | {key: v for key, v in cell_options.items() if key not in ("device", "dtype")}
        self.input_size = input_size
        self.hidden_sizes = list(hidden_sizes)
        self.cell = cell
        self.bidirectional = bidirectional
        self.num_directions = 2 if bidirectional else 1
        self.batch_first = batch_first
        self.residual = residual
        sizes = [input_size, *(self.num_directions * hidden for hidden in hidden_sizes)]
        self.layers = nn.ModuleList(
            LAYERS[cell](
                size,
                hidden,
                bidirectional=bidirectional,
                batch_first=batch_first,
                backend=backend,
                **cell_options,
            )
            for size, hidden in zip(sizes, hidden_sizes, strict=False)
        )
        above = list(pairwise(sizes[1:]))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size, _ in above) if layer_norm else None
        self.shortcuts = (
            nn.ModuleList(
                nn.Identity() if size == out else nn.Linear(size, out, bias=False)
                for size, out in above
            )
            if residual
            else None
        )
        self.dropout = nn.Dropout(dropout)
        self.output_size = sizes[-1]

    def forward(
        self, x: Tensor, states: Sequence[LayerState] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """Run over a batch of sequences.

        Args:
            x: [T, B, I], or [B, T, I] if `batch_first`.
            states: initial state of each layer, h_0 [D, B, H_l] or (h_0, c_0); None: zeros.
            lengths: valid steps of each row, int64 [B] on x's device, in any order; None: all.

        Returns:
            The output, last dimension `output_size`, zero past each row's end; the final states as
            a list.

        Raises:
            ValueError: `states` has not one entry per layer, or a layer finds its arguments wrong.
        """
        if states is not None and len(states) != len(self.layers):
            raise ValueError(
                f"states must have one entry per layer, {len(self.layers)}, got {len(states)}"
            )
        finals = []
        for index, layer in enumerate(self.layers):
            y, final = layer(
                self._below(index, x), None if states is None else states[index], lengths=lengths
            )
            x = self._join(index, x, y)
            finals.append(final)
        return x, finals

    def step(
        self, x_t: Tensor, states: Sequence[LayerState] | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """Run one time step, for streaming.

        Args:
            x_t: [B, I] or [I].
            states: as `forward` takes and gives them; None: zeros.

        Returns:
            The output [B, output_size] or [output_size], and the new states.

        Raises:
            RuntimeError: the stack is bidirectional.
        """
        finals = []
        layer: Any
        for index, layer in enumerate(self.layers):
            y, final = layer.step(
                self._below(index, x_t), None if states is None else states[index]
            )
            x_t = self._join(index, x_t, y)
            finals.append(final)
        return x_t, finals

    def _below(self, index: int, x: Tensor) -> Tensor:
        return x if index == 0 or self.norms is None else self.norms[index - 1](x)

    def _join(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        if index < len(self.layers) - 1:
            y = self.dropout(y)
        return y if index == 0 or self.shortcuts is None else y + self.shortcuts[index - 1](x)

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        return (
            f"{self.input_size}, {self.hidden_sizes}, cell={self.cell!r}, residual={self.residual}"
        )
