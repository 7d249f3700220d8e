"""One step of the decoder's layers without gradients, for hypotheses that share what they continue.

In a beam several hypotheses often continue the same one, and many have the same last symbol. What
the gates get from either is computed once and gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import LayerWeights, State
from .torch_loop import CELLS, input_bias, split_layers


class Parents(NamedTuple):
    """Which rows of a state the rows of the next step continue.

    Attributes:
        rows: int64 [N].
        kept: int64 [P], those that any row continues, each once.
        places: int64 [N], of `rows` in `kept`; None where they are the same.
    """

    rows: Tensor
    kept: Tensor
    places: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, count: int) -> Parents:
        """Find out what `rows`, each below `count`, share."""
        used = torch.zeros(count, dtype=torch.bool, device=rows.device)
        used[rows] = True
        kept = used.nonzero().squeeze(1)
        if len(kept) == len(rows):
            return cls(rows, rows, None)
        return cls(rows, kept, used.cumsum(0).sub_(1).index_select(0, rows))

    def spread(self, values: Tensor) -> Tensor:
        """From [P, *], one for each that is continued, to [N, *]."""
        return values if self.places is None else values.index_select(0, self.places)

    def gather(self, values: Tensor) -> Tensor:
        """From [N, *], equal where rows continue the same, to [P, *]."""
        if self.places is None:
            return values
        first = self.kept.new_full(self.kept.shape, len(self.places))
        numbers = torch.arange(len(self.places), device=first.device)
        return values.index_select(0, first.scatter_reduce_(0, self.places, numbers, "amin"))


def advance(
    cell: str,
    weights: Sequence[LayerWeights],
    x: Tensor,
    inputs: Tensor | None,
    fed: Tensor | None,
    states: Sequence[State],
    parents: Parents,
) -> list[State]:
    """One step of all layers.

    Args:
        cell: one of `CELLS`.
        weights: of each layer.
        x: [M, E], inputs of the lowest layer.
        inputs: int64 [N], which of them each row takes; None: M = N, its own.
        fed: [P, F], what is fed beside them to the rows that continue the same, or None.
        states: of each layer, as many rows as the step before had.
        parents: what each of the N rows continues.

    Returns:
        The states of N rows.
    """
    kind, results = CELLS[cell], list[State]()
    layers, below = split_layers(kind, weights, x.shape[1]), x
    for index, (layer, own, (h, *c)) in enumerate(zip(layers, weights, states, strict=True)):
        z = h.new_empty(len(parents.kept), 4 * h.shape[1])
        of_input, recurrent = kind.split(z)
        torch.mm(h.index_select(0, parents.kept), layer.recurrent.t(), out=recurrent)
        z[:, recurrent.shape[1] :] = 0
        if index == 0 and fed is not None:
            of_input.addmm_(fed, layer.fed.t())
        z, given = parents.spread(z), input_bias(kind, own).repeat(len(below), 1)
        matrix = layer.given if index == 0 else layer.fed
        kind.split(given)[0].addmm_(below, matrix.t())
        z += given if index > 0 or inputs is None else given.index_select(0, inputs)
        before = (c[0] if c else h).index_select(0, parents.rows)
        new = before.new_empty(3 if c else 1, *before.shape).unbind(0)
        kind.step(kind.blocks(z, [len(z)])[0], before, (before, *new[1:]), new[0])
        results.append(new[:2])
        below = new[0]
    return results
