"""Compile the attention decoder's kernels without a GPU, and write down what came out.

    python -m benchmarks.attention_facts [--capabilities 80 90 100] [--hidden 256 ...]

As compile_facts.py does for the recurrent kernels; rows go to attention_facts.csv, where those of
other versions of Triton stay.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.runtime import driver

from kernels.attention import FEEDBACKS, launch
from kernels.persistent.launch import interpreted

from .compile_facts import DEVICES, DTYPES, Row, _Driver, facts

RESULT = Path(__file__).parent / "results" / "attention_facts.csv"
VARIANTS = (
    ("lstm", "features", "additive", True, 1, 0),
    ("lstm", "context", "additive", False, 1, 0),
    ("gru", "features", "product", True, 2, 0),
    ("lstm", "none", "additive", False, 2, 5000),
    ("lstm", "features", "product", False, 1, 0),
    ("gru", "context", "additive", True, 1, 0),
    ("lstm", "features", "additive", True, 3, 50_000),
)
"""Cell, feedback, kind of score, coverage, layers, symbols to draw from."""


def inputs(
    cell: str,
    feedback: str,
    kind: str,
    coverage: bool,
    layers: int,
    symbols: int,
    size: int,
    dtype: torch.dtype,
) -> tuple[launch.Inputs, launch.Kind, launch.Words | None]:
    """Tensors of a decoder whose sizes are all the same, with lengths and dropout."""
    steps, batch, source = 2, launch.ROWS, 7

    def new(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    width = size if feedback == "none" else 2 * size
    additive = kind == "additive"
    tensors = launch.Inputs(
        new(batch, source, size),
        new(batch, source, size),
        new(size, size) if additive else None,
        new(size) if additive else None,
        new(size) if coverage else None,
        new(size, 2 * size),
        new(steps, batch, size),
        torch.ones(batch, dtype=torch.int64),
        [new(steps, batch, 4 * size) for _ in range(layers)],
        [new(4 * size, width if index == 0 else 2 * size) for index in range(layers)],
        [new(steps, batch, size) for _ in range(layers - 1)],
    )
    words = launch.Words(
        torch.ones(steps, batch, dtype=torch.bool),
        torch.zeros(steps, batch),
        new(symbols, size),
        new(symbols, size),
        new(symbols),
        new(steps, batch, size),
        new(4 * size, size),
        new(4 * size),
        torch.zeros(steps, batch, dtype=torch.int64),
    )
    kind_of = launch.Kind(layers, cell == "lstm", FEEDBACKS.index(feedback))
    return tensors, kind_of, words if symbols else None


def compile_both(x: launch.Inputs, kind: launch.Kind, words: launch.Words | None) -> dict[str, Row]:
    """Facts of both kernels for these inputs, from calls of their launchers."""
    found: list[Row] = []
    plan = SimpleNamespace(warps=launch.WARPS, slices=1)

    def dispatch(kernel: object, grid: tuple[int], **arguments: object) -> None:
        registers = {"maxnreg": launch.REGISTERS}
        found.append(facts(kernel, grid, plan, **registers, **arguments))  # type: ignore[arg-type]

    states = [x.keys.new_zeros(x.sizes["B"], size) for size in x.hidden]
    c = states if kind.lstm else []
    real, launch.dispatch = launch.dispatch, dispatch
    try:
        kept = launch.run_forward(x, kind, launch.Start(None, None, states, c), words)
        given = launch.Incoming(kept.features, kept.joined.float(), kept.weights, states, c)
        launch.run_backward(x, kind, kept, given)
    finally:
        launch.dispatch = real
    return dict(zip(("forward", "backward"), found, strict=True))


def main(arguments: list[str] | None = None) -> None:
    """Compile everything asked for and replace what this version of Triton had written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capabilities", nargs="+", type=int, default=list(DEVICES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--hidden", nargs="+", type=int, default=[256])
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="how many of them")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if interpreted(launch.forward_kernel):
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    rows: list[Row] = []
    grid = itertools.product(
        options.capabilities, options.dtypes, options.hidden, VARIANTS[: options.variants]
    )
    before = torch.backends.cuda.matmul.fp32_precision
    for capability, name, size, variant in grid:
        driver.set_active(_Driver(capability))
        dtype, precision = DTYPES[name]
        torch.backends.cuda.matmul.fp32_precision = precision
        for what, row in compile_both(*inputs(*variant, size, dtype)).items():
            names = ("cell", "feedback", "score", "coverage", "layers", "symbols")
            key = dict(zip(names, variant, strict=True))
            where = {"triton": triton.__version__, "capability": capability, "dtype": name}
            del row["weights_reloaded"], row["cooperative"]
            rows.append({**where, **key, "pass": what, "size": size, **row})
            print(*rows[-1].values(), flush=True)
    torch.backends.cuda.matmul.fp32_precision = before
    others: list[dict[str, str]] = []
    if options.output.exists():
        with options.output.open(newline="") as file:
            others = [row for row in csv.DictReader(file) if row["triton"] != triton.__version__]
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows([*others, *rows])


if __name__ == "__main__":
    main()
