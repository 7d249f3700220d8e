import csv
import os

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_modules.callbacks import BestCheckpoint, LatestRun, Throughput
from tests.toy import ToyData, ToyTask


def trainer(folder, *callbacks, **arguments):
    return Trainer(
        logger=CSVLogger(folder, name="toy"),
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **{"max_epochs": 1, "log_every_n_steps": 1} | arguments,
    )


def metrics(folder, name):
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lightning_modules.callbacks.time", clock)
    return clock


class Timed(ToyTask):
    """Takes a tenth of a second a token in training, and ten seconds a batch in validation."""

    def training_step(self, batch, batch_idx):
        self.clock.now += batch.num_tokens / 10
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock.now += 10
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_throughput_counts_training_alone(tmp_path, clock, every):
    data = ToyData()
    model = Timed(data.codec)
    model.clock = clock
    trainer(tmp_path, Throughput(), max_epochs=3, log_every_n_steps=every).fit(model, data)
    rates = metrics(tmp_path / "toy" / "version_0", "train/tokens_per_second")
    assert rates == pytest.approx([10.0] * (15 // every))


def test_latest_points_to_the_newest_training_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ToyData()
    for version in range(2):
        fresh = trainer(tmp_path, LatestRun(), BestCheckpoint("val/accuracy", "max"))
        fresh.fit(ToyTask(data.codec), data)
        assert os.readlink(tmp_path / "toy" / "latest") == f"version_{version}"
        lines = capsys.readouterr().out.splitlines()
        best = f"toy/version_{version}/checkpoints/best.ckpt"
        config = f"toy/version_{version}/config.yaml"
        train = "python -m fusedrnn.train"
        assert f"Evaluate: {train} test --config {config} --ckpt_path {best}" in lines
        assert f"Use:      {train} predict --ckpt_path {best} --input FILE" in lines
    trainer(tmp_path, LatestRun()).test(ToyTask(data.codec), data, verbose=False)
    assert os.readlink(tmp_path / "toy" / "latest") == "version_1"
    assert "Evaluate" not in capsys.readouterr().out


class Scripted(ToyTask):
    """Has a known validation score in each epoch."""

    scores = (0.2, 0.9, 0.5, 0.7)

    def validation_step(self, batch, batch_idx):
        self.log("val/score", self.scores[self.current_epoch], batch_size=1)


def test_best_checkpoint_stays_the_best_over_a_resumed_run(tmp_path):
    data = ToyData()
    first = BestCheckpoint("val/score", "max")
    run = trainer(tmp_path, first, max_epochs=3)
    run.fit(Scripted(data.codec), data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert [path.name for path in (tmp_path / "toy/version_0/checkpoints").iterdir()] == [
        "best.ckpt"
    ]

    second = BestCheckpoint("val/score", "max")
    trainer(tmp_path, second, max_epochs=4).fit(
        Scripted(data.codec), data, ckpt_path=tmp_path / "last.ckpt"
    )
    (best,) = (tmp_path / "toy/version_1/checkpoints").iterdir()
    assert best.name == "best.ckpt"
    assert torch.load(best, weights_only=True)["epoch"] == 1
    assert second.best_model_score == first.best_model_score == pytest.approx(0.9)
    assert (tmp_path / "toy/version_0/checkpoints/best.ckpt").is_file()


def test_best_checkpoint_is_replaced_by_a_better_one_after_resuming(tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "scores", (0.2, 0.3, 0.95))
    data = ToyData()
    run = trainer(tmp_path, BestCheckpoint("val/score", "max"), max_epochs=2)
    run.fit(Scripted(data.codec), data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = trainer(tmp_path, BestCheckpoint("val/score", "max"), max_epochs=3)
    again.fit(Scripted(data.codec), data, ckpt_path=tmp_path / "last.ckpt")
    (best,) = (tmp_path / "toy/version_1/checkpoints").iterdir()
    assert torch.load(best, weights_only=True)["epoch"] == 2


def test_evaluation_copies_no_checkpoint(tmp_path):
    data = ToyData()
    run = trainer(tmp_path, BestCheckpoint("val/accuracy", "max"))
    run.fit(ToyTask(data.codec), data)
    best = run.checkpoint_callback.best_model_path
    trainer(tmp_path, BestCheckpoint("val/accuracy", "max")).test(
        ToyTask(data.codec), data, ckpt_path=best, verbose=False
    )
    assert not (tmp_path / "toy/version_1/checkpoints").exists()
