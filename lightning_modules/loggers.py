"""The Weights & Biases logger of the packaged configurations."""

import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_warn

CONNECT_SECONDS = 20
"""How long a run waits for the W&B server before it goes on offline."""


class RunLogger(WandbLogger):
    """Logs a run to Weights & Biases: online for who is logged in, offline for everyone else.

    An offline run needs no account, no network and no answer; `wandb sync` uploads it later. A run
    that cannot reach the server within 20 seconds goes on offline too.

    Args:
        name: display name of the run.
        project: the project that the run belongs to.
        entity: the user or team that the project belongs to; None is the default of the account.
        tags: labels to find the run by.
        notes: a description of the run.
        save_dir: folder of the `wandb` folder with the run's files.
        offline: True or False decides; None takes what `WANDB_MODE` says, or else whether an API
            key is found in `WANDB_API_KEY` or in the netrc file that `wandb login` writes.
    """

    def __init__(
        self,
        name: str | None = None,
        project: str = "fusedrnn",
        entity: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        save_dir: str = "runs",
        offline: bool | None = None,
    ) -> None:
        mode = None if offline is None else "offline" if offline else "online"
        if mode is None:
            mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        super().__init__(
            name=name,
            project=project,
            save_dir=os.path.abspath(save_dir),  # W&B's own process may have another working folder
            entity=entity,
            tags=tags,
            notes=notes,
            mode=mode,
            settings=wandb.Settings(init_timeout=CONNECT_SECONDS),
        )
        self._wandb_init.pop("anonymous")  # None is the default; given, wandb warns about it

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started on first use."""
        if self._experiment is None and self.save_dir is not None:
            os.makedirs(self.save_dir, exist_ok=True)
        try:
            return super().experiment
        except wandb.errors.CommError as error:
            rank_zero_warn(f"W&B cannot be reached, so this run is logged offline: {error}")
            self._wandb_init["mode"] = "offline"
            return super().experiment

    def close(self) -> None:
        """End the W&B run, so that the next one in this process is a run of its own."""
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None


def logged_in() -> bool:
    """Return whether this machine has W&B credentials; ask neither the network nor the user."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    url = os.environ.get("WANDB_BASE_URL")
    urls = [url] if url else [wandb.Settings().base_url, "https://api.wandb.ai"]
    hosts = [urlsplit(url).netloc for url in urls]
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    return any(_has_key(file, host) for file in files for host in hosts)


def _has_key(file: Path, host: str) -> bool:
    try:
        found = netrc.netrc(file).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(found and found[2])
