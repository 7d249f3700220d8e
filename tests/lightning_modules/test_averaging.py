"""Averages of checkpoints: the mean of the weights, of models that belong together."""

import pytest
import torch

from fusedrnn.train import main
from lightning_modules import Task
from lightning_modules.averaging import average_checkpoints
from lightning_modules.base import CheckpointError
from tests.toy import ToyData, ToyTask

CONFIG = """
trainer: {accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}
model: {class_path: tests.toy.ToyTask}
data: {class_path: tests.toy.ToyData}
"""


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Three checkpoints of one run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(CONFIG)
    more = ["--trainer.max_epochs=3", "--trainer.callbacks=ModelCheckpoint"]
    more += ["--trainer.callbacks.save_top_k=-1", f"--trainer.callbacks.dirpath={tmp_path}"]
    main(["fit", "--config", "toy.yaml", *more])
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 3
    return [str(path) for path in paths]


def test_weights_are_the_means(saved):
    main(["average", "--ckpt_path", *saved, "--output", "mean.ckpt"])
    states = [Task.load_from_checkpoint(path).state_dict() for path in saved]
    for name, value in Task.load_from_checkpoint("mean.ckpt").state_dict().items():
        stacked = torch.stack([state[name] for state in states])
        assert value.dtype == stacked.dtype
        if value.is_floating_point():
            torch.testing.assert_close(value, stacked.double().mean(0).to(value.dtype))
            assert stacked.shape[-1] == 0 or stacked.unique(dim=0).shape[0] > 1, name
        else:
            assert torch.equal(value, stacked[-1])


def test_the_average_is_a_checkpoint_to_use(saved):
    average_checkpoints(saved, "mean.ckpt")
    cli = main(["test", "--config", "toy.yaml", "--ckpt_path", "mean.ckpt"])
    assert torch.isfinite(cli.trainer.callback_metrics["test/loss"])
    average_checkpoints(saved[:1], "one.ckpt")
    first, same = (Task.load_from_checkpoint(path) for path in (saved[0], "one.ckpt"))
    for name, value in first.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])


def test_models_that_differ_are_refused(saved, tmp_path):
    for name, model, words in (("size", {"hidden_size": 3}, {}), ("codec", {}, {"words": 5})):
        data = ToyData(**words)
        other = ToyTask(data.codec, **model)
        checkpoint = {"state_dict": other.state_dict()}
        header = torch.load(saved[0], weights_only=True)["fusedrnn"]
        header |= {"arguments": other.arguments, "codec": data.codec.to_dict()}
        torch.save(checkpoint | {"fusedrnn": header}, f"{name}.ckpt")
    with pytest.raises(CheckpointError, match=r"size.ckpt: differs from .* in its arguments"):
        average_checkpoints([saved[0], "size.ckpt"], "mean.ckpt")
    with pytest.raises(CheckpointError, match=r"codec.ckpt: differs from .* in its codec"):
        average_checkpoints([saved[0], "codec.ckpt"], "mean.ckpt")
    broken = torch.load(saved[0], weights_only=True)
    broken["state_dict"].popitem()
    torch.save(broken, "broken.ckpt")
    with pytest.raises(CheckpointError, match=r"broken.ckpt: has weights of other shapes than"):
        average_checkpoints([saved[0], "broken.ckpt"], "mean.ckpt")
    assert not (tmp_path / "mean.ckpt").exists()
