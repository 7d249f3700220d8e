"""Series of numbers: tables cut into windows, to forecast from or to reconstruct."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.data.module import SPLITS, DataModule
from lightning_modules.data.sources import column, load_rows

__all__ = ["AnomalyData", "SeriesBatch", "SeriesCodec", "SeriesData", "generate_series"]

CALENDAR = 4
"""Numbers that tell the time of a row: sine and cosine of the hour and of the day of the week."""


class SeriesCodec:
    """Everything between the rows of a table and the numbers of a model.

    Args:
        columns: names of the numbers of a row, in the order in which they are read.
        mean: of each column, in the training part.
        std: its standard deviation there; a column that never changes has 1.
        targets: names of the columns that are predicted.
        context: rows that the encoder reads.
        horizon: rows that are predicted.
        season: rows after which the series resembles itself.
        date_column: column of the time of a row, in ISO 8601; None: rows have none.
    """

    def __init__(
        self,
        columns: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        targets: Sequence[str],
        context: int,
        horizon: int,
        season: int = 1,
        date_column: str | None = None,
    ) -> None:
        self.columns, self.targets = list(columns), list(targets)
        self.mean, self.std = list(mean), list(std)
        self.context, self.horizon, self.season = context, horizon, season
        self.date_column = date_column
        self.places = [self.columns.index(name) for name in self.targets]

    @property
    def sizes(self) -> dict[str, Any]:
        """Sizes of a model for these rows: see `Seq2SeqModel`."""
        calendar = 0 if self.date_column is None else CALENDAR
        return {
            "source_features": len(self.columns) + calendar,
            "target_features": len(self.targets),
            "target_inputs": calendar + 1,
        }

    def scale(self, values: Tensor) -> Tensor:
        """Return numbers [..., columns] with the training part's mean 0 and deviation 1."""
        return (values - values.new_tensor(self.mean)) / values.new_tensor(self.std)

    def restore(self, values: Tensor) -> Tensor:
        """Return numbers [..., targets] in the units of the table."""
        mean, std = (values.new_tensor(numbers)[self.places] for numbers in (self.mean, self.std))
        return values * std + mean

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data, for a checkpoint."""
        return {name: value for name, value in vars(self).items() if name != "places"}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SeriesCodec:
        """Restore what `to_dict` returned."""
        return cls(**data)


class SeriesBatch(NamedTuple):
    """A batch of windows, numbers scaled.

    Attributes:
        source: float [B, S, columns], the rows read.
        source_calendar: float [B, S, 4 or 0], their times; see `calendar`.
        target: float [B, T, targets], the rows to predict, or to reconstruct.
        target_calendar: float [B, T, 4 or 0].
        labels: bool [B, T], whether a row is an anomaly; None where nobody knows.
    """

    source: Tensor
    source_calendar: Tensor
    target: Tensor
    target_calendar: Tensor
    labels: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Rows read and predicted."""
        return self.source.shape[0] * (self.source.shape[1] + self.target.shape[1])


def calendar(times: Sequence[datetime]) -> Tensor:
    """Return the sine and cosine of the hour of the day and of the day of the week.

    Args:
        times: of N rows.

    Returns:
        float [N, 4].
    """
    hours = torch.tensor([time.hour + time.minute / 60 for time in times])
    days = torch.tensor([float(time.weekday()) for time in times]) + hours / 24
    angles = 2 * math.pi * torch.stack([hours / 24, days / 7], -1)
    return torch.cat([angles.sin(), angles.cos()], -1)


def parse_time(cell: Any) -> datetime:
    """Read a time in ISO 8601.

    Raises:
        ValueError: it is none.
    """
    try:
        return datetime.fromisoformat(str(cell))
    except ValueError as error:
        raise ValueError(f"expected a time such as 2016-07-01 13:00:00, got {cell!r}") from error


def parse_number(cell: Any, name: str) -> float:
    """Read a finite number.

    Args:
        cell: the number or its text.
        name: of its column, for the message.

    Raises:
        ValueError: it is none.
    """
    try:
        number = float(cell)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number in column {name!r}, got {cell!r}")
    return number


def _read_cells(cells: Sequence[Any], read: Callable[[Any], Any], source: str) -> list[Any]:
    """Read a column; what is wrong is said with the source and the row, from 1."""
    values = []
    for number, cell in enumerate(cells, start=1):
        try:
            values.append(read(cell))
        except ValueError as error:
            raise ValueError(f"{source}: row {number}: {error}") from error
    return values


class _Table(NamedTuple):
    """A whole series: values [N, columns], calendar [N, 4 or 0], labels [N] or None."""

    values: Tensor
    calendar: Tensor
    labels: Tensor | None = None


class _Windows(DataModule):
    """Windows of one long table, whose parts follow each other in time.

    Subclasses read the table (`_read`), make the codec of its scales (`_make_codec`), and say where
    windows start (`starts`) and what those of some rows hold (`_batch`).
    """

    def __init__(self, rows: Sequence[int], batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__(batch_size, None, seed, num_workers)
        if len(rows) != len(SPLITS) or min(rows) < 1:
            raise ValueError(f"rows: expected three positive numbers of rows, got {list(rows)}")
        ends = [sum(rows[: n + 1]) for n in range(len(rows))]
        self.parts = dict(zip(SPLITS, zip([0, *ends], ends, strict=False), strict=True))

    @cached_property
    def table(self) -> _Table:
        """The whole series, read when first asked for, in the units of the table."""
        table, needed = self._read(), self.parts["test"][1]
        if len(table.values) < needed:
            raise ValueError(f"rows: expected at least {needed} rows, got {len(table.values)}")
        return table

    @cached_property
    def codec(self) -> SeriesCodec:
        """The codec, scaled by the training part when first asked for, unless it was given."""
        part = self.table.values[slice(*self.parts["train"])].double()
        std = part.std(0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        return self._make_codec(part.mean(0).tolist(), std.tolist())

    def _read(self) -> _Table:
        raise NotImplementedError

    def _make_codec(self, mean: list[float], std: list[float]) -> SeriesCodec:
        raise NotImplementedError

    def starts(self, split: str) -> Sequence[int]:
        """Return the first row of every window of a split.

        Args:
            split: `train`, `val` or `test`.
        """
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read the table, and find the windows that a stage needs."""
        for split in SPLITS:
            if len(self.starts(split)) == 0:
                first, end = self.parts[split]
                raise ValueError(f"rows: no window fits into the {end - first} of {split}")
        self._scaled = self.codec.scale(self.table.values.double()).float()
        super().setup(stage)

    def _encode(self, split: str) -> Sequence[int]:
        return self.starts(split)

    def _sizes(self, rows: Sequence[int]) -> list[int]:
        return [1] * len(rows)

    def _collate(self, split: str) -> Callable[[list[int]], SeriesBatch]:
        return self._batch

    def _batch(self, starts: list[int]) -> SeriesBatch:
        """Make a batch of the windows that start at some rows."""
        raise NotImplementedError


class SeriesData(_Windows):
    """A table of numbers over time, cut into windows: rows to read and the rows that follow them.

    The first rows are for training, the next for validation, the next for testing. The rows that a
    window of a later part reads may lie in the part before; those it predicts do not. Numbers are
    scaled by mean and standard deviation of the training part. This is the protocol of the ETT
    data sets (Zhou et al., Informer, 2021), whose 12, 4 and 4 months of hours are the default.

    Args:
        path: table (`.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`), one row for each step of time,
            in order.
        columns: the columns to read; all but that of the date by default.
        targets: those to predict; by default all that are read.
        date_column: column of the time of a row, in ISO 8601, or None.
        context: rows that the encoder reads.
        horizon: rows to predict.
        season: rows after which the series resembles itself: 24 for hours.
        rows: of the training, validation and test part.
        batch_size: windows in a batch.
        seed: of the order of the batches.
        num_workers: processes that collate batches.

    Raises:
        FileNotFoundError: the table does not exist.
        ValueError: an argument is out of range, or a cell of the table is no number or time; the
            message names the row.
    """

    def __init__(
        self,
        path: str,
        columns: list[str] | None = None,
        targets: list[str] | None = None,
        date_column: str | None = "date",
        context: int = 96,
        horizon: int = 24,
        season: int = 24,
        rows: Sequence[int] = (8640, 2880, 2880),
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(rows, batch_size, seed, num_workers)
        for name, value in (("context", context), ("horizon", horizon), ("season", season)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if season > context:
            raise ValueError(f"season: expected at most the context of {context}, got {season}")
        self.path, self.columns, self.targets = path, columns, targets
        self.date_column = date_column
        self.context, self.horizon, self.season = context, horizon, season

    def _read(self) -> _Table:
        rows = load_rows(self.path)
        if self.columns is None:
            self.columns = [name for name in rows.column_names if name != self.date_column]
        cells = {name: column(rows, name, self.path) for name in self.columns}
        numbers = [
            _read_cells(cells[name], partial(parse_number, name=name), self.path)
            for name in self.columns
        ]
        times = torch.zeros(len(rows), 0)
        if self.date_column is not None:
            read = column(rows, self.date_column, self.path)
            times = calendar(_read_cells(read, parse_time, self.path))
        return _Table(torch.tensor(numbers, dtype=torch.float64).T, times)

    def _make_codec(self, mean: list[float], std: list[float]) -> SeriesCodec:
        assert self.columns is not None  # read with the table
        targets = self.columns if self.targets is None else self.targets
        absent = [name for name in targets if name not in self.columns]
        if absent or not targets:
            known = ", ".join(self.columns)
            raise ValueError(f"targets: expected some of {known}, got {', '.join(targets)}")
        sizes = (self.context, self.horizon, self.season)
        return SeriesCodec(self.columns, mean, std, targets, *sizes, self.date_column)

    def starts(self, split: str) -> range:
        """Return the first row that each window of a split reads."""
        first, end = self.parts[split]
        return range(max(0, first - self.context), end - self.context - self.horizon + 1)

    def _batch(self, starts: list[int]) -> SeriesBatch:
        times, places = self.table.calendar, torch.tensor(starts)[:, None]
        read = places + torch.arange(self.context)
        predicted = places + self.context + torch.arange(self.horizon)
        target = self._scaled[predicted][..., self.codec.places]
        return SeriesBatch(self._scaled[read], times[read], target, times[predicted])


class AnomalyData(_Windows):
    """A series in which something may go wrong, cut into windows to reconstruct.

    Training sees only windows without a labelled row. Windows for evaluation do not overlap, so
    that every row is judged once.

    Args:
        path: table, one row for each step of time, in order; None for the built-in generator
            (`generate_series`).
        columns: the columns to read; all but that of the labels by default.
        label_column: column that holds 1 for an anomalous row and 0 for any other.
        window: rows in a window.
        stride: rows from one training window to the next.
        rows: of the training, validation and test part.
        batch_size: windows in a batch.
        seed: of the order of the batches, and of the generator.
        num_workers: processes that collate batches.

    Raises:
        FileNotFoundError: the table does not exist.
        ValueError: an argument is out of range, or a cell of the table is no number; the message
            names the row.
    """

    def __init__(
        self,
        path: str | None = None,
        columns: list[str] | None = None,
        label_column: str = "label",
        window: int = 50,
        stride: int = 5,
        rows: Sequence[int] = (10000, 5000, 10000),
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(rows, batch_size, seed, num_workers)
        for name, value in (("window", window), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.path, self.columns, self.label_column = path, columns, label_column
        self.window, self.stride = window, stride

    def _read(self) -> _Table:
        if self.path is None:
            values, labels = generate_series(self.parts["test"][1], self.seed)
            self.columns = [f"x{number}" for number in range(values.shape[1])]
            return _Table(values, torch.zeros(len(values), 0), labels)
        rows = load_rows(self.path)
        if self.columns is None:
            self.columns = [name for name in rows.column_names if name != self.label_column]
        names = [*self.columns, self.label_column]
        cells = [
            _read_cells(column(rows, name, self.path), partial(parse_number, name=name), self.path)
            for name in names
        ]
        table = torch.tensor(cells, dtype=torch.float64).T
        return _Table(table[:, :-1], torch.zeros(len(rows), 0), table[:, -1] > 0)

    def _make_codec(self, mean: list[float], std: list[float]) -> SeriesCodec:
        assert self.columns is not None  # read with the table
        return SeriesCodec(self.columns, mean, std, self.columns, self.window, self.window)

    def starts(self, split: str) -> Sequence[int]:
        """Return the first row of every window of a split."""
        first, end = self.parts[split]
        if split != "train":
            return range(first, end - self.window + 1, self.window)
        labels = self.table.labels
        assert labels is not None
        windows = range(first, end - self.window + 1, self.stride)
        return [start for start in windows if not labels[start : start + self.window].any()]

    def _batch(self, starts: list[int]) -> SeriesBatch:
        labels = self.table.labels
        assert labels is not None
        rows = torch.tensor(starts)[:, None] + torch.arange(self.window)
        window, times = self._scaled[rows], self.table.calendar[rows]
        return SeriesBatch(window, times, window, times, labels[rows])


def generate_series(length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make two related oscillations with noise, and disturb them now and then.

    About every 400 steps, for 10 to 30 steps, one of four things happens: the second oscillation
    turns over, both run twice as fast, the first stands still, or a small saw-tooth is added. None
    of them leaves the usual range, so that the value of a step alone tells little.

    Args:
        length: N, steps.
        seed: of noise and disturbances.

    Returns:
        values float64 [N, 2], and bool [N], where something is disturbed.
    """
    draw = torch.Generator().manual_seed(seed)
    labels = torch.zeros(length, dtype=torch.bool)
    speed = torch.full((length,), 2 * math.pi / 25, dtype=torch.float64)
    turned = torch.ones(length, dtype=torch.float64)
    held = torch.zeros(length, dtype=torch.bool)
    tooth = torch.zeros(length, dtype=torch.float64)
    start = int(torch.randint(100, 400, (), generator=draw))
    while start < length:
        size, kind = (int(torch.randint(*r, (), generator=draw)) for r in ((10, 31), (0, 4)))
        part = slice(start, min(length, start + size))
        labels[part] = True
        if kind == 0:
            turned[part] = -1
        elif kind == 1:
            speed[part] *= 2
        elif kind == 2:
            held[part] = True
        else:
            tooth[part] = torch.arange(length)[part] % 4 / 4 - 0.375
        start += size + int(torch.randint(200, 600, (), generator=draw))
    phase = speed.cumsum(0)
    first, second = phase.sin(), (phase + 1).sin() * turned
    last = torch.where(held, 0, torch.arange(length)).cummax(0).values  # the step before it is held
    values = torch.stack([first[last] + tooth, second], -1)
    return values + 0.1 * torch.randn(length, 2, generator=draw, dtype=torch.float64), labels
