"""The share of training time in which a packaged configuration waits for its input.

    FUSEDRNN_CORPORA=FOLDER python -m benchmarks input_wait

Of the corpora of scores.py those that FOLDER has are run, beside the ones that install with the
project.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from .registry import Case, Row, benchmark, read
from .scores import QUIET, SEQ2SEQ, TAGGING, corpora_folder

STEPS = 100
BUILTIN = ("pos", "g2p")


def _measure(config: str, given: Sequence[str]) -> Iterator[Row]:
    """Train for some steps, the first ones in an order by chance as all others."""
    from fusedrnn.train import main  # Lightning, which the benchmarks of a GPU do without

    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        limits = ["max_epochs=1", f"limit_train_batches={STEPS}", "limit_val_batches=1"]
        options = [f"--trainer.{option}" for option in (*limits, "log_every_n_steps=10")]
        main(["fit", "--config", config, *QUIET, *options, *given])
        (metrics,) = Path().rglob("metrics.csv")
        rows = read(metrics)
    measured = {}
    for name in ("tokens_per_second", "input_wait"):
        values = [float(row[f"train/{name}"]) for row in rows if row[f"train/{name}"]]
        measured[name] = statistics.median(values)
    yield {
        "tokens_per_second": round(measured["tokens_per_second"]),
        "input_wait_percent": round(100 * measured["input_wait"], 2),
    }


def _most(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    ranked = sorted((float(row["input_wait_percent"]), row["config"], row["data"]) for row in rows)
    if ranked:
        percent, config, data = ranked[-1]
        yield f"at most {percent} % of the time ({config}, {data}), of {len(ranked)} configurations"


@benchmark(_most)
def input_wait() -> Iterator[Case]:
    """Train each configuration for a few steps."""
    for config in BUILTIN:
        yield {"config": config, "data": "built in"}, partial(_measure, config, ())
    folder = corpora_folder()
    for name, corpus in (TAGGING | SEQ2SEQ).items():
        if folder is not None and corpus.is_in(folder):
            given = [*corpus.options, *corpus.arguments(folder)]
            yield {"config": corpus.config, "data": name}, partial(_measure, corpus.config, given)
