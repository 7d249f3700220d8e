"""Pictures and tables of a run: to Weights & Biases, and always as files beside the metrics."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from PIL import Image

T = TypeVar("T")


@rank_zero_only
def log_figure(module: L.LightningModule, key: str, figure: Figure) -> None:
    """Log a picture.

    It becomes `media/<key>_<step>.png` under the log folder of each CSVLogger, and a picture in
    each W&B run.

    Args:
        module: the module that is being trained or evaluated.
        key: name with the stage, such as `test/confusion_matrix`.
        figure: a matplotlib figure, made as `Figure()` and without pyplot, which would keep it
            alive.
    """
    files, loggers = _files(module, key, ".png"), _wandb(module)
    if not files and not loggers:
        return
    drawn = io.BytesIO()  # once for all: it takes longer than a training step
    figure.savefig(drawn, dpi=150, bbox_inches="tight")
    for file in files:
        file.write_bytes(drawn.getvalue())
    for logger in loggers:
        logger.log_image(key, [Image.open(drawn)], step=module.global_step)


@rank_zero_only
def log_table(
    module: L.LightningModule, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Log a table.

    It becomes `media/<key>_<step>.csv` under the log folder of each CSVLogger, and a table in each
    W&B run.

    Args:
        module: the module that is being trained or evaluated.
        key: name with the stage, such as `val/samples`.
        columns: names of the columns.
        rows: cells, strings or numbers, one sequence per row.
    """
    for path in _files(module, key, ".csv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)
    for logger in _wandb(module):
        logger.log_table(key, columns=list(columns), data=[list(row) for row in rows])


@rank_zero_only
def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table, text to the left and numbers to the right.

    Args:
        title: the line above it.
        columns: names of the columns.
        rows: cells, strings or numbers; fractions get four digits.
    """
    cells = [[f"{c:.4f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    table = [list(columns), *cells]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = [any(isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    print(f"\n{title}")
    for row in table:
        padded = (
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        )
        print("  ".join(padded).rstrip())


def spread(items: Sequence[T], number: int) -> Sequence[T]:
    """Return at most `number` items from all over a sequence, evenly apart."""
    return items[:: max(1, -(-len(items) // number))]


def _files(module: L.LightningModule, key: str, suffix: str) -> list[Path]:
    folders = [
        Path(lg.log_dir) / "media" for lg in module.trainer.loggers if isinstance(lg, CSVLogger)
    ]
    files = [folder / f"{key}_{module.global_step}{suffix}" for folder in folders]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    return files


def _wandb(module: L.LightningModule) -> list[WandbLogger]:
    return [logger for logger in module.trainer.loggers if isinstance(logger, WandbLogger)]
