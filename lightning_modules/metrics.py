"""Scores that are sums of counts, so that they are right over batches and processes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.data.schemes import chunks


def precision_recall_f1(counts: Tensor) -> Tensor:
    """Compute precision, recall and their harmonic mean from counts.

    Args:
        counts: [..., 3] int64: correct, predicted and gold items.

    Returns:
        [..., 3] float64: precision, recall and F1, as fractions; 0 for nothing divided by nothing.
    """
    correct, predicted, gold = counts.double().unbind(-1)
    totals = torch.stack([predicted, gold, (predicted + gold) / 2], -1)
    return torch.where(totals > 0, correct[..., None] / totals, 0.0)


class SpanF1(Metric):
    """Entity precision, recall and F1 as conlleval computes them.

    An entity counts as correct when its type and both its ends are. Ill-formed tags are read as
    conlleval reads them (see `chunks`), which is what seqeval does by default and not what its
    strict mode does. Scores are micro-averages over all entities of all updates and processes.

    Args:
        labels: the entity types to count apart; entities of any other type (one that is seen first
            in evaluation) are counted together.

    Attributes:
        labels: the types given, and last `<other>`.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        self.labels = [*labels, "<other>"]
        self._rows = {label: row for row, label in enumerate(labels)}
        zeros = torch.zeros(len(self.labels), 3, dtype=torch.int64)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(
        self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
    ) -> None:
        """Count the entities of some sentences.

        Args:
            predictions: the predicted tags of each sentence.
            references: the gold tags of each sentence, as many.

        Raises:
            ValueError: a sentence has more or fewer predicted than gold tags.
        """
        other = len(self.labels) - 1
        counts = [[0, 0, 0] for _ in self.labels]
        for predicted, gold in zip(predictions, references, strict=True):
            if len(predicted) != len(gold):
                raise ValueError(
                    f"predictions: expected {len(gold)} tags as in references, got {len(predicted)}"
                )
            found, wanted = set(chunks(predicted)), set(chunks(gold))
            for column, entities in enumerate((found & wanted, found, wanted)):
                for entity in entities:
                    counts[self._rows.get(entity.kind, other)][column] += 1
        self.counts += torch.tensor(counts, device=self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """Return `precision`, `recall`, `f1` (float64 scalars) and `counts` [labels, 3].

        A row of `counts` holds the correct, predicted and gold entities of a label.
        """
        precision, recall, f1 = precision_recall_f1(self.counts.sum(0))
        return {"precision": precision, "recall": recall, "f1": f1, "counts": self.counts.clone()}
