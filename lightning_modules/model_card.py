"""A page about a trained model, beside its checkpoints."""

import importlib.metadata
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

import kernels

NAME = "model_card.md"

LICENCE = "To be stated by whoever publishes this model; the licences of its data apply as well."


class ModelCard(Callback):
    """Writes `model_card.md` beside the checkpoints of a run, and adds the scores of later tests.

    It tells what the model is and how large, what it was trained on, its scores, and the command
    and versions that made it. The licence is left to the user.
    """

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the card, if the run has left checkpoints."""
        folder = next((f for f in map(_folder, trainer.checkpoint_callbacks) if f), None)
        if folder is not None:
            (folder / NAME).write_text("\n".join(_card(trainer, pl_module)), encoding="utf-8")

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the scores of a test to the card of the checkpoint that was tested."""
        path = Path(str(trainer.ckpt_path))
        card = path.parent / NAME
        if card.is_file():
            text = card.read_text(encoding="utf-8")
            section = "\n".join(_section(f"Test of {path.name}", _test(trainer)))
            if section not in text:
                card.write_text(f"{text.rstrip()}\n\n{section}", encoding="utf-8")


def _folder(callback: Any) -> Path | None:
    path = getattr(callback, "dirpath", None)
    return Path(path) if path and any(Path(path).glob("*.ckpt")) else None


def _card(trainer: L.Trainer, model: L.LightningModule) -> Iterator[str]:
    task = type(model).__name__
    yield from ("---", "library_name: fusedrnn", f"tags: [{task}]", "---", "")
    yield from (f"# {_name(trainer)}: a {task}", "")
    yield from _section("Data", _data(trainer))
    yield from _section("Model", _model(model))
    yield from _section("Scores", _scores(trainer))
    yield from _section("Training", _training(trainer, model))
    yield from _section("Licence", [LICENCE])


def _section(title: str, lines: Iterable[str]) -> Iterator[str]:
    yield from (f"## {title}", "", *lines, "")


def _name(trainer: L.Trainer) -> str:
    names = (str(logger.name) for logger in trainer.loggers if logger.name)
    return next(names, "model")


def _data(trainer: L.Trainer) -> Iterator[str]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    yield from _list(data.describe() if hasattr(data, "describe") else {})
    yield from _examples("training", trainer.train_dataloader)
    yield from _examples("validation", trainer.val_dataloaders)


def _examples(split: str, loader: Any) -> Iterator[str]:
    dataset: Any = getattr(loader, "dataset", None)
    if hasattr(dataset, "__len__"):
        yield f"- {split} examples: {len(dataset):,}"


def _model(model: L.LightningModule) -> Iterator[str]:
    sizes = [parameter.numel() for parameter in model.parameters()]
    yield f"- parameters: {sum(sizes):,}"
    codec = getattr(model, "codec", None)
    for name, value in (codec.to_dict() if codec is not None else {}).items():
        if isinstance(value, list):
            yield f"- {name}: {len(value):,}"
    yield from _list(getattr(model, "arguments", {}))


def _scores(trainer: L.Trainer) -> Iterator[str]:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_score is not None:
            name = Path(callback.best_model_path).name
            yield f"- {name}: {callback.monitor} {float(callback.best_model_score):.4f}"
    yield from _metrics(trainer, "val/", "last validation: ")


def _test(trainer: L.Trainer) -> Iterator[str]:
    yield from _examples("test", trainer.test_dataloaders)
    yield from _metrics(trainer, "test/")
    yield f"- command: `{_command()}`"


def _metrics(trainer: L.Trainer, prefix: str, label: str = "") -> Iterator[str]:
    for name, value in trainer.callback_metrics.items():
        if name.startswith(prefix):
            yield f"- {label}{name} {float(value):.4f}"


def _training(trainer: L.Trainer, model: L.LightningModule) -> Iterator[str]:
    device = model.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {name: importlib.metadata.version(name) for name in ("torch", "lightning")}
    versions = {"fusedrnn": kernels.__version__, **versions, "Python": platform.python_version()}
    yield from _list(
        {
            "command": f"`{_command()}`",
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "seed": getattr(model, "seed", None),
            "device": f"{place}, {trainer.world_size} processes, {trainer.precision}",
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
            "date": time.strftime("%Y-%m-%d"),
        }
    )


def _command() -> str:
    return shlex.join(["python", *sys.orig_argv[1:]])


def _list(items: dict[str, Any]) -> Iterator[str]:
    yield from (f"- {name}: {value}" for name, value in items.items())
