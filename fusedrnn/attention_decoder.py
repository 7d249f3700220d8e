"""AttentionDecoder: recurrent layers and an attention over encoder states, in one time loop.

Dimensions: B batch, T target steps, S source length, E input size, Q hidden size of the top layer,
K size of a key (encoder state), P of a projected key, F of the attentional features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from kernels.attention import (
    FEEDBACKS,
    DecoderWeights,
    LayerWeights,
    Masks,
    Problem,
    Sampling,
    decode,
)
from kernels.attention.spec import CELLS
from kernels.attention.stepper import Parents, advance

from .attention import AdditiveAttention, build_attention, fast_tanh
from .dropout import Dropout, dropout_mask
from .stack import LayerState, RecurrentStack

__all__ = [
    "AttentionDecoder",
    "DecoderOutput",
    "DecoderState",
    "EncodedSource",
    "ScheduledSampling",
]


class EncodedSource(NamedTuple):
    """What the decoder may look at while it writes.

    Attributes:
        keys: [B, S, K], outputs of the last encoder layer.
        projected: [B, S, P], the keys as the attention's score wants them; None without attention.
        lengths: int64 [B].
        combined: [B, S, F], what each key adds to the features before tanh; only where it was worth
            computing.
    """

    keys: Tensor
    projected: Tensor | None
    lengths: Tensor
    combined: Tensor | None = None

    def select(self, rows: Tensor) -> EncodedSource:
        """Keep, repeat or reorder rows, int64 [N]."""
        fields = (None if v is None else v.index_select(0, rows) for v in self)
        return EncodedSource(*cast(Any, fields))


class DecoderState(NamedTuple):
    """Everything a decoding step needs besides its input.

    Attributes:
        source: the encoded source of each row, or of each group of as many rows.
        layers: one entry per decoder layer, h [1, R, H] or (h, c).
        feed: [R, F], the last attentional features with feedback "features", else None.
        coverage: [R, S], the attention given so far, with coverage, else None.
        rows: int64 [B], which of R each row continues, so that rows which continue the same can
            share work; None: R = B, each its own.
    """

    source: EncodedSource
    layers: list[LayerState]
    feed: Tensor | None = None
    coverage: Tensor | None = None
    rows: Tensor | None = None

    @property
    def size(self) -> int:
        """B, the number of rows."""
        return self._stored if self.rows is None else len(self.rows)

    @property
    def _stored(self) -> int:
        """R."""
        top = self.layers[-1]
        return (top[0] if isinstance(top, tuple) else top).shape[1]

    def select(self, rows: Tensor, sources: Tensor | None = None) -> DecoderState:
        """Keep, repeat or reorder rows.

        Args:
            rows: int64 [N], indices into the rows.
            sources: int64 [M], in ascending order, the encoded sources that stay. Row i then reads
                source i // (N / M), so that hypotheses of one source share it. None gives each row
                a source of its own.

        Returns:
            The state of those N rows.
        """
        kept = rows if self.rows is None else self.rows.index_select(0, rows)
        return self._replace(source=self._sources(rows, sources), rows=kept)

    def apart(self) -> DecoderState:
        """The same with layers, feed and coverage of its own for each row."""
        if self.rows is None:
            return self
        rows = self.rows
        layers = [
            (s[0].index_select(1, rows), s[1].index_select(1, rows))
            if isinstance(s, tuple)
            else s.index_select(1, rows)
            for s in self.layers
        ]
        feed, coverage = (
            None if v is None else v.index_select(0, rows) for v in (self.feed, self.coverage)
        )
        return DecoderState(self.source, layers, feed, coverage)

    def asks(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What an attention weighs by: queries, projected keys, lengths and coverage.

        Args:
            query: [B, *, Q] of each row; they are put together by source, [M, *, Q].
        """
        _, projected, lengths, _ = self.source
        assert projected is not None
        seen = None if self.coverage is None else self.coverage.unflatten(0, (len(lengths), -1))
        return query.reshape(len(lengths), -1, query.shape[-1]), projected, lengths, seen

    def parents(self) -> Parents:
        """What the rows continue."""
        rows = self.rows
        if rows is None:
            rows = torch.arange(self.size, device=self.source.lengths.device)
        return Parents.of(rows, self._stored)

    def _sources(self, rows: Tensor, kept: Tensor | None) -> EncodedSource:
        """The sources of selected rows; where all stay, without a copy."""
        if kept is None:
            kept = rows // (self.size // len(self.source.lengths))
        elif len(kept) == len(self.source.lengths):
            return self.source
        return self.source.select(kept)


class DecoderOutput(NamedTuple):
    """What the decoder computes at each step; `step` gives it without the T.

    Attributes:
        features: [B, T, F], what predicts: tanh(W [context; output]) after dropout, or without
            attention the output after dropout.
        outputs: [B, T, Q], of the top layer.
        context: [B, T, K], None without attention, or where a step found the features without.
        weights: [B, T, S], of the attention, zero at padding; None without.
        symbols: int64 [B, T], what was fed under scheduled sampling, else None.
    """

    features: Tensor
    outputs: Tensor
    context: Tensor | None
    weights: Tensor | None
    symbols: Tensor | None = None


class ScheduledSampling(NamedTuple):
    """Feeds some of the decoder's own predictions back (Bengio et al. 2015).

    Attributes:
        symbols: int64 [B, T], what is fed otherwise.
        embedding: of the V symbols [V, E]; what is fed is its weight, with the decoder's dropout.
        output: from features to logits over the symbols [V, F].
        probability: with which each symbol after the first is a sample of the prediction.
    """

    symbols: Tensor
    embedding: nn.Embedding
    output: nn.Linear
    probability: float


class AttentionDecoder(nn.Module):
    """Recurrent decoder that attends to encoder states, teacher-forced or step by step.

    With feedback "features" (Luong et al. 2015, input feeding) or "context" (Bahdanau et al. 2014)
    a step is::

        features                                    context
        s_t = cell([y_t; a_{t-1}], s_{t-1})         alpha_t, c_t = attend(h_{t-1})
        alpha_t, c_t = attend(h_t)                  s_t = cell([y_t; c_t], s_{t-1})
        a_t = tanh(W [c_t; h_t])                    a_t = tanh(W [c_t; h_t])

    h is that of the top layer, the lowest one is fed, and a_t predicts. Without feedback and
    coverage all steps are one call of the recurrent layers and one batched attention; with either,
    one call of `kernels.attention.decode`. Cells other than "lstm" and "gru" go step by step then.

    Args:
        input_size: E, of y_t.
        hidden_sizes: of each layer, from the input up.
        key_size: K.
        features_size: F; None takes the top layer's hidden size.
        cell: "lstm", "gru", or any other cell of `RecurrentStack`.
        attention: "none", "dot", "general" or "additive".
        feedback: "none", "features" or "context".
        coverage: whether the attention's score sees the attention given before.
        dropout: probability, on the input, between layers and on the features.
        backend: "auto", "triton", "torch" or "reference".

    Raises:
        ValueError: an argument is out of range, or two of them exclude each other.
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: Sequence[int],
        key_size: int,
        features_size: int | None = None,
        cell: str = "lstm",
        attention: str = "general",
        feedback: str = "none",
        coverage: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if feedback not in FEEDBACKS:
            raise ValueError(f"feedback must be one of {', '.join(FEEDBACKS)}, got {feedback!r}")
        if feedback != "none" and attention == "none":
            raise ValueError(f"feedback={feedback!r} needs an attention, got 'none'")
        if not hidden_sizes:
            raise ValueError("hidden_sizes must name at least one layer")
        query_size = hidden_sizes[-1]
        self.features_size = query_size if features_size is None else features_size
        if attention == "none" and self.features_size != query_size:
            raise ValueError(
                f"without attention the features are the outputs, of size {query_size}: "
                f"features_size cannot be {features_size}"
            )
        fed = {"none": 0, "features": self.features_size, "context": key_size}[feedback]
        self.cell, self.feedback, self.backend = cell, feedback, backend
        self.key_size = key_size
        self.stack = RecurrentStack(
            input_size + fed,
            list(hidden_sizes),
            cell=cell,
            dropout=dropout,
            batch_first=True,
            backend=backend,
        )
        self.attention = build_attention(attention, query_size, key_size, coverage)
        if self.attention is not None:
            self.combine = nn.Linear(key_size + query_size, self.features_size, bias=False)
        self.dropout = Dropout(dropout)

    @property
    def covers(self) -> bool:
        """Whether the attention has coverage."""
        return self.attention is not None and self.attention.coverage is not None

    def start(self, keys: Tensor, lengths: Tensor, layers: Sequence[LayerState]) -> DecoderState:
        """The state before the first step.

        Args:
            keys: [B, S, K], encoder states; finite values past the lengths change nothing.
            lengths: int64 [B], each in 1..S.
            layers: initial state of each layer, h [1, B, H] or (h, c).
        """
        projected = None if self.attention is None else self.attention.project(keys)
        feed = None
        if self.feedback == "features":
            feed = keys.new_zeros(len(keys), self.features_size)
        coverage = keys.new_zeros(keys.shape[:2]) if self.covers else None
        return DecoderState(EncodedSource(keys, projected, lengths), [*layers], feed, coverage)

    def forward(
        self, x: Tensor, state: DecoderState, sampling: ScheduledSampling | None = None
    ) -> tuple[DecoderOutput, DecoderState]:
        """Decode all steps, each from the given input.

        Args:
            x: [B, T, E], y_t; with `sampling`, `sampling.embedding(sampling.symbols)`.
            state: from `start`, or after earlier steps.
            sampling: scheduled sampling; None: teacher forcing.

        Returns:
            What every step computes, and the state after the last one.

        Raises:
            ValueError: a shape does not fit.
        """
        if sampling is not None and sampling.probability == 0:
            sampling = None
        state = state.apart()
        loop = self.feedback != "none" or self.covers or sampling is not None
        if loop and self.attention is not None and self.cell in CELLS:
            return self._loop(x, state, sampling)
        if loop:
            return self._steps(x, state, sampling)
        outputs, layers = self.stack(self.dropout(x), state.layers)
        return self._attend(outputs, state), state._replace(layers=layers)

    def ragged(
        self, x: Tensor, state: DecoderState, lengths: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Decode all steps of rows of different lengths, each from the given input.

        On a CPU a time loop leaves out what stands past the lengths.

        Args:
            x: [B, T, E].
            state: from `start`, or after earlier steps.
            lengths: int64 [B], each in 1..T, how many steps of each row count.

        Returns:
            Features and weights of every step; finite but without meaning past the lengths.
        """
        loop = self.attention is not None and (self.feedback != "none" or self.covers)
        if not loop or x.device.type != "cpu" or self.cell not in CELLS:
            found, _ = self(x, state)
            return found.features, found.weights
        lengths, order = lengths.sort(descending=True, stable=True)
        longest = int(lengths[0])
        counts = (lengths[:, None] > torch.arange(longest)).sum(0).tolist()
        given, state = x[:, :longest].index_select(0, order), state.select(order).apart()
        found, _ = self._loop(given, state, None, counts)
        back, missing = order.argsort(), x.shape[1] - longest
        features, weights = (
            nn.functional.pad(cast(Tensor, v).index_select(0, back), (0, 0, 0, missing))
            if missing
            else cast(Tensor, v).index_select(0, back)
            for v in (found.features, found.weights)
        )
        return features, weights

    def step(
        self, x_t: Tensor, state: DecoderState, inputs: Tensor | None = None
    ) -> tuple[DecoderOutput, DecoderState]:
        """Decode one step.

        Args:
            x_t: [M, E].
            state: of B rows, from `start`, or after earlier steps.
            inputs: int64 [B], which of x_t each row takes; None: M = B, its own.

        Returns:
            What the step computes, and the state after it.
        """
        if self._shares(x_t):
            return self._shared_step(x_t, inputs, state)
        x_t = x_t if inputs is None else x_t.index_select(0, inputs)
        return self._step(self.dropout(x_t), state.apart())

    def _shares(self, x: Tensor) -> bool:
        """Whether the rows of a step can share work, which a CPU without gradients wants."""
        return (
            x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.float64)
            and self.cell in CELLS
            and not (
                self.training
                or torch.is_grad_enabled()
                or torch.is_autocast_enabled("cpu")
                or torch.compiler.is_compiling()
            )
        )

    def _shared_step(
        self, x: Tensor, inputs: Tensor | None, state: DecoderState
    ) -> tuple[DecoderOutput, DecoderState]:
        """A step in which what several rows have in common is computed once."""
        parents = state.parents()
        layers = [tuple(s[0] for s in v) if isinstance(v, tuple) else (v[0],) for v in state.layers]
        coverage = state.coverage
        if coverage is not None:
            coverage = coverage.index_select(0, parents.rows)
        now, found = state._replace(coverage=coverage), None
        fed = None if state.feed is None else state.feed.index_select(0, parents.kept)
        if self.feedback == "context":
            query = layers[-1][0].index_select(0, parents.rows)
            found = self._look(query[:, None], now)
            fed = parents.gather(found[0][:, 0])
        final = advance(self.cell, self._layers(), x, inputs, fed, layers, parents)
        source, outputs = state.source, final[-1][0]
        if found is None and self.attention is not None and now.size > len(source.keys):
            source, result = self._attend_combined(outputs, now)
        else:
            result = self._attend(outputs[:, None], now, found)
            result = DecoderOutput(*(cast(Any, None if v is None else v[:, 0]) for v in result))
        if coverage is not None and result.weights is not None:
            coverage = coverage + result.weights
        feed = None if state.feed is None else result.features
        new = [(s[0][None], s[1][None]) if len(s) == 2 else s[0][None] for s in final]
        return result, DecoderState(source, cast(list[LayerState], new), feed, coverage)

    def _attend_combined(
        self, outputs: Tensor, state: DecoderState
    ) -> tuple[EncodedSource, DecoderOutput]:
        """`_attend` for outputs [B, Q] of which several share a source.

        The keys' part of the features is linear: it is computed once for each key, and averaged.
        """
        of_keys, of_outputs = self.combine.weight.split((self.key_size, outputs.shape[-1]), 1)
        source = state.source
        if source.combined is None:
            source = source._replace(combined=source.keys @ of_keys.t())
        assert self.attention is not None and source.combined is not None
        weights = self.attention.weigh(*state.asks(outputs))
        mixed = (weights @ source.combined).flatten(0, 1)
        features = fast_tanh(mixed.addmm_(outputs, of_outputs.t()))
        return source, DecoderOutput(features, outputs, None, weights.flatten(0, 1))

    def _step(self, x: Tensor, state: DecoderState) -> tuple[DecoderOutput, DecoderState]:
        found = None
        if self.feedback == "context":
            top = state.layers[-1]
            query = top[0] if isinstance(top, tuple) else top
            found = self._look(query.transpose(0, 1), state)
            x = torch.cat([x, found[0][:, 0].to(x.dtype)], -1)
        elif state.feed is not None:
            x = torch.cat([x, state.feed.to(x.dtype)], -1)
        outputs, layers = self.stack.step(x, state.layers)
        result = self._attend(outputs[:, None], state, found)
        result = DecoderOutput(*(cast(Any, None if v is None else v[:, 0]) for v in result))
        feed = None if state.feed is None else result.features
        coverage = state.coverage
        if coverage is not None and result.weights is not None:
            coverage = coverage + result.weights
        return result, DecoderState(state.source, layers, feed, coverage)

    def _look(self, query: Tensor, state: DecoderState) -> tuple[Tensor, Tensor]:
        """Context [B, q, K] and weights [B, q, S] of queries [B, q, Q]."""
        assert self.attention is not None
        shared, projected, lengths, seen = state.asks(query)
        context, weights = self.attention(shared, state.source.keys, lengths, projected, seen)
        places = query.shape[:2]
        return context.reshape(*places, -1), weights.reshape(*places, -1)

    def _attend(
        self, outputs: Tensor, state: DecoderState, found: tuple[Tensor, Tensor] | None = None
    ) -> DecoderOutput:
        """From outputs [B, q, Q] to the rest, by one batched attention unless it was `found`."""
        if self.attention is None:
            return DecoderOutput(self.dropout(outputs), outputs, None, None)
        context, weights = self._look(outputs, state) if found is None else found
        features = fast_tanh(self.combine(torch.cat([context, outputs], -1)))
        return DecoderOutput(self.dropout(features), outputs, context, weights)

    def _steps(
        self, x: Tensor, state: DecoderState, sampling: ScheduledSampling | None
    ) -> tuple[DecoderOutput, DecoderState]:
        """Step by step, under autograd."""
        drawn = None if sampling is None else self._draws(x.transpose(0, 1), sampling)
        results: list[DecoderOutput] = []
        for t in range(x.shape[1]):
            if drawn is None:
                result, state = self._step(self.dropout(x[:, t]), state)
            else:
                features = results[-1].features if results else x[:, 0]
                symbols = drawn.draw(t, features)
                result, state = self._step(drawn.inputs(symbols, t), state)
                result = result._replace(symbols=symbols)
            results.append(result)
        columns = zip(*results, strict=True)
        parts = [None if c[0] is None else torch.stack(cast(Any, c), 1) for c in columns]
        return DecoderOutput(*cast(Any, parts)), state

    def _mask(self, x: Tensor, size: int) -> Tensor | None:
        """A dropout mask [T, B, size] for x [T, B, *]; None where nothing is dropped."""
        if not self.training or self.dropout.p == 0:
            return None
        return dropout_mask(x, (*x.shape[:2], size), self.dropout.p)

    def _draws(self, x: Tensor, sampling: ScheduledSampling) -> Sampling:
        """Scheduled sampling as the kernels take it; x is [T, B, E]."""
        symbols = sampling.symbols.t()
        replaced = torch.rand(symbols.shape, device=x.device) < sampling.probability
        replaced[0] = False
        uniform = torch.rand(symbols.shape, device=x.device)
        embedding, output = sampling.embedding, sampling.output
        return Sampling(
            symbols,
            replaced,
            uniform,
            embedding.weight,
            output.weight,
            output.bias,
            self._mask(x, x.shape[2]),
            embedding.padding_idx,
        )

    def _layers(self) -> list[LayerWeights]:
        """The parameters of the recurrent layers."""
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        return [
            LayerWeights(*(cast(Any, getattr(layer, n, None)) for n in names))
            for layer in self.stack.layers
        ]

    def weights(self) -> DecoderWeights:
        """The parameters as `kernels.attention.decode` takes them."""
        assert self.attention is not None
        query = energy = None
        if isinstance(self.attention, AdditiveAttention):
            query, energy = self.attention.query.weight, self.attention.energy.weight[0]
        return DecoderWeights(
            self._layers(), self.combine.weight, query, energy, self.attention.coverage
        )

    def _loop(
        self,
        x: Tensor,
        state: DecoderState,
        sampling: ScheduledSampling | None,
        counts: Sequence[int] | None = None,
    ) -> tuple[DecoderOutput, DecoderState]:
        """One call of the kernels for all steps; `counts` as theirs."""
        keys, projected, lengths, _ = state.source
        assert projected is not None
        x = x.transpose(0, 1)
        drawn = None if sampling is None else self._draws(x, sampling)
        between = [self._mask(x, size) for size in self.stack.hidden_sizes[:-1]]
        masks = Masks(
            [] if None in between else cast(list[Tensor], between),
            self._mask(x, self.features_size),
        )
        found = decode(
            Problem(self.cell, self.feedback),
            x if drawn is not None else self.dropout(x),
            keys,
            projected,
            lengths,
            self.weights(),
            [tuple(s[0] for s in v) if isinstance(v, tuple) else (v[0],) for v in state.layers],
            state.feed,
            state.coverage,
            masks,
            drawn,
            self.backend,
            counts,
        )
        layers = [(s[0][None], s[1][None]) if len(s) == 2 else s[0][None] for s in found.states]
        results = (found.features, found.outputs, found.context, found.weights, found.symbols)
        feed = None if state.feed is None else found.features[-1]
        coverage = None if state.coverage is None else state.coverage + found.weights.sum(0)
        return (
            DecoderOutput(*(cast(Any, None if v is None else v.transpose(0, 1)) for v in results)),
            DecoderState(state.source, cast(list[LayerState], layers), feed, coverage),
        )
