"""Trains a recurrent layer on a generated problem that needs a long memory."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_modules.base import Task
from lightning_modules.memory_model import Batch, Bias, MemoryModel, Problem

__all__ = ["Memory"]


class Memory(Task):
    """Learns a problem of `MemoryData`.

    It logs `loss`: the mean squared error of adding, cross-entropy in nats otherwise.

    Args:
        codec: the problem; on the command line it is linked from the data.
        cell: "lstm", "gru", "rnn", or a name in `kernels.CELLS`.
        bias: initial bias of the gate that the old state is multiplied with: "0", "1" or "chrono".
        hidden_size: hidden units.
        optimizer: makes the optimizer.
        scheduler: makes the learning-rate scheduler, which steps once an epoch.

    Raises:
        ValueError: an unknown cell.
    """

    codec_class = Problem

    def __init__(
        self,
        codec: Problem,
        cell: str = "lstm",
        bias: Bias = "1",
        hidden_size: int = 32,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        arguments: dict[str, Any] = {"cell": cell, "bias": bias, "hidden_size": hidden_size}
        super().__init__(codec, arguments, optimizer, scheduler)
        self.model = MemoryModel(codec.name, codec.length, **arguments)

    def forward(self, batch: Batch) -> Tensor:
        """Answer a batch: [B, answer], or [T, B, answer] for one at every step."""
        return self.model(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self._loss(batch, "train")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        self._loss(batch, stage)

    def _loss(self, batch: Batch, stage: str) -> Tensor:
        loss = self.codec.loss(self(batch), batch)
        rows = batch.x.shape[1]
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=rows, sync_dist=stage != "train")
        return loss
