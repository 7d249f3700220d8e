"""The time loop of one plan alone, as its launcher runs it: no input product, no autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.persistent import backward, forward
from kernels.persistent.launch import Masks
from kernels.persistent.plan import BLOCKS, LaunchPlan, loop_parameters
from kernels.spec import CELLS


class Loop:
    """Random tensors of the shapes that a plan's pass takes, and calls of its launcher with them.

    Args:
        plan: what to launch.
        steps: T.
        batch: B; the plan's own by default.
        device: where the tensors lie.
        lengths: int64 [B], or None.
        masks: dropout and zoneout.
        save: what a forward pass keeps for the gradient: "all", "state" or "nothing".
    """

    def __init__(
        self,
        plan: LaunchPlan,
        steps: int,
        batch: int | None = None,
        device: torch.device | str = "cpu",
        lengths: Tensor | None = None,
        masks: Masks | None = None,
        save: str = "all",
    ) -> None:
        self.plan, self.device, self.lengths, self.save = plan, device, lengths, save
        self.masks = masks or Masks()
        spec, blocks, size = CELLS[plan.cell], BLOCKS[plan.cell], plan.hidden_size
        batch = batch or plan.batch
        shape, d = (steps, batch, plan.directions), plan.directions
        extra = sum(loop_parameters(plan.cell).values()) * size
        self.params = self._new(d, extra) if extra else None
        self.w_hh = self._new(d, spec.gates * size, size)
        self.state = [self._new(d, batch, size) for _ in spec.states]
        if plan.backward:
            self.y = self._new(steps, batch, d * size)
            self.saved = forward.Saved(
                self._new(*shape, blocks.saved * size),
                self._new(*shape, size) if len(self.state) == 2 else None,
                self._new(*shape, blocks.statistics, dtype=torch.float32)
                if blocks.statistics
                else None,
            )
        else:
            self.gates = self._new(*shape, spec.gates * size)
            self.bias = self._new(d, spec.gates * size)

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Values as small as the usual weights, so that no recurrence grows without bound."""
        bound = self.plan.hidden_size**-0.5
        empty = torch.empty(*shape, device=self.device, dtype=dtype or self.plan.dtype)
        return empty.uniform_(-bound, bound)

    def run(self) -> None:
        """Launch once."""
        plan, params, lengths, masks = self.plan, self.params, self.lengths, self.masks
        if plan.backward:
            backward.backward(
                plan, self.y, self.state, self.w_hh, params, self.state, self.y, self.saved,
                lengths, masks,
            )  # fmt: skip
        else:
            forward.forward(
                plan, self.gates, self.w_hh, self.bias, params, self.state, lengths, masks,
                self.save,
            )  # fmt: skip
