"""Batches of a generated problem that needs a long memory."""

from typing import Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_modules.data.batching import BucketBatchSampler, ResumableLoader
from lightning_modules.memory_model import Batch, Problem


class MemoryData(L.LightningDataModule):
    """Rows of the adding problem, temporal order or copy memory, drawn when they are wanted.

    Every training batch is new; those of validation and test are the same in every epoch.

    Args:
        problem: "adding", "order" or "copy"; see `lightning_modules.memory_model.Problem`.
        length: its T.
        batch_size: rows in a batch.
        steps: training batches in an epoch.
        rows: rows for validation, and as many for test.
        seed: of all that is drawn.

    Attributes:
        codec: the problem.

    Raises:
        ValueError: no such problem, or a number that is not positive.
    """

    def __init__(
        self,
        problem: Literal["adding", "order", "copy"] = "adding",
        length: int = 200,
        batch_size: int = 128,
        steps: int = 200,
        rows: int = 1280,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"batch_size": batch_size, "steps": steps, "rows": rows}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.codec = Problem(problem, length)
        self.batch_size, self.rows, self.seed = batch_size, rows, seed
        self.sizes = {"train": steps * batch_size, "val": rows, "test": rows}

    def collate(self, split: str, numbers: list[int]) -> Batch:
        """Draws a batch from the numbers of its rows, so that it needs no other state."""
        key = hash((self.seed, list(self.sizes).index(split), *numbers))
        generator = torch.Generator().manual_seed(key % 2**63)
        return self.codec.generate(len(numbers), generator)

    def _loader(self, split: str) -> DataLoader:
        shuffle, size = split == "train", self.sizes[split]
        sampler = BucketBatchSampler([self.codec.length] * size, self.batch_size, None, shuffle)
        kind = ResumableLoader if shuffle else DataLoader
        return kind(
            range(size),  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=lambda numbers: self.collate(split, numbers),
        )

    def train_dataloader(self) -> DataLoader:
        """Batches that are new in every epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        """Batches that stay the same."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Others that stay the same."""
        return self._loader("test")
