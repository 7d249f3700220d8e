"""Which cells carry information over a long time: three generated tasks, every cell, three biases.

    python -m benchmarks.long_dependencies [--quick] [--tasks adding-200 ...] [--cells lstm ...]
    python -m benchmarks.long_dependencies --figures

Rows are appended to benchmarks/results/long_dependencies.csv as they come; a run that is finished
there is not run again, so that a study which was cut short goes on. `--quick` takes three minutes
and writes to long_dependencies_quick.csv. `--figures` draws what the file holds.

The tasks: the adding problem and temporal order (Hochreiter & Schmidhuber 1997, experiments 4 and
6a; the adding problem with values in [0, 1], as in Le et al. 2015) and copy memory (Arjovsky et al.
2016). The carry bias is that of the gate which multiplies the old state, f of an LSTM and z of a
GRU: 0, 1, or chrono (Tallec & Ollivier 2018), log U(1, T - 1) with the opposite on an LSTM's input
gate.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedrnn import RecurrentStack
from fusedrnn.diagnostics import CARRY, gradient_flow

from .registry import Row, environment, read

RESULTS = Path(__file__).parent / "results"
CELLS = ("rnn_tanh", "lstm", "lstm_peephole", "gru", "gru_reset_before")
BIASES = ("0", "1", "chrono")
KEY = ("task", "cell", "bias", "seed")
LEARNING_RATE, CLIP = 2e-3, 1.0
PROBE = 32
"""Rows of the batch on which gradients and gates are measured."""


class Batch(NamedTuple):
    """Inputs [T, B, I], lengths [B] or None, and targets: [B], or [T, B] for one at every step."""

    x: Tensor
    lengths: Tensor | None
    target: Tensor


def adding(batch: int, length: int) -> Batch:
    """Numbers in [0, 1], marked once in each half; the answer is the sum of the marked ones."""
    values, rows = torch.rand(length, batch), torch.arange(batch)
    marks = torch.zeros(length, batch)
    half = length // 2
    marks[torch.randint(half, (batch,)), rows] = 1.0
    marks[torch.randint(half, length, (batch,)), rows] = 1.0
    return Batch(torch.stack([values, marks], -1), None, (values * marks).sum(0))


def temporal_order(batch: int, length: int) -> Batch:
    """Symbols a b c d, begin, end, and X or Y at two places; the answer is which of XX, XY, YX, YY.

    Lengths are `length` to 1.1 `length`; the places lie a tenth to a fifth and a half to six tenths
    of `length` from the start.
    """
    longest, rows = length + length // 10, torch.arange(batch)
    lengths = torch.randint(length, longest + 1, (batch,))
    symbols = torch.randint(4, (longest, batch))
    symbols[0] = 4
    symbols[lengths - 1, rows] = 5
    first, second = torch.randint(2, (2, batch))
    symbols[torch.randint(length // 10, length // 5 + 1, (batch,)), rows] = 6 + first
    symbols[torch.randint(length // 2, 6 * length // 10 + 1, (batch,)), rows] = 6 + second
    return Batch(F.one_hot(symbols, 8).float(), lengths, 2 * first + second)


def copy_memory(batch: int, length: int) -> Batch:
    """Ten symbols, blanks, a sign `length` steps after them, and then the ten symbols as answer."""
    memory = torch.randint(1, 9, (10, batch))
    symbols, target = torch.zeros(2, length + 20, batch, dtype=torch.int64)
    symbols[:10], symbols[length + 9], target[length + 10 :] = memory, 9, memory
    return Batch(F.one_hot(symbols, 10).float(), None, target)


@dataclass(frozen=True)
class Task:
    """A generated task.

    Attributes:
        generate: draws a batch of a number of rows.
        length: T.
        inputs: I.
        outputs: size of an answer.
        chance: loss without memory.
        solved: loss below which the task counts as solved.
    """

    generate: Callable[[int, int], Batch]
    length: int
    inputs: int
    outputs: int
    chance: float
    solved: float

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean squared error of one number, cross-entropy in nats otherwise."""
        if self.outputs == 1:
            return F.mse_loss(outputs.squeeze(-1), batch.target)
        return F.cross_entropy(outputs.flatten(0, -2), batch.target.flatten())


def make_task(name: str) -> Task:
    """A task from its name and length: "adding-200", "order-100", "copy-100".

    Raises:
        ValueError: there is no such task.
    """
    kind, _, digits = name.partition("-")
    if kind not in ("adding", "order", "copy") or not digits.isdecimal() or int(digits) < 10:
        raise ValueError(f"task must be adding-T, order-T or copy-T with T >= 10, got {name!r}")
    length = int(digits)
    if kind == "adding":
        return Task(adding, length, 2, 1, 1 / 6, 0.01)
    if kind == "order":
        return Task(temporal_order, length, 8, 4, math.log(4), 0.01)
    chance = 10 * math.log(8) / (length + 20)
    return Task(copy_memory, length, 10, 9, chance, 0.1 * chance)


class Model(nn.Module):
    """A recurrent layer, and a linear answer at the end or at every step."""

    def __init__(self, task: Task, cell: str, bias: str, hidden_size: int) -> None:
        super().__init__()
        self.layer = RecurrentStack(task.inputs, [hidden_size], cell)
        set_carry_bias(self.layer, bias, task.length)
        self.head = nn.Linear(hidden_size, task.outputs)

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
def set_carry_bias(stack: RecurrentStack, bias: str, length: int) -> None:
    """Set the bias of the carry gate in every layer; a cell without one stays as it is."""
    for layer in stack.layers:
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


def measure(model: Model, task: Task, batch: Batch) -> Row:
    """Measure gradient norms and the carry gate on a batch.

    Norms are those at the first step and the last that all rows have; of the carry gate, the mean,
    the mean of the tenth of units whose gate is most open, and the product over time.
    """
    shortest = batch.x.shape[0] if batch.lengths is None else int(batch.lengths.min())
    end = shortest - 1

    def loss(y: Tensor) -> Tensor:
        return task.loss(model.answer(y, batch), batch)

    (flow,) = gradient_flow(model.layer, batch.x, loss, lengths=batch.lengths).values()
    name = CARRY.get(len(flow.gate_mean))
    units = flow.unit_mean[name][0] if name else torch.full((1,), math.nan)
    most = units.sort(descending=True).values[: max(1, len(units) // 10)]
    return {
        "gradient_first": flow.hidden[0, 0].item(),
        "gradient_last": flow.hidden[0, end].item(),
        "spectral_radius": max(radius.item() for radius in flow.spectral_radius.values()),
        "carry_mean": units.mean().item(),
        "carry_top_tenth": most.mean().item(),
        "carry_product": flow.carry[0, end].item() if flow.carry is not None else math.nan,
    }


def train(name: str, cell: str, bias: str, seed: int, options: argparse.Namespace) -> Iterator[Row]:
    """Train one model, and yield what is known of it every `options.every` steps and at the end."""
    torch.manual_seed(seed)
    task = make_task(name)
    model = Model(task, cell, bias, options.hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    start, recent = time.perf_counter(), []
    for step in itertools.count():
        seconds = time.perf_counter() - start
        batch = task.generate(options.batch_size, task.length)
        loss = task.loss(model(batch), batch)
        recent.append(loss.item())
        smooth = sum(recent[-50:]) / len(recent[-50:])
        solved = len(recent) >= 50 and smooth < task.solved
        finished = solved or step >= options.steps or seconds > options.seconds_each
        if finished or step % options.every == 0:
            yield {
                "task": name,
                "cell": cell,
                "bias": bias,
                "seed": seed,
                "step": step,
                "loss": smooth,
                "chance": task.chance,
                "solved": solved,
                "finished": finished,
                "seconds": round(seconds, 1),
                **measure(model, task, task.generate(PROBE, task.length)),
            }
        if finished:
            return
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


def study(options: argparse.Namespace) -> None:
    """Train what is missing from the result file."""
    done = {tuple(row[k] for k in KEY) for row in read(options.output) if row["finished"] == "True"}
    where = environment()
    runs = [
        (task, cell, bias, seed)
        for task in options.tasks
        for cell in options.cells
        for bias in (options.biases if not cell.startswith("rnn") else ["none"])
        for seed in options.seeds
    ]
    options.seconds_each = options.seconds / max(1, len(runs))
    for run in runs:
        if tuple(map(str, run)) in done:
            continue
        for row in train(*run, options):
            print(*run, f"step {row['step']}, loss {row['loss']:.4f}", flush=True)
            append(options.output, row | where)


def append(path: Path, row: Row) -> None:
    """Add a row to a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def figures(path: Path) -> list[Path]:
    """Draw loss, gradients and carry gate over the steps of training, a picture for each task."""
    from matplotlib.figure import Figure

    rows, drawn = read(path), []
    for task in dict.fromkeys(row["task"] for row in rows):
        figure = Figure(figsize=(17, 5), layout="constrained")
        panels = figure.subplots(1, 3)
        for number, (run, points) in enumerate(_runs(rows, task).items()):
            for axis, curve in zip(panels, _curves(points), strict=True):
                style = ("-", "--", ":")[number // 10 % 3]
                axis.plot(*curve, style, label=" ".join(run), color=f"C{number % 10}")
        chance = float(next(row["chance"] for row in rows if row["task"] == task))
        panels[0].axhline(chance, color="grey", linestyle=":", label="chance")
        titles = (
            "loss",
            "‖∂L/∂h_0‖ / ‖∂L/∂h_T‖",
            "carry gate of the tenth of units that carry most",
        )
        for axis, title in zip(panels, titles, strict=True):
            axis.set(title=f"{task}: {title}", xlabel="training step")
        for axis in panels[:2]:
            axis.set_yscale("log", nonpositive="mask")
        panels[2].legend(fontsize="x-small")
        drawn.append(path.with_name(f"{path.stem}_{task}.png"))
        figure.savefig(drawn[-1], dpi=120)
    return drawn


def _runs(rows: Sequence[Mapping[str, str]], task: str) -> dict[tuple[str, ...], list[Mapping]]:
    runs: dict[tuple[str, ...], list[Mapping]] = {}
    for row in rows:
        if row["task"] == task:
            runs.setdefault((row["cell"], row["bias"], row["seed"]), []).append(row)
    return runs


def _curves(points: Sequence[Mapping[str, str]]) -> list[tuple[list[float], list[float]]]:
    steps = [float(p["step"]) for p in points]
    ratio = [float(p["gradient_first"]) / max(float(p["gradient_last"]), 1e-30) for p in points]
    return [
        (steps, [float(p["loss"]) for p in points]),
        (steps, ratio),
        (steps, [float(p["carry_top_tenth"]) for p in points]),
    ]


FULL = {
    "tasks": ["adding-200", "adding-400", "order-100", "copy-100"],
    "cells": list(CELLS),
    "biases": list(BIASES),
    "steps": 10_000,
    "every": 250,
    "batch_size": 128,
    "hidden_size": 64,
    "seconds": math.inf,
    "output": RESULTS / "long_dependencies.csv",
}
QUICK = FULL | {
    "tasks": ["adding-40", "order-50"],
    "cells": ["rnn_tanh", "lstm", "gru"],
    "biases": ["1", "chrono"],
    "every": 100,
    "batch_size": 32,
    "hidden_size": 32,
    "seconds": 170.0,
    "output": RESULTS / "long_dependencies_quick.csv",
}


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, or draw what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three minutes instead of a night")
    parser.add_argument("--figures", action="store_true", help="draw the result file, do not train")
    parser.add_argument("--tasks", nargs="+", help="such as adding-200, order-100, copy-100")
    parser.add_argument("--cells", nargs="+", choices=CELLS)
    parser.add_argument("--biases", nargs="+", choices=BIASES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="most steps of a run")
    parser.add_argument("--every", type=int, help="steps between two rows")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--hidden_size", type=int)
    parser.add_argument("--seconds", type=float, help="for all runs together, shared evenly")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in options.tasks:
        try:
            make_task(name)
        except ValueError as error:
            parser.error(str(error))
    if options.figures:
        print(*figures(options.output), sep="\n")
    else:
        study(options)


if __name__ == "__main__":
    main()
