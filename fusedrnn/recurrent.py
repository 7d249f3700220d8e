"""LSTM, GRU and RNN: drop-in replacements of `torch.nn`'s, with cells that it lacks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .base import RecurrentBase
from .streaming import Stream

Input = Tensor | PackedSequence


class LSTM(RecurrentBase):
    """Long short-term memory, like `torch.nn.LSTM`, whose `state_dict` it takes and gives.

    i, f, o = sigmoid(.), g = tanh(.) of W_ih x_t + b_ih + W_hh h_{t-1} + b_hh; c_t = f c_{t-1} + i
    g; h_t = o tanh(c_t) (Hochreiter & Schmidhuber 1997, Gers et al. 2000).

    Args:
        input_size: size of the last dimension of the input.
        hidden_size: number of hidden units H.
        num_layers: number of layers.
        bias: whether the gates have biases.
        batch_first: whether input and output are [B, T, *] instead of [T, B, *].
        dropout: probability that an output of a layer but the last is zeroed, in training.
        bidirectional: whether a second direction runs from last step to first; the output
            concatenates both.
        proj_size: size P of the projection of h (Sak et al. 2014); 0: none.
        peephole: whether i and f see c_{t-1} and o sees c_t (Gers & Schmidhuber 2000), through the
            parameters `weight_ci_l0`, `weight_cf_l0`, `weight_co_l0`, each [H].
        forget_bias: initial bias of the forget gate (both biases together); None: drawn, as in
            torch.
        recurrent_dropout: probability in [0, 1) that the recurrent product does not see a unit of
            h, drawn once per sequence, in training (Gal & Ghahramani 2016).
        zoneout: probability in [0, 1) that a unit of h or c keeps its old value at a step (Krueger
            et al. 2016); outside training the expectation is taken.
        layer_norm: whether the input part and the recurrent part of the gates, and c_t on its way
            to the output, are normalised (Ba et al. 2016); parameters `weight_ln_ih_l0`,
            `weight_ln_hh_l0` [4*H], `weight_ln_c_l0`, `bias_ln_c_l0` [H].
        backend: "auto" (triton on a GPU, torch on a CPU), "triton", "torch" or "reference".
        recompute: whether only h and c are kept for the gradient (with layer norm, the input part
            of the gates too), and the gates rebuilt in the backward pass by one product: about a
            third of the memory for one more forward product. Only the Triton kernels have it: no
            effect where "auto" takes torch, as on a CPU.
        device: where the parameters are made.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        peephole: bool = False,
        forget_bias: float | None = None,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
        backend: str = "auto",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if peephole and layer_norm:
            raise ValueError("peephole and layer_norm exclude each other: no cell has both")
        if forget_bias is not None and not bias:
            raise ValueError("forget_bias needs bias=True")
        self.peephole = peephole
        self.layer_norm = layer_norm
        self.forget_bias = forget_bias
        super().__init__(
            "LSTM",
            "lstm_peephole" if peephole else "lstm_layernorm" if layer_norm else "lstm",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            backend=backend,
            recompute=recompute,
            device=device,
            dtype=dtype,
        )

    def _initialise(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        parameters = list(parameters)
        super()._initialise(parameters)
        if self.forget_bias is None:
            return
        forget = slice(self.hidden_size, 2 * self.hidden_size)
        with torch.no_grad():
            for name, parameter in parameters:
                if name.startswith("bias_ih"):
                    parameter[forget] = self.forget_bias
                elif name.startswith("bias_hh"):
                    parameter[forget] = 0.0

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        options = [f"{name}=True" for name in ("peephole", "layer_norm") if getattr(self, name)]
        if self.forget_bias is not None:
            options.append(f"forget_bias={self.forget_bias}")
        return ", ".join([super().extra_repr(), *options])

    def forward(
        self, input: Input, hx: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None
    ) -> tuple[Input, tuple[Tensor, Tensor]]:
        """Run over a batch of sequences.

        Args:
            input: [T, B, I], [B, T, I] if `batch_first`, [T, I] unbatched, or a PackedSequence.
            hx: initial (h_0 [num_layers * D, B, P], c_0 [num_layers * D, B, H]); None: zeros.
            lengths: valid steps of each row, int64 [B] on the input's device, in any order; None:
                all. Past its end a row's output is zero, its final state is that of its last step,
                and the second direction starts there.

        Returns:
            The output in the input's form, last dimension D*P, and the final (h_n, c_n) shaped as
            hx.

        Raises:
            TypeError, ValueError, RuntimeError: a shape, dtype, device or length does not fit.
        """
        y, (h_n, c_n) = self._forward(input, hx, lengths)
        return y, (h_n, c_n)

    def step(
        self, x_t: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run one time step, for streaming.

        Args:
            x_t: [B, I] or [I].
            state: (h, c) as `forward` takes and gives them; None: zeros.

        Returns:
            The output [B, P] or [P], and the new (h, c).

        Raises:
            RuntimeError: the layer is bidirectional.
        """
        y, (h, c) = self._step(x_t, state)
        return y, (h, c)

    def stream(self, state: tuple[Tensor, Tensor] | None = None) -> Stream:
        """Begin a sequence that arrives step by step: faster than `step`, without gradients.

        Args:
            state: (h, c) as `forward` takes and gives them; None: zeros.

        Returns:
            What takes each x_t and returns its output at once; it keeps the state.

        Raises:
            RuntimeError: the layer is bidirectional.
            ValueError: the state does not fit.
        """
        return Stream(self, state)


class _Hidden(RecurrentBase):
    """A layer whose only state is h."""

    def forward(
        self, input: Input, hx: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Input, Tensor]:
        """Run over a batch of sequences.

        Args:
            input: [T, B, I], [B, T, I] if `batch_first`, [T, I] unbatched, or a PackedSequence.
            hx: initial h [num_layers * D, B, H]; None: zeros.
            lengths: valid steps of each row, int64 [B] on the input's device, in any order; None:
                all. Past its end a row's output is zero, its final state is that of its last step,
                and the second direction starts there.

        Returns:
            The output in the input's form, last dimension D*H, and the final h shaped as hx.

        Raises:
            TypeError, ValueError, RuntimeError: a shape, dtype, device or length does not fit.
        """
        y, (h_n,) = self._forward(input, None if hx is None else (hx,), lengths)
        return y, h_n

    def step(self, x_t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run one time step, for streaming.

        Args:
            x_t: [B, I] or [I].
            state: h as `forward` takes and gives it; None: zeros.

        Returns:
            The output [B, H] or [H], and the new h.

        Raises:
            RuntimeError: the layer is bidirectional.
        """
        y, (h,) = self._step(x_t, None if state is None else (state,))
        return y, h

    def stream(self, state: Tensor | None = None) -> Stream:
        """Begin a sequence that arrives step by step: faster than `step`, without gradients.

        Args:
            state: h as `forward` takes and gives it; None: zeros.

        Returns:
            What takes each x_t and returns its output at once; it keeps the state.

        Raises:
            RuntimeError: the layer is bidirectional.
            ValueError: the state does not fit.
        """
        return Stream(self, None if state is None else (state,))


class GRU(_Hidden):
    """Gated recurrent unit, like `torch.nn.GRU`, whose `state_dict` it takes and gives.

    r, z = sigmoid(.) and n = tanh(.), h_t = (1 - z) n + z h_{t-1} (Cho et al. 2014): the update
    gate is torch's and Keras's. Textbooks that write h_t = (1 - z) h_{t-1} + z n call z what is 1 -
    z here.

    Args:
        input_size: size of the last dimension of the input.
        hidden_size: number of hidden units H.
        num_layers: number of layers.
        bias: whether the gates have biases.
        batch_first: whether input and output are [B, T, *] instead of [T, B, *].
        dropout: probability that an output of a layer but the last is zeroed, in training.
        bidirectional: whether a second direction runs from last step to first; the output
            concatenates both.
        reset_after: True: n = tanh(W_in x + b_in + r (W_hn h + b_hn)), as torch; False: the reset
            gate acts before the product, n = tanh(W_in x + b_in + W_hn (r h) + b_hn), with the same
            parameters.
        recurrent_dropout: as in `LSTM`.
        zoneout: as in `LSTM`.
        backend: "auto" (triton on a GPU, torch on a CPU), "triton", "torch" or "reference".
        recompute: as in `LSTM`.
        device: where the parameters are made.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reset_after: bool = True,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        backend: str = "auto",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.reset_after = reset_after
        super().__init__(
            "GRU",
            "gru" if reset_after else "gru_reset_before",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            backend=backend,
            recompute=recompute,
            device=device,
            dtype=dtype,
        )

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


class RNN(_Hidden):
    """Elman network, like `torch.nn.RNN`, whose `state_dict` it takes and gives.

    h_t = tanh or relu of W_ih x_t + b_ih + W_hh h_{t-1} + b_hh (Elman 1990).

    Args:
        input_size: size of the last dimension of the input.
        hidden_size: number of hidden units H.
        num_layers: number of layers.
        nonlinearity: "tanh" or "relu".
        bias: whether there are biases.
        batch_first: whether input and output are [B, T, *] instead of [T, B, *].
        dropout: probability that an output of a layer but the last is zeroed, in training.
        bidirectional: whether a second direction runs from last step to first; the output
            concatenates both.
        recurrent_dropout: as in `LSTM`.
        zoneout: as in `LSTM`.
        backend: "auto" (triton on a GPU, torch on a CPU), "triton", "torch" or "reference".
        recompute: as in `LSTM`.
        device: where the parameters are made.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        backend: str = "auto",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            f"rnn_{nonlinearity}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            backend=backend,
            recompute=recompute,
            device=device,
            dtype=dtype,
        )
