"""Windows of series: splits, scaling, calendar, the generator, and wrong tables."""

import csv
import math
from datetime import datetime, timedelta

import pytest
import torch

from lightning_modules.data.series import (
    AnomalyData,
    SeriesCodec,
    SeriesData,
    calendar,
    generate_series,
)

ROWS = (60, 30, 30)


def table(path, count=120, header=("date", "a", "b"), change=None):
    start = datetime(2016, 7, 1)
    rows = [[start + timedelta(hours=n), n, math.sin(n)] for n in range(count)]
    if change is not None:
        row, place, value = change
        rows[row][place] = value
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def make(path, **arguments):
    return SeriesData(path, **{"context": 10, "horizon": 3, "season": 5, "rows": ROWS, **arguments})


def windows(loader):
    batches = list(loader)
    return [
        torch.cat([getattr(batch, name) for batch in batches]) for name in batches[0]._fields[:4]
    ]


def test_windows_follow_the_published_protocol(tmp_path):
    """As in Informer's loader: what a later part predicts lies in it, what it reads may not."""
    data = make(table(tmp_path / "t.csv"))
    data.setup("fit")
    data.setup("test")
    firsts = {}
    for split, loader in (
        ("train", data.train_dataloader()),
        ("val", data.val_dataloader()),
        ("test", data.test_dataloader()),
    ):
        source, times, target, ahead = windows(loader)
        assert source.shape[1:] == (10, 2) and times.shape[1:] == (10, 4)
        assert target.shape[1:] == (3, 2) and ahead.shape[1:] == (3, 4)
        number = (source[..., 0] * data.codec.std[0] + data.codec.mean[0]).round().long()
        assert (number.diff(dim=1) == 1).all()
        coming = data.codec.restore(target)[..., 0].round().long()
        assert (coming[:, 0] == number[:, -1] + 1).all() and (coming.diff(dim=1) == 1).all()
        firsts[split] = sorted(coming[:, 0].tolist())
    assert firsts == {
        "train": list(range(10, 58)),
        "val": list(range(60, 88)),
        "test": list(range(90, 118)),
    }


def test_scaling_knows_the_training_part_alone(tmp_path):
    codec = make(table(tmp_path / "t.csv")).codec
    numbers = torch.arange(60.0)
    assert codec.mean[0] == pytest.approx(float(numbers.mean()))
    assert codec.std[0] == pytest.approx(float(numbers.std(correction=0)))
    assert codec.to_dict() == make(table(tmp_path / "u.csv", change=(60, 1, 1e9))).codec.to_dict()
    values = torch.randn(4, 2)
    torch.testing.assert_close(codec.restore(codec.scale(values)), values)
    assert SeriesCodec.from_dict(codec.to_dict()).to_dict() == codec.to_dict()


def test_a_column_that_never_changes_is_left_as_it_is(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["a,b", *(f"{n},7" for n in range(120))]))
    codec = make(str(path), date_column=None).codec
    assert codec.std[1] == 1
    assert codec.sizes == {"source_features": 2, "target_features": 2, "target_inputs": 1}


def test_some_columns_can_be_predicted(tmp_path):
    data = make(table(tmp_path / "t.csv"), targets=["b"])
    data.setup("test")
    source, _, target, _ = windows(data.test_dataloader())
    assert source.shape[2] == 2 and target.shape[2] == 1
    assert data.codec.sizes == {"source_features": 6, "target_features": 1, "target_inputs": 5}


def test_calendar_turns_with_the_day_and_the_week():
    monday = datetime(2026, 11, 23)
    hours = [monday + timedelta(hours=n) for n in (0, 6, 24, 7 * 24)]
    midnight, six, tuesday, next_monday = calendar(hours)
    torch.testing.assert_close(midnight, torch.tensor([0.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(six[[0, 2]], torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(tuesday[[0, 2]], midnight[[0, 2]], atol=1e-6, rtol=0)
    assert float(tuesday[1]) == pytest.approx(math.sin(2 * math.pi / 7))
    torch.testing.assert_close(next_monday, midnight, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context: expected at least 1, got 0"),
        ({"season": 11}, "season: expected at most the context of 10, got 11"),
        ({"rows": (60, 30)}, r"rows: expected three positive numbers of rows, got \[60, 30\]"),
        ({"rows": (60, 30, 31)}, "rows: expected at least 121 rows, got 120"),
        ({"rows": (12, 30, 30)}, "rows: no window fits into the 12 of train"),
        ({"targets": ["c"]}, "targets: expected some of a, b, got c"),
        ({"columns": ["a", "c"]}, "no column 'c'; its columns are date, a, b"),
        ({"date_column": "day"}, r"row 1: expected a finite number in column 'date', got '2016"),
        ({"batch_size": 0}, "batch_size: expected a positive number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(table(tmp_path / "t.csv"), **arguments).setup("fit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((4, 1, "x"), r"t\.csv: row 5: expected a finite number in column 'a', got 'x'"),
        ((4, 2, "nan"), r"t\.csv: row 5: expected a finite number in column 'b', got 'nan'"),
        ((4, 0, "noon"), r"t\.csv: row 5: expected a time such as .*, got 'noon'"),
    ],
    ids=["number", "nan", "time"],
)
def test_wrong_cells_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make(table(tmp_path / "t.csv", change=change)).setup("fit")


def test_missing_table_is_named():
    with pytest.raises(FileNotFoundError, match=r"no\.csv: no such file"):
        make("no.csv").setup("fit")


def test_generated_series_is_the_same_every_time_and_mostly_usual():
    values, labels = generate_series(5000, seed=3)
    again, _ = generate_series(5000, seed=3)
    assert torch.equal(values, again)
    assert 0.02 < labels.double().mean() < 0.1
    usual = values[~labels]
    assert usual.abs().max() < 1.6  # an oscillation of 1 and noise of deviation 0.1
    period = (values[25:] - values[:-25])[~labels[25:] & ~labels[:-25]]
    assert period.median().abs() < 0.05


def test_training_windows_hold_no_anomaly_and_evaluation_sees_each_row_once():
    data = AnomalyData(window=20, stride=3, rows=(2000, 1000, 1000), seed=1)
    data.setup("fit")
    data.setup("test")
    assert not any(batch.labels.any() for batch in data.train_dataloader())
    batches = list(data.test_dataloader())
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.numel() == 1000
    assert labels.sum() == data.table.labels[3000:].sum() > 0
    torch.testing.assert_close(batches[0].source, batches[0].target)


def test_labelled_tables_are_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["x,label", *(f"{n % 7},{int(n == 50)}" for n in range(100))]))
    data = AnomalyData(str(path), window=10, stride=10, rows=(60, 20, 20))
    data.setup("fit")
    assert len(data.starts("train")) == 5
    assert data.codec.columns == ["x"]
