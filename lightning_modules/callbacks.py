"""What a run reports about itself."""

import contextlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from fusedrnn.diagnostics import Record, draw, draw_history, record
from lightning_modules.base import Task
from lightning_modules.reporting import log_figure


class Throughput(Callback):
    """Logs `train/tokens_per_second`, summed over the processes, and `train/input_wait`.

    The latter is the share of time from asking for a batch to the start of its step, in which it is
    made and moved to the device: the largest of all processes. A loader that does not say when it
    was `asked` is taken to be asked as soon as the last step has ended. Both are over the steps
    since the last log. Time spent outside training steps and loading, such as in validation, does
    not count. Batches say how many tokens they hold in `num_tokens`, padding not included.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = self._waited = 0.0
        self._since: float | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock again."""
        self._since = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the time that the batch was waited for."""
        if self._since is not None:
            asked = getattr(trainer.train_dataloader, "asked", self._since)
            self._waited += time.perf_counter() - max(asked, self._since)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the tokens of the batch, and log at every `log_every_n_steps`."""
        self._stop()
        self._since = time.perf_counter()
        self._tokens += int(batch.num_tokens)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        if trainer.global_step % max(1, every) == 0:
            seconds = max(self._seconds, 1e-9)
            for name, value, reduce in (
                ("tokens_per_second", self._tokens / seconds, "sum"),
                ("input_wait", self._waited / seconds, "max"),
            ):
                pl_module.log(
                    f"train/{name}", value, reduce_fx=reduce, sync_dist=True, batch_size=1
                )
            self._tokens, self._seconds, self._waited = 0, 0.0, 0.0

    def _stop(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None


class GradientFlow(Callback):
    """Shows how far back in time the loss reaches, in every recurrent layer, every N steps.

    It logs the curves of `fusedrnn.diagnostics.draw` as `gradient_flow/curves`, for each layer a
    heat map of ||dL/dh_t|| over time and training step as `gradient_flow/<layer>`, and as numbers
    the spectral radius of its recurrent matrix, the mean and the saturation of each gate, and the
    product over time of the gate that carries the old state.

    Each of these steps takes the gradients that it trains with from the reference backend: slower,
    rounded otherwise, and with another draw of the dropout between layers that torch fuses.

    Args:
        every_n_steps: N, in optimizer steps.

    Raises:
        ValueError: N is not positive.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps: expected at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._history: dict[str, dict[int, Tensor]] = {}
        self._recording = contextlib.ExitStack()
        self._records: dict[str, Record] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the layers in a step that is due, in its first batch."""
        self._recording.close()  # still open if the last batch had no backward pass
        fresh = trainer.global_step not in self._steps()
        if fresh and trainer.global_step % self.every_n_steps == 0:
            self._records = self._recording.enter_context(record(pl_module))

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what was watched."""
        self._recording.close()
        flows = {name: r.flow() for name, r in self._records.items() if r.reached}
        self._records = {}
        if not flows:
            return
        numbers: dict[str, float] = {}
        log_figure(pl_module, "gradient_flow/curves", draw(flows))
        for name, flow in flows.items():
            history = self._history.setdefault(name, {})
            history[trainer.global_step] = flow.hidden.cpu()
            log_figure(pl_module, f"gradient_flow/{name}", draw_history(history, f"{name}: dL/dh"))
            for gate, radius in flow.spectral_radius.items():
                numbers[f"gradient_flow/{name}/spectral_radius_{gate}"] = radius.max().item()
                mean = flow.gate_mean[gate].mean().item()
                numbers[f"gradient_flow/{name}/mean_{gate}"] = mean
                saturation = flow.gate_saturation[gate].mean().item()
                numbers[f"gradient_flow/{name}/saturation_{gate}"] = saturation
            if flow.carry is not None:
                numbers[f"gradient_flow/{name}/carry_product"] = flow.carry[0, -1].item()
        for logger in trainer.loggers:  # `pl_module.log` would repeat them at later steps
            logger.log_metrics(numbers, step=trainer.global_step)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the layers their own backend back."""
        self._recording.close()

    def _steps(self) -> set[int]:
        return {step for history in self._history.values() for step in history}


class LatestRun(Callback):
    """Keeps a link to the latest run, and says at the end how to use the result.

    The runs of a CSVLogger lie in `save_dir/name/version_N`; `save_dir/name/latest` points to the
    newest.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Point the link to this run."""
        run = _run_folder(trainer)
        if run is not None:
            _link(run)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the commands that evaluate and use the best checkpoint."""
        run = _run_folder(trainer)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if run is None or not best:
            return
        best = os.path.relpath(best)
        print(
            "Evaluate: python -m fusedrnn.train test "
            f"--config {os.path.relpath(run / 'config.yaml')} --ckpt_path {best}"
        )
        if getattr(type(pl_module), "predict_lines", None) is not Task.predict_lines:
            print(f"Use:      python -m fusedrnn.train predict --ckpt_path {best} --input FILE")


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint as `best.ckpt`, over a resumed run too.

    A resumed run has a folder of its own. Lightning would forget there what was best before, and
    call the first epoch after it the best; this takes the best checkpoint so far along.

    Args:
        monitor: the logged metric that says how good the model is.
        mode: `min` or `max`, the better direction.
        filename: name of the file, without `.ckpt`.
    """

    def __init__(self, monitor: str, mode: str, filename: str = "best") -> None:
        super().__init__(monitor=monitor, mode=mode, filename=filename, save_top_k=1)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder; remember whether this is training."""
        super().setup(trainer, pl_module, stage)
        self._training = stage == "fit"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best checkpoint so far, when training goes on."""
        if not self._training:
            return
        before, score = Path(state_dict["best_model_path"]), state_dict["best_model_score"]
        if state_dict["dirpath"] == self.dirpath or not before.is_file():
            super().load_state_dict(state_dict)
            return
        path = self.format_checkpoint_name({})
        _copy(before, Path(path))
        super().load_state_dict(
            state_dict
            | {
                "dirpath": self.dirpath,
                "best_model_path": path,
                "kth_best_model_path": path,
                "best_k_models": {path: score},
            }
        )


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest state as `last.ckpt`, and lets a run be stopped anywhere.

    It is written at the end of every epoch; and in the middle of one where the run ends there:
    because of `max_steps` or `max_time`, or because a signal (SIGTERM, or SIGINT as by Ctrl-C) asks
    it to, in which case the run ends after its current batch. `fit --ckpt_path` goes on with the
    next batch. A second signal ends the run at once.

    Args:
        filename: name of the file, without `.ckpt`.

    Attributes:
        received: the signal that ended the run; None without.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, filename: str = "last") -> None:
        super().__init__(filename=filename, save_top_k=1, enable_version_counter=False)
        self.received: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals, where that is possible: in a main thread."""
        super().on_train_start(trainer, pl_module)
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._receive) for s in self.SIGNALS}

    def _receive(self, number: int, _: Any) -> None:
        self.received = number
        self._release()

    def _release(self) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """End the run where it is asked to, and write the checkpoint where it ends."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            trainer.should_stop = True
        ends = trainer.should_stop or trainer.global_step == trainer.max_steps
        trying = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        if ends and not trainer.is_last_batch and not trying:
            for callback in trainer.early_stopping_callbacks:
                callback.strict = False  # of an epoch cut short there may be no score
            path = self.format_checkpoint_name(self._monitor_candidates(trainer))
            self._save_checkpoint(trainer, path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        super().on_train_end(trainer, pl_module)
        self._release()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        super().on_exception(trainer, pl_module, exception)
        self._release()


@rank_zero_only
def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _run_folder(trainer: L.Trainer) -> Path | None:
    folders = [Path(lg.log_dir) for lg in trainer.loggers if isinstance(lg, CSVLogger)]
    return folders[0] if folders else None


@rank_zero_only
def _link(run: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    fresh = run.parent / f".latest-{os.getpid()}"
    fresh.symlink_to(run.name)
    fresh.replace(run.parent / "latest")
