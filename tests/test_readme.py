"""Runs what the README tells to run, small, and in the README's order.

Left to `.ci/run`, which takes it from the README too: making the environment and running the tests.
"""

import io
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from fusedrnn.train import CONFIGS, main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BUILTIN = ("turkish-treebanks", "cmudict")
ELSEWHERE = ("python3 -m venv", ". .venv/bin/activate", "pip install", "python -m pytest", "wandb")

QUICK = {
    "fit": ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2"],
    "validate": [],
    "test": [],
}
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.limit_val_batches=2",
    "--trainer.limit_test_batches=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
FILES = {
    ".conll": "Ann\tB-PER\nLee\tI-PER\nsaw\tO\n\nRome\tB-LOC\n\n" * 9,
    ".conllu": "1\tAnn\t_\tPROPN\t_\t_\t_\t_\t_\t_\n2\tran\t_\tVERB\t_\t_\t_\t_\t_\t_\n\n" * 9,
    ".tsv": "source\ttarget\n" + "".join(f"{n} a\ta {n}\n" for n in range(200)),
    ".txt": "Ann saw Rome\n" * 3,
}


def blocks():
    return re.findall(r"^```(bash|python)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands(block):
    """Splits a block at line ends that do not continue, `&&` and `;`."""
    joined = re.sub(r"(\\|&&)\n", r"\1 ", block).replace("\\ ", " ")
    parts = re.split(r"\n|&&|;", re.sub(r"(?m)(^|\s)#.*$", "", joined))
    return [part.strip() for part in parts if part.strip()]


def make_files(args):
    for arg in args:
        path = Path(arg.partition("=")[2] or arg)
        if path.suffix in FILES and not path.exists() and "ckpt" not in arg:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(FILES[path.suffix], encoding="utf-8")


def needs_hub(args):
    names = [value for option, value in pairwise(args) if option == "--config"]
    files = [CONFIGS / f"{name}.yaml" for name in names]
    sets = [yaml.safe_load(f.read_text())["data"]["init_args"].get("dataset") for f in files]
    return any(s is not None and s not in BUILTIN for s in sets)


def run(command, monkeypatch):
    before, pipe, after = command.rpartition("|")
    args = shlex.split(after)
    assert args[:3] == ["python", "-m", "fusedrnn.train"], f"README has an unknown command: {after}"
    args = args[3:]
    make_files(args)
    if pipe:
        source = shlex.split(before)
        assert source[0] == "echo"
        monkeypatch.setattr(sys, "stdin", io.StringIO(" ".join(source[1:]) + "\n"))
    if args[0] in QUICK:
        if needs_hub(args) and not any(arg.startswith("--data.train") for arg in args):
            with pytest.raises(SystemExit, match="0"):
                main([*args, "--print_config"])
            return
        args = [*args, *QUIET, *QUICK[args[0]]]
        args = ["ddp_fork" if arg == "ddp" else arg for arg in args]
    main(args)


def test_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "<!-- ci: test -->\n```bash\n" in README
    shared = {"__name__": "readme"}
    found = blocks()
    ran = 0
    for language, block in found:
        if language == "python":
            exec(compile(block, "README.md", "exec"), shared)
            continue
        for command in commands(block):
            if not command.startswith(ELSEWHERE):
                run(command, monkeypatch)
                ran += 1
    assert ran >= 3
    assert "Evaluate: python -m fusedrnn.train test" in capsys.readouterr().out
