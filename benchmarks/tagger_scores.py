"""Scores of the packaged tagger configurations on public corpora, from several seeds.

    FUSEDRNN_CORPORA=FOLDER python -m benchmarks tagger_scores

The corpora are not part of the project. FOLDER holds the files that `CORPORA` names, as their
publishers give them out; SNIPS as columns, a word and its tag a line. What is not there is not run.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .registry import Case, Row, benchmark

SEEDS = (1, 2, 3, 4, 5)
QUIET = (
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
    "--trainer.logger.save_dir=.",
)


class Corpus(NamedTuple):
    """Files of a corpus under the folder, and the packaged configuration for it.

    Without a test part only the validation scores count.
    """

    config: str
    train: str
    val: str
    test: str | None = None
    options: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("crf",)

    def files(self, folder: Path) -> dict[str, Path]:
        """Where each part is."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {part: folder / file for part, file in parts.items() if file is not None}


CORPORA = {
    "UNER Danish-DDT": Corpus(
        "ner",
        "uner_da_ddt/da_ddt-ud-train.iob2",
        "uner_da_ddt/da_ddt-ud-dev.iob2",
        "uner_da_ddt/da_ddt-ud-test.iob2",
        ("--data.token_column=1", "--data.tag_column=2"),
        ("crf", "softmax"),
    ),
    "SNIPS": Corpus("slots", "snips_slots/snips.train.conll", "snips_slots/snips.valid.conll"),
    "WNUT-17": Corpus(
        "ner",
        "wnut17/wnut17train.conll",
        "wnut17/emerging.dev.conll",
        heads=("crf", "softmax"),
    ),
    "UD English-EWT": Corpus(
        "ewt", "ud_en_ewt/en_ewt-ud-train.conllu", "ud_en_ewt/en_ewt-ud-dev.conllu"
    ),
}


def _folder() -> Path | None:
    name = os.environ.get("FUSEDRNN_CORPORA")
    return None if name is None else Path(name).absolute()


def _train(corpus: Corpus, files: Mapping[str, Path], head: str, seed: int) -> Iterator[Row]:
    """Train a packaged configuration, and score the checkpoint that is best in validation."""
    from fusedrnn.train import main  # Lightning, which the benchmarks of a GPU do without

    given = [f"--data.{part}={file}" for part, file in files.items()]
    named = [f"--seed_everything={seed}", f"--model.head={head}"]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        cli = main(["fit", "--config", corpus.config, *QUIET, *corpus.options, *given, *named])
        assert cli is not None  # as it is after predict alone
        seconds = time.perf_counter() - start
        scores: Row = {"epochs": cli.trainer.current_epoch, "seconds": round(seconds)}
        for part, evaluate in (("val", cli.trainer.validate), ("test", cli.trainer.test)):
            if part in files:
                (values,) = evaluate(
                    cli.model, datamodule=cli.datamodule, ckpt_path="best", verbose=False
                )
                scores |= {
                    f"{part}_{name}": round(100 * values[f"{part}/{name}"], 2)
                    for name in ("accuracy", "f1")
                    if f"{part}/{name}" in values
                }
    yield scores


def _means(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Mean, spread and number of seeds of each score."""
    if _folder() is None:
        yield "set FUSEDRNN_CORPORA to the folder of the corpora to run it"
    for name, head in dict.fromkeys((row["corpus"], row["head"]) for row in rows):
        own = [row for row in rows if (row["corpus"], row["head"]) == (name, head)]
        for score in ("val_accuracy", "val_f1", "test_accuracy", "test_f1"):
            values = [float(row[score]) for row in own if row.get(score)]
            if values:
                spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                ends = f"{min(values)} to {max(values)}, {len(values)} seeds"
                yield f"{name}, {head}: {score} {statistics.fmean(values):.2f}{spread} ({ends})"


@benchmark(_means)
def tagger_scores() -> Iterator[Case]:
    """Train each configuration from each seed; the first seeds of all come first."""
    folder = _folder()
    for seed in SEEDS:
        for name, corpus in CORPORA.items():
            files = {} if folder is None else corpus.files(folder)
            if files and all(file.is_file() for file in files.values()):
                for head in corpus.heads:
                    key: Row = {
                        "corpus": name,
                        "config": corpus.config,
                        "head": head,
                        "seed": seed,
                    }
                    yield key, partial(_train, corpus, files, head, seed)
