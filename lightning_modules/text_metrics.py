"""Scores of freely decoded text: counts, summed over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sacrebleu.metrics import BLEU
from torch import Tensor
from torchmetrics import Metric

__all__ = ["SacreBLEU", "SymbolErrorRate", "WordErrorRate", "edit_distance"]


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the fewest insertions, deletions and substitutions between two sequences.

    Args:
        first: symbols.
        second: symbols.
    """
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(diagonal + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def _check(predictions: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    if len(predictions) != len(references):
        raise ValueError(
            f"got {len(predictions)} predictions and {len(references)} lists of references: "
            "expected as many"
        )
    for number, answers in enumerate(references):
        if not answers:
            raise ValueError(f"references: row {number} has none")


class _Rate(Metric):
    """A ratio of two counts."""

    full_state_update = False
    higher_is_better = False
    errors: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("errors", "total"):
            self.add_state(name, torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the rate as a fraction; nan before any update."""
        return self.errors.double() / self.total


class SymbolErrorRate(_Rate):
    """Edits to the closest reference, per symbol of that reference.

    For phonemes this is PER, for the words of an utterance WER, for its characters CER. The closest
    reference is the one with the fewest edits, the first of several. Sums run over all rows before
    the division.
    """

    def update(
        self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
    ) -> None:
        """Count a batch.

        Args:
            predictions: B sequences of symbols.
            references: for each, one or more sequences of symbols.

        Raises:
            ValueError: different numbers of rows, or a row without references.
        """
        _check(predictions, references)
        for prediction, answers in zip(predictions, references, strict=True):
            edits = [edit_distance(prediction, answer) for answer in answers]
            closest = min(range(len(edits)), key=edits.__getitem__)
            self.errors += edits[closest]
            self.total += len(answers[closest])


class WordErrorRate(_Rate):
    """Share of rows that match none of their references exactly.

    The name is that of grapheme-to-phoneme conversion, where a row is a word.
    """

    def update(
        self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
    ) -> None:
        """Count a batch; arguments as for `SymbolErrorRate`."""
        _check(predictions, references)
        for prediction, answers in zip(predictions, references, strict=True):
            self.errors += list(prediction) not in [list(answer) for answer in answers]
        self.total += len(predictions)


class SacreBLEU(Metric):
    """Corpus BLEU as sacreBLEU computes it (Post, 2018), from summed n-gram counts.

    Args:
        lowercase: whether case is ignored; part of the signature.
        tokenize: tokenizer of sacreBLEU; `none` for text that is tokenized already.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor
    totals: Tensor
    lengths: Tensor
    fewest: Tensor
    most: Tensor

    def __init__(self, lowercase: bool = False, tokenize: str = "13a") -> None:
        super().__init__()
        # force: no warning per batch about text that looks tokenized
        self.bleu = BLEU(lowercase=lowercase, tokenize=tokenize, force=True)
        order = self.bleu.max_ngram_order
        for name, size in (("counts", order), ("totals", order), ("lengths", 2)):
            zeros = torch.zeros(size, dtype=torch.int64)
            self.add_state(name, zeros, dist_reduce_fx="sum")
        self.add_state("fewest", torch.tensor(2**31), dist_reduce_fx="min")
        self.add_state("most", torch.tensor(0), dist_reduce_fx="max")

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Count a batch.

        Args:
            predictions: B texts.
            references: for each, one or more texts.

        Raises:
            ValueError: different numbers of rows, or a row without references.
        """
        _check(predictions, references)
        if not predictions:
            return
        most = max(map(len, references))
        self.most = self.most.clamp(min=most)
        self.fewest = self.fewest.clamp(max=min(map(len, references)))
        streams = [
            [answers[i] if i < len(answers) else None for answers in references]
            for i in range(most)
        ]
        score = self.bleu.corpus_score(list(predictions), streams)  # type: ignore[arg-type]
        for state, values in (
            (self.counts, score.counts),
            (self.totals, score.totals),
            (self.lengths, [score.sys_len, score.ref_len]),
        ):
            state += torch.tensor(values, dtype=torch.int64, device=state.device)

    def compute(self) -> Tensor:
        """Return BLEU from 0 to 100."""
        # the signature of all processes: the same number of references everywhere, or varying
        self.bleu.num_refs = int(self.most) if self.most == self.fewest else -1
        score = BLEU.compute_bleu(
            self.counts.tolist(),
            self.totals.tolist(),
            int(self.lengths[0]),
            int(self.lengths[1]),
            smooth_method=self.bleu.smooth_method,
            smooth_value=self.bleu.smooth_value,
            max_ngram_order=self.bleu.max_ngram_order,
        )
        return torch.tensor(score.score, dtype=torch.float64)

    @property
    def signature(self) -> str:
        """What a reader needs to reproduce the score; complete after `compute`."""
        return str(self.bleu.get_signature())
