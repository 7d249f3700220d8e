"""Entities and tags, there and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedrnn.crf import allowed_transitions, split_tag
from lightning_modules.data.schemes import Chunk, chunks, convert, encode


@st.composite
def entities(draw: st.DrawFn) -> tuple[list[Chunk], int]:
    found, position = [], 0
    for gap, size, kind in draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from(["A", "B-C"])))
    ):
        found.append(Chunk(kind, position + gap, position + gap + size))
        position += gap + size
    return found, position + draw(st.integers(0, 2))


@pytest.mark.parametrize("scheme", ["BIO", "IOB1", "BIOES"])
@given(drawn=entities())
def test_tags_mark_the_entities_they_were_made_of(
    drawn: tuple[list[Chunk], int], scheme: str
) -> None:
    found, length = drawn
    tags = encode(found, length, scheme)
    assert len(tags) == length
    assert chunks(tags) == found


@pytest.mark.parametrize("scheme", ["BIO", "IOB1", "BIOES"])
@given(
    tags=st.lists(st.sampled_from(["O", *(f"{p}-{t}" for p in "BIES" for t in "XY")]), min_size=1)
)
def test_conversion_is_well_formed_and_keeps_the_entities(tags: list[str], scheme: str) -> None:
    converted = convert(tags, scheme)
    assert chunks(converted) == chunks(tags)
    start, between, end = allowed_transitions(converted, scheme)
    assert start[0]
    assert between.diagonal(1).all()
    assert end[-1]
    for tag in converted:
        split_tag(tag, scheme)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("I-A I-A O B-A", "B-A I-A O B-A"),
        ("I-A B-A I-B I-B", "B-A B-A B-B I-B"),
        ("I-A I-B O I-B", "B-A B-B O B-B"),
    ],
)
def test_iob1_and_io_become_bio(tags: str, expected: str) -> None:
    assert convert(tags.split(), "BIO") == expected.split()
