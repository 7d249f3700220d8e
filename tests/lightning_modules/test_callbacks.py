import csv
import os
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

import fusedrnn
from lightning_modules.callbacks import BestCheckpoint, GradientFlow, LatestRun, Throughput
from lightning_modules.data.batching import ResumableLoader
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


def test_input_wait_is_the_share_of_making_batches(tmp_path, clock):
    class Slow(ToyData):
        def collate(self, sentences):
            batch = super().collate(sentences)
            clock.now += batch.num_tokens / 30
            return batch

    model = Timed(Slow().codec)
    model.clock = clock
    trainer(tmp_path, Throughput(), max_epochs=3, log_every_n_steps=2).fit(model, Slow())
    shares = metrics(tmp_path / "toy" / "version_0", "train/input_wait")
    assert shares == pytest.approx([0.25] * 7)


def test_time_of_other_callbacks_is_not_waited_for_input(tmp_path, clock, monkeypatch):
    monkeypatch.setattr("lightning_modules.data.batching.time", clock)

    class Busy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            clock.now += 7

    class Slow(ToyData):
        def collate(self, sentences):
            batch = super().collate(sentences)
            clock.now += batch.num_tokens / 10
            return batch

        def train_dataloader(self):
            plain = super().train_dataloader()
            return ResumableLoader(
                plain.dataset, batch_sampler=plain.batch_sampler, collate_fn=self.collate
            )

    model = Timed(Slow().codec)
    model.clock = clock
    trainer(tmp_path, Throughput(), Busy(), max_epochs=2).fit(model, Slow())
    rates, shares = (
        metrics(tmp_path / "toy" / "version_0", f"train/{name}")
        for name in ("tokens_per_second", "input_wait")
    )
    assert max(rates) == pytest.approx(5) and min(rates) < 2.5
    assert shares == pytest.approx([rate / 10 for rate in rates])


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


class Recurrent(ToyTask):
    """The toy task with a layer of ours."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.rnn = fusedrnn.GRU(8, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.head = torch.nn.Linear(16, 2)


def test_gradient_flow_is_logged_every_n_steps(tmp_path):
    data = ToyData()
    callback = GradientFlow(every_n_steps=4)
    run = trainer(tmp_path, callback, max_steps=6, max_epochs=None, accumulate_grad_batches=2)
    model = Recurrent(data.codec, dropout=0.0)
    run.fit(model, data)
    log = Path(run.logger.log_dir)
    pictures = sorted(p.name for p in (log / "media" / "gradient_flow").iterdir())
    kinds = ("curves", "rnn.l0", "rnn.l1")
    assert pictures == sorted(f"{kind}_{step}.png" for kind in kinds for step in (0, 4))
    assert len(metrics(log, "gradient_flow/rnn.l1/spectral_radius_z")) == 2
    means = metrics(log, "gradient_flow/rnn.l0/mean_z")
    assert len(means) == 2 and all(0 < mean < 1 for mean in means)
    for kind in ("saturation_z", "carry_product"):
        shares = metrics(log, f"gradient_flow/rnn.l1/{kind}")
        assert len(shares) == 2 and all(0 <= share < 1 for share in shares)
    assert model.rnn.backend == "auto" and "recurrence" not in vars(model.rnn)


def test_gradient_flow_does_not_change_the_training(tmp_path):
    data, weights = ToyData(train=8), []
    for callbacks in ([], [GradientFlow(every_n_steps=1)]):
        torch.manual_seed(0)
        model = Recurrent(data.codec, dropout=0.5)
        trainer(tmp_path, *callbacks).fit(model, data)
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    assert not torch.equal(weights[0], torch.zeros_like(weights[0]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_gradient_flow_passes_over_batches_and_layers_without_gradients(tmp_path):
    class Idle(Recurrent):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.idle = fusedrnn.RNN(8, 8)

        def training_step(self, batch, batch_idx):
            self.idle(torch.randn(3, 2, 8))
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    data = ToyData(train=8)
    run = trainer(tmp_path, GradientFlow(every_n_steps=1))
    model = Idle(data.codec)
    run.fit(model, data)
    pictures = [p.name for p in (Path(run.logger.log_dir) / "media" / "gradient_flow").iterdir()]
    assert sorted(pictures) == ["curves_1.png", "rnn.l0_1.png", "rnn.l1_1.png"]
    assert model.rnn.backend == "auto"


def test_gradient_flow_gives_the_backends_back_after_an_error(tmp_path):
    class Broken(Recurrent):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ZeroDivisionError

    data = ToyData()
    model = Broken(data.codec)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, GradientFlow()).fit(model, data)
    assert model.rnn.backend == "auto" and "recurrence" not in vars(model.rnn)


def test_gradient_flow_needs_a_positive_number():
    with pytest.raises(ValueError, match="every_n_steps: expected at least 1, got 0"):
        GradientFlow(0)
