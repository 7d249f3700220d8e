"""The tagger: parts of speech, named entities, slots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_modules.base import Task, evaluation
from lightning_modules.data.tagging import CASINGS, IGNORED, TaggingBatch, TaggingCodec, TagSet
from lightning_modules.formats import (
    WRITERS,
    InputFormat,
    OutputFormat,
    Source,
    Tagged,
    Tokenizer,
    entities,
    read_columns,
    read_text,
    tokenize,
)
from lightning_modules.metrics import SpanF1, precision_recall_f1
from lightning_modules.reporting import log_figure, log_table, print_table
from lightning_modules.tagger_model import Head, TaggerModel

UNSEEN = "<unseen>"
"""Stands for the gold tags that are not in the training split: always an error."""

SAMPLES, SAMPLES_PER_BATCH = 20, 3
"""Sentences in the table of samples: a few from each batch, since a batch is of like lengths."""


class Found(NamedTuple):
    """What is found in a sentence.

    Attributes:
        tags: of each task, of each word.
        confidences: the probability of each tag of the first task; empty if not asked for.
        entity_confidences: that of each of its entities.
    """

    tags: list[list[str]]
    confidences: list[float]
    entity_confidences: list[float]


class Tagger(Task):
    """Tags the words of sentences, by a bidirectional recurrent network over words and characters.

    It logs `loss` (nats a word), `accuracy` (of words) and, for tags with a scheme, `precision`,
    `recall` and `f1` of entities as conlleval computes them; and tables of samples and of labels,
    and a confusion matrix. With several tasks in the data those are of the first, the others' stand
    under their names (`val/xpos/accuracy`), and the training loss is the sum over tasks.

    Args:
        codec: the codec of the data; on the command line it is linked from there.
        word_size: width of the word vectors; with pretrained vectors, theirs.
        character_size: width of the character vectors.
        character_hidden_size: hidden units of the character LSTM, each direction; 0: no LSTM.
        character_filters: filters of the character convolution, beside the LSTM; 0: none.
        character_filter_width: characters that a filter sees, odd.
        casing_size: width of the vectors of casing (lower, upper, title, ...); 0: none.
        hidden_sizes: hidden units of each layer of the stack, each direction.
        cell: the cell of the stack, such as "lstm", "lstm_peephole" or "gru".
        dropout: of the stack's input, between its layers and of its output.
        recurrent_dropout: of the stack's recurrent products.
        variational_dropout: whether `dropout` draws one mask for all words of a sentence.
        character_dropout: of the character vectors.
        unk_probability: how often a word that occurs once is taken for an unknown one, in training.
        word_dropout: how often any other word is; its characters stay.
        residual: whether a layer of the stack above the first adds its input to its output.
        layer_norm: whether the input of those layers is normalised.
        head: "crf" or "softmax", for all tasks or a list with one for each.
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
        character_filters: int = 0,
        character_filter_width: int = 3,
        casing_size: int = 0,
        hidden_sizes: Sequence[int] = (200,),
        cell: str = "lstm",
        dropout: float = 0.5,
        recurrent_dropout: float = 0.0,
        variational_dropout: bool = False,
        character_dropout: float = 0.0,
        unk_probability: float = 0.5,
        word_dropout: float = 0.0,
        residual: bool = False,
        layer_norm: bool = False,
        head: Head | list[Head] = "crf",
        freeze_vectors: bool = False,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        arguments: dict[str, Any] = {
            "word_size": word_size,
            "character_size": character_size,
            "character_hidden_size": character_hidden_size,
            "character_filters": character_filters,
            "character_filter_width": character_filter_width,
            "casing_size": casing_size,
            "hidden_sizes": list(hidden_sizes),
            "cell": cell,
            "dropout": dropout,
            "recurrent_dropout": recurrent_dropout,
            "variational_dropout": variational_dropout,
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
            other_tasks=[(task.tags.symbols, task.encoding) for task in codec.tasks[1:]],
            num_casings=len(CASINGS),
            first_rare=codec.frequent_words,
            vectors=codec.vectors,
            **arguments,
        )
        self.scores = nn.ModuleDict(
            {
                stage: nn.ModuleList(Scores(task) for task in codec.tasks)
                for stage in ("val", "test")
            }
        )
        self._samples: list[list[str]] = []
        self._confusions: list[Tensor] = []

    @property
    def score_names(self) -> set[str]:
        """Names under which validation logs its scores."""
        return {
            f"{f'val/{task.name}'.rstrip('/')}/{name}"
            for task in self.codec.tasks
            for name in ("loss", "accuracy", "precision", "recall", "f1")
            if task.scheme is not None or name in ("loss", "accuracy")
        }

    def forward(self, batch: TaggingBatch) -> Tensor:
        """Scores the tags of each word of a batch in the first task: [B, T, K]."""
        return self.model(*batch[:6])

    def training_step(self, batch: TaggingBatch, _: int) -> Tensor:
        """Return the negative log-likelihood of the gold tags, a word, summed over tasks."""
        features = self.model.encode(*batch[:6])
        loss = features.new_zeros(())
        for head, gold in zip(self.model.heads, [batch.tags, *batch.other_tags], strict=True):
            total, count = head.loss(head.emission(features), gold, batch.lengths)
            loss = loss + total / count.clamp(min=1)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.words))
        return loss

    def _evaluate(self, batch: TaggingBatch, stage: str) -> None:
        features = self.model.encode(*batch[:6])
        tags = [batch.tags, *batch.other_tags]
        names = [batch.tag_names or [], *batch.other_names]
        for place, head in enumerate(self.model.heads):
            emissions = head.emission(features)
            total, count = head.loss(emissions, tags[place], batch.lengths)
            paths = head.decode(emissions, batch.lengths)
            predicted = self._names(place, paths, batch.lengths)
            self._scores(stage)[place].update(
                total, count, paths, tags[place], names[place], predicted
            )
            if place == 0:
                rows = zip(batch.tokens or [], names[place], predicted, strict=True)
                self._samples += [
                    [" ".join(cell) for cell in row] for row in islice(rows, SAMPLES_PER_BATCH)
                ]

    def on_train_end(self) -> None:
        """Draw the confusion matrix of the last validation."""
        self._draw("val")

    def _start(self, stage: str) -> None:
        super()._start(stage)
        self._samples = []

    def _report(self, stage: str) -> None:
        """Log the scores, samples and each label's scores, and after testing the confusions."""
        results = [scores.compute() for scores in self._scores(stage)]
        self._confusions = [confusion for _, _, confusion in results]
        for task, head, (values, labels, _) in zip(
            self.codec.tasks, self.model.heads, results, strict=True
        ):
            key = f"{stage}/{task.name}".rstrip("/")
            if "loss" not in values:
                unit = "word" if head.crf is None else "sentence"
                rank_zero_warn(
                    f"{key}/loss is not logged: every {unit} has a tag that is not in the training "
                    "split, and so no likelihood"
                )
            self.log_dict({f"{key}/{name}": value for name, value in values.items()}, prog_bar=True)
            columns = ["label", "precision", "recall", "f1", "correct", "predicted", "gold"]
            log_table(self, f"{key}/labels", columns, labels)
            if stage == "test":
                print_table(f"{key}: labels", columns, labels)
        log_table(
            self, f"{stage}/samples", ["tokens", "gold", "predicted"], self._samples[:SAMPLES]
        )
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._draw(stage)

    def _draw(self, stage: str) -> None:
        for task, confusion in zip(self.codec.tasks, self._confusions, strict=False):
            key = f"{stage}/{task.name}".rstrip("/")
            names = [*task.tags.symbols, UNSEEN]
            log_figure(self, f"{key}/confusion_matrix", confusion_figure(confusion, names))
            log_table(self, f"{key}/confusion_counts", *confusion_table(confusion, names, None))
            if stage == "test":
                print_table(f"{key}: confusion of tags", *confusion_table(confusion, names))

    def tag(
        self,
        sentences: Sequence[str | Sequence[str]],
        batch_size: int = 32,
        tokenizer: Tokenizer = "whitespace",
    ) -> list[list[tuple[str, ...]]]:
        """Tag sentences.

        Args:
            sentences: each a string, or the list of its words.
            batch_size: sentences that are tagged at once; it does not change the result.
            tokenizer: how a string is cut into words: at `whitespace`, into `words` and
                punctuation marks, or into `characters`.

        Returns:
            For each sentence its words, each with its tag in every task; an empty list for one
            without words.

        Raises:
            ValueError: a single string, `batch_size` < 1, or an unknown tokenizer.
        """
        if isinstance(sentences, str):
            raise ValueError("sentences: expected a list of sentences, got a single string")
        words = [tokenize(s, tokenizer) if isinstance(s, str) else list(s) for s in sentences]
        found = self._find(words, batch_size)
        return [list(zip(row, *of.tags, strict=True)) for row, of in zip(words, found, strict=True)]

    @torch.inference_mode()
    def _find(
        self, sentences: Sequence[list[str]], batch_size: int, confidence: bool = False
    ) -> list[Found]:
        """Find the tags of each sentence; `confidence`: whether to say how sure it is of them."""
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        rows = [self.codec.untagged(words) for words in sentences]
        order = sorted(
            (i for i, row in enumerate(rows) if row.words), key=lambda i: len(rows[i].words)
        )
        results = [Found([[] for _ in self.codec.tasks], [], []) for _ in rows]
        with evaluation(self):
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = self.transfer_batch_to_device(
                    self.codec.batch([rows[i] for i in chosen]), self.device, 0
                )
                features = self.model.encode(*batch[:6])
                columns: list[list[list[str]]] = []
                shares: list[list[float]] = [[] for _ in chosen]
                sure = shares
                for place, head in enumerate(self.model.heads):
                    emissions = head.emission(features)
                    paths = head.decode(emissions, batch.lengths)
                    columns.append(self._names(place, paths, batch.lengths))
                    if confidence and place == 0:
                        shares = head.confidences(emissions, paths, batch.lengths).tolist()
                        sure = self._sure(emissions, paths, batch.lengths, columns[0])
                for i, share, entity, *tags in zip(chosen, shares, sure, *columns, strict=True):
                    results[i] = Found(tags, share[: len(tags[0])], entity)
        return results

    def _sure(
        self, emissions: Tensor, paths: Tensor, lengths: Tensor, names: list[list[str]]
    ) -> list[list[float]]:
        """How sure the model is of each entity of each sentence."""
        found = [entities(tags, self.codec.scheme) for tags in names]
        spans = [(row, e.start, e.end) for row, chunks in enumerate(found) for e in chunks]
        places = paths.new_tensor(spans).view(-1, 3)
        values = iter(self.model.span_confidences(emissions, paths, places, lengths).tolist())
        return [list(islice(values, len(chunks))) for chunks in found]

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
            tags_only: whether to write the tags without the words; of the format `text` alone.
            input_format: `text`, or columns: `conll`, or `conllu`.
            format: `text`: `word/TAG word/TAG ...` for each sentence; `conll`: a column of tags
                after the token or after the columns that were read; `json`: for each sentence an
                object with tokens, entities and offsets; `brat`: stand-off annotations; `html`: a
                page with coloured entities; `ansi`: coloured for a terminal.
            token_column: of `conll`, the index of the token.
            confidence: whether to write the probability of each tag (with a CRF, its marginal) and
                of each entity (of all its tags, with a CRF also of its end); of several tasks,
                those of the first.

        Yields:
            The results, in order.

        Raises:
            ValueError: arguments that exclude each other, or a line without a token.
        """
        if tags_only and (format != "text" or confidence):
            raise ValueError(
                "tags_only: expected the format text and no confidence, "
                f"got format {format}, confidence {confidence}"
            )
        sources = (
            read_text(lines, tokenizer)
            if input_format == "text"
            else read_columns(lines, token_column, input_format == "conllu")
        )
        tagged = self._tagged(sources, batch_size, confidence)
        if tags_only:
            for sentence in tagged:
                rows = zip(sentence.tags, *sentence.others, strict=True)
                yield " ".join("/".join(row) for row in rows)
        else:
            yield from WRITERS[format](tagged, self.codec.scheme)

    def _tagged(
        self, sources: Iterator[Source], batch_size: int, confidence: bool
    ) -> Iterator[Tagged]:
        while chunk := list(islice(sources, max(1, batch_size))):
            found = self._find([source.tokens for source in chunk], batch_size, confidence)
            for source, (tags, shares, sure) in zip(chunk, found, strict=True):
                known = {"confidences": shares, "entity_confidences": sure} if confidence else {}
                yield Tagged(source, tags[0], others=tags[1:], **known)

    def _names(self, place: int, paths: Tensor, lengths: Tensor) -> list[list[str]]:
        task = self.codec.tasks[place]
        rows = zip(paths.tolist(), lengths.tolist(), strict=True)
        return [task.decode(row[:length]) for row, length in rows]


class Scores(nn.Module):
    """What a stage of evaluation counts of a task: exact sums over batches and processes.

    Args:
        task: the tags.
    """

    def __init__(self, task: TagSet) -> None:
        super().__init__()
        self.tags = task.tags.symbols
        classes = len(self.tags) + 1
        self.loss = SumMetric().set_dtype(torch.float64)
        self.counted = SumMetric().set_dtype(torch.float64)
        self.accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED)
        self.confusion = MulticlassConfusionMatrix(classes, ignore_index=IGNORED)
        self.spans = None if task.scheme is None else SpanF1(task.labels)

    def update(
        self,
        total: Tensor,
        count: Tensor,
        paths: Tensor,
        tags: Tensor,
        names: list[list[str]],
        predicted: list[list[str]],
    ) -> None:
        """Count a batch.

        Args:
            total: sum of the loss over words.
            count: number of those words.
            paths: [B, T] the predicted tags, -1 past the end.
            tags: [B, T] the gold tags, -100 for those that are not learnt.
            names: the names of the gold tags.
            predicted: the names of the predicted tags.
        """
        self.loss.update(total)
        self.counted.update(count)
        past = paths < 0
        gold = torch.where(tags < 0, len(self.tags), tags).masked_fill(past, IGNORED)
        paths = paths.masked_fill(past, 0)
        self.accuracy.update(paths, gold)
        self.confusion.update(paths, gold)
        if self.spans is not None:
            self.spans.update(predicted, names)

    def compute(self) -> tuple[dict[str, Tensor], list[list[Any]], Tensor]:
        """Return the scores by name, the table of labels, and the confusion matrix.

        There is no loss where no sentence has a likelihood, for a tag that training has not seen.
        """
        values = {"accuracy": self.accuracy.compute()}
        counted = self.counted.compute()
        if counted > 0:
            values = {"loss": self.loss.compute() / counted} | values
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


def confusion_table(
    confusion: Tensor, names: Sequence[str], most: int | None = 16
) -> tuple[list[str], list[list[Any]]]:
    """Make a table of a confusion matrix.

    Args:
        confusion: [K, K], counts, gold tags down and predicted tags across.
        names: the names of the K tags; those that never occur are left out.
        most: of more tags than these only the most frequent confusions are listed, two dozen; None:
            always the whole matrix.

    Returns:
        The names of the columns, and the rows.
    """
    used = (confusion.sum(0) + confusion.sum(1)).nonzero()[:, 0].tolist()
    counts = confusion.tolist()
    if most is None or len(used) <= most:
        rows = [[names[i], *(counts[i][j] for j in used)] for i in used]
        return ["gold \\ predicted", *(names[j] for j in used)], rows
    pairs = [[names[i], names[j], counts[i][j]] for i in used for j in used if i != j]
    worst = sorted((pair for pair in pairs if pair[2]), key=lambda pair: -pair[2])
    return ["gold", "predicted", "count"], worst[:24]


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
    axes.set_title("words, shaded by their share of the gold tag", fontsize="small")
    if len(used) <= 24:
        for i, row in enumerate(counts.tolist()):
            for j, count in enumerate(row):
                if count:
                    shade = "white" if shares[i, j] > 0.6 else "black"
                    axes.text(j, i, count, ha="center", va="center", color=shade, fontsize=6)
    return figure
