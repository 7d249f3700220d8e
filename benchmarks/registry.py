"""Names of benchmarks, and what they share: interleaved timing and a description of the machine."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

Row = dict[str, object]
Benchmark = Callable[[], Iterator[Row]]

BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(run: Benchmark) -> Benchmark:
    """Register a generator of result rows under its function's name."""
    BENCHMARKS[run.__name__] = run
    return run


def environment() -> Row:
    """What a result depends on besides the code: processor or GPU, threads, torch, commit."""
    gpu = torch.cuda.is_available()
    return {
        "machine": torch.cuda.get_device_name() if gpu else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int) -> Iterator[Row]:
    """Time candidates in turn, so that all see the same disturbances.

    Args:
        candidates: name -> what to time; the first is the baseline. Each runs once beforehand.
        rounds: how often each is timed.

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
            start = time.perf_counter()
            candidates[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
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
