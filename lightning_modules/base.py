"""What every task shares: optimizer, checkpoint, and the road from raw text to results."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric

import kernels

FORMAT = 1
"""Of what a task writes into a checkpoint; a reader refuses a later one."""

HEADER = {"format", "task", "version", "arguments", "codec", "seed"}
"""What every checkpoint of a task says, under `fusedrnn`."""


class Codec(Protocol):
    """Turns text into model input and model output into text, and travels in the checkpoint."""

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Restore what `to_dict` returned."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason in one line."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of a `Task` without running any code that it may hold.

    Args:
        path: the `.ckpt` file.

    Returns:
        Lightning's checkpoint, its tensors on the CPU; under `fusedrnn`, what the task needs to be
        built again: `format`, `task`, `version`, `arguments`, `codec`, `seed`.

    Raises:
        CheckpointError: no such file, or it is truncated, unsafe, of another program, or of a later
            version.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises whatever it trips over in a broken file
        raise CheckpointError(
            f"{path}: truncated, or not a checkpoint that loads safely"
        ) from error
    header = checkpoint.get("fusedrnn") if isinstance(checkpoint, dict) else None
    header = header if isinstance(header, dict) else {}
    written = header.get("format")
    if isinstance(written, int) and written > FORMAT:
        raise CheckpointError(
            f"{path}: written by fusedrnn {header.get('version')}, newer than {kernels.__version__}"
        )
    if HEADER - header.keys() or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path}: not a checkpoint of fusedrnn")
    return checkpoint


class Task(L.LightningModule):
    """Base of the models that train and are evaluated: `Tagger`, `Seq2Seq` and yours.

    A subclass has a `training_step`, and scores a batch in `_evaluate`. What it counts stands in
    `scores`, a module of metrics for each of the stages `val` and `test`, and is reset when an
    evaluation starts; what else is to be shown at its end, `_report` shows.

    A checkpoint carries the codec and the plain constructor arguments, so that
    `load_from_checkpoint` needs neither the training data nor a configuration. It does not use
    `save_hyperparameters`, so a configuration given on resuming is the one that counts.

    Every batch draws its random numbers (dropout, sampling) from the seed, the epoch, its place in
    the epoch and the rank, so that a run continues exactly wherever it is resumed.

    Args:
        codec: turns text into model input and model output into text.
        arguments: the other constructor arguments, plain data: numbers, strings, booleans, None,
            lists and dicts of them.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate scheduler from the optimizer; it steps once an epoch. A
            `ReduceLROnPlateau` watches the metric it names, or else the task's `monitor`.

    Attributes:
        codec_class: the class of `codec`; set by each subclass.
        line_ends: whether `predict_lines` is to get lines with their line ends.
        monitor: the logged metric that says how good the model is.
        scores: stage -> what counts there; empty in a task that only logs.

    Raises:
        TypeError: an argument is not plain data.
    """

    codec_class: type[Codec]
    monitor: str = "val/loss"
    line_ends: bool = False

    def __init__(
        self,
        codec: Any,
        arguments: dict[str, Any],
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.codec = codec
        self.arguments = {name: _plain(value, name) for name, value in arguments.items()}
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.seed: int | None = None
        self.scores = nn.ModuleDict()
        self._plateau_metric: float | None = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Scores a batch of the validation split."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Scores a batch of the test split."""
        self._evaluate(batch, "test")

    def on_validation_epoch_start(self) -> None:
        """Start to count, whatever an interrupted evaluation left."""
        self._start("val")

    def on_test_epoch_start(self) -> None:
        """Start to count, whatever an interrupted evaluation left."""
        self._start("test")

    def on_validation_epoch_end(self) -> None:
        """Report what was counted, unless Lightning was only trying whether validation works."""
        if not self.trainer.sanity_checking:
            self._report("val")

    def on_test_epoch_end(self) -> None:
        """Report what was counted."""
        self._report("test")

    def _evaluate(self, batch: Any, stage: str) -> None:
        """Scores a batch of the stage `val` or `test`."""
        raise NotImplementedError(f"{type(self).__name__} has no _evaluate")

    def _start(self, stage: str) -> None:
        """Forget what was counted in a stage."""
        for metric in self._scores(stage).modules():
            if isinstance(metric, Metric):
                metric.reset()

    def _report(self, stage: str) -> None:
        """Show what was counted in a stage."""

    def _scores(self, stage: str) -> Any:
        return self.scores[stage] if stage in self.scores else nn.ModuleDict()

    @property
    def score_names(self) -> set[str]:
        """Names under which validation logs its scores; none where a task does not say."""
        scores = self._scores("val")
        return {f"val/{name}" for name in scores} if isinstance(scores, nn.ModuleDict) else set()

    def _log_scores(self, stage: str, size: int) -> None:
        """Log each metric of a stage under its name, over a batch of `size` rows."""
        for name, metric in self._scores(stage).items():
            key = f"{stage}/{name}"
            bar = key in ("val/loss", self.monitor)
            self.log(key, metric, prog_bar=bar, batch_size=size)

    def predict_lines(self, lines: Iterable[str], **options: Any) -> Iterator[str]:
        """Yield one line of result for each line of raw text, in order.

        Args:
            lines: raw text, without line ends unless the class asks for them. It may be endless:
                only a bounded number is held at a time.
            **options: what a task offers, such as `batch_size`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no predict_lines")

    def join(self, others: Sequence["Task"]) -> None:
        """Make this model an ensemble, whose `predict_lines` asks the others too.

        Args:
            others: models of the same class.

        Raises:
            CheckpointError: the task has no ensembles, or a model does not fit.
        """
        raise CheckpointError(f"a {type(self).__name__} works alone: give one checkpoint")

    def configure_optimizers(self) -> Any:
        """Build the optimizer and, with it, the scheduler."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": "epoch"}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = getattr(scheduler, "monitor", self.monitor)
        return {"optimizer": optimizer, "lr_scheduler": config}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, in bf16-mixed also for a fused optimizer: there nothing is scaled."""
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            kind = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision().clip_gradients(optimizer, gradient_clip_val or 0.0, kind)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        """Remember the seed that the batches draw from."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**31

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make the random numbers of a batch depend on nothing that came before it."""
        place = f"{self.seed or 0}/{self.current_epoch}/{batch_idx}/{self.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(place.encode()).digest()[:4]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `load_from_checkpoint` needs."""
        checkpoint["fusedrnn"] = {
            "format": FORMAT,
            "task": type(self).__name__,
            "version": kernels.__version__,
            "arguments": self.arguments,
            "codec": self.codec.to_dict(),
            "seed": self.seed,
            "plateau_metric": self._pending_plateau_metric(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits this model, and take over its seed."""
        self.check(checkpoint)
        self.seed = checkpoint["fusedrnn"]["seed"]
        self._plateau_metric = checkpoint["fusedrnn"]["plateau_metric"]

    def on_train_start(self) -> None:
        """Take the plateau step that was due when the checkpoint was written.

        A checkpoint of the end of an epoch is written before that step, and Lightning leaves it out
        on resuming.
        """
        for config in self.trainer.lr_scheduler_configs:
            scheduler, metric = config.scheduler, self._plateau_metric
            if isinstance(scheduler, ReduceLROnPlateau) and metric is not None:
                scheduler.step(metric)
        self._plateau_metric = None

    def _pending_plateau_metric(self) -> float | None:
        """Return the metric of an epoch at whose end the plateau schedulers have yet to step."""
        loop = self.trainer.fit_loop
        epoch = cast(Any, loop.epoch_progress.current)  # which Lightning declares too narrowly
        if epoch.started == epoch.completed or not loop.epoch_loop.batch_progress.is_last_batch:
            return None
        monitors = [
            config.monitor
            for config in self.trainer.lr_scheduler_configs
            if config.reduce_on_plateau and config.monitor is not None
        ]
        metric = self.trainer.callback_metrics.get(monitors[0]) if monitors else None
        return None if metric is None else metric.item()

    def check(self, checkpoint: dict[str, Any], path: str | Path = "checkpoint") -> None:
        """Check that a checkpoint was written by a model like this one.

        Args:
            checkpoint: what `read_checkpoint` returned.
            path: its file, for the message.

        Raises:
            CheckpointError: it is of another task, vocabulary or size; the message names the first
                difference.
        """
        header = checkpoint.get("fusedrnn")
        if header is None:
            raise CheckpointError(f"{path}: not a checkpoint of fusedrnn")
        if header["task"] != type(self).__name__:
            raise CheckpointError(f"{path}: holds a {header['task']}, not a {type(self).__name__}")
        theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        ours = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        for name in [*ours, *theirs]:
            if ours.get(name) != theirs.get(name):
                there, here = theirs.get(name, "absent"), ours.get(name, "absent")
                raise CheckpointError(
                    f"{path}: {name} is {there} there and {here} in this model; "
                    "give the run's own configuration (its config.yaml)"
                )
        if header["codec"] != self.codec.to_dict():
            raise CheckpointError(f"{path}: was trained with another vocabulary than this model's")

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, path: str | Path, map_location: torch.device | str = "cpu"
    ) -> Self:
        """Build a trained model from its checkpoint alone, ready for use (in evaluation mode).

        Args:
            path: the `.ckpt` file.
            map_location: the device to put the model on.

        Returns:
            A model of the class that wrote the checkpoint, which is `cls` or, called on a base
            class, one of its subclasses.

        Raises:
            CheckpointError: the file cannot be read (see `read_checkpoint`), or holds a model of
                another class.
        """
        checkpoint = read_checkpoint(path)
        header = checkpoint["fusedrnn"]
        known = {task.__name__: task for task in _family(cls)}
        task = known.get(header["task"])
        if task is None:
            names = ", ".join(sorted(known.keys() - {"Task"}))
            raise CheckpointError(f"{path}: holds a {header['task']}, expected one of: {names}")
        model = cast(Any, task)(
            codec=task.codec_class.from_dict(header["codec"]), **header["arguments"]
        )
        model.check(checkpoint, path)
        model.load_state_dict(checkpoint["state_dict"])
        return model.to(map_location).eval()


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside, and the former mode afterwards."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def _family(task: type[Task]) -> list[type[Task]]:
    """Return a class and all that derive from it."""
    return [task, *(member for child in task.__subclasses__() for member in _family(child))]


def _plain(value: Any, name: str) -> Any:
    """Copy plain data, tuples as lists, and refuse what a checkpoint cannot carry safely."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, name) for key, item in value.items()}
    raise TypeError(f"{name}: expected numbers, strings, lists or dicts of them, got {value!r}")
