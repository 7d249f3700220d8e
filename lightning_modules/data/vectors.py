"""Pretrained word vectors from files: text, and fastText's binary format."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

GREATEST = torch.finfo(torch.float32).max

_MAGIC, _VERSIONS, _SUPERVISED = 793712314, (11, 12), 3
_ARGUMENTS = struct.Struct("<12id")
_SIZES = struct.Struct("<3i2q")


class Vectors(NamedTuple):
    """Words and their vectors, `table` [words, width] float32, in the order of the file."""

    words: list[str]
    table: Tensor


def load_vectors(path: str | Path, limit: int | None = None) -> Vectors:
    """Read word vectors as `read_vectors` does, from a cache if the file has been read before.

    The cache is the folder `fusedrnn` in `$XDG_CACHE_HOME`, or in `~/.cache`. An entry belongs to a
    file's place, size and time of change, and is mapped into memory, so that only those vectors
    that are looked at are read.

    Args:
        path: as for `read_vectors`.
        limit: as for `read_vectors`.

    Raises:
        FileNotFoundError, ValueError: as `read_vectors`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    entry = _entry(Path(path).resolve(), limit)
    with suppress(OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, KeyError):
        stored = torch.load(entry, mmap=True, weights_only=True)
        return Vectors(stored["words"].split("\n"), stored["table"])
    vectors = read_vectors(path, limit)
    partial = entry.with_suffix(f".{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"words": "\n".join(vectors.words), "table": vectors.table}, partial)
        partial.replace(entry)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError where the disk is full
        with suppress(OSError):
            partial.unlink()
        rank_zero_warn(f"{path}: read without a cache, which cannot be written: {error}")
    return vectors


def _entry(path: Path, limit: int | None) -> Path:
    state = path.stat()
    key = f"{path}\n{state.st_size}\n{state.st_mtime_ns}\n{limit}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fusedrnn"
    return folder / f"vectors-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"


def read_vectors(path: str | Path, limit: int | None = None) -> Vectors:
    """Read word vectors in the text format of GloVe, fastText (`.vec`) and word2vec, or in `.bin`.

    In text, a first line of two whole numbers (count and width) is a header; fewer vectors than it
    says make a warning. A word may hold spaces, as some do in GloVe. The first vector of a word
    counts. A file whose name ends in `.bin` is a model of fastText: the vector of a word is the
    mean of its own and of those of its character n-grams (Bojanowski et al. 2017), which is what
    fastText writes into `.vec`.

    Args:
        path: the file; text in UTF-8.
        limit: read no more than this many vectors; None: all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line with another number of values than the first or with something that is
            not a finite number of single precision, with file and line number; no vectors; a `.bin`
            that is not a model of fastText, is quantised or is cut short.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if Path(path).suffix == ".bin":
        return _read_binary(Path(path), limit)
    rows: dict[str, int] = {}
    values, width, number, announced = array("f"), None, 0, None
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            cells = line.rstrip().split(" ")
            if number == 1 and len(cells) == 2 and all(cell.isdecimal() for cell in cells):
                announced, width = int(cells[0]), int(cells[1])
                continue
            if limit is not None and len(rows) >= limit:
                break
            width = len(cells) - 1 if width is None else width
            word, numbers = _split(cells, width, f"{path}:{number}")
            if word not in rows:
                rows[word] = len(rows)
                values.extend(numbers)
        else:
            if announced is not None and announced > number - 1:
                rank_zero_warn(f"{path}: the first line says {announced} vectors, got {number - 1}")
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
        numbers = [float(cell) for cell in cells[head:]]
    except ValueError as error:
        raise ValueError(f"{place}: expected {width} numbers: {error}") from None
    for cell, number in zip(cells[head:], numbers, strict=True):
        if not -GREATEST <= number <= GREATEST:
            raise ValueError(f"{place}: expected finite numbers, got {cell}")
    return " ".join(cells[:head]), numbers


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_binary(path: Path, limit: int | None) -> Vectors:
    with open(path, "rb") as file:
        if file.read(4) != struct.pack("<i", _MAGIC):
            raise ValueError(f"{path}: expected a model of fastText, got another binary file")
        try:
            return _read_model(file, path, limit)
        except (struct.error, EOFError):
            raise ValueError(f"{path}: cut short") from None


def _read_model(file: BinaryIO, path: Path, limit: int | None) -> Vectors:
    """Read what follows the magic number: version, arguments, dictionary, input matrix."""
    (version,) = struct.unpack("<i", file.read(4))
    if version not in _VERSIONS:
        raise ValueError(f"{path}: expected version 11 or 12 of fastText's format, got {version}")
    arguments = _ARGUMENTS.unpack(file.read(_ARGUMENTS.size))
    kind, buckets, shortest, longest = arguments[7:11]
    if version == 11 and kind == _SUPERVISED:
        longest = 0  # such models had no n-grams of characters
    entries, words_count, _, _, pruned = _SIZES.unpack(file.read(_SIZES.size))
    words = [_read_word(file) for _ in range(entries)][:words_count]
    file.seek(8 * max(0, pruned), os.SEEK_CUR)
    (quantised,) = struct.unpack("<?", file.read(1))
    if quantised or pruned > 0:
        raise ValueError(
            f"{path}: quantised models are not read; give the .vec or unquantised .bin"
        )
    rows, width = struct.unpack("<2q", file.read(16))
    if file.tell() + 4 * rows * width > path.stat().st_size:
        raise EOFError
    table = np.memmap(path, "<f4", "r", file.tell(), (rows, width))
    words = words[:limit]
    if not words:
        raise ValueError(f"{path}: expected word vectors, got none")
    vectors = np.empty((len(words), width), np.float32)
    for number, word in enumerate(words):
        grams = _ngrams(word, shortest, longest) if buckets and word != "</s>" else ()
        own = [number, *(words_count + _hash(gram) % buckets for gram in grams)]
        vectors[number] = table[own].mean(0, dtype=np.float32)
        if not np.isfinite(vectors[number]).all():
            raise ValueError(f"{path}: expected finite numbers, got others for {word!r}")
    kept = {word: number for number, word in reversed(list(enumerate(words)))}  # the first counts
    numbers = sorted(kept.values())
    return Vectors([words[n] for n in numbers], torch.from_numpy(vectors[numbers]))


def _read_word(file: BinaryIO) -> str:
    """Read an entry of the dictionary: the word up to a zero byte, its count and its kind."""
    letters = bytearray()
    while (letter := file.read(1)) != b"\0":
        if not letter:
            raise EOFError
        letters += letter
    file.seek(9, os.SEEK_CUR)
    return letters.decode("utf-8", errors="replace")


def _ngrams(word: str, shortest: int, longest: int) -> Iterator[bytes]:
    """The character n-grams of `<word>` that fastText hashes: none is a lone < or >."""
    marked = f"<{word}>"
    for start in range(len(marked)):
        for size in range(max(1, shortest), min(longest, len(marked) - start) + 1):
            if size > 1 or 0 < start < len(marked) - 1:
                yield marked[start : start + size].encode()


def _hash(gram: bytes) -> int:
    """FNV-1a of 32 bits as fastText has it: bytes are extended with their sign."""
    value = 2166136261
    for byte in gram:
        value ^= byte if byte < 128 else byte | 0xFFFFFF00
        value = value * 16777619 & 0xFFFFFFFF
    return value
