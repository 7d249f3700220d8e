"""Names of benchmarks, and what they share: timing, findings, a description of the machine."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, object]
Case = tuple[Row, Callable[[], Iterable[Row]]]
"""The columns that name some rows of the result, and what measures the others of each."""
Cases = Callable[[], Iterator[Case]]
Findings = Callable[[Sequence[Mapping[str, str]]], Iterator[str]]


@dataclass(frozen=True)
class Benchmark:
    """One table of results.

    Attributes:
        cases: what to measure; no case takes long before it is measured.
        findings: the few lines worth reading, from the rows as the file has them.
        gpu: whether it needs a GPU.
    """

    cases: Cases
    findings: Findings
    gpu: bool = False


BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(findings: Findings, gpu: bool = False) -> Callable[[Cases], Cases]:
    """Register a generator of cases under its function's name; arguments as in `Benchmark`."""

    def register(cases: Cases) -> Cases:
        BENCHMARKS[cases.__name__] = Benchmark(cases, findings, gpu)
        return cases

    return register


def spread(column: str, *label: str) -> Findings:
    """Say of a column of ratios its ends and its geometric mean.

    Args:
        column: its name. The rows of baselines, which are 1, do not count; NaN is an upper end.
        label: columns that name a row.
    """

    def key(row: Mapping[str, str]) -> tuple[bool, float]:
        value = float(row[column])
        return math.isnan(value), value

    def say(row: Mapping[str, str]) -> str:
        return f"{row[column]} ({', '.join(f'{name} {row[name]}' for name in label)})"

    def findings(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
        ranked = sorted((r for r in rows if r.get("baseline", "") != r.get("name")), key=key)
        if ranked:
            logs = [math.log(v) if (v := float(r[column])) else -math.inf for r in ranked]
            mean = math.exp(statistics.fmean(logs))
            ends = f"{say(ranked[0])} to {say(ranked[-1])}"
            yield f"{column} {ends}, geometric mean {mean:.2f} of {len(ranked)}"

    return findings


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a result file, none if there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Replace the file at once, so that no moment leaves half of it."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def environment() -> Row:
    """What a result depends on: processor or GPU, threads, versions, and the code.

    The code is named by its commit; with changes, or without git, by a digest of the sources too.
    Without git the environment's COMMIT may say which commit it is.
    """
    gpu = torch.cuda.is_available()
    found = _git("rev-parse", "--short", "HEAD")
    commit = found or os.environ.get("COMMIT", "")
    changed = _git("status", "--porcelain", "-uno", ":/", ":(top,exclude)benchmarks/results")
    return {
        "machine": torch.cuda.get_device_name() if gpu else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit if found and not changed else f"{commit}+{_digest()}",
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _digest() -> str:
    """Of the modules that a result may depend on."""
    digest = hashlib.sha256()
    for package in ("kernels", "fusedrnn", "lightning_modules", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:7]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Row]:
    """Time candidates in turn, so that all see the same disturbances.

    Args:
        candidates: name -> what to time; the first is the baseline. Each runs once beforehand.
        rounds: how often each is timed.
        clock: seconds so far; `time.thread_time` leaves out what other programs take meanwhile.

    Yields:
        For each candidate: its name, the baseline's, the median in milliseconds, and the median
        over rounds of its time divided by the baseline's in the same round, with the quartiles
        of that ratio.
    """
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for run in candidates.values():
        run()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            candidates[name]()
            times[name].append(1e3 * (clock() - start))
    for name in names:
        ratios = [t / base for t, base in zip(times[name], times[names[0]], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        yield {
            "name": name,
            "baseline": names[0],
            "milliseconds": round(statistics.median(times[name]), 2),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_q1": round(quartiles[0], 3),
            "ratio_q3": round(quartiles[2], 3),
            "rounds": rounds,
        }
