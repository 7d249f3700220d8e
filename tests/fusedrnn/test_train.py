import csv
import functools
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml

from fusedrnn import train
from fusedrnn.train import main, packaged_configs
from lightning_modules import Task
from tests.toy import ToyData, ToyTask

ROOT = Path(__file__).parents[2]

CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    - class_path: CSVLogger
      init_args: {save_dir: runs, name: toy}
  callbacks:
    - class_path: BestCheckpoint
      init_args: {monitor: val/accuracy, mode: max}
    - class_path: ModelCheckpoint
      init_args: {filename: last}
    - class_path: EarlyStopping
      init_args: {monitor: val/loss, patience: 3}
    - class_path: LearningRateMonitor
    - class_path: LatestRun
model:
  class_path: tests.toy.ToyTask
  init_args:
    optimizer: {class_path: Adam, init_args: {lr: 0.01}}
    scheduler: {class_path: ExponentialLR, init_args: {gamma: 0.7}}
data:
  class_path: tests.toy.ToyData
"""
LAST = "runs/toy/version_0/checkpoints/last.ckpt"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with a configuration in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def fitted(here):
    main(["fit", "--config", "toy.yaml"])
    return here


def rows(version):
    with open(f"runs/toy/version_{version}/metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def fails(capsys, *args):
    """Runs a command that must be refused with code 2 and returns what it said last."""
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 2
    assert not list(Path().glob("runs/toy/version_1"))
    return capsys.readouterr().err


def test_fit_validate_test_predict(fitted, capsys):
    (fitted / "text.txt").write_text("w1 w1 w2\n\nw3\r\nç w1")
    best = "runs/toy/latest/checkpoints/best.ckpt"
    for command, names in (("validate", "val"), ("test", "test")):
        cli = main([command, "--config", "toy.yaml", "--ckpt_path", best])
        assert set(cli.trainer.callback_metrics) == {f"{names}/loss", f"{names}/accuracy"}
    predict = ["predict", "--ckpt_path", best, "--task", "tests.toy.ToyTask"]
    main([*predict, "--input", "text.txt", "--output", "tags.txt", "--upper", "true"])
    results = (fitted / "tags.txt").read_text().split("\n")
    assert [len(line.split()) for line in results] == [3, 0, 1, 2, 0]
    assert set(" ".join(results).split()) <= {"NEW", "SEEN"}
    assert sorted(path.name for path in fitted.iterdir()) == [
        "runs",
        "tags.txt",
        "text.txt",
        "toy.yaml",
    ]


def test_a_task_without_ensembles_takes_one_checkpoint(fitted, capsys):
    predict = ["predict", "--task", "tests.toy.ToyTask", "--ckpt_path", LAST, LAST]
    said = fails(capsys, *predict, "--input", "toy.yaml")
    assert said == "error: a ToyTask works alone: give one checkpoint\n"


def test_predict_reads_and_writes_streams(fitted, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\nw3\n"))
    capsys.readouterr()
    main(["predict", "--ckpt_path", LAST, "--task", "tests.toy.ToyTask"])
    assert [len(line.split()) for line in capsys.readouterr().out.splitlines()] == [2, 1]


def test_predict_needs_no_data(fitted, monkeypatch):
    monkeypatch.delattr("tests.toy.ToyData.sentences")
    (fitted / "text.txt").write_text("w1\n")
    main(["predict", "--ckpt_path", LAST, "--input", "text.txt", "--output", "out.txt"])
    assert (fitted / "out.txt").read_text() in ("new\n", "seen\n")


def test_predict_that_fails_leaves_the_old_file(fitted, monkeypatch):
    def broken(self, lines):
        yield "one"
        raise RuntimeError("in the middle")

    monkeypatch.setattr(ToyTask, "predict_lines", broken)
    (fitted / "text.txt").write_text("w1\nw2\n")
    (fitted / "out.txt").write_text("before\n")
    before = set(fitted.iterdir())
    with pytest.raises(RuntimeError, match="in the middle"):
        main(["predict", "--ckpt_path", LAST, "--input", "text.txt", "--output", "out.txt"])
    assert (fitted / "out.txt").read_text() == "before\n"
    assert set(fitted.iterdir()) == before


def test_module_command(here):
    (here / "toy.yaml").write_text(CONFIG.replace("logger:", "logger:\n    - RunLogger", 1))
    done = subprocess.run(
        [sys.executable, "-m", "fusedrnn.train", "fit", "--config=toy.yaml"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for noise in ("litlogger", "LeafSpec", "Deprecat", "anonymous"):
        assert noise not in done.stdout + done.stderr


def test_stored_configuration_repeats_the_run(fitted):
    stored = yaml.safe_load(Path("runs/toy/version_0/config.yaml").read_text())
    assert stored["seed_everything"] == 42
    assert stored["trainer"]["use_distributed_sampler"] is False
    assert set(stored["model"]["init_args"]) == {
        "hidden_size",
        "dropout",
        "optimizer",
        "scheduler",
    }
    main(["fit", "--config", "runs/toy/version_0/config.yaml"])
    assert rows(0) == rows(1)


def test_a_run_without_loggers(here):
    main(["fit", "--config", "toy.yaml", "--trainer.logger", "false"])
    assert Path("checkpoints/best.ckpt").exists()
    assert not Path("runs").exists()


def test_wandb_gets_the_configuration(here, monkeypatch):
    (here / "toy.yaml").write_text(CONFIG.replace("callbacks:", "  - RunLogger\n  callbacks:", 1))
    kept = []
    monkeypatch.setattr(
        "lightning_modules.loggers.RunLogger.close",
        lambda logger: kept.append(dict(logger.experiment.config)) or logger.experiment.finish(),
    )
    main(["fit", "--config", "toy.yaml"])
    assert kept[0]["model"]["class_path"] == "tests.toy.ToyTask"
    assert kept[0]["seed_everything"] == 42
    assert list(here.glob("runs/wandb/offline-run-*/*.wandb"))


def test_print_config_gives_a_configuration(here, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", "toy.yaml", "--print_config"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"] == "tests.toy.ToyTask"
    assert "codec" not in printed["model"]["init_args"]
    assert not (here / "runs").exists()


def test_arguments_as_a_dict(here):
    config = yaml.safe_load(CONFIG)
    config["trainer"] |= {"fast_dev_run": True}
    cli = main({"subcommand": "fit", "fit": config})
    assert cli.trainer.global_step == 1


def test_lightning_s_own_modules_work_without_a_codec(here):
    boring = "lightning.pytorch.demos.boring_classes.Boring"
    more = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    cli = main(["fit", "--model", f"{boring}Model", "--data", f"{boring}DataModule", *more])
    assert cli.trainer.global_step == 1


DECAY = "{class_path: ExponentialLR, init_args: {gamma: 0.7}}"
PLATEAU = """
      class_path: lightning.pytorch.cli.ReduceLROnPlateau
      init_args: {monitor: val/loss, patience: 1, threshold: 9.0, threshold_mode: abs, factor: 0.5}
"""


@pytest.mark.parametrize("scheduler", [DECAY, PLATEAU], ids=["decay", "plateau"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_resuming_continues_exactly(here, epochs, scheduler):
    (here / "toy.yaml").write_text(CONFIG.replace(DECAY, scheduler))
    more = ["--trainer.max_epochs", "4"]
    whole = main(["fit", "--config", "toy.yaml", *more])
    main(["fit", "--config", "toy.yaml", "--trainer.max_epochs", str(epochs)])
    part = "runs/toy/version_1/checkpoints/last.ckpt"
    resumed = main(["fit", "--config", "toy.yaml", *more, "--ckpt_path", part])
    assert len({row["lr-Adam"] for row in rows(0) if "lr-Adam" in row}) > 1

    assert [row for row in rows(0) if "train/loss" in row and int(row["epoch"]) >= epochs] == [
        row for row in rows(2) if "train/loss" in row
    ]
    for name in ("val/loss", "val/accuracy", "lr-Adam"):
        series = [row[name] for row in rows(0) if name in row]
        assert series[-(4 - epochs) :] == [row[name] for row in rows(2) if name in row]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for one, other in zip(whole.trainer.callbacks, resumed.trainer.callbacks, strict=True):
        for key in ("best_score", "wait_count", "best_model_score", "stopped_epoch"):
            assert getattr(one, key, None) == getattr(other, key, None), key


def test_a_checkpoint_brings_its_vocabulary(fitted):
    cli = main(["test", "--config", "toy.yaml", "--ckpt_path", LAST, "--data.words", "5"])
    trained = Task.load_from_checkpoint(LAST).codec.words
    assert cli.model.codec.words == cli.datamodule.codec.words == trained


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_bad_checkpoints_are_refused_before_the_data_is_touched(
    fitted, capsys, monkeypatch, command
):
    def touched(self, *args):
        raise AssertionError("the data was touched")

    monkeypatch.setattr("tests.toy.ToyData.__init__", touched)
    Path("short.ckpt").write_bytes(Path(LAST).read_bytes()[:999])
    torch.save({"state_dict": {}}, "foreign.ckpt")
    args = [command, "--config", "toy.yaml", "--ckpt_path"]
    assert fails(capsys, *args, "absent.ckpt") == "error: absent.ckpt: no such checkpoint\n"
    assert fails(capsys, *args, "best") == "error: best: no such checkpoint\n"
    assert fails(capsys, *args, "short.ckpt").startswith("error: short.ckpt: truncated, or not")
    assert fails(capsys, *args, "foreign.ckpt") == (
        "error: foreign.ckpt: not a checkpoint of fusedrnn\n"
    )
    other = [*args, LAST, "--model", "tests.toy.OtherTask"]
    assert fails(capsys, *other) == f"error: {LAST}: holds a ToyTask, not a OtherTask\n"


def test_a_checkpoint_of_another_size_is_refused(fitted, capsys):
    said = fails(
        capsys, "test", "--config", "toy.yaml", "--ckpt_path", LAST, "--model.hidden_size", "9"
    )
    assert said.splitlines()[-1] == (
        f"error: {LAST}: embedding.weight is (14, 8) there and (14, 9) in this model; "
        "give the run's own configuration (its config.yaml)"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "--config", "pso"], "--config: 'pso' is neither a file nor a packaged one ("),
        (["fit", "-c=pso"], "--config: 'pso' is neither a file nor a packaged one ("),
        (
            ["fit", "--config", "toy.yaml", "--model", "Taggr"],
            "error: --model: expected the import path of a class or null, got Taggr",
        ),
        (
            ["fit", "--config", "toy.yaml", "--model.hiden_size", "3"],
            "error: --model.hiden_size: no such option",
        ),
        (
            ["fit", "--config", "toy.yaml", "--data.train", "many"],
            "error: --data.train: expected int, got many",
        ),
        (
            ["fit", "--config", "pos", "--model.head", "foo"],
            "error: --model.head: expected one of 'crf', 'softmax' or list, got foo",
        ),
        (
            ["fit", "--config", "pos", "--data.scheme", "XX"],
            "error: --data.scheme: expected one of 'BIO', 'IOB1', 'IO', 'BIOES' or null, got XX",
        ),
        (
            ["fit", "--config", "pos", "--trainer.max_epochs", "x"],
            "error: --trainer.max_epochs: expected int or null, got x",
        ),
        (
            ["fit", "--config", "pos", "--model.optimizer.lr", "x"],
            "error: --model.optimizer.lr: expected float or the import path of a class, got x",
        ),
        (
            ["fit", "--config", "pos", "--model.optimizer", "Foo"],
            "error: --model.optimizer: expected the import path of a class, got Foo",
        ),
        (
            ["fit", "--config", "toy.yaml", "--trainer.max_epochs=-5"],
            "error: --trainer: `max_epochs` must be a non-negative integer or -1",
        ),
        (["fit", "--config", "bad.yaml"], "bad.yaml:2: expected"),
        (["train"], "train"),
        ([], 'expected "subcommand" to be one of {fit,validate,test}'),
        (["predict"], "ckpt_path"),
        (["predict", "--ckpt_path", "absent.ckpt"], "error: absent.ckpt: no such checkpoint"),
        (["predict", "--ckpt_path", "toy.yaml"], "error: toy.yaml: truncated, or not"),
        (["average", "--ckpt_path", "absent.ckpt"], "--output"),
        (["average", "--ckpt_path", "a", "--output", "b"], "error: a: no such checkpoint"),
        (["average", "--ckpt_path", "a", "--output", "no/b"], "error: --output: no folder no"),
        (
            ["predict", "--ckpt_path", "x", "--task", "nothing.Here"],
            "error: --task: 'nothing.Here'",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_commands(here, capsys, args, message):
    (here / "bad.yaml").write_text("trainer: [1\n")
    said = fails(capsys, *args)
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--input", "absent.txt"], "--input: cannot read 'absent.txt': No such file"),
        (["--input", "runs"], "--input: cannot read 'runs': Is a directory"),
        (["--input", "text.txt", "--output", "runs"], "--output: expected a file, got the folder"),
        (["--input", "text.txt", "--output", "/proc/x"], "--output: cannot write '/proc/x'"),
        (["--input", "latin.txt"], "latin.txt:2: expected UTF-8 text, got the byte 0xE9"),
        (["--input", "text.txt", "--output", "no/such/folder.txt"], "--output: no folder no/such"),
        (["--input", "text.txt", "--device", "toaster"], "--device: cannot use 'toaster'"),
        (["--loud", "true"], "unrecognized arguments: --loud"),
        (["--upper", "perhaps"], "error: --upper: expected bool, got perhaps"),
    ],
)
def test_bad_predict_arguments(fitted, capsys, more, message):
    Path("latin.txt").write_bytes("cafés\n".encode() + b"caf\xe9\n")
    Path("text.txt").write_text("w1\n")
    said = fails(capsys, "predict", "--ckpt_path", LAST, *more)
    assert message in said.splitlines()[-1]


def test_a_pipe_is_written_and_not_replaced(fitted):
    Path("text.txt").write_text("w1 w2\n")
    os.mkfifo("pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(Path("pipe").read_text()), daemon=True)
    reader.start()
    main(["predict", "--ckpt_path", LAST, "--input", "text.txt", "--output", "pipe"])
    reader.join(10)
    assert read[0].count("\n") == 1
    assert Path("pipe").is_fifo()


@pytest.mark.parametrize("bad", ["train", "val"])
def test_data_that_cannot_be_read_is_one_line(here, capsys, monkeypatch, bad):
    sentences = ToyData.sentences

    def unreadable(self, split):
        if split == bad:
            raise ValueError(f"{split}.conllu:3: expected 10 columns, got 2")
        return sentences(self, split)

    monkeypatch.setattr(ToyData, "sentences", unreadable)
    said = fails(capsys, "fit", "--config", "toy.yaml")
    assert said.splitlines()[-1] == f"error: {bad}.conllu:3: expected 10 columns, got 2"


def test_data_that_a_stage_needs_is_read_before_the_run_has_a_folder(here, capsys, monkeypatch):
    def setup(self, stage):
        raise ValueError(f"val: no such split was given, {stage} needs it")

    monkeypatch.setattr(ToyData, "setup", setup)
    said = fails(capsys, "fit", "--config", "toy.yaml")
    assert said.splitlines()[-1] == "error: val: no such split was given, fit needs it"
    assert not Path("runs").exists()


@pytest.mark.parametrize("kind", [ToyTask, ToyData], ids=["model", "data"])
def test_what_a_constructor_refuses_is_one_short_line(here, capsys, monkeypatch, kind):
    def refuse(self, *args, **kwargs):
        raise ValueError("sizes: expected positive numbers, got [0]")

    monkeypatch.setattr(kind, "__init__", functools.wraps(kind.__init__)(refuse))
    said = fails(capsys, "fit", "--config", "toy.yaml")
    assert said.splitlines()[-1] == "error: sizes: expected positive numbers, got [0]"


def test_help_names_every_command_and_configuration(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0
    assert said.startswith(
        "usage: python -m fusedrnn.train {fit,validate,test,predict,average} ...\n"
    )
    assert all(name in said for name in packaged_configs())


def test_other_errors_keep_their_traceback(here, monkeypatch):
    def broken(self, batch, index):
        raise ValueError("a mistake in the model")

    monkeypatch.setattr(ToyTask, "training_step", broken)
    with pytest.raises(ValueError, match="a mistake in the model"):
        main(["fit", "--config", "toy.yaml"])


def test_packaged_configs_are_found_by_name(monkeypatch, here, tmp_path):
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    (packaged / "mine.yaml").write_text(CONFIG)
    monkeypatch.setattr(train, "CONFIGS", packaged)
    assert packaged_configs() == ["mine"]
    for args in (["--config", "mine"], ["-c", "mine"], ["--config=mine"]):
        assert main(["fit", *args, "--trainer.fast_dev_run", "true"]).trainer.global_step == 1
