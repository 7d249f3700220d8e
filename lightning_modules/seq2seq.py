"""Training, evaluation and use of the encoder-decoder on text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules.base import CheckpointError, Task, evaluation
from lightning_modules.data.batching import pad
from lightning_modules.data.pairs import PairBatch, PairCodec
from lightning_modules.data.speech import SpeechCodec
from lightning_modules.reporting import log_figure, log_table, spread
from lightning_modules.search import Hypotheses, SearchOptions, ensemble, normalise
from lightning_modules.seq2seq_model import Seq2SeqModel, rename
from lightning_modules.text_metrics import SacreBLEU, SymbolErrorRate, WordErrorRate

__all__ = ["Seq2Seq", "SpeechToText"]

SAMPLES_PER_BATCH, SAMPLES, ALIGNMENTS = 4, 20, 4
"""Rows kept of each evaluation batch, rows shown in the table, alignments drawn."""

WIDEST, TALLEST, MOST_LABELS = 14.0, 24.0, 80
"""Of the drawing of an alignment: inches across and down, labels of an axis."""

GREEDY = SearchOptions()
LENGTH_PENALTY = 0.6
"""Of beam search unless another is asked for."""
NO_ATTENTION = "this model has no attention to show"


class Translation(NamedTuple):
    """A result.

    Attributes:
        text: what was written.
        score: its length-normalised log-probability.
        symbols: of the text.
        weights: what the decoder looked at, [T + 1, S], where asked for; see `Seq2Seq.alignments`.
    """

    text: str
    score: float
    symbols: list[str]
    weights: Tensor | None = None


class _Sample(NamedTuple):
    """A row of an evaluation, to be shown."""

    text: str
    prediction: list[int]
    score: float
    references: list[list[str]]
    source: Tensor


class Seq2Seq(Task):
    """Turns one sequence of symbols into another: letters into phonemes, a text into its summary.

    Summaries, which repeat names and numbers of the text, want a codec that copies (`data.copy`)
    and `coverage` (See et al., 2017).

    Validation and testing decode freely, as in use, and report the teacher-forced loss and symbol
    accuracy beside the score of what was decoded.

    Args:
        codec: of the data; see `PairCodec`.
        embedding_size: of the symbols of both sides.
        encoder_sizes: hidden size of each encoder layer, per direction.
        decoder_sizes: hidden size of each decoder layer.
        cell: `lstm` or `gru`, of both sides.
        bidirectional: whether the encoder reads in both directions.
        attention: `none`, `dot`, `general` or `additive`.
        input_feeding: whether the attention's result enters the decoder cell at the next step.
        tied_embeddings: whether the output layer and the target embeddings share their weights.
        dropout: probability, on embeddings, between layers and before the output.
        label_smoothing: share of the probability that training spreads over all symbols; with a
            codec that copies, over those of the vocabulary.
        sampling_probability: in training, the probability with which a symbol that the decoder is
            fed is its own guess (scheduled sampling).
        sampling_steps: optimizer steps over which that probability grows linearly from 0.
        score: what to compute on decoded text: `per`, phoneme error rate, and the share of wrong
            words, a row being one; `wer`, word and character error rate, a row being an utterance;
            or `bleu`, with and without regard to case.
        max_length_ratio: decoding stops after this many symbols per source symbol, ...
        max_length_extra: ... plus this many.
        test_beam_size: hypotheses that the search of `test` keeps, with the length penalty of
            `translate`; 1: greedy, as validation always is.
        backend: of the recurrent layers.
        source_stride: frames of a recording that become one step of the encoder.
        feedback: what of the attention enters the decoder cell: `none`; `features`, which is
            `input_feeding`; or `context`, before the step (Bahdanau et al., 2014).
        coverage: whether the attention sees how much it has looked at each source symbol before
            (See et al., 2017), so as to leave nothing out and repeat nothing.
        decoder_cell: `lstm` or `gru`, of the decoder; by default `cell`.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate scheduler from the optimizer.

    Raises:
        ValueError: an argument is out of range, or two of them exclude each other.
    """

    codec_class: type[PairCodec] = PairCodec

    def __init__(
        self,
        codec: PairCodec,
        embedding_size: int = 128,
        encoder_sizes: Sequence[int] = (128,),
        decoder_sizes: Sequence[int] = (256,),
        cell: Literal["lstm", "gru"] = "lstm",
        bidirectional: bool = True,
        attention: Literal["none", "dot", "general", "additive"] = "general",
        input_feeding: bool = False,
        tied_embeddings: bool = False,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        sampling_probability: float = 0.0,
        sampling_steps: int = 0,
        score: Literal["per", "wer", "bleu"] = "bleu",
        max_length_ratio: float = 2.0,
        max_length_extra: int = 10,
        test_beam_size: int = 1,
        backend: str = "auto",
        source_stride: int = 1,
        feedback: Literal["none", "features", "context"] = "none",
        coverage: bool = False,
        decoder_cell: Literal["lstm", "gru"] | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        architecture: dict[str, Any] = {
            "embedding_size": embedding_size,
            "encoder_sizes": encoder_sizes,
            "decoder_sizes": decoder_sizes,
            "cell": cell,
            "bidirectional": bidirectional,
            "attention": attention,
            "input_feeding": input_feeding,
            "tied_embeddings": tied_embeddings,
            "dropout": dropout,
            "backend": backend,
            "source_stride": source_stride,
            "feedback": feedback,
            "coverage": coverage,
            "decoder_cell": decoder_cell,
        }
        training: dict[str, Any] = {
            "label_smoothing": label_smoothing,
            "sampling_probability": sampling_probability,
            "sampling_steps": sampling_steps,
            "score": score,
            "max_length_ratio": max_length_ratio,
            "max_length_extra": max_length_extra,
            "test_beam_size": test_beam_size,
        }
        super().__init__(codec, {**architecture, **training}, optimizer, scheduler)
        for name in ("label_smoothing", "sampling_probability"):
            if not 0 <= self.arguments[name] < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {self.arguments[name]}")
        if score not in ("per", "wer", "bleu"):
            raise ValueError(f"score: expected per, wer or bleu, got {score!r}")
        if max_length_ratio < 0 or max_length_extra < 1:
            raise ValueError(
                "max_length_ratio, max_length_extra: expected at least 0 and 1, "
                f"got {max_length_ratio} and {max_length_extra}"
            )
        if test_beam_size < 1:
            raise ValueError(f"test_beam_size: expected at least 1, got {test_beam_size}")
        self.model = Seq2SeqModel(**codec.sizes, **architecture)
        self.label_smoothing = label_smoothing
        self.sampling_probability, self.sampling_steps = sampling_probability, sampling_steps
        self.max_length_ratio, self.max_length_extra = max_length_ratio, max_length_extra
        self.test_beam_size = test_beam_size
        self.score, self.source_stride = score, source_stride
        self.monitor = f"val/{score}"
        self.scores = nn.ModuleDict({stage: self._new_scores() for stage in ("val", "test")})
        self.companions = nn.ModuleList()
        self._samples: list[_Sample] = []
        self._decoded: list[tuple[int, int, float]] = []

    def _new_scores(self) -> nn.ModuleDict:
        scores: dict[str, Metric] = {
            "loss": MeanMetric().set_dtype(torch.float64),
            "accuracy": MulticlassAccuracy(
                len(self.codec.target),
                average="micro",
                ignore_index=self.codec.target.pad,
                validate_args=False,  # copied symbols have numbers beyond the vocabulary
            ),
        }
        if self.score == "per":
            scores |= {"per": SymbolErrorRate(), "wer": WordErrorRate()}
        elif self.score == "wer":
            scores |= {"wer": SymbolErrorRate(), "cer": SymbolErrorRate()}
        else:
            lowercase = self.codec.target_symbols.lowercase
            scores["bleu"] = SacreBLEU(lowercase=lowercase)
            if not lowercase:
                scores["bleu_lowercase"] = SacreBLEU(lowercase=True)
        return nn.ModuleDict(scores)

    def check(self, checkpoint: dict[str, Any], path: str | Path = "checkpoint") -> None:
        """Check a checkpoint, one from before the decoder was one module too."""
        if isinstance(checkpoint.get("state_dict"), dict):
            rename(self.model, checkpoint["state_dict"], "model.")
        super().check(checkpoint, path)

    def forward(
        self, source: Tensor, source_lengths: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Predict each symbol of a target from those before it; see `Seq2SeqModel.forward`."""
        return self.model(source, source_lengths, target)

    def _loss(self, logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Mean cross entropy over the symbols after `<bos>`, in fp32."""
        numbers, pad = target[:, 1:].flatten(), self.codec.target.pad
        scores = logits.flatten(0, 1).float()
        if smoothing == 0 or not self.codec.copy:
            return cross_entropy(scores, numbers, ignore_index=pad, label_smoothing=smoothing)
        # none of it to the symbols that other rows alone can copy
        scores = scores.log_softmax(-1)[numbers != pad]
        spread = -scores[:, : len(self.codec.target)].mean()
        return (1 - smoothing) * nll_loss(scores, numbers[numbers != pad]) + smoothing * spread

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Teacher forcing, mixed with the model's own guesses where scheduled."""
        probability = self.sampling_probability
        if self.sampling_steps > 0:
            probability *= min(1.0, self.global_step / self.sampling_steps)
        inputs = batch.target[:, :-1]
        logits, _ = self.model(batch.source, batch.source_lengths, inputs, probability)
        loss = self._loss(logits, batch.target, self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(inputs))
        return loss

    def _evaluate(self, batch: PairBatch, stage: str) -> None:
        assert batch.texts is not None and batch.references is not None
        scores = self._scores(stage)
        logits, _ = self(batch.source, batch.source_lengths, batch.target[:, :-1])
        symbols = (batch.target_lengths - 1).sum()
        scores["loss"].update(self._loss(logits, batch.target).double(), symbols)
        scores["accuracy"].update(logits.argmax(-1), batch.target[:, 1:])

        search = GREEDY
        if stage == "test" and self.test_beam_size > 1:
            search = SearchOptions(self.test_beam_size, length_penalty=LENGTH_PENALTY)
        decoded = self.decode(batch.source, batch.source_lengths, search)
        found = [row[0] for row in decoded.sequences(self.codec.target.eos)]
        decode = self.codec.decode_target
        predictions = [decode(n, text) for n, text in zip(found, batch.texts, strict=True)]
        if self.score == "per":
            for name in ("per", "wer"):
                scores[name].update(predictions, batch.references)
        else:
            join = self.codec.target_symbols.join
            texts = [join(prediction) for prediction in predictions]
            references = [[join(answer) for answer in answers] for answers in batch.references]
            for name in scores.keys() & {"bleu", "bleu_lowercase"}:
                scores[name].update(texts, references)
            if self.score == "wer":
                for name, cut in (("wer", str.split), ("cer", list)):
                    answers = [[cut(text) for text in row] for row in references]
                    scores[name].update([cut(text) for text in texts], answers)
        self._log_scores(stage, len(predictions))
        sizes = decoded.lengths
        means = decoded.scores / normalise(sizes.double(), sizes, search.length_penalty)
        sources = [row[:n].cpu() for row, n in zip(batch.source, batch.source_lengths, strict=True)]
        mean = means.flatten().tolist()
        rows = zip(batch.texts, found, mean, batch.references, sources, strict=True)
        self._samples += islice((_Sample(*row) for row in rows), SAMPLES_PER_BATCH)
        self._decoded += [
            (len(prediction), len(answers[0]), score)
            for prediction, answers, score in zip(found, batch.references, mean, strict=True)
        ]

    def _start(self, stage: str) -> None:
        super()._start(stage)
        self._samples, self._decoded = [], []

    def _report(self, stage: str) -> None:
        """Log sample outputs, alignments, histograms and the signature of BLEU."""
        samples = spread(self._samples, SAMPLES)
        join = self.codec.target_symbols.join
        columns = ["source", "prediction", "references", "mean_log_probability"]
        rows = [
            [
                row.text,
                join(self.codec.decode_target(row.prediction, row.text)),
                " | ".join(map(join, row.references)),
                round(row.score, 4),
            ]
            for row in samples
        ]
        log_table(self, f"{stage}/samples", columns, rows)
        if self.score == "bleu":
            metrics = {n: m for n, m in self._scores(stage).items() if n.startswith("bleu")}
            scored = [[n, float(m.compute()), m.signature] for n, m in metrics.items()]
            log_table(self, f"{stage}/bleu", ["score", "bleu", "signature"], scored)
        if not self.trainer.is_global_zero or not samples:
            return
        lengths, expected, means = zip(*self._decoded, strict=True)
        named = {"decoded": lengths, "reference": expected}
        log_figure(self, f"{stage}/lengths", histogram("symbols", named, whole=True))
        figure = histogram("mean log-probability of a symbol (nats)", {"decoded": means})
        log_figure(self, f"{stage}/mean_log_probabilities", figure)
        if self.model.attention is None:
            return
        for number, row in enumerate(spread(samples, ALIGNMENTS)):
            (weights,) = self._alignments([row.source], [row.prediction])
            labels = self.codec.source_labels(row.text, row.source)[:: self.source_stride]
            lines = [*self.codec.decode_target(row.prediction, row.text), "<eos>"]
            log_figure(
                self, f"{stage}/alignment_{number}", alignment_figure(weights, labels, lines)
            )

    def join(self, others: Sequence[Task]) -> None:
        """Decode from now on with the mean of several models' probabilities.

        Args:
            others: models with the same codec.

        Raises:
            CheckpointError: one has another codec, or reads its source in other steps.
        """
        for number, other in enumerate(others, start=2):
            same = isinstance(other, Seq2Seq) and other.source_stride == self.source_stride
            if not same or other.codec.to_dict() != self.codec.to_dict():
                raise CheckpointError(
                    f"model {number} of the ensemble: expected the symbols of the first, "
                    "got others (train them on the same data)"
                )
            self.companions.extend(cast(Seq2Seq, other).models)

    @property
    def models(self) -> list[Seq2SeqModel]:
        """This model and those that it was joined with."""
        return [self.model, *cast(list[Seq2SeqModel], list(self.companions))]

    @torch.no_grad()
    def decode(
        self,
        source: Tensor,
        source_lengths: Tensor,
        options: SearchOptions = GREEDY,
        numbers: Sequence[int] | None = None,
    ) -> Hypotheses:
        """Search for the most probable outputs. `<pad>`, `<bos>` and `<unk>` are never written.

        Args:
            source: int64 [B, S], 0 past the lengths.
            source_lengths: int64 [B], at least 1.
            options: which search to run, and how.
            numbers: of the B rows, for sampling; by default their places in the batch.

        Returns:
            `n_best` hypotheses for each row.
        """
        target = self.codec.target
        banned = torch.tensor([target.pad, target.unk, target.bos], device=source.device)
        states = [model.encode(source, source_lengths) for model in self.models]
        advance, state = ensemble([model.step for model in self.models], states)

        def step(symbols: Tensor, state: Any) -> tuple[Tensor, Any]:
            log_probs, state = advance(symbols, state)
            return log_probs.index_fill(1, banned, -torch.inf), state

        limits = (self.max_length_ratio * source_lengths).long() + self.max_length_extra
        return options.run(step, state, limits, target.bos, target.eos, numbers)

    def translate(
        self, texts: Sequence[str], batch_size: int = 64, **options: Any
    ) -> list[str] | list[list[tuple[str, float]]]:
        """Turn raw source texts into target texts.

        Args:
            texts: raw texts, cut into symbols as the training data were. An empty one has an empty
                result.
            batch_size: texts decoded together; it changes the speed only.
            **options: attributes of `SearchOptions`, such as `beam_size`; the `length_penalty` is
                `LENGTH_PENALTY` here by default.

        Returns:
            One text for each text or, with `n_best` above 1, lists of texts with their scores
            (length-normalised log-probabilities), the best first.

        Raises:
            ValueError: an argument is out of range.
        """
        if isinstance(texts, str):
            raise ValueError("texts: expected a list of texts, got a single string")
        search = SearchOptions(**{"length_penalty": LENGTH_PENALTY, **options})
        results = self.hypotheses(texts, search, batch_size)
        if search.n_best == 1:
            return [row[0].text for row in results]
        return [[(found.text, found.score) for found in row] for row in results]

    def hypotheses(
        self,
        texts: Sequence[str],
        options: SearchOptions,
        batch_size: int = 64,
        first: int = 0,
        align: bool = False,
    ) -> list[list[Translation]]:
        """Turn raw source texts into target texts, and tell all about them.

        Args:
            texts: raw texts.
            options: which search to run, and how.
            batch_size: texts decoded together; it changes the speed only.
            first: number of the first text, for sampling.
            align: whether to tell what the decoder looked at.

        Returns:
            For each text its hypotheses, the best first; of an empty text an empty one.

        Raises:
            ValueError: an argument is out of range, or the model has no attention to tell of.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if align and self.model.attention is None:
            raise ValueError(NO_ATTENTION)
        encoded = [self.codec.encode_source(text) for text in texts]
        nothing = torch.zeros(1, 0) if align else None
        results = [[Translation("", 0.0, [], nothing)] for _ in texts]
        order = sorted(
            (i for i, row in enumerate(encoded) if len(row)), key=lambda i: len(encoded[i])
        )
        with evaluation(self):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                source, sizes = self._stack([encoded[i] for i in rows])
                found = self.decode(source, sizes, options, [first + i for i in rows])
                written = self._read(found, [texts[i] for i in rows])
                for i, hypotheses in zip(rows, written, strict=True):
                    results[i] = hypotheses
                if align:
                    self._align(results, rows, encoded, found)
        return results

    def _read(self, found: Hypotheses, texts: Sequence[str]) -> list[list[Translation]]:
        """Put what was found into words."""
        join = self.codec.target_symbols.join
        words = [
            [self.codec.decode_target(numbers, text) for numbers in row]
            for row, text in zip(found.sequences(self.codec.target.eos), texts, strict=True)
        ]
        return [
            [Translation(join(w), score, w) for w, score in zip(row, scores, strict=False)]
            for row, scores in zip(words, found.scores.tolist(), strict=True)
        ]

    def _align(
        self,
        results: list[list[Translation]],
        rows: Sequence[int],
        encoded: Sequence[Any],
        found: Hypotheses,
    ) -> None:
        """Add the attention weights to the results of a batch."""
        places = [(i, n) for i in rows for n in range(len(results[i]))]
        numbers = [h for row in found.sequences(self.codec.target.eos) for h in row]
        weights = self._alignments([encoded[i] for i, _ in places], numbers)
        for (i, n), weight in zip(places, weights, strict=True):
            results[i][n] = results[i][n]._replace(weights=weight)

    def alignments(self, texts: Sequence[str], outputs: Sequence[str]) -> list[Tensor]:
        """Return what the decoder looks at while it writes given outputs.

        Args:
            texts: raw source texts, not empty.
            outputs: a target text for each.

        Returns:
            For each pair, attention weights [T + 1, S]: a row for each of the T target symbols and
            the end, a column for each of the S source symbols, or of every `source_stride` frames.

        Raises:
            ValueError: the model has no attention, or a source is empty.
        """
        if self.model.attention is None:
            raise ValueError(NO_ATTENTION)
        sources = [self.codec.encode_source(text) for text in texts]
        if not all(map(len, sources)):
            raise ValueError("texts: expected no empty text")
        pairs = zip(texts, outputs, strict=True)
        targets = [self.codec.encode_target(output, text)[1:-1] for text, output in pairs]
        return self._alignments(sources, targets)

    def _alignments(self, sources: Sequence[Any], outputs: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the mean attention weights of all models; see `alignments`."""
        begin = cast(int, self.codec.target.bos)
        target = pad([[begin, *output] for output in outputs]).to(self.device)
        with evaluation(self):
            batch = self._stack(sources)
            found = [m(*batch, target)[1] for m in self.models if m.attention is not None]
            weights = torch.stack(found).mean(0).float().cpu()
        return [
            w[: len(output) + 1, : -(-len(source) // self.source_stride)]
            for w, output, source in zip(weights, outputs, sources, strict=True)
        ]

    def _stack(self, sources: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return encoded sources as a batch, and their lengths."""
        source, sizes = self.codec.collate_sources(sources)
        return source.to(self.device), sizes.to(self.device)

    def predict_lines(  # type: ignore[override]
        self,
        lines: Iterable[str],
        beam_size: int = 1,
        n_best: int = 1,
        length_penalty: float = LENGTH_PENALTY,
        batch_size: int = 64,
        min_length: int = 0,
        max_length: int | None = None,
        no_repeat_ngram_size: int = 0,
        sampling: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        format: Literal["text", "json"] = "text",
        alignments: bool = False,
        drawings: str | None = None,
    ) -> Iterator[str]:
        """Yield the translation of each line, in order.

        Args:
            lines: raw source texts without line ends.
            beam_size: hypotheses kept at each step; 1 for greedy search.
            n_best: results on each line, each followed by its score, separated by tabs; 1 for the
                text alone.
            length_penalty: exponent of the length penalty; above 0 favours longer results.
            batch_size: lines read and decoded together; it changes the speed only.
            min_length: fewest symbols of a result.
            max_length: most symbols of a result.
            no_repeat_ngram_size: n, for no n symbols in a row to come twice in a result; 0 for no
                such rule.
            sampling: draw the symbols by chance.
            temperature: of sampling: below 1 sharper, above 1 flatter than the model.
            top_k: of sampling: among the most probable symbols only; 0 for all.
            top_p: of sampling: among the fewest symbols that have this probability together.
            seed: of sampling; the same lines have the same results, whatever the batch size.
            format: `text`, or `json`: an object a line, with the score, the symbols and, where
                asked for, the alignment of every result.
            alignments: tell what the decoder looked at: in `json` the weights, a row for each
                symbol and the end; in `text`, after another tab, the source symbol that each symbol
                looked at most, such as `0-0 2-1`, source first, from 0.
            drawings: folder for a heat map of the best result's alignment, `LINE.png`.

        Raises:
            ValueError: an argument is out of range.
        """
        options = SearchOptions(
            beam_size,
            n_best,
            length_penalty,
            min_length,
            max_length,
            no_repeat_ngram_size,
            sampling,
            temperature,
            top_k,
            top_p,
            seed,
        )
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        align = alignments or drawings is not None
        write = _as_json if format == "json" else _as_text
        waiting, first = iter(lines), 0
        while chunk := list(islice(waiting, batch_size)):
            results = self.hypotheses(chunk, options, batch_size, first, align)
            for number, (text, found) in enumerate(zip(chunk, results, strict=True), first + 1):
                if drawings is not None and found[0].symbols:
                    self._draw(text, found[0], Path(drawings) / f"{number}.png")
                yield write(text, found, alignments, n_best > 1)
            first += len(chunk)

    def _draw(self, text: str, found: Translation, file: Path) -> None:
        """Store the heat map of an alignment."""
        assert found.weights is not None
        file.parent.mkdir(parents=True, exist_ok=True)
        labels = self.codec.source_labels(text, self.codec.encode_source(text))
        figure = alignment_figure(
            found.weights, labels[:: self.source_stride], [*found.symbols, "<eos>"]
        )
        figure.savefig(file, dpi=150, bbox_inches="tight")


def _as_text(text: str, found: Sequence[Translation], alignments: bool, scores: bool) -> str:
    """Write results with tabs between."""
    cells = []
    for result in found:
        cells.append(result.text)
        if scores:
            cells.append(f"{result.score:.4f}")
        if alignments and result.weights is not None:
            best = result.weights[:-1].argmax(-1).tolist() if result.symbols else []
            cells.append(" ".join(f"{s}-{t}" for t, s in enumerate(best)))
    return "\t".join(cells)


def _as_json(text: str, found: Sequence[Translation], alignments: bool, scores: bool) -> str:
    """Write results as one object."""
    results: list[dict[str, Any]] = []
    for result in found:
        score = round(result.score, 6)
        results.append({"text": result.text, "score": score, "symbols": result.symbols})
        if alignments and result.weights is not None:
            rows = result.weights.tolist()
            results[-1]["alignment"] = [[round(w, 4) for w in row] for row in rows]
    return json.dumps({"source": text, "hypotheses": results}, ensure_ascii=False)


class SpeechToText(Seq2Seq):
    """Turns recordings, or other frames of features, into text: speech, captions of videos.

    It is `Seq2Seq` whose sources are files: a line of raw input is the path of one. Its arguments
    are those of `Seq2Seq`.
    """

    codec_class = SpeechCodec


def alignment_figure(weights: Tensor, source: Sequence[str], target: Sequence[str]) -> Figure:
    """Draw attention weights.

    Args:
        weights: [T, S].
        source: the S symbols of the horizontal axis.
        target: the T symbols of the vertical axis, from the top.

    Returns:
        A heat map, 0 white and 1 dark, with labels for some of the symbols only where they are
        many.
    """
    width, height = min(0.35 * len(source), WIDEST), min(0.3 * len(target), TALLEST)
    size = 1.5 + width, 1.2 + height
    figure = Figure(figsize=size)
    axes = figure.add_subplot()
    axes.imshow(weights.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    rotation = 0 if max(map(len, source)) == 1 else 60
    columns, rows = (spread(range(len(side)), MOST_LABELS) for side in (source, target))
    axes.set_xticks(columns, [source[place] for place in columns], rotation=rotation)
    axes.set_yticks(rows, [target[place] for place in rows])
    axes.set(xlabel="source", ylabel="output")
    axes.set_title("attention, from 0 (white) to 1", fontsize="small")
    return figure


def histogram(
    quantity: str, values: Mapping[str, Sequence[float]], bins: int = 30, whole: bool = False
) -> Figure:
    """Draw how often values occur.

    Args:
        quantity: of the horizontal axis.
        values: name -> values, at least one; all names share their bins.
        bins: at most this many.
        whole: whether the values are whole numbers, none of which is to fall between two bins.

    Returns:
        Histograms, one on another.
    """
    everything = [value for several in values.values() for value in several]
    edges = np.histogram_bin_edges(everything, bins).tolist()
    if whole:
        low, span = min(everything), int(max(everything) - min(everything))
        width = max(1, -(-(span + 1) // bins))
        edges = [low - 0.5 + width * i for i in range(span // width + 2)]
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    for name, several in values.items():
        axes.hist(several, edges, alpha=0.5, label=name)
    axes.set(xlabel=quantity, ylabel="number of outputs")
    axes.legend()
    return figure
