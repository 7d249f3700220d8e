"""Run benchmarks by name; without a name all of them, or on a GPU those that need one.

Rows stand in results/NAME.csv as soon as they are measured. Those that are there from the same
commit, machine and versions are not measured again; new ones replace those from elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import pkgutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

import benchmarks

from .registry import BENCHMARKS, RESULTS, Row, environment, read, write

R = TypeVar("R", bound=Mapping[str, object])
NO_GPU: Row = {"status": "no GPU has run this"}


def main(args: list[str] | None = None) -> None:
    """Run the named benchmarks.

    Args:
        args: names and options; None takes them from the command line.

    Raises:
        SystemExit: not everything could be measured.
    """
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name != "__main__":
            importlib.import_module(f"benchmarks.{module.name}")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no case that may end after so long"
    )
    options = parser.parse_args(args)
    unknown = set(options.names) - BENCHMARKS.keys()
    if unknown:
        parser.error(
            f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    where = environment()
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    gpu = torch.cuda.is_available()
    names = options.names or [name for name, it in BENCHMARKS.items() if it.gpu or not gpu]
    failures: Counter[str] = Counter()
    findings = []
    limit = Limit(60 * options.minutes)
    for name in names:
        path = options.output / f"{name}.csv"
        if BENCHMARKS[name].gpu and not gpu:
            findings.append(f"{name}: not run, needs a GPU")
            if not path.exists():
                write(path, [NO_GPU | where])
            continue
        with _counting(failures, name):
            _run(name, path, where, failures, limit)
        with _counting(failures, name, "findings"):
            rows = _matching(read(path), where)
            findings += [f"{name}: {line}" for line in BENCHMARKS[name].findings(rows)]
    print(*findings, sep="\n", flush=True)
    if failures:
        sys.exit("failed: " + ", ".join(f"{name} ({n})" for name, n in failures.items()))


class Limit:
    """The end of a run that must not be killed.

    Args:
        seconds: how long it may take from now.
    """

    def __init__(self, seconds: float) -> None:
        self.end, self.longest, self.start = time.monotonic() + seconds, 0.0, 0.0

    def reached(self) -> bool:
        """Whether another case, as long as the longest so far, would end too late."""
        self.start = time.monotonic()
        return self.start + self.longest > self.end

    def count(self) -> None:
        """Remember how long the case took that began with `reached`."""
        self.longest = max(self.longest, time.monotonic() - self.start)


def _run(name: str, path: Path, where: Row, failures: Counter[str], limit: Limit) -> None:
    rows: list[Mapping[str, object]] = list(_matching(read(path), where))
    if rows:
        print(f"{name}: {len(rows)} rows are there from before", flush=True)
    for key, measure in BENCHMARKS[name].cases():
        if _matching(rows, key):
            continue
        if limit.reached():
            print(f"{name}: time is up before {_text(key)}; run again to go on", flush=True)
            return
        with _counting(failures, name, _text(key)):
            measured = [key | row for row in measure()]
            print(*(f"{name} {_text(row)}" for row in measured), sep="\n", flush=True)
            rows += [row | where for row in measured]
            write(path, rows)
        limit.count()


@contextlib.contextmanager
def _counting(failures: Counter[str], name: str, *what: str) -> Iterator[None]:
    """Say in one line what was raised inside, count it, and go on."""
    try:
        yield
    except Exception as error:
        failures[name] += 1
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        text = next(iter(str(error).strip().splitlines()), "")
        print(name, *what, f"failed: {type(error).__name__}: {text} ({place})", flush=True)


def _text(row: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.items())


def _matching(rows: Sequence[R], columns: Row) -> list[R]:
    """The rows that agree with `columns`, all compared as the file has them."""
    return [r for r in rows if all(str(r.get(name)) == str(v) for name, v in columns.items())]


if __name__ == "__main__":
    main()
