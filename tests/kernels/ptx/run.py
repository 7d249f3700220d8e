"""Runs the cases named on stdin, one a line, and answers each with a line of JSON on stdout.

Run as a module, without TRITON_INTERPRET, which the tests' own process has.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from .card import Card, inserted
from .problems import PROBLEMS


def answer(card: Card, name: str) -> dict[str, object]:
    """What went wrong, or nothing, and what was launched.

    Args:
        card: the machine.
        name: of a problem.
    """
    card.launches.clear()
    card.seed, card.mutate, error = 1, str, ""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        try:
            PROBLEMS[name](card, monkeypatch)
        except Exception as found:
            error = f"{type(found).__name__}: {found}"
    return {"error": error, "launches": [launch._asdict() for launch in card.launches]}


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    with (
        contextlib.redirect_stdout(sys.stderr),
        tempfile.TemporaryDirectory() as folder,
        inserted(Path(folder)) as card,
    ):
        for line in sys.stdin:
            print(json.dumps(answer(card, line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main()
