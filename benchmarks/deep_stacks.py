"""Eight LSTM layers on temporal order: plain, and with residual connections and layer norm.

`python -m benchmarks deep_stacks` trains them, in minutes on one core, and
`python -m benchmarks.deep_stacks` draws the curves as results/deep_stacks.png.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusedrnn import RecurrentStack

from .long_dependencies import CLIP, RESULTS, make_task
from .registry import Case, Row, benchmark, read

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "residual + layer norm": {"residual": True, "layer_norm": True},
}
LEARNING_RATE = 2e-3
TASK, LAYERS, HIDDEN, BATCH, STEPS, EVERY, SEEDS = "order-20", 8, 32, 32, 300, 20, (0, 1, 2)


def _train(name: str, seed: int) -> Iterator[Row]:
    """The mean loss since the last row, every few steps."""
    task = make_task(TASK)
    torch.manual_seed(seed)
    stack = RecurrentStack(task.inputs, [HIDDEN] * LAYERS, forget_bias=1.0, **VARIANTS[name])
    head = nn.Linear(HIDDEN, task.outputs)
    parameters = [*stack.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    recent: list[float] = []
    for step in range(1, STEPS + 1):
        batch = task.generate(BATCH)
        assert batch.lengths is not None
        y, _ = stack(batch.x, lengths=batch.lengths)
        loss = task.loss(head(y[batch.lengths - 1, torch.arange(BATCH)]), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        recent.append(loss.item())
        if step % EVERY == 0:
            yield {"step": step, "loss": round(sum(recent) / len(recent), 5)}
            recent = []


def _last_losses(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    last = {(row["variant"], row["seed"]): row for row in rows}.values()
    for variant in VARIANTS:
        losses = [
            f"{row['loss']} (seed {row['seed']})" for row in last if row["variant"] == variant
        ]
        yield f"{variant}: last loss {', '.join(losses)}"


@benchmark(_last_losses)
def deep_stacks() -> Iterator[Case]:
    """Train each variant from each seed."""
    for seed in SEEDS:
        for name in VARIANTS:
            yield {"variant": name, "seed": seed}, partial(_train, name, seed)


def draw(path: Path) -> Path:
    """Draw the curves of a result file beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    rows = read(path)
    for number, variant in enumerate(VARIANTS):
        for seed in dict.fromkeys(row["seed"] for row in rows):
            own = [row for row in rows if (row["variant"], row["seed"]) == (variant, seed)]
            steps, losses = ([float(row[key]) for row in own] for key in ("step", "loss"))
            axis.plot(list(steps), list(losses), color=f"C{number}", label=f"{variant}, {seed}")
    axis.axhline(make_task(TASK).chance, color="grey", linestyle=":", label="chance")
    axis.set(title=f"{LAYERS} LSTM layers on {TASK}", xlabel="training step", ylabel="loss (nats)")
    axis.set_yscale("log")
    axis.legend(fontsize="small")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    return picture


if __name__ == "__main__":
    print(draw(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "deep_stacks.csv"))
