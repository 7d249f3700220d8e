"""Two processes train, and evaluate to the same metrics as one."""

import csv
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fusedrnn.train import main

ROOT = Path(__file__).parents[2]

TAGS = {"the": "DET", "a": "DET", "cat": "NOUN", "dogs": "NOUN", "runs": "VERB", "big": "ADJ"}
SIZES = {"train": 21, "val": 7, "test": 9}
"""Splits that neither two processes nor batches of four divide."""

TASKS = {
    "tagger": (["--model=Tagger", "--data=TaggingData", "--model.hidden_sizes=[8]"], "conll"),
    "tagger with entities": (
        ["--model=Tagger", "--data=TaggingData", "--model.hidden_sizes=[8]", "--data.scheme=BIO"],
        "bio.conll",
    ),
    "seq2seq": (["--model=Seq2Seq", "--data=PairData"], "tsv"),
}
COMMON = [
    "--data.batch_size=4",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=runs",
    "--trainer.callbacks=ModelCheckpoint",
    "--trainer.callbacks.filename=last",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    for split, size in SIZES.items():
        sentences = [draw.choices(list(TAGS), k=draw.randint(1, 7)) for _ in range(size)]
        words = [[f"{word}\t{TAGS[word]}" for word in sentence] for sentence in sentences]
        entities = [[f"{word}\tB-{TAGS[word]}" for word in sentence] for sentence in sentences]
        pairs = [f"{' '.join(s)}\t{' '.join(TAGS[w] for w in s[::-1])}" for s in sentences]
        Path(f"{split}.conll").write_text("\n\n".join(map("\n".join, words)) + "\n")
        Path(f"{split}.bio.conll").write_text("\n\n".join(map("\n".join, entities)) + "\n")
        Path(f"{split}.tsv").write_text("\n".join(["source\ttarget", *pairs]) + "\n")
    return tmp_path


def command(name, task, devices, strategy="ddp_fork"):
    options, suffix = TASKS[task]
    files = [f"--data.{split}={split}.{suffix}" for split in SIZES]
    strategy = [f"--trainer.strategy={strategy}"] if devices > 1 else []
    return [name, *options, *files, *COMMON, f"--trainer.devices={devices}", *strategy]


def metrics(version):
    with open(f"runs/lightning_logs/version_{version}/metrics.csv", newline="") as file:
        return [
            {name: value for name, value in row.items() if value} for row in csv.DictReader(file)
        ]


def values(cli):
    return {name: value.item() for name, value in cli.trainer.callback_metrics.items()}


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_is_the_same_to_the_last_digit(here, task):
    trained = main(command("fit", task, 2))
    last = "runs/lightning_logs/version_0/checkpoints/last.ckpt"
    for name in ("validate", "test"):
        one = values(main([*command(name, task, 1), "--ckpt_path", last]))
        two = values(main([*command(name, task, 2), "--ckpt_path", last]))
        assert one == two
        assert len(one) >= 2
        if name == "validate":
            logged = values(trained)
            assert one == {key: logged[key] for key in one}


def test_training_in_two_processes_started_by_the_command(here):
    """The strategy `ddp`, which starts the command again for the second process."""
    done = subprocess.run(
        [sys.executable, "-m", "fusedrnn.train", *command("fit", "tagger", 2, "ddp")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    main(command("fit", "tagger", 2))
    started, forked = metrics(0), metrics(1)
    assert started == forked
    steps = [row for row in started if "train/loss" in row]
    assert len(steps) == 2 * 3  # 21 sentences in fours are 6 batches, 3 for each process


@pytest.mark.parametrize("task", ["tagger", "seq2seq"])
def test_resuming_continues_exactly(here, task):
    fit = command("fit", task, 2)
    main(fit)
    main([*fit, "--trainer.max_epochs=1"])
    part = "runs/lightning_logs/version_1/checkpoints/last.ckpt"
    main([*fit, "--ckpt_path", part])
    whole = [row for row in metrics(0) if row["epoch"] == "1"]
    assert whole == metrics(2)
    assert sum("train/loss" in row for row in whole) == 3
