"""What every data module shares: the rows of its splits, and batches of rows of like lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_modules.data.batching import BucketBatchSampler, ResumableLoader, check_limits

SPLITS = ("train", "val", "test")
NEEDED = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
"""The splits of each stage."""


class DataModule(L.LightningDataModule):
    """Base of the data modules.

    A subclass says in `_encode` what the rows of a split are, in `_sizes` how long each of them is,
    and in `_collate` how some of them become a batch. Its `codec` is a `cached_property`: built
    from the training split when first asked for, unless another is assigned before.

    Args:
        batch_size: most rows in a batch; None: no limit.
        max_tokens: most tokens in a batch, padding counted; None: no limit.
        seed: of the order of the batches.
        num_workers: processes that collate batches.

    Raises:
        ValueError: one is out of its range, or there is no limit.
    """

    def __init__(
        self,
        batch_size: int | None,
        max_tokens: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_limits(batch_size, max_tokens, num_workers)
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.seed, self.num_workers = seed, num_workers
        self._rows: dict[str, Sequence[Any]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and encode the splits that a stage needs."""
        for split in NEEDED.get(stage or "", ()):
            if split not in self._rows:
                self._rows[split] = self._encode(split)

    def _encode(self, split: str) -> Sequence[Any]:
        raise NotImplementedError

    def _sizes(self, rows: Any) -> Sequence[int]:
        raise NotImplementedError

    def _collate(self, split: str) -> Callable[[list[Any]], Any]:
        raise NotImplementedError

    def _loader(self, split: str) -> DataLoader:
        rows, shuffle = self._rows[split], split == "train"
        sampler = BucketBatchSampler(
            self._sizes(rows), self.batch_size, self.max_tokens, shuffle, self.seed
        )
        return (ResumableLoader if shuffle else DataLoader)(
            rows,  # type: ignore[arg-type]  # a sequence is as good as a Dataset
            batch_sampler=sampler,
            collate_fn=self._collate(split),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch, which is made on the CPU; where it stays there, do not walk through it."""
        if device.type == "cpu":
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def train_dataloader(self) -> DataLoader:
        """Batches of the training split, reshuffled each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation split."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        """Batches of the test split."""
        return self._loader("test")
