import pickle

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_modules import CheckpointError, Task
from lightning_modules.base import read_checkpoint
from tests.toy import OtherTask, ToyData, ToyTask


def quick(tmp_path, **arguments):
    arguments = {"max_epochs": 1, "use_distributed_sampler": False} | arguments
    return Trainer(
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **arguments,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    data = ToyData()
    model = ToyTask(data.codec, hidden_size=6)
    trainer = quick(folder)
    trainer.fit(model, data)
    path = folder / "toy.ckpt"
    trainer.save_checkpoint(path)
    return model.eval(), path


def test_round_trip_without_data(trained):
    model, path = trained
    for cls in (ToyTask, Task):
        loaded = cls.load_from_checkpoint(path)
        assert type(loaded) is ToyTask
        assert not loaded.training
        assert loaded.codec.words == model.codec.words
        words = torch.arange(8).view(2, 4)
        assert torch.equal(loaded(words), model(words))
        assert list(loaded.predict_lines(["w1 w1"])) == list(model.predict_lines(["w1 w1"]))


def test_checkpoint_is_plain_data(trained):
    header = torch.load(trained[1], weights_only=True)["fusedrnn"]
    assert header["arguments"] == {"hidden_size": 6, "dropout": 0.5}
    assert header["task"] == "ToyTask"
    assert header["format"] == 1
    assert header["version"] == "0.1.0"
    assert "hyper_parameters" not in torch.load(trained[1], weights_only=True)


class Evil:
    def __reduce__(self):
        return (print, ("ran code from a checkpoint",))


def spoil(path, kind):
    """Writes a file that is no checkpoint of ours, in one of several ways."""
    good = path.read_bytes()
    spoilt = path.with_name(f"{kind}.ckpt")
    if kind == "truncated":
        spoilt.write_bytes(good[: len(good) // 2])
    elif kind == "empty":
        spoilt.write_bytes(b"")
    elif kind == "text":
        spoilt.write_text("hello")
    elif kind == "pickle":
        spoilt.write_bytes(pickle.dumps({"state_dict": Evil()}))
    elif kind == "evil":
        torch.save({"state_dict": Evil(), "fusedrnn": {}}, spoilt)
    elif kind == "foreign":
        torch.save({"state_dict": BoringModel().state_dict()}, spoilt)
    elif kind == "namesake":
        torch.save({"state_dict": {}, "fusedrnn": {"format": 1, "task": "ToyTask"}}, spoilt)
    elif kind == "tensor":
        torch.save(torch.zeros(2), spoilt)
    elif kind == "newer":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["fusedrnn"] |= {"format": 2, "version": "9.0"}
        torch.save(checkpoint, spoilt)
    return spoilt


UNREADABLE = "truncated, or not a checkpoint that loads safely"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "no such checkpoint"),
        ("truncated", UNREADABLE),
        ("empty", UNREADABLE),
        ("text", UNREADABLE),
        ("pickle", UNREADABLE),
        ("evil", UNREADABLE),
        ("foreign", "not a checkpoint of fusedrnn"),
        ("namesake", "not a checkpoint of fusedrnn"),
        ("tensor", "not a checkpoint of fusedrnn"),
        ("newer", "written by fusedrnn 9.0, newer than 0.1.0"),
    ],
)
def test_bad_files_are_one_line(trained, kind, message, capsys):
    path = spoil(trained[1], kind)
    with pytest.raises(CheckpointError) as caught:
        Task.load_from_checkpoint(path)
    assert str(caught.value) == f"{path}: {message}"
    assert not capsys.readouterr().out


def test_other_class_is_refused(trained):
    with pytest.raises(CheckpointError, match="holds a ToyTask, expected one of: OtherTask"):
        OtherTask.load_from_checkpoint(trained[1])


def test_check_names_the_first_difference(trained):
    model, path = trained
    checkpoint = read_checkpoint(path)
    model.check(checkpoint)
    with pytest.raises(CheckpointError, match="holds a ToyTask, not a OtherTask"):
        OtherTask(model.codec, 6).check(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"embedding.weight is \(14, 6\) there and \(14, 7\)"):
        ToyTask(model.codec, 7).check(checkpoint, path)
    renamed = ToyTask(type(model.codec).from_dict(model.codec.to_dict()), 6)
    renamed.codec.words.symbols[-1] = "other"
    with pytest.raises(CheckpointError, match="another vocabulary"):
        renamed.check(checkpoint, path)


def test_trainer_refuses_a_checkpoint_that_does_not_fit(trained, tmp_path):
    data = ToyData()
    with pytest.raises(CheckpointError, match=r"embedding\.weight"):
        quick(tmp_path).test(ToyTask(data.codec, 7), data, ckpt_path=trained[1])


@pytest.mark.parametrize("value", [torch.zeros(1), object(), {"a": {1, 2}}, [len]])
def test_arguments_must_be_plain(value):
    with pytest.raises(TypeError, match="size: expected numbers, strings"):
        Task(None, {"size": value})


def test_plain_arguments_are_copied():
    sizes = [1, (2, None)]
    task = Task(None, {"sizes": sizes, "options": {"a": "b"}})
    sizes.append(3)
    assert task.arguments == {"sizes": [1, [2, None]], "options": {"a": "b"}}


def test_no_scheduler_and_epoch_scheduler():
    codec = ToyData().codec
    assert isinstance(ToyTask(codec).configure_optimizers(), torch.optim.Adam)
    decay = ToyTask(
        codec,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    ).configure_optimizers()
    assert isinstance(decay["optimizer"], torch.optim.SGD)
    assert decay["lr_scheduler"]["interval"] == "epoch"
    assert "monitor" not in decay["lr_scheduler"]


def test_plateau_watches_the_named_metric_or_the_task_s():
    codec = ToyData().codec
    named = ToyTask(codec, scheduler=lambda o: ReduceLROnPlateau(o, monitor="val/accuracy"))
    assert named.configure_optimizers()["lr_scheduler"]["monitor"] == "val/accuracy"
    plain = ToyTask(codec, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    assert plain.configure_optimizers()["lr_scheduler"]["monitor"] == "val/loss"


def test_plateau_steps(tmp_path):
    data = ToyData()
    model = ToyTask(
        data.codec,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        scheduler=lambda o: ReduceLROnPlateau(
            o, monitor="val/loss", patience=0, threshold=1e9, threshold_mode="abs", factor=0.5
        ),
    )
    trainer = quick(tmp_path, max_epochs=4, enable_checkpointing=False)
    trainer.fit(model, data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**3


def test_epochs_draw_from_seed_epoch_and_rank(monkeypatch):
    def draw(epoch=0, rank=0, before=0):
        task = Task(None, {})
        torch.manual_seed(3)
        task.on_fit_start()
        torch.rand(before)
        monkeypatch.setattr(Task, "current_epoch", epoch)
        monkeypatch.setattr(Task, "global_rank", rank)
        task.on_train_batch_start(None, 0)
        return torch.rand(1).item()

    assert draw() == draw(before=5)
    assert len({draw(), draw(epoch=1), draw(rank=1), draw(epoch=1, rank=1)}) == 4


def test_predict_lines_is_the_subclass_s():
    with pytest.raises(NotImplementedError, match="Task has no predict_lines"):
        Task(None, {}).predict_lines([])
