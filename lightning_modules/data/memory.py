"""Batches of a generated problem that needs a long memory."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

from lightning_modules.data.module import SPLITS, DataModule
from lightning_modules.memory_model import Batch, Problem


class MemoryData(DataModule):
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
        super().__init__(batch_size, seed=seed)
        for name, value in {"steps": steps, "rows": rows}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.codec = Problem(problem, length)
        sizes = (steps * batch_size, rows, rows)
        self._rows = {split: range(size) for split, size in zip(SPLITS, sizes, strict=True)}

    def draw(self, split: str, numbers: list[int]) -> Batch:
        """Draw a batch from the numbers of its rows, so that it needs no other state."""
        key = hash((self.seed, SPLITS.index(split), *numbers))
        generator = torch.Generator().manual_seed(key % 2**63)
        return self.codec.generate(len(numbers), generator)

    def _sizes(self, rows: range) -> list[int]:
        return [self.codec.length] * len(rows)

    def _collate(self, split: str) -> Callable[[list[int]], Batch]:
        return partial(self.draw, split)
