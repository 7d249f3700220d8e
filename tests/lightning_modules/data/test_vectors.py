"""Word vectors in text files and in fastText's models, good and bad, and their cache."""

import base64
import os
import struct
import warnings
from pathlib import Path

import pytest
import torch

from lightning_modules.data import vectors
from lightning_modules.data.readers import Sentence
from lightning_modules.data.tagging import TaggingCodec, coverage
from lightning_modules.data.vectors import Vectors, load_vectors, read_vectors


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


def test_a_file_that_is_cut_short_is_noticed(write) -> None:
    path = write("5 3\n" + TEXT)
    with pytest.warns(UserWarning, match="the first line says 5 vectors, got 4"):
        read_vectors(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_vectors(path, limit=2)
        read_vectors(write("4 3\n" + TEXT))


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
        ("a 1 2\nb nan 1\n", r"vectors.txt:2: expected finite numbers, got nan"),
        ("a 1 2\nb 1 -inf\n", r"vectors.txt:2: expected finite numbers, got -inf"),
        ("2 2\na 1 1e39\n", r"vectors.txt:2: expected finite numbers, got 1e39"),
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


def test_missing_from_the_cache(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such file"):
        load_vectors(tmp_path / "absent")


def model(
    words: dict[str, float],
    grams: list[float],
    shortest: int,
    longest: int,
    version: int = 12,
    quantised: bool = False,
) -> bytes:
    """A fastText model of width 2: the vectors of words and of buckets are (x, -x)."""
    arguments = (2, 5, 1, 1, 5, 1, 1, 2, len(grams), shortest, longest, 100)
    written = struct.pack("<14id", 793712314, version, *arguments, 1e-4)
    written += struct.pack("<3i2q", len(words) + 1, len(words), 1, 99, -1)
    for word in words:
        written += word.encode() + b"\0" + struct.pack("<qb", 3, 0)
    written += b"__label__x\0" + struct.pack("<qb", 3, 1)
    values = [*words.values(), *grams]
    written += struct.pack("<?2q", quantised, len(values), 2)
    return written + b"".join(struct.pack("<2f", x, -x) for x in values) + b"output matrix"


WRITTEN_BY_FASTTEXT = base64.b64decode(
    b"uhZPLwwAAAACAAAABQAAAAIAAAABAAAABQAAAAEAAAACAAAAAgAAAAsAAAACAAAAAwAAAGQAAAAtQxzr4jYaPwQA"
    b"AAAEAAAAAAAAAFAAAAAAAAAA//////////9rw7ZsbgAUAAAAAAAAAADljJfkuqwAFAAAAAAAAAAAYQAUAAAAAAAA"
    b"AAA8L3M+ABQAAAAAAAAAAAAPAAAAAAAAAAIAAAAAAAAAoHbUvkaByD774J6+oHbUvkaByD774J6+Qe2ovowCkT7c"
    b"B/e9w8d6vqQHMz43dI09BLUjvl8UiD0SfIQ+iUSZvRHNK70Xm+U+pgcnPLjwGb7lRbm+cwbDPRZ3hL7ATTC++ZU4"
    b"PtD1u75Ggo88XNSHPop0875SLlQ+AAQAAAAAAAAAAgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    b"AAAAAA=="
)
"""A skip-gram model of fastText 0.9.2 (dim=2, minn=2, maxn=3, bucket=11), and its own vectors."""

ITS_VECTORS = {
    "köln": (-0.13376961648464203, 0.030386287719011307),
    "北京": (-0.09146352857351303, -0.08931543678045273),
    "a": (-0.03931941092014313, -0.012696648016571999),
    "</s>": (-0.32993510365486145, 0.2832225561141968),
}


def test_model_that_fasttext_wrote(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(WRITTEN_BY_FASTTEXT)
    words, table = read_vectors(tmp_path / "a.bin")
    assert words == list(ITS_VECTORS)
    torch.testing.assert_close(table, torch.tensor(list(ITS_VECTORS.values())))


def fnv1a(text: str) -> int:
    """The published algorithm, on bytes as signed numbers, as fastText computes it."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = ((value ^ (byte - 256 if byte > 127 else byte)) & 0xFFFFFFFF) * 0x01000193 % 2**32
    return value


def test_fasttext_model(tmp_path: Path) -> None:
    """A word's vector is the mean of its own and its n-grams'; `</s>` has none; labels are out."""
    path = tmp_path / "a.bin"
    grams = [10.0, 20.0, 40.0]
    path.write_bytes(model({"</s>": 7.0, "a": 1.0, "\u6f22": 2.0, "abcd": 3.0}, grams, 2, 3))
    words, table = read_vectors(path)
    assert words == ["</s>", "a", "\u6f22", "abcd"]
    spelt = {
        "a": ["<a", "a>", "<a>"],
        "\u6f22": ["<\u6f22", "\u6f22>", "<\u6f22>"],
        "abcd": ["<a", "ab", "bc", "cd", "d>", "<ab", "abc", "bcd", "cd>"],
    }
    assert (fnv1a("a"), fnv1a("foobar")) == (0xE40C292C, 0xBF9CF968)  # published with FNV-1a
    expected = [7.0]
    for own, pieces in zip((1.0, 2.0, 3.0), spelt.values(), strict=True):
        expected.append((own + sum(grams[fnv1a(p) % 3] for p in pieces)) / (1 + len(pieces)))
    torch.testing.assert_close(table[:, 0], torch.tensor(expected))
    torch.testing.assert_close(table[:, 1], -torch.tensor(expected))
    assert read_vectors(path, limit=2).words == ["</s>", "a"]


@pytest.mark.parametrize(
    ("shortest", "longest", "version", "expected"),
    [(1, 1, 12, (1 + 10) / 2), (0, 0, 12, 1), (3, 6, 11, (1 + 10) / 2)],
    ids=["letters-without-marks", "no-grams", "version-11"],
)
def test_fasttext_model_by_its_options(
    tmp_path: Path, shortest: int, longest: int, version: int, expected: float
) -> None:
    (tmp_path / "a.bin").write_bytes(model({"a": 1.0}, [10.0], shortest, longest, version))
    assert read_vectors(tmp_path / "a.bin").table[0, 0].item() == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b"2 3\nword 123", "expected a model of fastText, got another binary file"),
        (b"", "expected a model of fastText"),
        (model({"a": 1.0}, [1.0], 2, 3, version=9), "expected version 11 or 12 .* got 9"),
        (model({"a": 1.0}, [1.0], 2, 3, quantised=True), "quantised models are not read"),
        (model({"a": 1.0}, [1.0], 2, 3)[:80], "cut short"),
        (model({"a": 1.0}, [1.0], 2, 3)[:-20], "cut short"),
        (model({}, [1.0], 2, 3), "expected word vectors, got none"),
        (
            model({"a": 1.0, "b": float("inf")}, [], 2, 3),
            "expected finite numbers, got others for 'b'",
        ),
    ],
    ids=["word2vec", "empty", "version", "quantised", "dictionary", "matrix", "no-words", "inf"],
)
def test_refuses_models(tmp_path: Path, written: bytes, expected: str) -> None:
    (tmp_path / "a.bin").write_bytes(written)
    with pytest.raises(ValueError, match=rf"a.bin: {expected}"):
        read_vectors(tmp_path / "a.bin")


@pytest.fixture
def reads(monkeypatch, tmp_path: Path) -> list[str]:
    """The files that were read and not taken from the cache, which is empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read, found = read_vectors, []

    def watch(path: str | Path, limit: int | None = None) -> Vectors:
        found.append(Path(path).name)
        return read(path, limit)

    monkeypatch.setattr(vectors, "read_vectors", watch)
    return found


def test_cache(write, reads: list[str]) -> None:
    path = write(TEXT)
    first = load_vectors(path)
    for _ in range(2):
        again = load_vectors(path)
        assert again.words == first.words
        assert torch.equal(again.table, first.table)
    assert len(reads) == 1
    assert load_vectors(path, limit=1).words == ["the"]
    assert len(reads) == 2
    state = path.stat()
    path.write_text(TEXT.replace("the", "thy"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert load_vectors(path).words[0] == "thy"
    assert len(reads) == 3


def test_cache_that_is_damaged_is_made_anew(write, reads: list[str], tmp_path: Path) -> None:
    path = write(TEXT)
    expected = load_vectors(path)
    for damaged in (b"", b"PK not a zip", None):
        (entry,) = (tmp_path / "cache" / "fusedrnn").iterdir()
        entry.write_bytes(entry.read_bytes()[:-50] if damaged is None else damaged)
        again = load_vectors(path)
        assert again.words == expected.words
        assert torch.equal(again.table, expected.table)
    assert len(reads) == 4


def test_cache_that_cannot_be_written(write, reads: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    path = write(TEXT)
    with pytest.warns(UserWarning, match="read without a cache, which cannot be written"):
        assert load_vectors(path).words[0] == "the"


def test_coverage() -> None:
    train = [Sentence(["the", "The", "cat", "ran", "ran"], ["X"] * 5)]
    table = torch.eye(3)
    codec = TaggingCodec.from_sentences(train, vectors=Vectors(["the", "sat", "<unk>"], table))
    dev = [Sentence(["sat", "Sat", "dog", "dog", "cat"], ["X"] * 5)]
    assert list(coverage(codec, {"train": train, "val": dev})) == [
        "train: no vector for 3 of 5 words (60.0 %) and 2 of 4 distinct words (50.0 %), "
        "such as ran, cat",
        "val: no vector for 3 of 5 words (60.0 %) and 2 of 4 distinct words (50.0 %), "
        "such as dog, cat",
        "1 words beyond the training split have vectors",
    ]
