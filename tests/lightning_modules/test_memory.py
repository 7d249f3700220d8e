import csv

import pytest
import torch

from fusedrnn.train import main
from lightning_modules import Memory, Task
from lightning_modules.data import MemoryData

QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
]


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("config", ["adding", "temporal_order", "copy_memory"])
def test_packaged_configuration_runs(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    small = ["--data.length=12", "--data.steps=3", "--data.batch_size=4", "--data.rows=8"]
    main(["fit", "--config", config, "--trainer.max_epochs=2", *small, *QUICK])
    assert "python -m fusedrnn.train predict" not in capsys.readouterr().out
    run = tmp_path / "runs" / config / "latest"
    assert len([row for row in metrics(run) if row["val/loss"]]) == 2
    assert (run / "media" / "gradient_flow" / "curves_0.png").is_file()
    best = run / "checkpoints" / "best.ckpt"
    cli = main(["test", "--config", config, "--ckpt_path", str(best), *small, *QUICK])
    assert cli.trainer.callback_metrics["test/loss"].isfinite()
    task = Task.load_from_checkpoint(best)
    assert isinstance(task, Memory)
    batch = task.codec.generate(3)
    assert task(batch).isfinite().all()


def test_a_short_problem_is_solved_and_the_run_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    options = ["--data.length=10", "--data.batch_size=64", "--data.steps=50", "--data.rows=64"]
    cell = ["--model.cell=gru", "--trainer.log_every_n_steps=50"]
    cli = main(["fit", "--config", "adding", *QUICK, *options, *cell])
    assert cli.trainer.current_epoch < 50
    assert cli.trainer.callback_metrics["val/loss"] < 0.01


def batches(loader, epoch):
    loader.batch_sampler.set_epoch(epoch)
    return [batch.x for batch in loader]


def test_batches_are_new_each_epoch_and_the_same_each_run():
    data, again = (MemoryData("adding", 10, batch_size=4, steps=3, rows=8) for _ in range(2))
    first = batches(data.train_dataloader(), 0)
    assert len(first) == 3
    for x, y in zip(first, batches(again.train_dataloader(), 0), strict=True):
        assert torch.equal(x, y)
    later = batches(data.train_dataloader(), 1)
    assert not any(torch.equal(x, y) for x in first for y in later)
    val, test = (
        [b.x for b in loader] for loader in (data.val_dataloader(), data.test_dataloader())
    )
    assert torch.equal(torch.cat(val, 1), torch.cat([b.x for b in data.val_dataloader()], 1))
    assert not torch.equal(torch.cat(val, 1), torch.cat(test, 1))
    other = MemoryData("adding", 10, batch_size=4, steps=3, rows=8, seed=1)
    assert not torch.equal(first[0], batches(other.train_dataloader(), 0)[0])


@pytest.mark.parametrize("name", ["batch_size", "steps", "rows"])
def test_numbers_are_checked(name):
    with pytest.raises(ValueError, match=f"{name}: expected (at least 1|a positive number), got 0"):
        MemoryData(**{name: 0})


def test_unknown_problem_is_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "adding", "--data.length=3"])
    assert "a length of at least 10, got 'adding' with 3" in capsys.readouterr().err
