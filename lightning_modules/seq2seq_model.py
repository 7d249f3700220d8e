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

from fusedrnn import AttentionDecoder, RecurrentStack
from fusedrnn.attention import Attention, valid_positions
from fusedrnn.attention_decoder import DecoderState, EncodedSource, ScheduledSampling
from fusedrnn.dropout import Dropout
from fusedrnn.saving import saveable

__all__ = ["Bridge", "DecoderState", "EncodedSource", "FrameEmbedding", "Seq2SeqModel"]

LayerState = Tensor | tuple[Tensor, Tensor]


class Bridge(nn.Module):
    """Carry every encoder layer's final state, memory cells included, to every decoder layer.

    Where the encoder has as many layers as the decoder, of the same sizes (directions
    concatenated), nothing is learnt; the decoder starts from exactly what the encoder ended with::

        h_0^dec(l) = h_T^enc(l),   c_0^dec(l) = c_T^enc(l)

    For every other pair of depths and sizes, each decoder layer sees all of them::

        h_0^dec(l) = tanh(W_l [h_T^enc(1); ...; h_T^enc(L)] + b_l)
        c_0^dec(l) =      V_l [c_T^enc(1); ...; c_T^enc(L)] + d_l

    tanh keeps h in the range an output gate gives it; the memory cell has no such bound. Where only
    the encoder has memory cells, they stand beside the h_T in the first equation; where only the
    decoder has, the h_T stand for them in the second.

    Args:
        encoder_sizes: state size of each encoder layer, directions concatenated.
        decoder_sizes: state size of each decoder layer.
        has_cell: whether the decoder's states are (h, c).
        given_cell: whether the encoder's are; None: as the decoder's.
    """

    def __init__(
        self,
        encoder_sizes: Sequence[int],
        decoder_sizes: Sequence[int],
        has_cell: bool,
        given_cell: bool | None = None,
    ) -> None:
        super().__init__()
        given_cell = has_cell if given_cell is None else given_cell
        self.exact = given_cell == has_cell and list(encoder_sizes) == list(decoder_sizes)
        self.has_cell = has_cell
        if self.exact:
            return
        total = sum(encoder_sizes)
        read = 2 * total if given_cell and not has_cell else total
        self.hidden = nn.ModuleList(nn.Linear(read, size) for size in decoder_sizes)
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
        if not self.has_cell:
            return [*self._project(hidden + cell, "hidden")]
        cell = self._project(cell or hidden, "cell")
        return [*zip(self._project(hidden, "hidden"), cell, strict=True)]

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


class CopyState(NamedTuple):
    """The decoder's state, and what can be copied.

    Attributes:
        decoder: its state.
        copies: int64 [M, S], the numbers under which the symbols of each source are written.
        size: of the target vocabulary and the copied symbols that it lacks.
    """

    decoder: DecoderState
    copies: Tensor
    size: int

    @property
    def source(self) -> EncodedSource:
        """The encoded source."""
        return self.decoder.source

    def select(self, rows: Tensor, sources: Tensor | None = None) -> CopyState:
        """Keep, repeat or reorder rows; see `DecoderState.select`."""
        kept = sources
        if kept is None:
            kept = rows // (self.decoder.size // len(self.copies))
        return CopyState(self.decoder.select(rows, sources), self.copies[kept], self.size)


@saveable
class Seq2SeqModel(nn.Module):
    """Recurrent encoder-decoder with optional attention (Luong 2015, Bahdanau 2014).

    With `attention="none"` this is the plain encoder-decoder (Sutskever 2014): the source reaches
    the decoder through its initial state only, and `p(y_t) = softmax(W h_t)`. With attention::

        h_t     = decoder(y_{t-1}, h_{t-1})                 or  decoder([y_{t-1}; a_{t-1}], h_{t-1})
        context = sum_s weights[t, s] encoded[s]                (input feeding)
        a_t     = tanh(W_a [context; h_t])
        p(y_t)  = softmax(W a_t)

    or with the context that h_{t-1} attends to fed into the cell (`feedback="context"`). Teacher
    forcing and scheduled sampling are one call of `fusedrnn.AttentionDecoder` over all T steps.

    With `copy` it is a pointer-generator network (See et al. 2017), which mixes that distribution
    with the attention, each source position standing for its symbol::

        p(w) = g softmax(W a_t)[w] + (1 - g) sum_{s: x_s = w} weights[t, s]
        g    = sigmoid(v [a_t; y_{t-1}] + b)

    (a_t stands for the context and the state of which it is made). Symbols that the target
    vocabulary lacks have numbers from K on, in each row its own; fed back, they are symbol 1, the
    unknown one.

    With `source_features` the source is frames of features instead of symbols. With
    `target_features` the model predicts numbers, `y_t = W a_t + b`, and the decoder is fed
    `target_inputs` given numbers at each step; `regress` feeds it its own results as well.

    Args:
        source_size: number of source symbols, 0 being padding; 0 where the source is features.
        target_size: K, number of target symbols, 0 being padding; 0 where numbers are predicted.
        embedding_size: E, of both sides.
        encoder_sizes: hidden size of each encoder layer, per direction.
        decoder_sizes: hidden size of each decoder layer.
        cell: "lstm" or "gru", or any other cell of `RecurrentStack`, of both sides.
        bidirectional: whether the encoder reads in both directions.
        attention: "none", "dot", "general" or "additive".
        input_feeding: whether the attentional features of a step enter the cell at the next one.
        tied_embeddings: whether the output layer uses the target embeddings as its weights. The
            features then have the embeddings' size.
        dropout: probability, on embeddings, between layers and before the output.
        backend: of the recurrent layers; see `fusedrnn.LSTM`.
        feedback: "none"; "features", which is `input_feeding`; or "context" (Bahdanau 2014), the
            result of the attention from before a step, fed to the cell in that step.
        coverage: whether the attention sees how much it has attended to each key before.
        copy: whether symbols can be copied from the source.
        source_features: numbers in a frame of the source.
        source_stride: frames that become one step of the encoder.
        target_features: K, numbers predicted at each step.
        target_inputs: numbers that the decoder is fed at each step.
        decoder_cell: of the decoder's layers; None: `cell`.

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
        feedback: str = "none",
        coverage: bool = False,
        copy: bool = False,
        source_features: int = 0,
        source_stride: int = 1,
        target_features: int = 0,
        target_inputs: int = 0,
        decoder_cell: str | None = None,
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
        if copy and (attention == "none" or source_features or target_features):
            raise ValueError("copy needs an attention, and symbols on both sides")
        if input_feeding and feedback == "context":
            raise ValueError("input_feeding and feedback='context' exclude each other")
        feedback = "features" if input_feeding else feedback
        query_size = decoder_sizes[-1]
        features = embedding_size if tied_embeddings else query_size
        if attention == "none" and features != query_size:
            raise ValueError(
                "tied_embeddings without attention needs embedding_size == decoder_sizes[-1], "
                f"got {embedding_size} and {query_size}"
            )
        self.dropout = Dropout(dropout)
        decoder_cell = cell if decoder_cell is None else decoder_cell

        self.source_embedding = (
            FrameEmbedding(source_features, embedding_size, source_stride)
            if source_features
            else nn.Embedding(source_size, embedding_size, padding_idx=0)
        )
        self.encoder = RecurrentStack(
            embedding_size,
            list(encoder_sizes),
            cell=cell,
            bidirectional=bidirectional,
            dropout=dropout,
            batch_first=True,
            backend=backend,
        )
        directions = 2 if bidirectional else 1
        joined = [directions * size for size in encoder_sizes]
        has_cell, given_cell = (name.startswith("lstm") for name in (decoder_cell, cell))
        self.bridge = Bridge(joined, decoder_sizes, has_cell, given_cell)

        self.target_embedding = (
            nn.Linear(target_inputs, embedding_size)
            if target_features
            else nn.Embedding(target_size, embedding_size, padding_idx=0)
        )
        self.decoder = AttentionDecoder(
            embedding_size,
            decoder_sizes,
            joined[-1],
            features,
            cell=decoder_cell,
            attention=attention,
            feedback=feedback,
            coverage=coverage,
            dropout=dropout,
            backend=backend,
        )
        self.output = nn.Linear(features, target_features or target_size)
        if tied_embeddings:
            nn.init.normal_(self.target_embedding.weight, std=embedding_size**-0.5)
            self.output.weight = self.target_embedding.weight
        self.target_size = target_size
        self.copy_gate = nn.Linear(features + embedding_size, 1) if copy else None
        self.register_load_state_dict_pre_hook(rename)

    @property
    def attention(self) -> Attention | None:
        """The decoder's attention."""
        return self.decoder.attention

    def encode(self, source: Tensor, lengths: Tensor) -> DecoderState | CopyState:
        """Read the source.

        Args:
            source: int64 [B, S], symbol numbers, 0 past the lengths; with `copy` [B, S, 2], the
                numbers under which the symbols are written beside them; or frames [B, S, features].
            lengths: int64 [B], at least 1, on the device of `source`.

        Returns:
            The state from which decoding starts.
        """
        if self.copy_gate is not None:
            source, copies = source.unbind(-1)
        if isinstance(self.source_embedding, FrameEmbedding):
            embedded, lengths = self.source_embedding(source, lengths)
        else:
            embedded = self.source_embedding(source)
        keys, states = self.encoder(self.dropout(embedded), lengths=lengths)
        state = self.decoder.start(keys, lengths, self.bridge(states))
        if self.copy_gate is None:
            return state
        return CopyState(state, copies, max(self.target_size, int(copies.max()) + 1))

    def forward(
        self,
        source: Tensor,
        source_lengths: Tensor,
        target: Tensor,
        sampling_probability: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict each target symbol from those before it.

        Args:
            source: as for `encode`.
            source_lengths: int64 [B], at least 1.
            target: int64 [B, T], the symbols fed to the decoder, the begin symbol first; or, where
                numbers are predicted, [B, T, target_inputs].
            sampling_probability: for each symbol after the first, the probability that the decoder
                is fed a sample of its own prediction in place of `target` (scheduled sampling,
                Bengio et al. 2015). Symbols only; with `copy` the decoder goes step by step then.

        Returns:
            logits [B, T, K], step t predicting the symbol after `target[:, t]` (or the K numbers of
            step t; with `copy` the log-probabilities of those K and all copied symbols), and the
            attention weights [B, T, S], None without attention. What stands where `target` is
            padded is finite, and means nothing.
        """
        state = self.encode(source, source_lengths)
        if isinstance(state, CopyState):
            mixed, looks = (
                self._sample_copies(target, state, sampling_probability)
                if sampling_probability > 0
                else self._force_copies(target, state)
            )
            # 1e-30: a target that nothing points at has a large loss, not an infinite one
            return mixed.clamp(min=1e-30).log(), looks
        sampling = None
        if sampling_probability > 0:
            if not isinstance(self.target_embedding, nn.Embedding):
                raise ValueError("sampling_probability: expected 0 where numbers are predicted")
            sampling = ScheduledSampling(
                target, self.target_embedding, self.output, sampling_probability
            )
        embedded = self.target_embedding(target)
        if sampling is None and target.dim() == 2:
            features, weights = self.decoder.ragged(embedded, state, _filled(target))
        else:
            found, _ = self.decoder(embedded, state, sampling)
            features, weights = found.features, found.weights
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
        assert isinstance(state, DecoderState)  # numbers are not copied
        previous, outputs, weights = first, [], []
        for given in inputs.unbind(1):
            embedded = self.target_embedding(torch.cat([given, previous], -1))
            found, state = self.decoder.step(embedded, state)
            previous = self.output(found.features)
            outputs.append(previous)
            if found.weights is not None:
                weights.append(found.weights)
        return torch.stack(outputs, 1), torch.stack(weights, 1) if weights else None

    def step(self, symbols: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Advance every row by one symbol.

        Args:
            symbols: int64 [B], the previous symbol of each row.
            state: from `encode` or the step before.

        Returns:
            Log-probabilities [B, K] of the next symbol (float32 or wider), and the new state.
        """
        if isinstance(state, CopyState):
            mixed, _, state = self._copy_step(symbols, state)
            return mixed[:, 0].log(), state
        inputs = None
        if symbols.device.type == "cpu":
            symbols, inputs = symbols.unique(return_inverse=True)
        found, state = self.decoder.step(self.target_embedding(symbols), state, inputs)
        logits = self.output(found.features)
        return torch.log_softmax(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), -1
        ), state

    def _copy_step(self, symbols: Tensor, state: CopyState) -> tuple[Tensor, Tensor, CopyState]:
        """Probabilities [B, 1, size] after symbols [B], attention weights [B, 1, S], new state."""
        embedded = self.target_embedding(self._known(symbols))
        found, inner = self.decoder.step(embedded, state.decoder)
        copies = state.copies.repeat_interleave(len(symbols) // len(state.copies), 0)
        assert found.weights is not None  # copying needs an attention
        features, weights = found.features[:, None], found.weights[:, None]
        mixed = self._mix(features, embedded[:, None], weights, copies, state.size)
        return mixed, weights, state._replace(decoder=inner)

    def _force_copies(self, target: Tensor, state: CopyState) -> tuple[Tensor, Tensor]:
        """Teacher forcing: probabilities [B, T, size] and attention weights [B, T, S]."""
        embedded = self.target_embedding(self._known(target))
        features, weights = self.decoder.ragged(embedded, state.decoder, _filled(target))
        assert weights is not None  # copying needs an attention
        return self._mix(features, embedded, weights, state.copies, state.size), weights

    def _sample_copies(
        self, target: Tensor, state: CopyState, probability: float
    ) -> tuple[Tensor, Tensor]:
        """Scheduled sampling from what `_mix` returns, copied symbols included, step by step."""
        replaced = torch.rand(target.shape, device=target.device) < probability
        steps: list[Tensor] = []
        looks: list[Tensor] = []
        for t, symbols in enumerate(target.unbind(1)):
            if steps:
                drawn = steps[-1][:, 0].detach().multinomial(1).squeeze(1)
                symbols = torch.where(replaced[:, t], drawn, symbols)
            mixed, weights, state = self._copy_step(symbols, state)
            steps.append(mixed)
            looks.append(weights)
        return torch.cat(steps, 1), torch.cat(looks, 1)

    def _known(self, symbols: Tensor) -> Tensor:
        """Symbols as they are fed back: those that the vocabulary lacks are unknown."""
        return symbols.masked_fill(symbols >= self.target_size, 1)

    def _mix(
        self, features: Tensor, embedded: Tensor, weights: Tensor, copies: Tensor, size: int
    ) -> Tensor:
        """Probabilities [B, T, size] from what was generated and what was copied, in fp32.

        They add up to 1 up to rounding, and are cut off there, as search needs them to be.
        """
        assert self.copy_gate is not None
        logits, gate = self.output(features), self.copy_gate(torch.cat([features, embedded], -1))
        wide = torch.promote_types(logits.dtype, torch.float32)
        gate = gate.to(wide).sigmoid()
        generated = nn.functional.pad(
            gate * logits.to(wide).softmax(-1), (0, size - self.target_size)
        )
        places = copies[:, None].expand_as(weights)
        return generated.scatter_add(2, places, (1 - gate) * weights.to(wide)).clamp(max=1.0)


def _filled(symbols: Tensor) -> Tensor:
    """Lengths [B] of rows of symbols [B, T] without the padding at their ends, at least 1."""
    places = torch.arange(1, symbols.shape[1] + 1, device=symbols.device)
    return (places * (symbols != 0)).amax(1).clamp(min=1)


def rename(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take weights from before the decoder became one module."""
    for old, new in (
        ("decoder.layers.", "decoder.stack.layers."),
        ("attention.", "decoder.attention."),
        ("combine.", "decoder.combine."),
    ):
        for name in [name for name in weights if name.startswith(prefix + old)]:
            weights[prefix + new + name[len(prefix + old) :]] = weights.pop(name)
