"""Gradient flow through time: how far back a loss reaches, and what the gates do about it.

Nothing here computes a cell. Gradients come from the oracle (`kernels.reference`), whose states at
every step are kept in the graph; gates are those that the torch loop (`kernels.torch_loop`) saves
for its backward pass, run once more on the same values and the same masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels import CELLS, reference, torch_loop
from kernels.api import without_padding

from .base import RecurrentBase, State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GATES = {1: ("h",), 3: ("r", "z", "n"), 4: ("i", "f", "g", "o")}
"""Names of the gate blocks, by their number."""

CARRY = {3: "z", 4: "f"}
"""The gate that the old state is multiplied with, by the number of gates."""

SATURATED = 0.05
"""A gate is saturated within this share of its range from either end."""


class Flow(NamedTuple):
    """What one layer did in one forward and backward pass.

    Norms are over units and rows; means are over units and the rows that are long enough. Times are
    positions in the sequence, also in the second direction, which runs from the last to the first.

    Attributes:
        hidden: ||dL/dh_t||, [D, T].
        cell: ||dL/dc_t||, through h_t too, [D, T]; None without a cell state.
        carry: mean of the product over the steps so far of the gate that the old state is
            multiplied with, f of an LSTM and z of a GRU, [D, T]; None for other cells.
        gate_mean: name of the gate -> its mean, [D, T].
        unit_mean: name -> mean of each unit's gate over rows and times, [D, H].
        gate_saturation: name -> share of its values within 0.05 of its range from either end, [D].
        spectral_radius: name -> largest modulus of an eigenvalue of the gate's block of the
            recurrent matrix, [D].
    """

    hidden: Tensor
    cell: Tensor | None
    carry: Tensor | None
    gate_mean: dict[str, Tensor]
    unit_mean: dict[str, Tensor]
    gate_saturation: dict[str, Tensor]
    spectral_radius: dict[str, Tensor]


@dataclass
class Record:
    """One pass of one layer, complete once the loss's `backward()` has run.

    Attributes:
        cell: name in `kernels.CELLS`.
        gates: name of the gate -> its activated values, [D, T, B, H], zero past the lengths.
        states: for each direction, for each time, h_t [B, P] and, for the LSTMs, c_t [B, H]; after
            `backward()` their `.grad` is the derivative of the loss along all paths.
        recurrent: recurrent matrix [D, G*H, P].
        projection: [D, P, H], or None.
        alive: whether a row has a step at a time, bool [T, B].
    """

    cell: str
    gates: dict[str, Tensor]
    states: list[list[State]]
    recurrent: Tensor
    projection: Tensor | None
    alive: Tensor

    @property
    def reached(self) -> bool:
        """Whether a backward pass has come by."""
        return any(step[0].grad is not None for direction in self.states for step in direction)

    def gradient(self, state: int) -> Tensor:
        """dL/dh_t (`state` 0) or dL/dc_t (1), [D, T, B, *], zero where the loss does not reach.

        Raises:
            RuntimeError: no backward pass has run.
        """
        if not self.reached:
            raise RuntimeError("there are no gradients: call backward() on a loss of the output")
        steps = ([step[state] for step in direction] for direction in self.states)
        grads = ([torch.zeros_like(s) if s.grad is None else s.grad for s in d] for d in steps)
        return torch.stack([torch.stack(direction) for direction in grads])

    def carry(self) -> Tensor | None:
        """Product over the steps so far of f_k (LSTM) or z_k (GRU), [D, T, B, H]; else None.

        Where h's path is cut, dL/dc_0 = sum over t of (dL/dc_t directly) * carry_t.
        """
        name = CARRY.get(len(self.gates))
        if name is None:
            return None
        factors = torch.where(self.alive[..., None], self.gates[name], 1.0)
        products = [
            f.flip(0).cumprod(0).flip(0) if reverse else f.cumprod(0)
            for reverse, f in enumerate(factors)
        ]
        return torch.stack(products)

    def flow(self) -> Flow:
        """Norms and statistics.

        Raises:
            RuntimeError: no backward pass has run.
        """
        has_cell = len(CELLS[self.cell].states) == 2
        carry = self.carry()
        return Flow(
            _norm(self.gradient(0)),
            _norm(self.gradient(1)) if has_cell else None,
            None if carry is None else self._mean(carry),
            {name: self._mean(gate) for name, gate in self.gates.items()},
            {name: gate[:, self.alive].mean(1) for name, gate in self.gates.items()},
            {name: self._saturation(name, gate) for name, gate in self.gates.items()},
            self._spectral_radius(),
        )

    def _mean(self, values: Tensor) -> Tensor:
        """Over rows that are alive and units: [D, T, B, H] -> [D, T]."""
        rows = torch.where(self.alive[..., None], values, 0.0).sum((-1, -2))
        return rows / (self.alive.sum(-1) * values.shape[-1]).clamp(min=1)

    def _saturation(self, name: str, gate: Tensor) -> Tensor:
        if self.cell == "rnn_relu":
            saturated = gate <= 0
        elif name in ("g", "n", "h"):
            saturated = gate.abs() > 1 - 2 * SATURATED
        else:
            saturated = (gate - 0.5).abs() > 0.5 - SATURATED
        return saturated[:, self.alive].double().mean((-1, -2))

    def _spectral_radius(self) -> dict[str, Tensor]:
        blocks = self.recurrent.chunk(len(self.gates), 1)
        if self.projection is not None:
            blocks = tuple(block @ self.projection for block in blocks)
        values = (torch.linalg.eigvals(b.double()).abs().amax(-1) for b in blocks)
        return dict(zip(self.gates, values, strict=True))


def _norm(gradient: Tensor) -> Tensor:
    return gradient.double().flatten(2).norm(dim=-1)


@contextmanager
def record(module: nn.Module) -> Iterator[dict[str, Record]]:
    """Watch every recurrent layer of a module while it runs forward and backward.

    Inside, the layers compute with `backend="reference"`, the same mathematics in plain steps:
    slower, and rounded otherwise. Of a layer that is called more than once the last call counts.
    After mixed precision's loss scaling, gradients are those of the scaled loss.

        with record(model) as records:
            loss(model(x)).backward()
        flows = {name: r.flow() for name, r in records.items()}

    Args:
        module: a layer, a stack, or a model that holds some.

    Yields:
        The records by the layer's name in the module, with "l0", "l1", ... for each layer of one
        that has several.
    """
    records: dict[str, Record] = {}
    layers = {n: m for n, m in module.named_modules() if isinstance(m, RecurrentBase)}
    backends = {name: layer.backend for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.backend = "reference"
            layer.recurrence = _Watcher(name, layer.num_layers, records)  # type: ignore[assignment]
        yield records
    finally:
        for name, layer in layers.items():
            layer.backend = backends[name]
            del layer.recurrence


def gradient_flow(
    layer: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    hx: Any = None,
    lengths: Tensor | None = None,
) -> dict[str, Flow]:
    """Measure a layer or stack on a batch. No parameter's `.grad` changes.

    Args:
        layer: LSTM, GRU, RNN or RecurrentStack.
        x: input, as for the layer.
        loss: makes a scalar of the layer's output.
        hx: initial state, as for the layer.
        lengths: as for the layer.

    Returns:
        For each layer its flow, by the names of `record`.
    """
    with record(layer) as records, torch.enable_grad():
        value = loss(layer(x, hx, lengths=lengths)[0])
        watched = [s for r in records.values() for d in r.states for step in d for s in step]
        value.backward(inputs=watched)
    return {name: r.flow() for name, r in records.items()}


def draw(flows: Mapping[str, Flow]) -> Figure:
    """Draw the flow of layers over time: gradient norms, the carry and the gates.

    Args:
        flows: by name, as `gradient_flow` returns them.

    Returns:
        A figure with a row for each layer; dashed lines are the second direction.
    """
    figure, rows = _panels(len(flows), 3)
    for axes, (name, flow) in zip(rows, flows.items(), strict=True):
        norms = {"‖∂L/∂h_t‖": flow.hidden, "‖∂L/∂c_t‖": flow.cell}
        _curves(axes[0], norms)
        _curves(axes[1], {"mean of ∏ carry": flow.carry})
        _curves(axes[2], flow.gate_mean)
        for axis in axes[:2]:
            axis.set_yscale("log", nonpositive="mask")
        radii = (f"{gate} {value.max():.2f}" for gate, value in flow.spectral_radius.items())
        axes[0].set_title(f"{name}: gradients")
        axes[1].set_title(f"spectral radius: {', '.join(radii)}", fontsize="small")
        axes[2].set_title("gate means")
    return figure


def draw_history(history: Mapping[int, Tensor], title: str = "") -> Figure:
    """Draw gradient norms as a heat map of time and training step.

    Args:
        history: training step -> norms at each time, [D, T]; T may differ from step to step.
        title: what the norms are of.

    Returns:
        A figure with a panel for each direction; the colour is log10 of the norm.
    """
    norms = list(history.values())
    figure, rows = _panels(len(norms[0]), 1)
    longest = max(norm.shape[1] for norm in norms)
    for direction, (axis,) in enumerate(rows):
        table = torch.full((longest, len(norms)), float("nan"), dtype=torch.float64)
        for column, norm in enumerate(norms):
            table[: norm.shape[1], column] = norm[direction].cpu().log10()
        table[table.isinf()] = float("nan")
        image = axis.imshow(table.numpy(), aspect="auto", origin="lower", interpolation="nearest")
        axis.set_xticks(range(len(norms)), [str(step) for step in history], rotation=90)
        axis.locator_params(axis="x", nbins=12)
        axis.set(xlabel="training step", ylabel="time step", title=title)
        figure.colorbar(image, ax=axis, label="log10")
    return figure


def _panels(rows: int, columns: int) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns + 1, 3 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _curves(axis: Any, curves: Mapping[str, Tensor | None]) -> None:
    for number, (label, values) in enumerate(curves.items()):
        for direction, row in enumerate(() if values is None else values.cpu()):
            name = None if direction else label
            axis.plot(row.numpy(), "-" if not direction else "--", color=f"C{number}", label=name)
    axis.set_xlabel("time step")
    if axis.lines:
        axis.legend(fontsize="small")


class _Watcher:
    """Stands in for `kernels.recurrence` in one layer, and writes down what it computes."""

    def __init__(self, name: str, layers: int, records: dict[str, Record]) -> None:
        self.name = name
        self.layers = layers
        self.records = records
        self.calls = 0

    def __call__(
        self, cell: str, x: Tensor, *arguments: Any, backend: str, recompute: bool, **options: Any
    ) -> tuple[Tensor, State]:
        lengths = options.get("lengths")
        steps, batch = x.shape[:2]
        if lengths is not None:
            x = without_padding(x, lengths)
        if not torch.is_grad_enabled():
            return reference.recurrence(cell, x, *arguments, **options)
        w_hh, directions = arguments[1], arguments[1].shape[0]
        states: list[list[State]] = [[()] * steps for _ in range(directions)]

        def watch(direction: int, t: int, state: State) -> None:
            for tensor in state:
                if tensor.requires_grad:
                    tensor.retain_grad()
            states[direction][t] = state

        result = reference.recurrence(cell, x, *arguments, watch=watch, **options)
        times = torch.arange(steps, device=x.device)[:, None]
        alive = times < (lengths if lengths is not None else x.new_full((batch,), steps))
        w_hr = options.get("w_hr")
        self.records[self._key()] = Record(
            cell,
            _gates(cell, x, arguments, options, alive),
            states,
            w_hh.detach(),
            None if w_hr is None else w_hr.detach(),
            alive,
        )
        return result

    def _key(self) -> str:
        index = self.calls % self.layers
        self.calls += 1
        parts = [self.name] if self.name else []
        return ".".join([*parts, f"l{index}"] if self.layers > 1 else parts) or "l0"


def _gates(
    cell: str, x: Tensor, arguments: Sequence[Any], options: Mapping[str, Any], alive: Tensor
) -> dict[str, Tensor]:
    """The activated gates that the torch loop saves, rows in x's order."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().requires_grad_(value.is_floating_point())
        if isinstance(value, Mapping):
            return {name: leaf(v) for name, v in value.items()}
        return [leaf(v) for v in value] if isinstance(value, list | tuple) else value

    y, _ = torch_loop.recurrence(
        cell, leaf(x), *map(leaf, arguments), **{name: leaf(v) for name, v in options.items()}
    )
    gates = torch.where(alive[..., None], torch_loop.saved_gates(y).detach(), 0.0)
    names = GATES[CELLS[cell].gates]
    return dict(zip(names, gates.chunk(len(names), -1), strict=True))
