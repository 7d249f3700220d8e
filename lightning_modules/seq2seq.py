"""Training, evaluation and use of the encoder-decoder on text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules.base import Task
from lightning_modules.data.batching import pad
from lightning_modules.data.pairs import PairBatch, PairCodec
from lightning_modules.data.speech import SpeechCodec
from lightning_modules.reporting import log_figure, log_table
from lightning_modules.search import Hypotheses, beam_search, greedy_search
from lightning_modules.seq2seq_model import DecoderState, Seq2SeqModel
from lightning_modules.text_metrics import SacreBLEU, SymbolErrorRate, WordErrorRate

__all__ = ["Seq2Seq", "SpeechToText"]

SAMPLES_PER_BATCH, SAMPLES, ALIGNMENTS = 4, 20, 4
"""Rows kept of each evaluation batch, rows shown in the table, alignments drawn."""


class Seq2Seq(Task):
    """Turns one sequence of symbols into another: letters into phonemes, a language into another.

    Validation and testing decode freely, as in use, and report the teacher-forced loss and symbol
    accuracy beside the score of what was decoded.

    Args:
        codec: of the data; see `PairCodec`.
        embedding_size: of the symbols of both sides.
        encoder_sizes: hidden size of each encoder layer, per direction.
        decoder_sizes: hidden size of each decoder layer.
        cell: `lstm` or `gru`.
        bidirectional: whether the encoder reads in both directions.
        attention: `none`, `dot`, `general` or `additive`.
        input_feeding: whether the attention's result enters the decoder cell at the next step.
        tied_embeddings: whether the output layer and the target embeddings share their weights.
        dropout: probability, on embeddings, between layers and before the output.
        label_smoothing: share of the probability that training spreads over all symbols.
        sampling_probability: in training, the probability with which a symbol that the decoder is
            fed is its own guess (scheduled sampling).
        sampling_steps: optimizer steps over which that probability grows linearly from 0.
        score: what to compute on decoded text: `per`, phoneme and word error rate, or `bleu`, with
            and without regard to case.
        max_length_ratio: decoding stops after this many symbols per source symbol, ...
        max_length_extra: ... plus this many.
        backend: of the recurrent layers.
        source_stride: frames of a recording that become one step of the encoder.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate scheduler from the optimizer.

    Raises:
        ValueError: an argument is out of range, or two of them exclude each other.
    """

    codec_class = PairCodec

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
        score: Literal["per", "bleu"] = "bleu",
        max_length_ratio: float = 2.0,
        max_length_extra: int = 10,
        backend: str = "auto",
        source_stride: int = 1,
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
        }
        training: dict[str, Any] = {
            "label_smoothing": label_smoothing,
            "sampling_probability": sampling_probability,
            "sampling_steps": sampling_steps,
            "score": score,
            "max_length_ratio": max_length_ratio,
            "max_length_extra": max_length_extra,
        }
        super().__init__(codec, {**architecture, **training}, optimizer, scheduler)
        for name in ("label_smoothing", "sampling_probability"):
            if not 0 <= self.arguments[name] < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {self.arguments[name]}")
        if score not in ("per", "bleu"):
            raise ValueError(f"score: expected per or bleu, got {score!r}")
        if max_length_ratio < 0 or max_length_extra < 1:
            raise ValueError(
                "max_length_ratio, max_length_extra: expected at least 0 and 1, "
                f"got {max_length_ratio} and {max_length_extra}"
            )
        self.model = Seq2SeqModel(**codec.sizes, **architecture)
        self.label_smoothing = label_smoothing
        self.sampling_probability, self.sampling_steps = sampling_probability, sampling_steps
        self.max_length_ratio, self.max_length_extra = max_length_ratio, max_length_extra
        self.score, self.source_stride = score, source_stride
        self.monitor = f"val/{score}"
        self.scores = nn.ModuleDict({stage: self._new_scores() for stage in ("val", "test")})
        self._samples: list[tuple[str, list[str], list[list[str]], Any]] = []

    def _new_scores(self) -> nn.ModuleDict:
        scores: dict[str, Metric] = {
            "loss": MeanMetric().set_dtype(torch.float64),
            "accuracy": MulticlassAccuracy(
                len(self.codec.target), average="micro", ignore_index=self.codec.target.pad
            ),
        }
        if self.score == "per":
            scores |= {"per": SymbolErrorRate(), "wer": WordErrorRate()}
        else:
            lowercase = self.codec.target_symbols.lowercase
            scores["bleu"] = SacreBLEU(lowercase=lowercase)
            if not lowercase:
                scores["bleu_lowercase"] = SacreBLEU(lowercase=True)
        return nn.ModuleDict(scores)

    def _scores(self, stage: str) -> dict[str, Any]:
        return cast(dict[str, Any], self.scores[stage])

    def forward(
        self, source: Tensor, source_lengths: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Predicts each symbol of a target from those before it; see `Seq2SeqModel.forward`."""
        return self.model(source, source_lengths, target)

    def _loss(self, logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Mean cross entropy over the symbols after `<bos>`, in fp32."""
        return cross_entropy(
            logits.flatten(0, 1).float(),
            target[:, 1:].flatten(),
            ignore_index=self.codec.target.pad,
            label_smoothing=smoothing,
        )

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

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Scores a batch; see `Seq2Seq`."""
        self._evaluate(batch, "val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Scores a batch; see `Seq2Seq`."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: PairBatch, stage: str) -> None:
        assert batch.texts is not None and batch.references is not None
        scores = self._scores(stage)
        logits, _ = self(batch.source, batch.source_lengths, batch.target[:, :-1])
        symbols = (batch.target_lengths - 1).sum()
        scores["loss"].update(self._loss(logits, batch.target).double(), symbols)
        scores["accuracy"].update(logits.argmax(-1), batch.target[:, 1:])

        decoded = self.decode(batch.source, batch.source_lengths)
        predictions = [self._symbols(row[0]) for row in decoded.sequences(self.codec.target.eos)]
        if self.score == "per":
            for name in ("per", "wer"):
                scores[name].update(predictions, batch.references)
        else:
            join = self.codec.target_symbols.join
            references = [[join(answer) for answer in answers] for answers in batch.references]
            for name in scores.keys() & {"bleu", "bleu_lowercase"}:
                scores[name].update([join(p) for p in predictions], references)
        for name, metric in scores.items():
            bar = stage == "val" and name in ("loss", self.score)
            self.log(f"{stage}/{name}", metric, prog_bar=bar, batch_size=len(predictions))
        sources = [row[:n].cpu() for row, n in zip(batch.source, batch.source_lengths, strict=True)]
        rows = zip(batch.texts, predictions, batch.references, sources, strict=True)
        self._samples += islice(rows, SAMPLES_PER_BATCH)

    def on_validation_epoch_start(self) -> None:
        """Starts to count, whatever an interrupted evaluation left."""
        self._start("val")

    def on_test_epoch_start(self) -> None:
        """Starts to count, whatever an interrupted evaluation left."""
        self._start("test")

    def _start(self, stage: str) -> None:
        self._samples = []
        for metric in self._scores(stage).values():
            metric.reset()

    def on_validation_epoch_end(self) -> None:
        """Reports what was decoded."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Reports what was decoded."""
        self._report("test")

    def _report(self, stage: str) -> None:
        """Logs sample outputs, alignments and the signature of BLEU."""
        samples = _spread(self._samples, SAMPLES)
        if self.trainer.sanity_checking:
            return
        join = self.codec.target_symbols.join
        rows = [
            [text, join(prediction), " | ".join(join(answer) for answer in answers)]
            for text, prediction, answers, _ in samples
        ]
        log_table(self, f"{stage}/samples", ["source", "prediction", "references"], rows)
        if self.score == "bleu":
            metrics = {n: m for n, m in self._scores(stage).items() if n.startswith("bleu")}
            scored = [[n, float(m.compute()), m.signature] for n, m in metrics.items()]
            log_table(self, f"{stage}/bleu", ["score", "bleu", "signature"], scored)
        if self.model.attention is None or not self.trainer.is_global_zero:
            return
        for number, (text, symbols, _, source) in enumerate(_spread(samples, ALIGNMENTS)):
            output = join(symbols)
            (weights,) = self._alignments([source], [output])
            columns = self.codec.source_labels(text, source)[:: self.source_stride]
            lines = [*self.codec.target_symbols.split(output), "<eos>"]
            figure = alignment_figure(weights, columns, lines)
            log_figure(self, f"{stage}/alignment_{number}", figure)

    def _symbols(self, numbers: Sequence[int]) -> list[str]:
        return self.codec.target.decode(numbers)

    @torch.no_grad()
    def decode(
        self,
        source: Tensor,
        source_lengths: Tensor,
        beam_size: int = 1,
        n_best: int = 1,
        length_penalty: float = 0.0,
    ) -> Hypotheses:
        """Searches for the most probable outputs. `<pad>`, `<bos>` and `<unk>` are never written.

        Args:
            source: int64 [B, S], 0 past the lengths.
            source_lengths: int64 [B], at least 1.
            beam_size: hypotheses kept at each step; 1 for greedy search.
            n_best: hypotheses to return, at most `beam_size`.
            length_penalty: exponent of the length penalty; see `beam_search`.

        Returns:
            `n_best` hypotheses for each row.
        """
        target = self.codec.target
        banned = torch.tensor([target.pad, target.unk, target.bos], device=source.device)

        def step(symbols: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
            log_probs, state = self.model.step(symbols, state)
            return log_probs.index_fill(1, banned, -torch.inf), state

        state = self.model.encode(source, source_lengths)
        limits = (self.max_length_ratio * source_lengths).long() + self.max_length_extra
        arguments = (step, state, limits, target.bos, target.eos)
        if beam_size == 1 and n_best == 1:
            return greedy_search(*arguments, alpha=length_penalty)
        return beam_search(*arguments, beam_size, n_best, length_penalty)

    def translate(
        self,
        texts: Sequence[str],
        beam_size: int = 1,
        n_best: int = 1,
        length_penalty: float = 0.6,
        batch_size: int = 64,
    ) -> list[str] | list[list[tuple[str, float]]]:
        """Turns raw source texts into target texts.

        Args:
            texts: raw texts, cut into symbols as the training data were. An empty one has an empty
                result.
            beam_size: hypotheses kept at each step; 1 for greedy search.
            n_best: how many results to return for each text, at most `beam_size`.
            length_penalty: exponent of the length penalty; see `beam_search`.
            batch_size: texts decoded together; it changes the speed only.

        Returns:
            One text for each text or, with `n_best` above 1, lists of texts with their scores
            (length-normalised log-probabilities), the best first.

        Raises:
            ValueError: an argument is out of range.
        """
        if isinstance(texts, str):
            raise ValueError("texts: expected a list of texts, got a single string")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        encoded = [self.codec.encode_source(text) for text in texts]
        results: list[list[tuple[str, float]]] = [[("", 0.0)] for _ in texts]
        order = sorted((i for i, row in enumerate(encoded) if len(row)), key=lambda i: len(encoded[i]))
        join = self.codec.target_symbols.join
        with _Evaluation(self):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                source, sizes = self._stack([encoded[i] for i in rows])
                found = self.decode(source, sizes, beam_size, n_best, length_penalty)
                sequences = found.sequences(self.codec.target.eos)
                for i, hypotheses, scores in zip(rows, sequences, found.scores, strict=True):
                    outputs = [join(self._symbols(h)) for h in hypotheses]
                    results[i] = list(zip(outputs, scores.tolist(), strict=False))
        return results if n_best > 1 else [row[0][0] for row in results]

    def alignments(self, texts: Sequence[str], outputs: Sequence[str]) -> list[Tensor]:
        """Returns what the decoder looks at while it writes given outputs.

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
            raise ValueError("this model has no attention to show")
        sources = [self.codec.encode_source(text) for text in texts]
        if not all(map(len, sources)):
            raise ValueError("texts: expected no empty text")
        return self._alignments(sources, outputs)

    def _alignments(self, sources: Sequence[Any], outputs: Sequence[str]) -> list[Tensor]:
        """Returns the attention weights of encoded sources; see `alignments`."""
        targets = [self.codec.encode_target(output) for output in outputs]
        with _Evaluation(self):
            _, weights = self(*self._stack(sources), pad(targets)[:, :-1].to(self.device))
        return [
            w[: len(target) - 1, : -(-len(source) // self.source_stride)].float().cpu()
            for w, target, source in zip(weights, targets, sources, strict=True)
        ]

    def _stack(self, sources: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Returns encoded sources as a batch, and their lengths."""
        source, sizes = self.codec.collate_sources(sources)
        return source.to(self.device), sizes.to(self.device)

    def predict_lines(  # type: ignore[override]
        self,
        lines: Iterable[str],
        beam_size: int = 1,
        n_best: int = 1,
        length_penalty: float = 0.6,
        batch_size: int = 64,
    ) -> Iterator[str]:
        """Yields the translation of each line, in order.

        Args:
            lines: raw source texts without line ends.
            beam_size: hypotheses kept at each step; 1 for greedy search.
            n_best: results on each line, each followed by its score, separated by tabs; 1 for the
                text alone.
            length_penalty: exponent of the length penalty; above 0 favours longer results.
            batch_size: lines read and decoded together; it changes the speed only.

        Raises:
            ValueError: an argument is out of range.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        waiting = iter(lines)
        while chunk := list(islice(waiting, batch_size)):
            for result in self.translate(chunk, beam_size, n_best, length_penalty, batch_size):
                if isinstance(result, str):
                    yield result
                else:
                    yield "\t".join(f"{text}\t{score:.4f}" for text, score in result)


class SpeechToText(Seq2Seq):
    """Turns recordings, or other frames of features, into text.

    It is `Seq2Seq` whose sources are files: a line of raw input is the path of one. Its arguments
    are those of `Seq2Seq`.
    """

    codec_class = SpeechCodec


class _Evaluation:
    """Evaluation mode without gradients, and the former mode afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.no_grad = module, torch.no_grad()

    def __enter__(self) -> None:
        self.training = self.module.training
        self.module.eval()
        self.no_grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.no_grad.__exit__(*error)
        self.module.train(self.training)


def _spread(items: list[Any], number: int) -> list[Any]:
    """Returns at most `number` items from all over a list."""
    step = max(1, -(-len(items) // number))
    return items[::step]


def alignment_figure(weights: Tensor, source: Sequence[str], target: Sequence[str]) -> Figure:
    """Draws attention weights.

    Args:
        weights: [T, S].
        source: the S symbols of the horizontal axis.
        target: the T symbols of the vertical axis, from the top.

    Returns:
        A heat map, 0 white and 1 dark.
    """
    figure = Figure(figsize=(1.5 + 0.35 * len(source), 1.2 + 0.3 * len(target)))
    axes = figure.add_subplot()
    axes.imshow(weights.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    rotation = 0 if max(map(len, source)) == 1 else 60
    axes.set_xticks(range(len(source)), source, rotation=rotation)
    axes.set_yticks(range(len(target)), target)
    axes.set_xlabel("source")
    axes.set_ylabel("output")
    return figure
