"""Which targets the measurements on a GPU meet, as a table, and the plots of what was measured.

python -m benchmarks.gpu_targets [--results benchmarks/results] [--figures]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from .gpu_speed import CORNER, grid
from .registry import RESULTS, read

Row = dict[str, str]
POINT = tuple(asdict(CORNER))
PASSES = ("forward", "training")


class Verdict(NamedTuple):
    """One line of the table."""

    target: str
    measured: str
    met: str


def measured(folder: Path, name: str) -> list[Row]:
    """The rows of a result file that a GPU has measured."""
    return [row for row in read(folder / f"{name}.csv") if not row.get("status")]


def _place(row: Row, names: Iterable[str]) -> str:
    return " ".join(f"{name}={row[name]}" for name in names if row.get(name))


def _share(row: Row, what: str) -> str:
    """How much of the time the loops take, measured and by the model: the rest is not theirs."""
    loops = {"forward": ("forward",), "training": ("forward", "backward")}.get(what, ())
    if not loops or not row.get("forward_loop_us"):
        return ""
    spent, floor = (
        int(row["layers"]) * sum(float(row[f"{loop}_{kind}_us"]) for loop in loops)
        for kind in ("loop", "floor")
    )
    ours = float(row[f"{what}_ours_us"])
    return f", where a step takes {ours:.2f} µs, the loops {spent:.2f}, by the model {floor:.2f}"


def _worst(
    target: str,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    limit: float,
    least: bool,
    what: str = "",
    names: Sequence[str] = POINT,
) -> Verdict:
    """A limit that every row must keep, with the row that comes closest to breaking it.

    Args:
        target: what is wanted.
        rows: those concerned.
        value: what is limited.
        limit: of it.
        least: whether it must not be less, or not more.
        what: the pass whose time it is about, or "".
        names: columns that name a row.
    """
    if not rows:
        return Verdict(target, "not measured", "-")

    def badness(row: Row) -> float:
        number = value(row)
        return math.inf if math.isnan(number) else -number if least else number

    worst = max(rows, key=badness)
    broken = sum(badness(row) > (-limit if least else limit) for row in rows)
    text = f"{value(worst):.2f} at {_place(worst, names)}{_share(worst, what) if broken else ''}"
    if len(rows) > 1:
        text = f"worst {text}; {len(rows) - broken} of {len(rows)} within"
    return Verdict(target, text, "no" if broken else "yes")


def _ratio(what: str) -> Callable[[Row], float]:
    return lambda row: float(row[f"{what}_ratio"])


def _slowdown(what: str) -> Callable[[Row], float]:
    return lambda row: float(row[f"{what}_ours_us"]) / float(row[f"{what}_other_us"])


def _mean(target: str, rows: Sequence[Row], what: str, limit: float) -> Verdict:
    """A limit of the geometric mean; also said of where cuDNN took its standard algorithm."""
    if not rows:
        return Verdict(target, "not measured", "-")

    def mean(chosen: Sequence[Row]) -> float:
        return statistics.geometric_mean([_ratio(what)(row) for row in chosen])

    standard = [r for r in rows if r[f"{what}_other_algorithm"].startswith("standard")]
    text = f"{mean(rows):.2f} over {len(rows)} of {len(grid())} points"
    if standard:
        text += f"; {mean(standard):.2f} over the {len(standard)} of cuDNN's standard algorithm"
    return Verdict(target, text, "yes" if mean(rows) >= limit else "no")


def verdicts(folder: Path) -> Iterator[Verdict]:
    """Every target of the kernels, in the order in which they were set."""
    speed = measured(folder, "gpu_speed")
    corner = {name: str(value) for name, value in asdict(CORNER).items()}
    wanted = [{name: str(value) for name, value in asdict(point).items()} for point in grid()]
    points = [row for row in speed if {name: row[name] for name in POINT} in wanted]
    at_corner = [row for row in speed if {name: row[name] for name in POINT} == corner]
    cudnn = [row for row in speed if row["against"] == "cuDNN"]

    def against(name: str, cell: str = "") -> list[Row]:
        return [row for row in speed if row["against"] == name and cell in ("", row["cell"])]

    accuracy = measured(folder, "gpu_accuracy")
    case = ("cell", "dtype", "hidden_size", "bidirectional", "lengths", "denominator")
    target = "error at most 2 x that of torch's kernels"
    yield _worst(target, accuracy, lambda row: float(row["worst_ratio"]), 2, False, names=case)
    for what in PASSES:
        target = f"{what} at least 1.0 x cuDNN at its best corner"
        yield _worst(target, at_corner, _ratio(what), 1, True, what)
    for what in PASSES:
        yield _mean(f"{what} at least 3 x cuDNN, geometric mean of the grid", points, what, 3)
    for what in PASSES:
        yield _worst(f"{what} nowhere below 0.9 x cuDNN", cudnn, _ratio(what), 0.9, True, what)
    for what in PASSES:
        rows = against("cuDNN packed")
        yield _worst(f"{what} at least 5 x packed sequences", rows, _ratio(what), 5, True, what)
    for what in PASSES:
        rows = against("lstm", "lstm_peephole")
        target = f"{what} with peepholes at most 1.05 x the LSTM"
        yield _worst(target, rows, _slowdown(what), 1.05, False, what)
    for what in PASSES:
        rows = against("gru", "gru_reset_before")
        target = f"{what} of the reset-before GRU at most 1.6 x the GRU"
        yield _worst(target, rows, _slowdown(what), 1.6, False, what)
    for what in PASSES:
        rows = against("compiled loop")
        yield _worst(f"{what} at least 20 x a compiled loop", rows, _ratio(what), 20, True, what)
    for what in ("forward", "backward"):
        rows = [row for row in speed if row.get(f"{what}_over_floor")]
        target = f"{what} loop at most 1.5 x the model's floor"

        def over(row: Row, what: str = what) -> float:
            return float(row[f"{what}_over_floor"])

        yield _worst(target, rows, over, 1.5, False)


def table(folder: Path) -> Iterator[str]:
    """The verdicts in Markdown."""
    yield "| target | measured | met |"
    yield "|---|---|---|"
    for verdict in verdicts(folder):
        yield f"| {' | '.join(verdict)} |"


def _lines(axis: Any, rows: Sequence[Row], column: str, style: str, label: str) -> None:
    """A line over H for each batch size."""
    for batch in sorted({int(row["batch"]) for row in rows}):
        of_batch = [row for row in rows if int(row["batch"]) == batch and row.get(column)]
        pairs = sorted((int(row["hidden_size"]), float(row[column])) for row in of_batch)
        if pairs:
            look = {"color": f"C{batch.bit_length()}", "marker": ".", "label": f"{label} B={batch}"}
            axis.plot(*zip(*pairs, strict=True), style, **look)


def _finish(axis: Any, title: str, ylabel: str) -> None:
    axis.set_title(title, fontsize="medium")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="y", which="minor", labelsize="xx-small")
    axis.set_xlabel("hidden size H")
    axis.set_ylabel(ylabel)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize="xx-small")


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.8 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def ratios(rows: Sequence[Row], bidirectional: bool) -> Any:
    """Speed relative to cuDNN over H and B: forward solid, training dashed; 1 is as fast."""
    figure, axes = _figure(2, 3)
    for i, cell in enumerate(("lstm", "gru")):
        for j, dtype in enumerate(("bf16", "fp16", "tf32")):
            kind = {"cell": cell, "dtype": dtype, "bidirectional": str(bidirectional)}
            kind |= {"against": "cuDNN", "layers": "1", "steps": "512"}
            some = [r for r in rows if all(r[name] == value for name, value in kind.items())]
            for what, style in zip(PASSES, ("-", "--"), strict=True):
                _lines(axes[i, j], some, f"{what}_ratio", style, what)
            axes[i, j].axhline(1.0, color="grey", linestyle=":")
            title = f"{cell}, {dtype}, {'both directions' if bidirectional else 'one direction'}"
            _finish(axes[i, j], title, "times as fast as cuDNN")
    return figure


def steps(rows: Sequence[Row]) -> Any:
    """Microseconds of a step of the loop over H, and the cost model's floor, dashed."""
    figure, axes = _figure(2, 2)
    for i, cell in enumerate(("lstm", "gru")):
        kind = {"cell": cell, "dtype": "bf16", "bidirectional": "False", "layers": "1"}
        some = [r for r in rows if all(r[name] == value for name, value in kind.items())]
        for j, what in enumerate(("forward", "backward")):
            _lines(axes[i, j], some, f"{what}_loop_us", "-", "measured")
            _lines(axes[i, j], some, f"{what}_floor_us", "--", "model")
            _finish(axes[i, j], f"{cell}, bf16, {what} loop", "µs per step")
    return figure


def barriers(rows: Sequence[Row]) -> Any:
    """Microseconds of a barrier of one group over its programs, by variant."""
    figure, axes = _figure(1, 1)
    for variant in dict.fromkeys(row["variant"] for row in rows):
        chosen = [row for row in rows if row["variant"] == variant and row["groups"] == "1"]
        pairs = sorted((int(row["slices"]), float(row["us_per_barrier"])) for row in chosen)
        if pairs:
            axes[0, 0].plot(*zip(*pairs, strict=True), marker=".", label=variant)
    _finish(axes[0, 0], "one group barrier", "µs")
    axes[0, 0].set_xlabel("programs of the group")
    return figure


def figures(folder: Path) -> list[Path]:
    """Draw what was measured beside the result files; what was not is left out."""
    speed = [row for row in measured(folder, "gpu_speed") if row.get("cell")]
    drawn = {}
    if speed:
        drawn["gpu_ratio_one_direction"] = ratios(speed, False)
        drawn["gpu_ratio_both_directions"] = ratios(speed, True)
        drawn["gpu_steps"] = steps(speed)
    if rows := measured(folder, "gpu_barriers"):
        drawn["gpu_barriers"] = barriers(rows)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    return [folder / f"{name}.png" for name in drawn]


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--figures", action="store_true", help="draw beside the CSV files, too")
    options = parser.parse_args(arguments)
    print(*table(options.results), sep="\n")
    if options.figures:
        print(*figures(options.results), sep="\n")


if __name__ == "__main__":
    main()
