import subprocess
import sys
import time

import pytest
import wandb

from lightning_modules import loggers
from lightning_modules.loggers import RunLogger, logged_in


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A home without an account, and no word in the environment."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


def mode(**arguments):
    return RunLogger(**arguments)._wandb_init["mode"]


def test_offline_without_an_account():
    assert not logged_in()
    assert mode() == "offline"
    assert mode(offline=False) == "online"


def test_online_with_a_key_in_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert mode() == "online"
    assert mode(offline=True) == "offline"


@pytest.mark.parametrize(
    ("text", "url", "known"),
    [
        ("machine api.wandb.ai\n login user\n password abc\n", None, True),
        ("machine github.com\n login user\n password abc\n", None, False),
        ("machine w.example\n login user\n password abc\n", "https://w.example", True),
        ("machine api.wandb.ai\n login user\n password abc\n", "https://w.example", False),
        ("not a netrc file", None, False),
    ],
    ids=["wandb", "another host", "own server", "own server without a key", "broken"],
)
def test_netrc(nobody, monkeypatch, text, url, known):
    (nobody / "netrc").write_text(text)
    if url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
    assert logged_in() is known


@pytest.mark.parametrize("asked", ["offline", "online", "disabled"])
def test_the_environment_decides_when_it_says_so(monkeypatch, asked):
    monkeypatch.setenv("WANDB_MODE", asked)
    assert mode() == asked
    assert mode(offline=True) == "offline"


FIRST_RUN = """
import socket, sys, time
connected = []
def spy(event, arguments):
    if event == "socket.connect" and arguments[0].family != socket.AF_UNIX:
        connected.append(arguments[1])
sys.addaudithook(spy)
from lightning_modules.loggers import RunLogger
started = time.perf_counter()
logger = RunLogger(name="first", save_dir=sys.argv[1])
logger.log_metrics({"loss": 1.0}, step=0)
logger.close()
outside = [a for a in connected if a[0] not in ("127.0.0.1", "::1", "localhost")]
print("seconds", time.perf_counter() - started, "outside", outside)
"""


def test_first_run_without_account_and_network_neither_asks_nor_waits(nobody):
    """The process has no terminal to answer on, and is killed if it waits for one."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_RUN, str(nobody)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "outside []" in done.stdout
    assert "warn" not in done.stderr.lower()
    assert list(nobody.glob("wandb/offline-run-*/*.wandb"))


def test_unreachable_server_means_offline(nobody, monkeypatch):
    """The server is a closed port of this machine."""
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(loggers, "CONNECT_SECONDS", 2)
    wandb.teardown()
    started = time.perf_counter()
    logger = RunLogger(save_dir=str(nobody))
    with pytest.warns(UserWarning, match="W&B cannot be reached, so this run is logged offline"):
        logger.log_metrics({"loss": 1.0}, step=0)
    logger.close()
    wandb.teardown()
    assert time.perf_counter() - started < 60
    assert list(nobody.glob("wandb/offline-run-*/*.wandb"))


def test_close_ends_the_run(nobody):
    runs = []
    for _ in range(2):
        logger = RunLogger(save_dir=str(nobody))
        runs.append(logger.experiment.id)
        logger.close()
        logger.close()
    assert runs[0] != runs[1]
