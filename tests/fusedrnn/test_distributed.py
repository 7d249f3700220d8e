"""Two processes train, and evaluate to the same metrics as one."""

import csv
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedrnn.train import main
from lightning_modules import Tagger

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
    "seq2seq": (
        [
            *("--model=Seq2Seq", "--data=PairData", "--model.embedding_size=8"),
            *("--model.encoder_sizes=[8]", "--model.decoder_sizes=[8]"),
        ],
        "tsv",
    ),
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
    "--trainer.callbacks=LastCheckpoint",
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


def test_resuming_continues_exactly(here):
    fit = command("fit", "tagger", 2)
    main(fit)
    main([*fit, "--trainer.max_epochs=1"])
    part = "runs/lightning_logs/version_1/checkpoints/last.ckpt"
    main([*fit, "--ckpt_path", part])
    whole = [row for row in metrics(0) if row["epoch"] == "1"]
    assert whole == metrics(2)
    assert sum("train/loss" in row for row in whole) == 3


@pytest.mark.parametrize(
    ("task", "devices", "workers"),
    [("tagger", 1, 0), ("tagger", 1, 1), ("tagger", 2, 0), ("seq2seq", 2, 0)],
)
def test_a_run_stopped_in_the_middle_of_an_epoch_continues_exactly(here, task, workers, devices):
    fit = [*command("fit", task, devices), f"--data.num_workers={workers}"]
    main(fit)
    steps = 6 // devices
    main([*fit, f"--trainer.max_steps={steps + 2}"])  # two batches into the second epoch
    last = "runs/lightning_logs/version_{}/checkpoints/last.ckpt".format
    main([*fit, "--ckpt_path", last(1)])
    whole, resumed = (torch.load(last(n), weights_only=True) for n in (0, 2))
    assert whole["global_step"] == resumed["global_step"] == 2 * steps
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    lost = {"train/loss", "step", "epoch"}
    trained = [row for row in metrics(0) if "train/loss" in row][steps + 2 :]
    again = [row for row in metrics(2) if "train/loss" in row]
    assert [{k: row[k] for k in lost} for row in trained] == [
        {k: row[k] for k in lost} for row in again
    ]
    assert len(again) == steps - 2
    assert metrics(0)[-1] == metrics(2)[-1]  # of the validation


def test_other_batches_than_those_of_the_stopped_run_are_refused(here, capsys):
    main([*command("fit", "tagger", 1), "--trainer.max_steps=2"])
    last = "runs/lightning_logs/version_0/checkpoints/last.ckpt"
    with pytest.raises(SystemExit):
        main([*command("fit", "tagger", 1), "--data.batch_size=3", "--ckpt_path", last])
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(
            "error: the checkpoint was written after batch 2 of an epoch with steps = 6, "
            "this run has 7"
        )
    )


@pytest.mark.parametrize(
    ("number", "devices", "rank"),
    [(signal.SIGINT, 1, 0), (signal.SIGTERM, 1, 0), (signal.SIGTERM, 2, 1)],
    ids=["ctrl-c", "sigterm", "sigterm-to-one-of-two"],
)
def test_a_signal_ends_a_run_after_its_batch(here, monkeypatch, number, devices, rank):
    """Also where only one of two processes gets it."""
    fit = command("fit", "tagger", devices)
    main(fit)
    step = Tagger.training_step

    def interrupted(self, batch, index):
        if self.global_step == 1 and self.global_rank == rank:
            os.kill(os.getpid(), number)
        return step(self, batch, index)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Tagger, "training_step", interrupted)
        if devices > 1:  # the training is in forked processes, which this one does not see end
            main(fit)
        else:
            with pytest.raises(SystemExit) as caught:
                main(fit)
            assert caught.value.code == 128 + number
    assert signal.getsignal(number) == handler
    assert sum("train/loss" in row for row in metrics(1)) == 2
    last = "runs/lightning_logs/version_{}/checkpoints/last.ckpt".format
    main([*fit, "--ckpt_path", last(1)])
    whole, resumed = (torch.load(last(n), weights_only=True) for n in (0, 2))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
