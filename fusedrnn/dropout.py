"""Dropout that costs little on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, which on a CPU draws uniform numbers and not Bernoulli's.

    Those take a quarter of the time, and the same share of the elements is dropped.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of any shape in training, and scale the others by 1 / (1 - p)."""
        plain = self.inplace or input.device.type != "cpu" or not 0 < self.p < 1
        if plain or not self.training:
            return super().forward(input)
        kept = torch.rand(input.shape).ge_(self.p).to(input.dtype)
        return input * kept.mul_(1 / (1 - self.p))
