"""Problems that need a long memory, generated, and the network that is to solve them.

The adding problem and temporal order (Hochreiter & Schmidhuber 1997, experiments 4 and 6a; the
adding problem with values in [0, 1], as in Le et al. 2015), and copy memory (Arjovsky et al. 2016).
Nothing here needs Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fusedrnn import RecurrentStack
from fusedrnn.diagnostics import CARRY
from fusedrnn.saving import saveable

Bias = Literal["0", "1", "chrono"]


class Batch(NamedTuple):
    """Inputs [T, B, I], lengths [B] or None, and targets: [B], or [T, B] for one at every step."""

    x: Tensor
    lengths: Tensor | None
    target: Tensor

    @property
    def num_tokens(self) -> int:
        """Steps without padding."""
        steps, rows = self.x.shape[:2]
        return steps * rows if self.lengths is None else int(self.lengths.sum())


def adding(batch: int, length: int, generator: Generator | None = None) -> Batch:
    """Numbers in [0, 1], marked once in each half; the answer is the sum of the marked ones."""
    values, rows = torch.rand(length, batch, generator=generator), torch.arange(batch)
    marks = torch.zeros(length, batch)
    half = length // 2
    marks[torch.randint(half, (batch,), generator=generator), rows] = 1.0
    marks[torch.randint(half, length, (batch,), generator=generator), rows] = 1.0
    return Batch(torch.stack([values, marks], -1), None, (values * marks).sum(0))


def temporal_order(batch: int, length: int, generator: Generator | None = None) -> Batch:
    """Symbols a b c d, begin, end, and X or Y at two places; the answer is which of XX, XY, YX, YY.

    Lengths are `length` to 1.1 `length`; the places lie a tenth to a fifth and a half to six tenths
    of `length` from the start.
    """
    longest, rows = length + length // 10, torch.arange(batch)
    lengths = torch.randint(length, longest + 1, (batch,), generator=generator)
    symbols = torch.randint(4, (longest, batch), generator=generator)
    symbols[0] = 4
    symbols[lengths - 1, rows] = 5
    first, second = torch.randint(2, (2, batch), generator=generator)
    for symbol, start, end in (
        (first, length // 10, length // 5),
        (second, length // 2, 6 * length // 10),
    ):
        places = torch.randint(start, end + 1, (batch,), generator=generator)
        symbols[places, rows] = 6 + symbol
    return Batch(F.one_hot(symbols, 8).float(), lengths, 2 * first + second)


def copy_memory(batch: int, length: int, generator: Generator | None = None) -> Batch:
    """Ten symbols, blanks, a sign `length` steps after them, and then the ten symbols as answer."""
    memory = torch.randint(1, 9, (10, batch), generator=generator)
    symbols, target = torch.zeros(2, length + 20, batch, dtype=torch.int64)
    symbols[:10], symbols[length + 9], target[length + 10 :] = memory, 9, memory
    return Batch(F.one_hot(symbols, 10).float(), None, target)


GENERATORS = {"adding": adding, "order": temporal_order, "copy": copy_memory}


class Problem:
    """A generated problem.

    Args:
        name: "adding", "order" or "copy".
        length: T, at least 10: of the sequences, of the shortest of them, or between symbols and
            answer.

    Raises:
        ValueError: there is no such problem.
    """

    def __init__(self, name: str, length: int) -> None:
        if name not in GENERATORS or length < 10:
            raise ValueError(
                f"problem must be one of {', '.join(GENERATORS)} with a length of at least 10, "
                f"got {name!r} with {length}"
            )
        self.name = name
        self.length = length

    @property
    def inputs(self) -> int:
        """Size I of an input."""
        return {"adding": 2, "order": 8, "copy": 10}[self.name]

    @property
    def outputs(self) -> int:
        """Size of an answer: one number, or a score for each symbol."""
        return {"adding": 1, "order": 4, "copy": 9}[self.name]

    @property
    def chance(self) -> float:
        """Loss without memory."""
        copy = 10 * math.log(8) / (self.length + 20)
        return {"adding": 1 / 6, "order": math.log(4), "copy": copy}[self.name]

    @property
    def solved(self) -> float:
        """Loss below which the problem counts as solved."""
        return 0.1 * self.chance if self.name == "copy" else 0.01

    def generate(self, batch: int, generator: Generator | None = None) -> Batch:
        """Draw a batch of a number of rows."""
        return GENERATORS[self.name](batch, self.length, generator)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean squared error of one number, cross-entropy in nats otherwise."""
        if self.outputs == 1:
            return F.mse_loss(outputs.squeeze(-1), batch.target)
        return F.cross_entropy(outputs.flatten(0, -2), batch.target.flatten())

    def to_dict(self) -> dict[str, Any]:
        """Name and length."""
        return {"name": self.name, "length": self.length}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Problem:
        """Restore what `to_dict` returned."""
        return cls(**data)


@saveable
class MemoryModel(nn.Module):
    """A recurrent layer, and a linear answer at the end or at every step.

    Args:
        problem: name of the problem, as for `Problem`.
        length: its T.
        cell: "lstm", "gru", "rnn", or a name in `kernels.CELLS`.
        bias: initial bias of the gate that the old state is multiplied with: "0", "1" or "chrono";
            see `set_carry_bias`.
        hidden_size: hidden units H.
    """

    def __init__(
        self, problem: str, length: int, cell: str = "lstm", bias: Bias = "1", hidden_size: int = 32
    ) -> None:
        super().__init__()
        solved = Problem(problem, length)
        self.layer = RecurrentStack(solved.inputs, [hidden_size], cell)
        set_carry_bias(self.layer, bias, length)
        self.head = nn.Linear(hidden_size, solved.outputs)

    def answer(self, y: Tensor, batch: Batch) -> Tensor:
        """From the layer's outputs [T, B, H]."""
        if batch.target.dim() == 2:
            return self.head(y)
        if batch.lengths is None:
            return self.head(y[-1])
        return self.head(y[batch.lengths - 1, torch.arange(y.shape[1])])

    def forward(self, batch: Batch) -> Tensor:
        """Answer a batch."""
        return self.answer(self.layer(batch.x, lengths=batch.lengths)[0], batch)


@torch.no_grad()
def set_carry_bias(stack: RecurrentStack, bias: Bias, length: int) -> None:
    """Set the bias of the carry gate in every layer, f of an LSTM and z of a GRU.

    Args:
        stack: its layers; one whose cell has no such gate stays as it is.
        bias: "0", "1", or "chrono" (Tallec & Ollivier 2018): log U(1, T - 1), with the opposite on
            an LSTM's input gate.
        length: T.
    """
    for layer in cast(Iterable[Any], stack.layers):
        size = layer.hidden_size
        gates = len(layer.bias_ih_l0) // size
        if gates not in CARRY:
            continue
        value = torch.full((size,), float(bias)) if bias != "chrono" else None
        if value is None:
            value = torch.empty(size).uniform_(1, length - 1).log()
        carry = slice(size, 2 * size)
        layer.bias_ih_l0[carry], layer.bias_hh_l0[carry] = value, 0.0
        if gates == 4 and bias == "chrono":
            layer.bias_ih_l0[:size], layer.bias_hh_l0[:size] = -value, 0.0
