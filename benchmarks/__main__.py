"""Run benchmarks by name, all of them without a name; each writes results/NAME.csv as it goes."""

from __future__ import annotations

import argparse
import csv
import importlib
import pkgutil
from pathlib import Path

import benchmarks

from .registry import BENCHMARKS, environment

RESULTS = Path(__file__).parent / "results"


def main(args: list[str] | None = None) -> None:
    """Run the named benchmarks.

    Args:
        args: names and options; None takes them from the command line.
    """
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name != "__main__":
            importlib.import_module(f"benchmarks.{module.name}")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the CSV files")
    options = parser.parse_args(args)
    unknown = set(options.names) - BENCHMARKS.keys()
    if unknown:
        parser.error(
            f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    where = environment()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    for name in options.names or BENCHMARKS:
        _run(name, options.output / f"{name}.csv", where)


def _run(name: str, path: Path, where: dict[str, object]) -> None:
    with path.open("w", newline="") as file:
        writer = None
        for row in BENCHMARKS[name]():
            print(name, ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            row = row | where
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    main()
