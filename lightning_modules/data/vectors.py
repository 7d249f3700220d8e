"""Pretrained word vectors in text files."""

from array import array
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Vectors(NamedTuple):
    """Words and their vectors, `table` [words, width] float32, in the order of the file."""

    words: list[str]
    table: Tensor


def read_vectors(path: str | Path, limit: int | None = None) -> Vectors:
    """Read word vectors in the text format of GloVe, fastText (`.vec`) and word2vec.

    A first line of two whole numbers (count and width) is a header. A word may hold spaces, as
    some do in GloVe. The first vector of a word counts.

    Args:
        path: the file; UTF-8.
        limit: read no more than this many vectors; None: all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line with another number of values than the first or with something that is
            not a number, with file and line number; no vectors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    rows: dict[str, int] = {}
    values, width = array("f"), None
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            cells = line.rstrip().split(" ")
            if number == 1 and len(cells) == 2 and all(cell.isdecimal() for cell in cells):
                width = int(cells[1])
                continue
            if limit is not None and len(rows) >= limit:
                break
            width = len(cells) - 1 if width is None else width
            word, numbers = _split(cells, width, f"{path}:{number}")
            if word not in rows:
                rows[word] = len(rows)
                values.extend(numbers)
    if not rows:
        raise ValueError(f"{path}: expected word vectors, got none")
    return Vectors(list(rows), torch.tensor(values).view(len(rows), -1))


def _split(cells: list[str], width: int, place: str) -> tuple[str, list[float]]:
    """Cut a line into its word, which may hold spaces, and `width` numbers."""
    head = max(1, len(cells) - width)
    wide = head > 1 and _is_number(cells[head - 1])
    if width < 1 or len(cells) <= width or wide:
        raise ValueError(f"{place}: expected a word and {width} numbers, got {len(cells) - 1}")
    try:
        return " ".join(cells[:head]), [float(cell) for cell in cells[head:]]
    except ValueError as error:
        raise ValueError(f"{place}: expected {width} numbers: {error}") from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
