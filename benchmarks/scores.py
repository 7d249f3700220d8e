"""Scores of the packaged configurations on public data, from several seeds.

    FUSEDRNN_CORPORA=FOLDER python -m benchmarks tagger_scores
    FUSEDRNN_CORPORA=FOLDER python -m benchmarks seq2seq_scores

The corpora are not part of the project. FOLDER holds the files that `TAGGING` and `SEQ2SEQ` name,
as their publishers give them out; SNIPS as columns, a word and its tag a line. What is not there is
not run. Each configuration is trained as it is packaged, and the epoch that is best in validation
is scored.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from .registry import Case, Row, benchmark

TAGGER_SEEDS, SEQ2SEQ_SEEDS = (1, 2, 3, 4, 5), (1, 2, 3)
PERCENT = ("accuracy", "precision", "recall", "f1", "per", "wer", "cer")
"""Scores that are shares; the others are reported as they are."""

BEAM = 5
QUIET = (
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
    "--trainer.logger.save_dir=.",
)


class Corpus(NamedTuple):
    """Files of a corpus, and the packaged configuration for it.

    Attributes:
        config: the configuration's name.
        files: for each argument of the data, its file under the folder, or two for two languages.
        tested: whether there is a test part; without one only the validation scores count.
        options: further arguments.
        heads: of a tagger, those to train.
        beam: whether the test part is decoded a second time, by beam search.
    """

    config: str
    files: Mapping[str, str | tuple[str, str]]
    tested: bool
    options: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    beam: bool = False

    def arguments(self, folder: Path) -> list[str]:
        """Where the files are, as arguments."""
        return [
            f"--data.{name}={folder / file}"
            if isinstance(file, str)
            else f"--data.{name}=[{folder / file[0]}, {folder / file[1]}]"
            for name, file in self.files.items()
        ]

    def is_in(self, folder: Path) -> bool:
        """Whether the folder has all files."""
        names = ((file,) if isinstance(file, str) else file for file in self.files.values())
        return all((folder / name).is_file() for name in chain.from_iterable(names))


TAGGING = {
    "UNER Danish-DDT": Corpus(
        "ner",
        {
            "train": "uner_da_ddt/da_ddt-ud-train.iob2",
            "val": "uner_da_ddt/da_ddt-ud-dev.iob2",
            "test": "uner_da_ddt/da_ddt-ud-test.iob2",
        },
        True,
        ("--data.token_column=1", "--data.tag_column=2"),
        ("crf", "softmax"),
    ),
    "SNIPS": Corpus(
        "slots",
        {"train": "snips_slots/snips.train.conll", "val": "snips_slots/snips.valid.conll"},
        False,
        heads=("crf",),
    ),
    "WNUT-17": Corpus(
        "ner",
        {"train": "wnut17/wnut17train.conll", "val": "wnut17/emerging.dev.conll"},
        False,
        heads=("crf", "softmax"),
    ),
    "UD English-EWT": Corpus(
        "ewt",
        {
            "train": "ud_en_ewt/en_ewt-ud-train.conllu",
            "val": "ud_en_ewt/en_ewt-ud-dev.conllu",
        },
        False,
        heads=("crf",),
    ),
}

SEQ2SEQ = {
    "FSDD": Corpus("speech", {"path": "fsdd/fsdd_recordings.tar.gz"}, True, beam=True),
    "ETTh1": Corpus("forecast", {"path": "ett/ETTh1.csv"}, True),
    "SIGMORPHON 2021 French": Corpus(
        "sigmorphon",
        {
            "train": "sigmorphon2021_fre/fre_train.tsv",
            "val": "sigmorphon2021_fre/fre_dev.tsv",
            "test": "sigmorphon2021_fre/fre_test.tsv",
        },
        True,
        beam=True,
    ),
    "CMUdict g014b2b": Corpus(
        "g014b2b",
        {"train": "cmudict_g014b2b/g014b2b.train", "test": "cmudict_g014b2b/g014b2b.ref"},
        True,
        beam=True,
    ),
    "Multi30k English-German": Corpus(
        "multi30k",
        {
            "train": ("multi30k/train.en.gz", "multi30k/train.de.gz"),
            "val": ("multi30k/val.en.gz", "multi30k/val.de.gz"),
            "test": ("multi30k/test_2016_flickr.en.gz", "multi30k/test_2016_flickr.de.gz"),
        },
        True,
        beam=True,
    ),
}


def corpora_folder() -> Path | None:
    """The folder of the corpora, which the environment names, if it does."""
    name = os.environ.get("FUSEDRNN_CORPORA")
    return None if name is None else Path(name).absolute()


def _train(corpus: Corpus, folder: Path, given: Sequence[str]) -> Iterator[Row]:
    """Train a packaged configuration, and score the checkpoint that is best in validation."""
    from fusedrnn.train import main  # Lightning, which the benchmarks of a GPU do without

    start = time.process_time()
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        arguments = [*QUIET, *corpus.options, *corpus.arguments(folder), *given]
        cli = main(["fit", "--config", corpus.config, *arguments])
        assert cli is not None  # as it is after predict alone
        minutes = (time.process_time() - start) / 60
        scores: Row = {"epochs": cli.trainer.current_epoch, "cpu_minutes": round(minutes, 1)}

        def score(name: str, evaluate: Callable[..., Any]) -> None:
            (values,) = evaluate(
                cli.model, datamodule=cli.datamodule, ckpt_path="best", verbose=False
            )
            for key, value in values.items():
                metric = key.partition("/")[2]
                if metric != "loss":
                    scores[f"{name}_{metric}"] = _rounded(metric, value)

        score("val", cli.trainer.validate)
        if corpus.tested:
            score("test", cli.trainer.test)
        if corpus.beam:
            cli.model.test_beam_size = BEAM
            score("beam", cli.trainer.test)
    yield scores


def _rounded(metric: str, value: float) -> float:
    """Percentages and BLEU with two digits, the rest with four."""
    if metric in PERCENT:
        return round(100 * value, 2)
    return round(value, 2 if metric.startswith("bleu") else 4)


def _means(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Mean, spread and number of seeds of each score."""
    if corpora_folder() is None:
        yield "set FUSEDRNN_CORPORA to the folder of the corpora to run it"
    for name, head in dict.fromkeys((row["corpus"], row.get("head", "")) for row in rows):
        own = [row for row in rows if (row["corpus"], row.get("head", "")) == (name, head)]
        scores = [key for key in own[0] if key.partition("_")[0] in ("val", "test", "beam")]
        for score in scores:
            values = [float(row[score]) for row in own if row.get(score)]
            if values:
                mean, ends = statistics.fmean(values), f"{min(values)} to {max(values)}"
                spread = f" +- {statistics.stdev(values):.2g}" if len(values) > 1 else ""
                what = f"{name}, {head}" if head else name
                yield f"{what}: {score} {mean:.5g}{spread} ({ends}, {len(values)} seeds)"


def _cases(corpora: Mapping[str, Corpus], seeds: Sequence[int]) -> Iterator[Case]:
    """The first seeds of all come first."""
    folder = corpora_folder()
    if folder is None:
        return
    there = {name: corpus for name, corpus in corpora.items() if corpus.is_in(folder)}
    for seed in seeds:
        for name, corpus in there.items():
            key: Row = {"corpus": name, "config": corpus.config}
            if not corpus.heads:
                given = [f"--seed_everything={seed}"]
                yield key | {"seed": seed}, partial(_train, corpus, folder, given)
            for head in corpus.heads:
                given = [f"--seed_everything={seed}", f"--model.head={head}"]
                yield key | {"head": head, "seed": seed}, partial(_train, corpus, folder, given)


@benchmark(_means)
def tagger_scores() -> Iterator[Case]:
    """Taggers."""
    yield from _cases(TAGGING, TAGGER_SEEDS)


@benchmark(_means)
def seq2seq_scores() -> Iterator[Case]:
    """Sequence-to-sequence models: speech, forecasts, pronunciations, translation."""
    yield from _cases(SEQ2SEQ, SEQ2SEQ_SEEDS)
