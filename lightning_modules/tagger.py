"""The tagger: parts of speech, named entities, slots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_modules.base import Task
from lightning_modules.data.tagging import IGNORED, TaggingBatch, TaggingCodec
from lightning_modules.formats import (
    WRITERS,
    InputFormat,
    OutputFormat,
    Source,
    Tagged,
    Tokenizer,
    read_columns,
    read_text,
    tokenize,
)
from lightning_modules.metrics import SpanF1, precision_recall_f1
from lightning_modules.reporting import log_figure, log_table
from lightning_modules.tagger_model import Head, TaggerModel

UNSEEN = "<unseen>"
"""Stands for the gold tags that are not in the training split: always an error."""

SAMPLES, SAMPLES_PER_BATCH = 20, 3
"""Sentences in the table of samples: a few from each batch, since a batch is of like lengths."""


class Tagger(Task):
    """Tags the words of sentences, by a bidirectional recurrent network over words and characters.

    It logs `loss` (nats a word), `accuracy` (of words) and, for tags with a scheme, `precision`,
    `recall` and `f1` of entities as conlleval computes them; and tables of samples and of labels,
    and a confusion matrix.

    Args:
        codec: the codec of the data; on the command line it is linked from there.
        word_size: width of the word vectors; with pretrained vectors, theirs.
        character_size: width of the character vectors.
        character_hidden_size: hidden units of the character LSTM, each direction; 0: no characters.
        hidden_sizes: hidden units of each layer of the stack, each direction.
        cell: the cell of the stack, such as "lstm", "lstm_peephole" or "gru".
        dropout: of the stack's input, between its layers and of its output.
        recurrent_dropout: of the stack's recurrent products.
        character_dropout: of the character vectors.
        unk_probability: how often a word that occurs once is taken for an unknown one, in training.
        word_dropout: how often any other word is; its characters stay.
        residual: whether a layer of the stack above the first adds its input to its output.
        layer_norm: whether the input of those layers is normalised.
        head: "crf" or "softmax".
        freeze_vectors: whether pretrained vectors stay as they are.
        optimizer: makes the optimizer.
        scheduler: makes the learning-rate scheduler, which steps once an epoch.

    Raises:
        ValueError: an argument is out of its range (see `TaggerModel`).
    """

    codec_class = TaggingCodec
    line_ends = True

    def __init__(
        self,
        codec: TaggingCodec,
        word_size: int = 100,
        character_size: int = 30,
        character_hidden_size: int = 50,
        hidden_sizes: Sequence[int] = (200,),
        cell: str = "lstm",
        dropout: float = 0.5,
        recurrent_dropout: float = 0.0,
        character_dropout: float = 0.0,
        unk_probability: float = 0.5,
        word_dropout: float = 0.0,
        residual: bool = False,
        layer_norm: bool = False,
        head: Head = "crf",
        freeze_vectors: bool = False,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        arguments: dict[str, Any] = {
            "word_size": word_size,
            "character_size": character_size,
            "character_hidden_size": character_hidden_size,
            "hidden_sizes": list(hidden_sizes),
            "cell": cell,
            "dropout": dropout,
            "recurrent_dropout": recurrent_dropout,
            "character_dropout": character_dropout,
            "unk_probability": unk_probability,
            "word_dropout": word_dropout,
            "residual": residual,
            "layer_norm": layer_norm,
            "head": head,
            "freeze_vectors": freeze_vectors,
        }
        super().__init__(codec, arguments, optimizer, scheduler)
        self.monitor = "val/accuracy" if codec.scheme is None else "val/f1"
        self.model = TaggerModel(
            num_words=codec.known_words,
            num_fixed=len(codec.words) - codec.known_words,
            num_characters=len(codec.characters),
            tags=codec.tags.symbols,
            scheme=codec.encoding,
            first_rare=codec.frequent_words,
            vectors=codec.vectors,
            **arguments,
        )
        self.scores = nn.ModuleDict({stage: Scores(codec) for stage in ("val", "test")})
        self._samples: list[list[str]] = []
        self._confusion: Tensor | None = None

    def forward(self, batch: TaggingBatch) -> Tensor:
        """Score the tags of each word of a batch: [B, T, K]."""
        return self.model(*batch[:5])

    def training_step(self, batch: TaggingBatch, _: int) -> Tensor:
        """Return the negative log-likelihood of the gold tags, a word."""
        total, count = self.model.loss(self(batch), batch.tags, batch.lengths)
        loss = total / count.clamp(min=1)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.words))
        return loss

    def validation_step(self, batch: TaggingBatch, _: int) -> None:
        """Score a batch of the validation split."""
        self._evaluate("val", batch)

    def test_step(self, batch: TaggingBatch, _: int) -> None:
        """Score a batch of the test split."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: TaggingBatch) -> None:
        emissions = self(batch)
        total, count = self.model.loss(emissions, batch.tags, batch.lengths)
        paths = self.model.decode(emissions, batch.lengths)
        predicted = self._names(paths, batch.lengths)
        self._scores(stage).update(total, count, paths, batch, predicted)
        rows = zip(batch.tokens or [], batch.tag_names or [], predicted, strict=True)
        self._samples += [
            [" ".join(cell) for cell in row] for row in islice(rows, SAMPLES_PER_BATCH)
        ]

    def on_validation_epoch_start(self) -> None:
        """Start to count."""
        self._start("val")

    def on_test_epoch_start(self) -> None:
        """Start to count."""
        self._start("test")

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the validation split."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test split, each label's, and the confusion matrix."""
        self._report("test")

    def on_train_end(self) -> None:
        """Draw the confusion matrix of the last validation."""
        self._draw("val")

    def _start(self, stage: str) -> None:
        self._scores(stage).reset()
        self._samples = []

    def _report(self, stage: str) -> None:
        values, labels, self._confusion = self._scores(stage).compute()
        if self.trainer.sanity_checking:
            return
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=True)
        log_table(
            self, f"{stage}/samples", ["tokens", "gold", "predicted"], self._samples[:SAMPLES]
        )
        columns = ["label", "precision", "recall", "f1", "correct", "predicted", "gold"]
        log_table(self, f"{stage}/labels", columns, labels)
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._draw(stage)

    def _scores(self, stage: str) -> Scores:
        return cast(Scores, self.scores[stage])

    def _draw(self, stage: str) -> None:
        if self._confusion is not None:
            figure = confusion_figure(self._confusion, [*self.codec.tags.symbols, UNSEEN])
            log_figure(self, f"{stage}/confusion_matrix", figure)

    def tag(
        self,
        sentences: Sequence[str | Sequence[str]],
        batch_size: int = 32,
        tokenizer: Tokenizer = "whitespace",
    ) -> list[list[tuple[str, str]]]:
        """Tag sentences.

        Args:
            sentences: each a string, or the list of its words.
            batch_size: sentences that are tagged at once; it does not change the result.
            tokenizer: how a string is cut into words: at `whitespace`, into `words` and
                punctuation marks, or into `characters`.

        Returns:
            For each sentence its words with their tags; an empty list for one without words.

        Raises:
            ValueError: a single string, `batch_size` < 1, or an unknown tokenizer.
        """
        if isinstance(sentences, str):
            raise ValueError("sentences: expected a list of sentences, got a single string")
        words = [tokenize(s, tokenizer) if isinstance(s, str) else list(s) for s in sentences]
        found = self._find(words, batch_size)
        return [list(zip(w, tags, strict=True)) for w, (tags, _) in zip(words, found, strict=True)]

    @torch.inference_mode()
    def _find(
        self, sentences: Sequence[list[str]], batch_size: int, confidence: bool = False
    ) -> list[tuple[list[str], list[float]]]:
        """Find the tags of the words of each sentence and, if asked, the confidence in each."""
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        was_training = self.training
        self.eval()
        rows = [self.codec.untagged(words) for words in sentences]
        order = sorted(
            (i for i, row in enumerate(rows) if row.words), key=lambda i: len(rows[i].words)
        )
        results: list[tuple[list[str], list[float]]] = [([], []) for _ in rows]
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = self.transfer_batch_to_device(
                self.codec.batch([rows[i] for i in chosen]), self.device, 0
            )
            emissions = self(batch)
            paths = self.model.decode(emissions, batch.lengths)
            shares: list[list[float]] = [[] for _ in chosen]
            if confidence:
                shares = self.model.confidences(emissions, paths, batch.lengths).tolist()
            names = self._names(paths, batch.lengths)
            for i, tags, share in zip(chosen, names, shares, strict=True):
                results[i] = tags, share[: len(tags)]
        self.train(was_training)
        return results

    def predict_lines(  # type: ignore[override]
        self,
        lines: Iterable[str],
        batch_size: int = 32,
        tokenizer: Tokenizer = "whitespace",
        tags_only: bool = False,
        input_format: InputFormat = "text",
        format: OutputFormat = "text",
        token_column: int = 0,
        confidence: bool = False,
    ) -> Iterator[str]:
        """Tag lines of text, a sentence each, or the sentences of columns.

        Args:
            lines: the lines.
            batch_size: sentences that are tagged at once.
            tokenizer: how a line of text is cut into words: at `whitespace`, into `words` and
                punctuation marks, or into `characters`, for scripts without spaces.
            tags_only: whether to write the tags without the words, as `text`.
            input_format: `text`, or columns: `conll`, or `conllu`.
            format: `text`: `word/TAG word/TAG ...` for each sentence; `conll`: a column of tags
                after the token or after the columns that were read; `json`: for each sentence an
                object with tokens, entities and offsets; `brat`: stand-off annotations; `html`: a
                page with coloured entities; `ansi`: coloured for a terminal.
            token_column: of `conll`, the index of the token.
            confidence: whether to write the probability of each tag (with a CRF, its marginal).

        Yields:
            The results, in order.
        """
        sources = (
            read_text(lines, tokenizer)
            if input_format == "text"
            else read_columns(lines, token_column, input_format == "conllu")
        )
        tagged = self._tagged(sources, batch_size, confidence)
        if tags_only:
            yield from (" ".join(sentence.tags) for sentence in tagged)
        else:
            yield from WRITERS[format](tagged, self.codec.scheme)

    def _tagged(
        self, sources: Iterator[Source], batch_size: int, confidence: bool
    ) -> Iterator[Tagged]:
        while chunk := list(islice(sources, max(1, batch_size))):
            found = self._find([source.tokens for source in chunk], batch_size, confidence)
            for source, (tags, shares) in zip(chunk, found, strict=True):
                yield Tagged(source, tags, shares if confidence else None)

    def _names(self, paths: Tensor, lengths: Tensor) -> list[list[str]]:
        rows = zip(paths.tolist(), lengths.tolist(), strict=True)
        return [self.codec.decode_tags(row[:length]) for row, length in rows]


class Scores(nn.Module):
    """What a stage of evaluation counts: exact sums over batches and processes.

    Args:
        codec: the codec of the tags.
    """

    def __init__(self, codec: TaggingCodec) -> None:
        super().__init__()
        self.tags = codec.tags.symbols
        classes = len(self.tags) + 1
        self.loss = MeanMetric().set_dtype(torch.float64)
        self.accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED)
        self.confusion = MulticlassConfusionMatrix(classes, ignore_index=IGNORED)
        self.spans = None if codec.scheme is None else SpanF1(codec.labels)

    def update(
        self,
        total: Tensor,
        count: Tensor,
        paths: Tensor,
        batch: TaggingBatch,
        predicted: list[list[str]],
    ) -> None:
        """Count a batch.

        Args:
            total: sum of the loss over words.
            count: number of those words.
            paths: [B, T] the predicted tags, -1 past the end.
            batch: the batch, with gold tags.
            predicted: the names of the predicted tags.
        """
        self.loss.update(total.double() / count.clamp(min=1), count)
        past = paths < 0
        gold = torch.where(batch.tags < 0, len(self.tags), batch.tags).masked_fill(past, IGNORED)
        paths = paths.masked_fill(past, 0)
        self.accuracy.update(paths, gold)
        self.confusion.update(paths, gold)
        if self.spans is not None:
            self.spans.update(predicted, batch.tag_names or [])

    def compute(self) -> tuple[dict[str, Tensor], list[list[Any]], Tensor]:
        """Return the scores by name, the table of labels, and the confusion matrix."""
        values = {"loss": self.loss.compute(), "accuracy": self.accuracy.compute()}
        confusion = self.confusion.compute()
        if self.spans is None:
            names = [*self.tags, UNSEEN]
            counts = torch.stack([confusion.diagonal(), confusion.sum(0), confusion.sum(1)], -1)
        else:
            spans = self.spans.compute()
            names, counts = self.spans.labels, spans.pop("counts")
            values |= spans
        rates = precision_recall_f1(counts).tolist()
        table = zip(names, rates, counts.tolist(), strict=True)
        return values, [[name, *rate, *row] for name, rate, row in table if any(row)], confusion

    def reset(self) -> None:
        """Start to count anew."""
        for metric in (self.loss, self.accuracy, self.confusion, self.spans):
            if metric is not None:
                metric.reset()


def confusion_figure(confusion: Tensor, names: Sequence[str]) -> Figure:
    """Draw a confusion matrix, each row as shares of its gold tag.

    Args:
        confusion: [K, K], counts, gold tags down and predicted tags across.
        names: the names of the K tags; those that never occur are left out.
    """
    used = (confusion.sum(0) + confusion.sum(1)).nonzero()[:, 0].tolist()
    counts = confusion[used][:, used].cpu()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = 2 + 0.3 * len(used)
    figure = Figure(figsize=(side, side))
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    labels = [names[i] for i in used]
    axes.set_xticks(range(len(used)), labels, rotation=90)
    axes.set_yticks(range(len(used)), labels)
    axes.set(xlabel="predicted", ylabel="gold")
    if len(used) <= 24:
        for i, row in enumerate(counts.tolist()):
            for j, count in enumerate(row):
                if count:
                    shade = "white" if shares[i, j] > 0.5 else "black"
                    axes.text(j, i, count, ha="center", va="center", color=shade, fontsize=5)
    return figure
