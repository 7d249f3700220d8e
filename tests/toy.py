"""A small task on data that it makes itself, for tests of what every task shares."""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules import Task
from lightning_modules.data import BucketBatchSampler, Vocabulary, lengths, pad


class ToyCodec:
    def __init__(self, words: Vocabulary) -> None:
        self.words = words

    def to_dict(self) -> dict:
        return {"words": self.words.to_list()}

    @classmethod
    def from_dict(cls, data: dict) -> "ToyCodec":
        return cls(Vocabulary(data["words"]))


class ToyBatch(NamedTuple):
    words: Tensor
    lengths: Tensor
    tags: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


class ToyTask(Task):
    """Says of each word whether it has been seen in the sentence before."""

    codec_class = ToyCodec

    def __init__(
        self,
        codec: ToyCodec,
        hidden_size: int = 8,
        dropout: float = 0.5,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        arguments = {"hidden_size": hidden_size, "dropout": dropout}
        super().__init__(codec, arguments, optimizer, scheduler)
        self.embedding = nn.Embedding(len(codec.words), hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.rnn = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, 2)
        self.accuracy = MulticlassAccuracy(2, average="micro", ignore_index=-100)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.rnn(self.dropout(self.embedding(words)))[0])

    def loss(self, batch: ToyBatch) -> Tensor:
        logits = self(batch.words)
        self.accuracy.update(logits.flatten(0, 1), batch.tags.flatten())
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.tags.flatten(), ignore_index=-100
        )

    def training_step(self, batch: ToyBatch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.accuracy.reset()
        self.log("train/loss", loss, batch_size=batch.num_tokens)
        return loss

    def _evaluate(self, batch: ToyBatch, stage: str) -> None:
        loss = self.loss(batch)
        self.log(f"{stage}/loss", loss, batch_size=batch.num_tokens, sync_dist=True, on_epoch=True)
        self.log(f"{stage}/accuracy", self.accuracy, on_epoch=True, batch_size=batch.num_tokens)

    @torch.inference_mode()
    def predict_lines(self, lines: Iterable[str], upper: bool = False) -> Iterator[str]:
        """Yields `new` or `seen` for each word.

        Args:
            lines: sentences.
            upper: shout.
        """
        for line in lines:
            words = self.codec.words.encode(line.split())
            tags = self(torch.tensor([words])).argmax(-1)[0].tolist() if words else []
            result = " ".join(("new", "seen")[tag] for tag in tags)
            yield result.upper() if upper else result


class OtherTask(ToyTask):
    """The same under another name."""


class ToyData(L.LightningDataModule):
    def __init__(self, train: int = 20, val: int = 7, test: int = 9, words: int = 12) -> None:
        super().__init__()
        self.sizes = {"train": train, "val": val, "test": test}
        self.num_words = words

    def sentences(self, split: str) -> list[list[str]]:
        generator = torch.Generator().manual_seed(len(split))
        sizes = torch.randint(1, 9, (self.sizes[split],), generator=generator).tolist()
        draws = [torch.randint(self.num_words, (n,), generator=generator).tolist() for n in sizes]
        return [[f"w{word}" for word in sentence] for sentence in draws]

    @cached_property
    def codec(self) -> ToyCodec:
        counts = Counter(word for sentence in self.sentences("train") for word in sentence)
        return ToyCodec(Vocabulary.from_counts(counts))

    def collate(self, sentences: list[list[str]]) -> ToyBatch:
        tags = [[int(w in s[:i]) for i, w in enumerate(s)] for s in sentences]
        words = pad([self.codec.words.encode(sentence) for sentence in sentences])
        return ToyBatch(words, lengths(sentences), pad(tags, -100))

    def loader(self, split: str) -> DataLoader:
        data = self.sentences(split)
        sampler = BucketBatchSampler(list(map(len, data)), batch_size=4, shuffle=split == "train")
        return DataLoader(data, batch_sampler=sampler, collate_fn=self.collate)

    def train_dataloader(self) -> DataLoader:
        return self.loader("train")

    def val_dataloader(self) -> DataLoader:
        return self.loader("val")

    def test_dataloader(self) -> DataLoader:
        return self.loader("test")
