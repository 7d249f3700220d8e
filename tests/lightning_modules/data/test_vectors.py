"""Word vectors in text files, good and bad."""

from pathlib import Path

import pytest
import torch

from lightning_modules.data.vectors import read_vectors


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "vectors.txt"
        path.write_text(text, encoding="utf-8")
        return path

    return write


TEXT = "the 0.1 -0.2 3\n. . . 1e-3 0 5\nthe 9 9 9\n1984 0 0 1\n"


@pytest.mark.parametrize("header", ["", "4 3\n"], ids=["glove", "fasttext"])
def test_reads(write, header: str) -> None:
    words, table = read_vectors(write(header + TEXT.replace("\n", " \n")))
    assert words == ["the", ". . .", "1984"]
    expected = torch.tensor([[0.1, -0.2, 3], [1e-3, 0, 5], [0, 0, 1]])
    torch.testing.assert_close(table, expected)


def test_limit(write) -> None:
    assert read_vectors(write(TEXT), limit=1).words == ["the"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a 1 2 3\nb 1 2\n", r"vectors.txt:2: expected a word and 3 numbers, got 2"),
        ("a 1 2 3\nb 1 2 3 4\n", r":2: expected a word and 3 numbers, got 4"),
        ("2 4\na 1 2 3\n", r":2: expected a word and 4 numbers, got 3"),
        ("a 1 2\nb 1 x\n", r":2: expected 2 numbers: could not convert string to float: 'x'"),
        ("a 1 2\n\n", r":2: expected a word and 2 numbers, got 0"),
        ("a\n", r":1: expected a word and 0 numbers"),
        ("", "expected word vectors, got none"),
    ],
)
def test_refuses(write, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        read_vectors(write(text))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such file"):
        read_vectors(tmp_path / "absent")
