"""Dropout that costs little on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def dropout_mask(like: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """Draw what to multiply by: 0 with probability p, else 1 / (1 - p).

    Uniform numbers take a quarter of the time of Bernoulli's on a CPU.

    Args:
        like: a tensor of the device and the dtype that are wanted.
        shape: of the mask.
        p: in [0, 1].
    """
    drawn = torch.rand(tuple(shape), device=like.device).ge_(p).to(like.dtype)
    return drawn.mul_(1 / (1 - p)) if p < 1 else drawn


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, faster on a CPU; see `dropout_mask`."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of any shape in training, and scale the others by 1 / (1 - p)."""
        plain = self.inplace or input.device.type != "cpu" or not 0 < self.p < 1
        if plain or not self.training:
            return super().forward(input)
        return input * dropout_mask(input, input.shape, self.p)
