"""Encoder, bridge and attention decoder as a plain `torch.nn.Module`.

Either side may be symbols or vectors of features: text to text, speech or video to text, series to
series. Dimensions: B batch, S source length, T target length, E embedding size, F output features,
K symbols of the target vocabulary (or numbers predicted at each step), D directions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedrnn import RecurrentStack
from fusedrnn.attention import build_attention, valid_positions

__all__ = ["Bridge", "DecoderState", "EncodedSource", "FrameEmbedding", "Seq2SeqModel"]

LayerState = Tensor | tuple[Tensor, Tensor]


class EncodedSource(NamedTuple):
    """What the decoder may look at while it writes.

    Attributes:
        keys: [B, S, Dk], outputs of the last encoder layer, zero past the lengths.
        projected: [B, S, P], the keys as the attention's score wants them; None without attention.
        lengths: int64 [B].
    """

    keys: Tensor
    projected: Tensor | None
    lengths: Tensor


class DecoderState(NamedTuple):
    """Everything a decoding step needs besides the previous symbol.

    Attributes:
        source: the encoded source of each row.
        layers: one entry per decoder layer, h [1, B, H] or (h, c).
        feed: [B, F], the last attentional features with input feeding, else None.
    """

    source: EncodedSource
    layers: list[LayerState]
    feed: Tensor | None

    def select(self, rows: Tensor) -> DecoderState:
        """Keep, repeat or reorder rows.

        Args:
            rows: int64 [N], indices into the batch.

        Returns:
            The state of those N rows.
        """
        keys, projected, lengths = self.source
        source = EncodedSource(
            keys[rows], None if projected is None else projected[rows], lengths[rows]
        )
        layers = [_select(layer, rows) for layer in self.layers]
        return DecoderState(source, layers, None if self.feed is None else self.feed[rows])


def _select(layer: LayerState, rows: Tensor) -> LayerState:
    """Keep rows of one layer's state."""
    if isinstance(layer, tuple):
        return layer[0][:, rows], layer[1][:, rows]
    return layer[:, rows]


class Bridge(nn.Module):
    """Carry every encoder layer's final state, memory cells included, to every decoder layer.

    Where the encoder has as many layers as the decoder, of the same sizes (directions
    concatenated), nothing is learnt; the decoder starts from exactly what the encoder ended with::

        h_0^dec(l) = h_T^enc(l),   c_0^dec(l) = c_T^enc(l)

    For every other pair of depths and sizes, each decoder layer sees all of them::

        h_0^dec(l) = tanh(W_l [h_T^enc(1); ...; h_T^enc(L)] + b_l)
        c_0^dec(l) =      V_l [c_T^enc(1); ...; c_T^enc(L)] + d_l

    tanh keeps h in the range an output gate gives it; the memory cell has no such bound.

    Args:
        encoder_sizes: state size of each encoder layer, directions concatenated.
        decoder_sizes: state size of each decoder layer.
        has_cell: whether the states are (h, c).
    """

    def __init__(
        self, encoder_sizes: Sequence[int], decoder_sizes: Sequence[int], has_cell: bool
    ) -> None:
        super().__init__()
        self.exact = list(encoder_sizes) == list(decoder_sizes)
        if self.exact:
            return
        total = sum(encoder_sizes)
        self.hidden = nn.ModuleList(nn.Linear(total, size) for size in decoder_sizes)
        if has_cell:
            self.cell = nn.ModuleList(nn.Linear(total, size) for size in decoder_sizes)

    def forward(self, states: list[LayerState]) -> list[LayerState]:
        """Turn final encoder states into initial decoder states.

        Args:
            states: one entry per encoder layer, h [D, B, H] or (h, c).

        Returns:
            One entry per decoder layer, h [1, B, H] or (h, c).
        """
        hidden = [_join(state[0] if isinstance(state, tuple) else state) for state in states]
        cell = [_join(state[1]) for state in states if isinstance(state, tuple)]
        hidden = self._project(hidden, "hidden")
        if not cell:
            return [*hidden]
        return [*zip(hidden, self._project(cell, "cell"), strict=True)]

    def _project(self, states: list[Tensor], kind: str) -> list[Tensor]:
        if self.exact:
            return states
        everything = torch.cat(states, -1)
        projected = [linear(everything) for linear in getattr(self, kind)]
        return [torch.tanh(p) for p in projected] if kind == "hidden" else projected


def _join(state: Tensor) -> Tensor:
    """Concatenate the directions of a state: [D, B, H] -> [1, B, D*H]."""
    return state.transpose(0, 1).flatten(1)[None]


class FrameEmbedding(nn.Module):
    """Make vectors of equal size from frames of features, one of every few frames.

    Neighbouring frames are put side by side before the projection, which makes a long recording
    short for the recurrent layers (as in Sak et al., Fast and Accurate Recurrent Neural Network
    Acoustic Models, 2015)::

        e_j = W [x_{kj}; x_{kj + 1}; ...; x_{kj + k - 1}] + b

    Args:
        features: numbers in a frame.
        size: E, of the result.
        stride: k, frames that are put together.
    """

    def __init__(self, features: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.linear = nn.Linear(stride * features, size)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embed frames.

        Args:
            frames: [B, S, features]; finite values past the lengths change nothing.
            lengths: int64 [B], at least 1.

        Returns:
            [B, ceil(S / k), E], and the lengths int64 [B] in those units.
        """
        inside = valid_positions(lengths, frames.shape[1])
        frames = frames.masked_fill(~inside[..., None], 0.0)
        frames = nn.functional.pad(frames, (0, 0, 0, -frames.shape[1] % self.stride))
        stacked = frames.unflatten(1, (-1, self.stride)).flatten(2)
        return self.linear(stacked), (lengths + self.stride - 1) // self.stride


class Seq2SeqModel(nn.Module):
    """Recurrent encoder-decoder with optional attention (Luong 2015, Bahdanau 2014).

    With `attention="none"` this is the plain encoder-decoder (Sutskever 2014): the source reaches
    the decoder through its initial state only, and `p(y_t) = softmax(W h_t)`. With attention::

        h_t     = decoder(y_{t-1}, h_{t-1})                 or  decoder([y_{t-1}; a_{t-1}], h_{t-1})
        context = sum_s weights[t, s] encoded[s]                (input feeding)
        a_t     = tanh(W_a [context; h_t])
        p(y_t)  = softmax(W a_t)

    Without feedback of the attention into the cell, teacher forcing is one call of the decoder over
    all T steps and one batched attention.

    With `source_features` the source is frames of features instead of symbols. With
    `target_features` the model predicts numbers, `y_t = W a_t + b`, and the decoder is fed
    `target_inputs` given numbers at each step; `regress` feeds it its own results as well.

    Args:
        source_size: number of source symbols, 0 being padding; 0 where the source is features.
        target_size: K, number of target symbols, 0 being padding; 0 where numbers are predicted.
        embedding_size: E, of both sides.
        encoder_sizes: hidden size of each encoder layer, per direction.
        decoder_sizes: hidden size of each decoder layer.
        cell: "lstm" or "gru", or any other cell of `RecurrentStack`.
        bidirectional: whether the encoder reads in both directions.
        attention: "none", "dot", "general" or "additive".
        input_feeding: whether the attentional features of a step enter the cell at the next one.
        tied_embeddings: whether the output layer uses the target embeddings as its weights. The
            features then have the embeddings' size.
        dropout: probability, on embeddings, between layers and before the output.
        backend: of the recurrent layers; see `fusedrnn.LSTM`.
        source_features: numbers in a frame of the source.
        source_stride: frames that become one step of the encoder.
        target_features: K, numbers predicted at each step.
        target_inputs: numbers that the decoder is fed at each step.

    Raises:
        ValueError: an argument is out of range, or two of them exclude each other.
    """

    def __init__(
        self,
        source_size: int,
        target_size: int,
        embedding_size: int = 128,
        encoder_sizes: Sequence[int] = (128,),
        decoder_sizes: Sequence[int] = (256,),
        cell: str = "lstm",
        bidirectional: bool = True,
        attention: str = "general",
        input_feeding: bool = False,
        tied_embeddings: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
        source_features: int = 0,
        source_stride: int = 1,
        target_features: int = 0,
        target_inputs: int = 0,
    ) -> None:
        super().__init__()
        for side, size, features in (
            ("source", source_size, source_features),
            ("target", target_size, target_features),
        ):
            if min(size, features) < 0 or (size > 0) == (features > 0):
                raise ValueError(
                    f"expected one of {side}_size and {side}_features to be at least 1 and the "
                    f"other 0, got {size} and {features}"
                )
        counts = {"embedding_size": embedding_size, "source_stride": source_stride}
        if target_features:
            counts["target_inputs"] = target_inputs
        for name, size in counts.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if tied_embeddings and target_features:
            raise ValueError("tied_embeddings needs symbols as its target, not features")
        for name, layers in {
            "encoder_sizes": encoder_sizes,
            "decoder_sizes": decoder_sizes,
        }.items():
            if not layers or min(layers) < 1:
                raise ValueError(f"{name} must be one or more positive sizes, got {list(layers)}")
        if input_feeding and attention == "none":
            raise ValueError(
                "input_feeding feeds attention back: it needs an attention, got 'none'"
            )
        query_size = decoder_sizes[-1]
        features = embedding_size if tied_embeddings else query_size
        if attention == "none" and features != query_size:
            raise ValueError(
                "tied_embeddings without attention needs embedding_size == decoder_sizes[-1], "
                f"got {embedding_size} and {query_size}"
            )
        self.input_feeding = input_feeding
        self.features_size = features
        self.dropout = nn.Dropout(dropout)
        options: dict[str, Any] = {
            "cell": cell,
            "dropout": dropout,
            "batch_first": True,
            "backend": backend,
        }

        self.source_embedding = (
            FrameEmbedding(source_features, embedding_size, source_stride)
            if source_features
            else nn.Embedding(source_size, embedding_size, padding_idx=0)
        )
        self.encoder = RecurrentStack(
            embedding_size, list(encoder_sizes), bidirectional=bidirectional, **options
        )
        directions = 2 if bidirectional else 1
        joined = [directions * size for size in encoder_sizes]
        self.bridge = Bridge(joined, decoder_sizes, has_cell=cell.startswith("lstm"))

        self.target_embedding = (
            nn.Linear(target_inputs, embedding_size)
            if target_features
            else nn.Embedding(target_size, embedding_size, padding_idx=0)
        )
        fed = features if input_feeding else 0
        self.decoder = RecurrentStack(embedding_size + fed, list(decoder_sizes), **options)
        self.attention = build_attention(attention, query_size, joined[-1])
        if self.attention is not None:
            self.combine = nn.Linear(joined[-1] + query_size, features, bias=False)
        self.output = nn.Linear(features, target_features or target_size)
        if tied_embeddings:
            nn.init.normal_(self.target_embedding.weight, std=embedding_size**-0.5)
            self.output.weight = self.target_embedding.weight

    def encode(self, source: Tensor, lengths: Tensor) -> DecoderState:
        """Read the source.

        Args:
            source: int64 [B, S], symbol numbers, 0 past the lengths; or frames [B, S, features].
            lengths: int64 [B], at least 1, on the device of `source`.

        Returns:
            The state from which decoding starts.
        """
        if isinstance(self.source_embedding, FrameEmbedding):
            embedded, lengths = self.source_embedding(source, lengths)
        else:
            embedded = self.source_embedding(source)
        keys, states = self.encoder(self.dropout(embedded), lengths=lengths)
        projected = None if self.attention is None else self.attention.project(keys)
        feed = keys.new_zeros(len(source), self.features_size) if self.input_feeding else None
        return DecoderState(EncodedSource(keys, projected, lengths), self.bridge(states), feed)

    def forward(
        self,
        source: Tensor,
        source_lengths: Tensor,
        target: Tensor,
        sampling_probability: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict each target symbol from those before it.

        Args:
            source: int64 [B, S], or frames [B, S, features].
            source_lengths: int64 [B], at least 1.
            target: int64 [B, T], the symbols fed to the decoder, the begin symbol first; or, where
                numbers are predicted, [B, T, target_inputs].
            sampling_probability: for each symbol after the first, the probability that the decoder
                is fed a sample of its own prediction in place of `target` (scheduled sampling,
                Bengio et al. 2015). Above zero, decoding goes step by step; symbols only.

        Returns:
            logits [B, T, K], step t predicting the symbol after `target[:, t]` (or the K numbers of
            step t), and the attention weights [B, T, S], None without attention.
        """
        state = self.encode(source, source_lengths)
        if self.input_feeding or sampling_probability > 0:
            features, weights = self._unroll(target, state, sampling_probability)
        else:
            outputs, _ = self.decoder(self.dropout(self.target_embedding(target)), state.layers)
            features, weights = self._attend(outputs, state.source)
        return self.output(features), weights

    def regress(
        self, source: Tensor, source_lengths: Tensor, inputs: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Predict numbers step by step, feeding each prediction back, in training as in use.

        Args:
            source: int64 [B, S], or frames [B, S, features].
            source_lengths: int64 [B], at least 1.
            inputs: [B, T, target_inputs - K], given numbers of each step.
            first: [B, K], what stands in for the prediction before the first.

        Returns:
            Predictions [B, T, K] and attention weights [B, T, S], None without attention.
        """
        state = self.encode(source, source_lengths)
        previous, outputs, weights = first, [], []
        for given in inputs.unbind(1):
            features, state, weight = self._advance(torch.cat([given, previous], -1), state)
            previous = self.output(features)
            outputs.append(previous)
            if weight is not None:
                weights.append(weight)
        return torch.stack(outputs, 1), torch.stack(weights, 1) if weights else None

    def step(self, symbols: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Advance every row by one symbol.

        Args:
            symbols: int64 [B], the previous symbol of each row.
            state: from `encode` or the step before.

        Returns:
            Log-probabilities [B, K] of the next symbol (float32 or wider), and the new state.
        """
        features, state, _ = self._advance(symbols, state)
        logits = self.output(features)
        return torch.log_softmax(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), -1
        ), state

    def _advance(
        self, symbols: Tensor, state: DecoderState
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """One step: features [B, F], the new state, and weights [B, S] where there is attention."""
        inputs = self.dropout(self.target_embedding(symbols))
        if state.feed is not None:
            inputs = torch.cat([inputs, state.feed.to(inputs.dtype)], -1)
        outputs, layers = self.decoder.step(inputs, state.layers)
        features, weights = self._attend(outputs[:, None], state.source)
        features = features[:, 0]
        feed = None if state.feed is None else features
        state = DecoderState(state.source, layers, feed)
        return features, state, None if weights is None else weights[:, 0]

    def _attend(self, outputs: Tensor, source: EncodedSource) -> tuple[Tensor, Tensor | None]:
        """Features [B, T, F] of decoder outputs [B, T, H], and the attention weights [B, T, S]."""
        if self.attention is None:
            return self.dropout(outputs), None
        context, weights = self.attention(outputs, source.keys, source.lengths, source.projected)
        features = torch.tanh(self.combine(torch.cat([context, outputs], -1)))
        return self.dropout(features), weights

    def _unroll(
        self, target: Tensor, state: DecoderState, sampling_probability: float
    ) -> tuple[Tensor, Tensor | None]:
        """Decode step by step: features [B, T, F] and weights [B, T, S]."""
        features: list[Tensor] = []
        weights: list[Tensor] = []
        symbols = target[:, 0]
        for t in range(target.shape[1]):
            if t > 0:
                symbols = target[:, t]
                if sampling_probability > 0:
                    symbols = self._mix(symbols, features[-1], sampling_probability)
            feature, state, weight = self._advance(symbols, state)
            features.append(feature)
            if weight is not None:
                weights.append(weight)
        return torch.stack(features, 1), torch.stack(weights, 1) if weights else None

    @torch.no_grad()
    def _mix(self, symbols: Tensor, features: Tensor, probability: float) -> Tensor:
        """Replace each symbol, with the given probability, by a sample of the prediction."""
        guesses = self.output(features).float().softmax(-1).multinomial(1).squeeze(-1)
        replaced = torch.rand(symbols.shape, device=symbols.device) < probability
        return torch.where(replaced, guesses, symbols)
