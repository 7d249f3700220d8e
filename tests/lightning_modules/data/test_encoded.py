"""Rows in Arrow files."""

from typing import NamedTuple

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_modules.data import encoded
from lightning_modules.data.encoded import EncodedRows
from lightning_modules.data.pairs import PairData
from lightning_modules.data.tagging import TaggingData


class Row(NamedTuple):
    numbers: list[int]
    text: str
    names: list[str] | None
    more: list[list[int]]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


numbers = st.lists(st.integers(-100, 2**40), max_size=5)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@given(
    st.lists(st.tuples(numbers, texts, st.lists(numbers, max_size=2)), min_size=1, max_size=9),
    st.booleans(),
)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_rows_come_back_as_they_were(cache, cells, named):
    rows = [Row(n, t, [t, "x"] if named else None, more) for n, t, more in cells]
    stored = EncodedRows(Row, lambda: rows, [cells, named])
    assert list(stored) == rows
    assert stored[-1] == rows[-1]
    assert stored[:2] == rows[:2]
    places = list(range(len(rows)))[::-1]
    assert stored.__getitems__(places) == rows[::-1]
    assert stored.lengths("numbers") == [len(row.numbers) for row in rows]
    with pytest.raises(IndexError):
        stored[len(rows)]


def test_rows_are_made_once_for_a_key_and_the_code(cache, monkeypatch):
    made = []

    def make(key):
        def encode():
            made.append(key)
            return [Row([1], key, None, [])]

        return EncodedRows(Row, encode, {"key": key})[0].text

    assert [make("a"), make("b"), make("a")] == ["a", "b", "a"]
    assert made == ["a", "b"]
    monkeypatch.setattr(encoded, "_code", lambda: b"other")
    assert make("a") == "a"
    assert made == ["a", "b", "a"]


def test_what_encoding_raises_is_raised(cache):
    def encode():
        raise ValueError("max_length: no row is as short")

    for _ in range(2):
        with pytest.raises(ValueError, match=r"^max_length: no row is as short$"):
            EncodedRows(Row, encode, "key")


@pytest.mark.parametrize("workers", [0, 1])
def test_tagged_sentences_are_read_from_the_file(cache, tmp_path, monkeypatch, workers):
    (tmp_path / "a.conll").write_text("Ann\tB-X\nran\tO\n\nhe\tO\n\nBo\tB-X\nis\tO\nold\tO\n")

    def batches():
        place = str(tmp_path / "a.conll")
        data = TaggingData(place, place, scheme="BIO", batch_size=2, num_workers=workers)
        data.setup("fit")
        loaders = data.train_dataloader(), data.val_dataloader()
        return [[repr(batch) for batch in loader] for loader in loaders]

    first = batches()
    monkeypatch.setattr("lightning_modules.data.tagging.TaggingCodec.encode", None)
    assert batches() == first
    assert "['Ann', 'ran']" in first[1][0] + first[1][1]


def test_pairs_are_read_from_the_file(cache, tmp_path, monkeypatch):
    (tmp_path / "a.tsv").write_text("source\ttarget\na b\tx\nc\ty z\nc\tw\n")

    def batches(**options):
        place = str(tmp_path / "a.tsv")
        data = PairData(place, place, batch_size=2, **options)
        data.setup("fit")
        return [
            repr(b) for loader in (data.train_dataloader(), data.val_dataloader()) for b in loader
        ]

    first = batches()
    assert batches(group_references=True) != first
    with pytest.raises(ValueError, match="max_length: no training pair is as short as 0"):
        batches(max_length=0)
    monkeypatch.setattr("lightning_modules.data.pairs.PairCodec.encode_source", None)
    assert batches() == first
