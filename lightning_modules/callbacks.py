"""What a run reports about itself."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only


class Throughput(Callback):
    """Logs `train/tokens_per_second`: over the steps since the last log, summed over the processes.

    Time spent outside training steps and loading, such as in validation, does not count. Batches
    say how many tokens they hold in `num_tokens`, padding not included.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = 0.0
        self._since: float | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self._stop()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock again."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts the tokens of the batch, and logs at every `log_every_n_steps`."""
        self._stop()
        self._since = time.perf_counter()
        self._tokens += int(batch.num_tokens)
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:
            rate = self._tokens / max(self._seconds, 1e-9)
            pl_module.log(
                "train/tokens_per_second", rate, reduce_fx="sum", sync_dist=True, batch_size=1
            )
            self._tokens, self._seconds = 0, 0.0

    def _stop(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None


class LatestRun(Callback):
    """Keeps a link to the latest run, and says at the end how to use the result.

    The runs of a CSVLogger lie in `save_dir/name/version_N`; `save_dir/name/latest` points to the
    newest.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Points the link to this run."""
        run = _run_folder(trainer)
        if run is not None:
            _link(run)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the commands that evaluate and use the best checkpoint."""
        run = _run_folder(trainer)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if run is None or not best:
            return
        best = os.path.relpath(best)
        print(
            "Evaluate: python -m fusedrnn.train test "
            f"--config {os.path.relpath(run / 'config.yaml')} --ckpt_path {best}\n"
            f"Use:      python -m fusedrnn.train predict --ckpt_path {best} --input FILE"
        )


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
        """Finds the folder; remembers whether this is training."""
        super().setup(trainer, pl_module, stage)
        self._training = stage == "fit"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the best checkpoint so far, when training goes on."""
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
