"""Trains, evaluates and uses models.

`python -m fusedrnn.train {fit,validate,test,predict,average}`.
"""

import argparse
import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc import locate
from typing import Any, Literal, NoReturn, TextIO

import jsonargparse
import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_modules.data
from lightning_modules import CheckpointError, Task
from lightning_modules.averaging import average_checkpoints
from lightning_modules.base import read_checkpoint
from lightning_modules.callbacks import LastCheckpoint
from lightning_modules.data.readers import numbered
from lightning_modules.formats import BadLine
from lightning_modules.loggers import RunLogger
from lightning_modules.model_card import ModelCard

CONFIGS = Path(lightning_modules.__file__).parent / "configs"

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 20,
    "use_distributed_sampler": False,  # BucketBatchSampler deals its batches out by itself
    "callbacks": [ModelCard()],  # of every run, beside those of its configuration
}


class OneLineParser(jsonargparse.ArgumentParser):
    """Says in one line which option is wrong, and what was expected."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line, and exit with code 2."""
        # without exit it is one of the parsers inside, whose message becomes part of another
        super().error(_in_one_line(message) if self.exit_on_error else message, ex)


class CLIParser(OneLineParser, LightningArgumentParser):
    """That of the command line."""


class SaveConfig(SaveConfigCallback):
    """Stores the whole configuration with a training run, and sends it to Weights & Biases."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Store it where there is a run to store it with."""
        if stage == "fit" and trainer.loggers:
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Send it to Weights & Biases."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False, format="yaml"))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(config)


class CLI(LightningCLI):
    """LightningCLI with packaged configurations, linked codecs, and checkpoints checked first."""

    checkpoint: dict[str, Any] | None = None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Leave out Lightning's predict, in whose place `predict` reads raw text."""
        return {k: v for k, v in LightningCLI.subcommands().items() if k != "predict"}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse a command line, or the dict that stands for one."""
        if isinstance(args, dict | jsonargparse.Namespace):
            self.config = parser.parse_object(args)
            return
        try:
            self.config = parser.parse_args(_find_configs(list(args)))
        except ValueError as error:
            parser.error(str(error))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the codec."""
        parser.link_arguments(
            "data", "model.init_args.codec", compute_fn=self._codec, apply_on="instantiate"
        )

    def _codec(self, data: Any) -> Any:
        """Return the codec of the data, which is the checkpoint's where there is one."""
        if self.checkpoint is not None and hasattr(type(data), "codec"):
            data.codec = self._task().codec_class.from_dict(self.checkpoint["fusedrnn"]["codec"])
        try:
            return getattr(data, "codec", None)
        except (ValueError, OSError) as error:
            _fail(error)

    def _task(self) -> Any:
        return locate(self.config[self.config.subcommand].model.class_path)

    def _parse_ckpt_path(self) -> None:
        """Read the checkpoint before anything is built.

        Lightning would let the settings stored in it override the given ones here.
        """
        path = self.config[self.config.subcommand].ckpt_path
        task = self._task()
        if path is None or not issubclass(task, Task):
            return
        self.checkpoint = read_checkpoint(path)
        name = self.checkpoint["fusedrnn"]["task"]
        if name != task.__name__:
            raise CheckpointError(f"{path}: holds a {name}, not a {task.__name__}")

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; refuse in one line what they cannot be built from."""
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:
            _fail(ValueError(f"--trainer: {error}"))
        except (ValueError, OSError) as error:
            _fail(_inner(error))

    def after_instantiate_classes(self) -> None:
        """Compare model and checkpoint, and read the data, before the run has a folder."""
        if self.checkpoint is not None:
            self.model.check(self.checkpoint, self.config[self.config.subcommand].ckpt_path)
            self.checkpoint = None
        if self.config.subcommand == "fit" and isinstance(self.model, Task):
            _check_monitors(self.trainer, self.model)
        if not self.trainer.loggers:  # the monitor that configurations come with would raise
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
            callbacks[:] = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
        if hasattr(type(self.datamodule), "codec"):  # one that needs no process group
            self.datamodule.setup(self.config.subcommand)


def main(args: Sequence[str] | dict[str, Any] | None = None) -> CLI | None:
    """Run one command of the command line.

    Args:
        args: the command and its options, such as `["fit", "--config", "pos"]`; by default those of
            this process.

    Returns:
        The CLI, with its `trainer`, `model` and `datamodule`; None after `predict` and `average`.

    Raises:
        SystemExit: with code 2 after a line on stderr, when the input is wrong; with 128 and the
            number of the signal that ended a training run.
    """
    args = sys.argv[1:] if args is None else args
    _quieten()
    try:
        if not isinstance(args, dict) and list(args[:1]) == ["predict"]:
            predict(args[1:])
            return None
        if not isinstance(args, dict) and list(args[:1]) == ["average"]:
            average(args[1:])
            return None
        cli = CLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=42,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_class=CLIParser,
            parser_kwargs=_parser_kwargs(),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args if isinstance(args, dict) else list(args),
        )
    except (ValueError, OSError) as error:
        if isinstance(error, CheckpointError) or _raised_by_data(error):
            _fail(error)
        raise
    for logger in cli.trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.close()
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        if isinstance(callback, LastCheckpoint) and callback.received is not None:
            raise SystemExit(128 + callback.received)  # as the shell says of what a signal ended
    return cli


def _check_monitors(trainer: L.Trainer, task: Task) -> None:
    """Refuse a callback that would look for a score after an epoch, and not find it."""
    names = task.score_names
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        monitor = getattr(callback, "monitor", None)
        if names and str(monitor).startswith("val/") and monitor not in names:
            known, kind = ", ".join(sorted(names)), type(callback).__name__
            _fail(ValueError(f"monitor of {kind}: expected one of {known}, got {monitor!r}"))


def predict(args: Sequence[str]) -> None:
    """Write the results of a trained model on raw text, one line for each line.

    Args:
        args: `--ckpt_path X --input FILE|- [--output FILE|-]`, and the options of the task in the
            checkpoint. Several checkpoints make an ensemble.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--ckpt_path", nargs="+")
    peek.add_argument("--task", default="lightning_modules.Task")
    peeked = peek.parse_known_args(args)[0]
    if peeked.ckpt_path is None:
        _predict_parser(Task).parse_args(list(args))  # prints the help, or that it is required
    kind = _task_class(peeked.task)
    task, *others = [kind.load_from_checkpoint(path) for path in peeked.ckpt_path]
    if others:
        task.join(others)
    options = vars(_predict_parser(type(task)).parse_args(list(args)))
    source, target, device = (options.pop(name) for name in ("input", "output", "device"))
    del options["ckpt_path"], options["task"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        task.to(device)
    except (RuntimeError, AssertionError) as error:
        _fail(ValueError(f"--device: cannot use {device!r}: {error}"))
    try:
        with _reading(source) as text, _writing(target) as file:
            for result in task.predict_lines(_lines(text, source, task.line_ends), **options):
                print(result, file=file, flush=target == "-")
    except BadLine as error:
        _fail(ValueError(f"{_name(source)}:{error.number}: {error.problem}"))
    except (OSError, ValueError) as error:
        _fail(error)


def average(args: Sequence[str]) -> None:
    """Write a checkpoint whose weights are the means of several.

    Args:
        args: `--ckpt_path A B ... --output FILE`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn.train average",
        description="Averages the weights of checkpoints of a run.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, metavar="FILE", help="the checkpoint to write")
    options = parser.parse_args(list(args))
    try:
        average_checkpoints(options.ckpt_path, options.output)
    except OSError as error:
        _fail(error)


def _predict_parser(task: type[Task]) -> jsonargparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m fusedrnn.train predict",
        description="Uses a trained model on raw text, one result for each line. Further options "
        "depend on the model: --ckpt_path FILE --help lists them.",
    )
    for name, default, text in (
        ("input", "-", "a text file, or - for stdin"),
        ("output", "-", "a file, or - for stdout"),
        ("device", "auto", "auto, cpu, cuda, cuda:1, ..."),
        ("task", None, "the class of the model, such as my_module.MyTask, if it is your own"),
    ):
        parser.add_argument(f"--{name}", type=str, default=default, help=text)
    checkpoints = "a checkpoint of a run, or several for an ensemble"
    parser.add_argument(
        "--ckpt_path", type=str, nargs="+", required=True, metavar="FILE", help=checkpoints
    )
    if task is not Task:
        parser.add_method_arguments(task, "predict_lines", skip={"lines"})
    return parser


def _parser_kwargs() -> dict[str, Any]:
    """Return what the help says, and a usage line in place of one with every option."""
    program = "python -m fusedrnn.train"
    commands = ",".join([*CLI.subcommands(), "predict", "average"])
    usages: dict[str, Any] = {
        name: {"usage": f"{program} {name} [--config NAME|FILE] [--OPTION VALUE ...]"}
        for name in CLI.subcommands()
    }
    description = (
        "Trains and evaluates models; `predict` uses one on raw text, `average` makes one of "
        "several checkpoints of a run. "
        f"Packaged configurations: {', '.join(packaged_configs())}."
    )
    usage = f"{program} {{{commands}}} ..."
    return {"prog": program, "usage": usage, "description": description, **usages}


def _in_one_line(message: str) -> str:
    """Shorten what jsonargparse says of a value: the innermost option, its types, the value.

    Its own message is a tree: options inside a class inside a union, each with all it could be.
    """
    *outer, inner = re.split(r'Parser key "(.+?)":', message)
    if not outer:
        return " ".join(message.split())
    if outer[2:]:  # what follows this option is about those around it
        inner = re.split(r"\n {0,4}- Expected a <class 'NoneType'>", inner)[0]
    name = "--" + ".".join(dict.fromkeys(outer[1::2]))
    absent = re.search(r"Option '(.+?)' is not accepted", inner)
    if absent:
        return f"{name.removesuffix(f'.{absent[1]}')}.{absent[1]}: no such option"
    types = re.findall(r"Expected an? (.+?)(?:\. Got value: .*)?$", inner, re.MULTILINE)
    value = re.search(r"(?:Given|Got) value: (.*?)(?:\. Got value: .*)?$", inner, re.MULTILINE)
    value = value or re.search(r"import path string: (.*)", inner)
    if not types or value is None:
        return f"{name}: {' '.join(inner.split())}"
    nested = re.fullmatch(r"NestedArg\(key='(.+?)', val=(.*)\)", value[1])
    if nested:
        name = f"{name}.{nested[1]}"
    wanted = dict.fromkeys(filter(None, map(_type_name, types)))
    return f"{name}: expected {' or '.join(wanted)}, got {nested[2] if nested else value[1]}"


def _type_name(description: str) -> str:
    """Say in a user's words what jsonargparse expects; nothing for what only it could read."""
    if description.startswith("path but"):
        return ""
    if description.startswith("dot import path"):
        return "the import path of a class"
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", description)
    if choices:
        return f"one of {choices[1]}"
    name = re.sub(r"<class '(.+)'>", r"\1", description)
    return re.sub(r"\b\w+\.", "", name).replace("NoneType", "null")


def packaged_configs() -> list[str]:
    """Return the names that `--config` takes beside files."""
    return sorted(file.stem for file in CONFIGS.glob("*.yaml"))


def _find_configs(args: list[str]) -> list[str]:
    """Replace the bare names of packaged configurations by their files."""
    found = []
    for place, arg in enumerate(args):
        option, equals, name = arg.partition("=")
        if equals and option in ("--config", "-c"):
            found.append(f"{option}={_find_config(name)}")
        elif place > 0 and args[place - 1] in ("--config", "-c"):
            found.append(_find_config(arg))
        else:
            found.append(arg)
    return found


def _find_config(name: str) -> str:
    file = Path(name)
    if not file.is_file():
        file = CONFIGS / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(packaged_configs())
        raise ValueError(f"--config: {name!r} is neither a file nor a packaged one ({known})")
    try:
        yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.MarkedYAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else f"{file}"
        raise ValueError(f"{place}: {getattr(error, 'problem', error)}") from error
    return str(file)


def _task_class(path: str) -> Any:
    task = locate(path)
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise CheckpointError(f"--task: {path!r} is not a subclass of lightning_modules.Task")
    return task


def _opened(path: str | Path, mode: Literal["r", "w"], fault: str) -> TextIO:
    """Open a file, and name the fault if that fails; not what fails later, while it is open."""
    try:
        if mode == "w":
            return open(path, mode, encoding="utf-8", newline="\n")
        return open(path, mode, encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise ValueError(f"{fault}: {error.strerror}") from error


@contextmanager
def _reading(source: str) -> Iterator[TextIO]:
    if source == "-":
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="")
        yield sys.stdin
    else:
        with _opened(source, "r", f"--input: cannot read {source!r}") as file:
            yield file


def _lines(text: TextIO, source: str, ends: bool) -> Iterator[str]:
    for _, line in numbered(text, _name(source)):
        yield line if ends else line.rstrip("\r\n")


def _name(source: str) -> str:
    return "stdin" if source == "-" else source


@contextmanager
def _writing(target: str) -> Iterator[TextIO]:
    """Yield stdout, a device or a pipe, or a file that has its name only when it is complete."""
    if target == "-":
        yield sys.stdout
        return
    path = Path(target)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output: no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"--output: expected a file, got the folder {path}")
    whole = path.is_file() or not path.exists()
    partial = path.with_name(f".{path.name}.{os.getpid()}") if whole else path
    try:
        with _opened(partial, "w", f"--output: cannot write {target!r}") as file:
            yield file
        if whole:
            partial.replace(path)
    finally:
        if whole:
            partial.unlink(missing_ok=True)


def _quieten() -> None:
    """Silence what Lightning says to every user of a supported setting."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    warnings.filterwarnings("ignore", message="(?s).*(deprecated in v4|JsonargparseDeprecation)")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


def _raised_by_data(error: Exception) -> bool:
    """Return whether data were at work, so that the input is to blame."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    sources = (L.LightningDataModule, lightning_modules.data.ResumableLoader)
    return any(isinstance(f.f_locals.get("self"), sources) for f in frames)


def _inner(error: Exception) -> Exception:
    """Return what a constructor raised, without what jsonargparse says about types around it."""
    inner = error.__cause__ or error.__context__
    if isinstance(inner, Exception) and str(error).startswith("Does not validate"):
        return inner
    return error


def _fail(error: Exception) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2) from error


if __name__ == "__main__":
    main()
