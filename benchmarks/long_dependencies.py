"""Which cells carry information over a long time: three generated tasks, every cell, three biases.

    python -m benchmarks.long_dependencies [--quick] [--tasks adding-200 ...] [--cells lstm ...]
    python -m benchmarks.long_dependencies --figures

Rows stand in benchmarks/results/long_dependencies.csv as soon as they are known; a run that is
finished there is not run again, and one that is not begins anew, so that a study which was cut
short goes on. `--quick` takes three minutes and writes to long_dependencies_quick.csv. `--figures`
draws what the file holds, a picture for each claim.

Tasks, cells and biases are those of `lightning_modules.memory_model`; the packaged configurations
adding, temporal_order and copy_memory train the same with Lightning.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedrnn.diagnostics import CARRY, gradient_flow
from lightning_modules.memory_model import Batch, MemoryModel, Problem

from .registry import Row, environment, read, write

RESULTS = Path(__file__).parent / "results"
CELLS = ("lstm", "gru", "rnn_tanh", "lstm_peephole", "gru_reset_before")
BIASES = ("1", "chrono", "0")
"""These and the cells in the order in which they are trained: the most telling runs first."""
KEY = ("task", "cell", "bias", "seed", "learning_rate")
CLIP = 1.0
PROBE = 32
"""Rows of the batch on which gradients and gates are measured."""


def make_task(name: str) -> Problem:
    """A task from its name and length: "adding-200", "order-100", "copy-100".

    Raises:
        ValueError: there is no such task.
    """
    kind, _, digits = name.partition("-")
    if not digits.isdecimal():
        raise ValueError(f"task must be adding-T, order-T or copy-T, got {name!r}")
    return Problem(kind, int(digits))


PLACES = range(0, 101, 10)
"""Where in the sequence the gradient is measured, in percent of the steps that all rows have."""


def measure(model: MemoryModel, task: Problem, batch: Batch) -> Row:
    """Measure gradient norms and the carry gate on a batch, in float64: an RNN's reach 1e-50.

    `gradient_h_0` ... `gradient_h_100` are ||dL/dh_t|| along the sequence, `gradient_c_0` and
    `gradient_c_100` those of the cell state; of the carry gate, the mean, the mean of the tenth of
    units whose gate is most open, and the product over time.
    """
    model, x = copy.deepcopy(model).double(), batch.x.double()
    if batch.target.is_floating_point():
        batch = batch._replace(target=batch.target.double())
    shortest = len(x) if batch.lengths is None else int(batch.lengths.min())
    end = shortest - 1

    def loss(y: Tensor) -> Tensor:
        return task.loss(model.answer(y, batch), batch)

    (flow,) = gradient_flow(model.layer, x, loss, lengths=batch.lengths).values()
    name = CARRY.get(len(flow.gate_mean))
    units = flow.unit_mean[name][0] if name else torch.full((1,), math.nan)
    most = units.sort(descending=True).values[: max(1, len(units) // 10)]
    cell = torch.full((1, shortest), math.nan) if flow.cell is None else flow.cell
    values = {
        **{f"gradient_h_{place}": flow.hidden[0, end * place // 100] for place in PLACES},
        **{f"gradient_c_{place}": cell[0, end * place // 100] for place in (0, 100)},
        "spectral_radius": torch.stack(list(flow.spectral_radius.values())).max(),
        "carry_mean": units.mean(),
        "carry_top_tenth": most.mean(),
        "carry_product": torch.tensor(math.nan) if flow.carry is None else flow.carry[0, end],
    }
    return {name: f"{value.item():.4g}" for name, value in values.items()}


def train(
    name: str, cell: str, bias: str, seed: int, learning_rate: float, options: argparse.Namespace
) -> Iterator[Row]:
    """Train one model, and yield what is known of it every `options.every` steps and at the end."""
    torch.manual_seed(seed)
    task = make_task(name)
    carry: Any = bias  # "none" where the cell has no carry gate to set it of
    model = MemoryModel(task.name, task.length, cell, carry, options.hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    start, recent = time.perf_counter(), []
    for step in itertools.count():
        seconds = time.perf_counter() - start
        batch = task.generate(options.batch_size)
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
                "learning_rate": learning_rate,
                "step": step,
                "loss": round(smooth, 6),
                "chance": round(task.chance, 6),
                "solved": solved,
                "finished": finished,
                "seconds": round(seconds, 1),
                **measure(model, task, task.generate(PROBE)),
            }
        if finished:
            return
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


def study(options: argparse.Namespace) -> None:
    """Train what is missing from the result file."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Mapping[str, object]] = list(read(options.output))
    done = {_key(row) for row in rows if row["finished"] == "True"}
    rows = [row for row in rows if _key(row) in done]
    where = environment()
    print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    runs = [
        (task, cell, "none" if cell.startswith("rnn") else bias, seed, options.learning_rate)
        for seed in options.seeds
        for task in options.tasks
        for bias in options.biases
        for cell in options.cells
    ]
    runs = list(dict.fromkeys(runs))
    options.seconds_each = options.seconds / max(1, len(runs))
    for run in runs:
        if tuple(map(str, run)) in done:
            continue
        for row in train(*run, options):
            rows.append(row | where)
            write(options.output, rows)
        print(*run, _outcome(row), f"{row['seconds']} s", flush=True)


def _key(row: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def _outcome(row: Mapping[str, object]) -> str:
    """What became of a run, from its last row."""
    solved = "solved" if str(row["solved"]) == "True" else "not solved"
    return f"{solved} at step {row['step']}, loss {float(str(row['loss'])):.4f}"


Run = list[dict[str, str]]
"""The rows of a run."""


def figures(path: Path) -> list[Path]:
    """Draw a picture for each claim: loss, steps until solved, gradients, carry gates.

    Args:
        path: the result file; its unfinished runs are left out.

    Returns:
        The pictures, beside it.
    """
    from matplotlib.figure import Figure

    runs: dict[tuple[str, ...], Run] = {}
    for row in read(path):
        runs.setdefault(_key(row), []).append(row)
    runs = {key: run for key, run in runs.items() if run[-1]["finished"] == "True"}
    tasks = list(dict.fromkeys(task for task, *_ in runs))
    drawn = []
    for draw, columns in ((losses, 3), (steps, 1), (gradients, 3), (gates, 4)):
        figure = Figure(figsize=(4.5 * columns + 2, 3.2 * len(tasks)), layout="constrained")
        panels = figure.subplots(len(tasks), columns, squeeze=False)
        for task, axes in zip(tasks, panels, strict=True):
            draw(axes, task, {key[1:]: run for key, run in runs.items() if key[0] == task})
        drawn.append(path.with_name(f"{path.stem}_{draw.__name__}.png"))
        figure.savefig(drawn[-1], dpi=90)
    return drawn


STYLES = {"0": ":", "1": "--", "chrono": "-", "none": "-"}
"""Lines of the carry biases."""

Runs = Mapping[tuple[str, ...], Run]
"""The runs of a task, by cell, bias, seed and learning rate."""


def losses(axes: Sequence[Any], task: str, runs: Runs) -> None:
    """Loss over the steps of training, a panel for each carry bias; an RNN has none: in all."""
    for axis, wanted in zip(axes, BIASES, strict=True):
        for (cell, bias, *_), run in runs.items():
            if bias in (wanted, "none"):
                _curve(axis, run, "loss", CELLS.index(cell), cell)
        if axis.lines:
            axis.axhline(make_task(task).chance, color="grey", linestyle=":", label="chance")
            axis.axhline(make_task(task).solved, color="black", linestyle=":", label="solved")
        axis.set_yscale("log")
        _step_scale(axis)
        _finish(axis, f"{task}, carry bias {wanted}: loss")


def steps(axes: Sequence[Any], task: str, runs: Runs) -> None:
    """Steps until a run solved the task; a cross is one that did not."""
    for (cell, bias, *_), run in runs.items():
        place = CELLS.index(cell) + (0 if bias == "none" else (BIASES.index(bias) - 1) / 4)
        marker = "o" if run[-1]["solved"] == "True" else "x"
        color = "grey" if bias == "none" else f"C{BIASES.index(bias)}"
        label = "no carry gate" if bias == "none" else f"carry bias {bias}"
        axes[0].plot(place, float(run[-1]["step"]), marker, color=color, label=label)
    axes[0].set_xticks(range(len(CELLS)), CELLS)
    axes[0].set_xlim(-0.5, len(CELLS) - 0.5)
    axes[0].set_yscale("log")
    _finish(axes[0], f"{task}: training steps until solved (×: stopped unsolved)", xlabel="")


def gradients(axes: Sequence[Any], task: str, runs: Runs) -> None:
    """Norms of dL/dh_t along the sequence, before and after training, and their ratio meanwhile."""
    for (cell, bias, *_), run in runs.items():
        if cell not in ("lstm", "gru", "rnn_tanh"):
            continue
        label = cell if bias == "none" else f"{cell}, bias {bias}"
        style = {"color": f"C{CELLS.index(cell)}", "label": label, "linestyle": STYLES[bias]}
        for axis, row in zip(axes, (run[0], run[-1]), strict=False):
            norms = [float(row[f"gradient_h_{place}"]) for place in PLACES]
            axis.plot(list(PLACES), norms, **style)
        ratio = [float(r["gradient_h_0"]) / max(float(r["gradient_h_100"]), 1e-300) for r in run]
        axes[2].plot([float(r["step"]) for r in run], ratio, marker=".", **style)
    for axis in axes:
        axis.set_yscale("log", nonpositive="mask")
        axis.set_ylim(1e-60, 1e2)
    _step_scale(axes[2])
    place = "t, percent of the sequence"
    _finish(axes[0], f"{task}, before training: ‖∂L/∂h_t‖", xlabel=place)
    _finish(axes[1], f"{task}, at the end: ‖∂L/∂h_t‖", xlabel=place)
    _finish(axes[2], f"{task}: ‖∂L/∂h_0‖ / ‖∂L/∂h_T‖")


def gates(axes: Sequence[Any], task: str, runs: Runs) -> None:
    """The mean carry gate of the tenth of units where it is most open, a panel for each cell."""
    for axis, wanted in zip(axes, (c for c in CELLS if not c.startswith("rnn")), strict=True):
        for (cell, bias, *_), run in runs.items():
            if cell == wanted:
                _curve(axis, run, "carry_top_tenth", BIASES.index(bias), f"carry bias {bias}")
        axis.axhline(1.0, color="grey", linestyle=":")
        axis.set_ylim(0.3, 1.02)
        _finish(axis, f"{task}, {wanted}: carry gate")


def _step_scale(axis: Any) -> None:
    axis.set_xscale("symlog", linthresh=200)
    axis.set_xlim(left=0)


def _curve(axis: Any, run: Run, column: str, color: int, label: str) -> None:
    points = [(float(row["step"]), float(row[column])) for row in run]
    axis.plot(*zip(*points, strict=True), marker=".", color=f"C{color}", label=label)


def _finish(axis: Any, title: str, xlabel: str = "training step") -> None:
    axis.set_title(title, fontsize="medium")
    axis.set_xlabel(xlabel)
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once:
        axis.legend(once.values(), once.keys(), fontsize="x-small")
    else:
        axis.set_axis_off()  # no such run is finished


FULL = {
    "tasks": ["adding-200", "order-100", "copy-100", "adding-400"],
    "cells": list(CELLS),
    "biases": list(BIASES),
    "steps": 10_000,
    "every": 200,
    "batch_size": 128,
    "hidden_size": 32,
    "learning_rate": 1e-2,
    "seconds": math.inf,
    "output": RESULTS / "long_dependencies.csv",
}
QUICK = FULL | {
    "tasks": ["adding-40", "order-50"],
    "cells": ["rnn_tanh", "lstm", "gru"],
    "biases": ["1", "chrono"],
    "every": 100,
    "batch_size": 32,
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
    parser.add_argument("--learning_rate", type=float)
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
