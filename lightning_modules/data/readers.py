"""Readers of tagged text: CoNLL-U and CoNLL column files."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fusedrnn.crf import split_tag

CONLLU_COLUMNS = (
    "id",
    "form",
    "lemma",
    "upos",
    "xpos",
    "feats",
    "head",
    "deprel",
    "deps",
    "misc",
)

NOT_A_WORD = re.compile(r"\d+[-.]\d+")
"""The number of a range of words or of an empty node in CoNLL-U."""
_SEVERAL = re.compile("[|+,;/(#][BIESLU]-|#O$")
_DOCUMENT = "-DOCSTART-"


class Sentence(NamedTuple):
    """The tokens of a sentence and their tags, lists of the same length.

    `others` holds the tags of further columns, if such were read.
    """

    tokens: list[str]
    tags: list[str]
    others: tuple[list[str], ...] = ()


def read_conllu(
    path: str | Path, column: str = "upos", scheme: str | None = None
) -> list[Sentence]:
    """Read a CoNLL-U file (https://universaldependencies.org/format.html).

    Ranges of multiword tokens (`1-2`) and empty nodes (`8.1`) are left out: they are not words.

    Args:
        path: the file.
        column: the column to take the tags from, by name; `feats:KEY` or `misc:KEY` takes one
            key's value, `_` where a word does not have it.
        scheme: the tag scheme to check against, if any, as for `check_tag`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown column, a line that is not ten columns separated by tabs, or a tag
            outside the scheme, with file and line number; no sentence.
    """
    name, _, key = column.partition(":")
    if name not in CONLLU_COLUMNS or (key and name not in ("feats", "misc")):
        known = ", ".join(CONLLU_COLUMNS)
        raise ValueError(f"{path}: no column {column!r}; CoNLL-U has {known}, feats:KEY, misc:KEY")
    place = CONLLU_COLUMNS.index(name)
    sentences, current = [], Sentence([], [])
    for number, line in _lines(path):
        if not line.strip():
            sentences.append(current)
            current = Sentence([], [])
            continue
        if line.startswith("#"):
            continue
        cells = line.split("\t")
        if len(cells) != len(CONLLU_COLUMNS):
            raise ValueError(
                f"{path}:{number}: expected {len(CONLLU_COLUMNS)} columns separated by tabs, "
                f"got {len(cells)}"
            )
        if NOT_A_WORD.fullmatch(cells[0]):
            continue
        if not cells[0].isdecimal():
            raise ValueError(f"{path}:{number}: expected the number of a word, got {cells[0]!r}")
        tag = _feature(cells[place], key) if key else cells[place]
        _append(current, cells[1], tag, scheme, f"{path}:{number}")
    return _finish([*sentences, current], path)


def read_columns(
    path: str | Path,
    token_column: int = 0,
    tag_column: int = -1,
    delimiter: str | None = None,
    scheme: str | None = None,
) -> list[Sentence]:
    r"""Read a CoNLL column file: one token a line, blank lines between sentences.

    Lines that start with `# ` are comments, unless they can only be the token `#` (they have a tab
    in a file with tabs; or as many columns as the other lines, inside a sentence or with a tag of
    the scheme). `#hashtag` is a token. `-DOCSTART-` lines are left out, and, where the first column
    is not the token but its number, so are `1-2` and `8.1`, which are not words.

    Args:
        path: the file.
        token_column: index of the column of the token; negative: from the right.
        tag_column: index of the column of the tag.
        delimiter: what separates columns: "\t", or " " for any run of spaces and tabs; None: a tab
            if the first line has one. Only between tabs may tokens hold spaces.
        scheme: the tag scheme to check against, if any, as for `check_tag`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line with another number of columns than the first, an empty token, or a tag
            outside the scheme, with file and line number; no such column, or one for both; no
            sentence.
    """
    if delimiter not in (None, "\t", " "):
        raise ValueError(f"delimiter: expected a tab, a space or None, got {delimiter!r}")
    lines = list(_lines(path))
    rows = ((n, x) for n, x in lines if x.strip() and not (_hash(x) or x.startswith(_DOCUMENT)))
    first = next(rows, None)
    if first is None:
        return _finish([], path)
    tabs = delimiter == "\t" or (delimiter is None and "\t" in first[1].strip())
    width = len(cells_of(first[1], tabs))
    for name, place in (("token_column", token_column), ("tag_column", tag_column)):
        if not -width <= place < width:
            raise ValueError(
                f"{path}:{first[0]}: no column {name} = {place}; the line has {width} columns"
            )
    if token_column % width == tag_column % width:
        raise ValueError(
            f"{path}:{first[0]}: expected a token and a tag in different columns, got both from "
            f"column {token_column % width} of {width}"
        )
    numbered = token_column % width != 0
    sentences, current = [], Sentence([], [])
    for number, line in lines:
        cells = cells_of(line, tabs)
        blank = not line.strip()
        if blank or cells[token_column % len(cells)] == _DOCUMENT:
            sentences.append(current)
            current = Sentence([], [])
            continue
        if _hash(line) and not _is_token(line, cells, width, tabs, tag_column, current, scheme):
            continue
        if len(cells) != width:
            raise ValueError(f"{path}:{number}: expected {width} columns, got {len(cells)}")
        if numbered and NOT_A_WORD.fullmatch(cells[0]):
            continue
        _append(current, cells[token_column], cells[tag_column], scheme, f"{path}:{number}")
    return _finish([*sentences, current], path)


def check_tag(tag: str, scheme: str | None, place: str) -> str:
    """Check that a tag belongs to a scheme.

    Args:
        tag: the tag.
        scheme: "BIO", "IOB1", "BIOES"; "IO", whose tags may be bare types (`PER`), which become
            `I-PER`; or None, to which every tag that is not empty belongs.
        place: where the tag stands, for the message.

    Returns:
        The tag.

    Raises:
        ValueError: it does not.
    """
    if not tag:
        raise ValueError(f"{place}: expected a tag, got an empty one")
    if scheme is not None and _SEVERAL.search(tag):
        raise ValueError(f"{place}: expected one tag, got {tag!r}: entities cannot be nested")
    if scheme == "IO":
        return _inside(tag, place)
    if scheme is not None:
        try:
            split_tag(tag, scheme)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    return tag


def _inside(tag: str, place: str) -> str:
    if re.fullmatch("[BESLU]-.+", tag):
        raise ValueError(f"{place}: tag {tag!r} is outside the scheme IO: expected O, I-TYPE, TYPE")
    return tag if tag == "O" or tag.startswith("I-") else f"I-{tag}"


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines, whatever the line ends, without a byte-order mark."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in numbered(file, path):
            yield number, line.removesuffix("\n")


def numbered(lines: Iterable[str], place: str | Path) -> Iterator[tuple[int, str]]:
    """Number lines from 1, and find the one that is not UTF-8, which a decoder does not say.

    Args:
        lines: decoded with `errors="surrogateescape"`.
        place: where they come from, for the message.

    Raises:
        ValueError: a line is not UTF-8 text.
    """
    for number, line in enumerate(lines, start=1):
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError as error:
                byte = ord(line[error.start]) - 0xDC00
                raise ValueError(
                    f"{place}:{number}: expected UTF-8 text, got the byte 0x{byte:02X}"
                ) from None
        yield number, line


def cells_of(line: str, tabs: bool) -> list[str]:
    """Return the columns of a line, between tabs or between runs of spaces and tabs."""
    return line.split("\t") if tabs else re.split("[ \t]+", line.strip(" \t"))


def _hash(line: str) -> bool:
    return line == "#" or line.startswith("# ")


def _is_token(
    line: str,
    cells: list[str],
    width: int,
    tabs: bool,
    tag_column: int,
    current: Sentence,
    scheme: str | None,
) -> bool:
    """Whether a line that starts with a lone hash is the token `#` after all."""
    if tabs:
        return "\t" in line
    if len(cells) != width:
        return False
    if current.tokens or scheme in (None, "IO"):  # to which anything belongs
        return bool(current.tokens)
    try:
        split_tag(cells[tag_column], scheme)
    except ValueError:
        return False
    return True


def _append(sentence: Sentence, token: str, tag: str, scheme: str | None, place: str) -> None:
    if not token:
        raise ValueError(f"{place}: expected a token, got an empty one")
    tag = check_tag(tag, scheme, place)
    sentence.tokens.append(token)
    sentence.tags.append(tag)


def _feature(cell: str, key: str) -> str:
    for pair in cell.split("|"):
        name, _, value = pair.partition("=")
        if name == key:
            return value
    return "_"


def _finish(sentences: list[Sentence], path: str | Path) -> list[Sentence]:
    kept = [sentence for sentence in sentences if sentence.tokens]
    if not kept:
        raise ValueError(f"{path}: expected at least one sentence, got none")
    return kept
