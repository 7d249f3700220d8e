"""Sentences to tag, from raw text or columns, and tagged sentences in the formats people use."""

import html
import json
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

from lightning_modules.data.readers import NOT_A_WORD, cells_of
from lightning_modules.data.schemes import Chunk, chunks

Tokenizer = Literal["whitespace", "words", "characters"]
InputFormat = Literal["text", "conll", "conllu"]
OutputFormat = Literal["text", "conll", "json", "brat", "html", "ansi"]

Span = tuple[int, int]

_JOINERS = "\u200c\u200d_"
_WORD = re.compile("w+(?:[-'’]w+)*|[^w ]")


class BadLine(ValueError):
    """A line of the input that cannot be read.

    Args:
        number: of the line, from 1.
        problem: what is wrong with it.
    """

    def __init__(self, number: int, problem: str) -> None:
        super().__init__(f"line {number}: {problem}")
        self.number, self.problem = number, problem


class Source(NamedTuple):
    """A sentence to tag.

    Attributes:
        text: as it stands, without its line end; of columns, the tokens with blanks between them.
        spans: start and end of each token in `text`, in characters.
        offset: where `text` starts in the whole input, in characters, line ends as they are.
        lines: of columns, all lines of the sentence; empty for raw text.
        rows: the place in `lines` of each token.
    """

    text: str
    spans: list[Span]
    offset: int = 0
    lines: list[str] = []  # noqa: RUF012 (a NamedTuple's default, never changed)
    rows: list[int] = []  # noqa: RUF012

    @property
    def tokens(self) -> list[str]:
        """The tokens."""
        return [self.text[start:end] for start, end in self.spans]


class Tagged(NamedTuple):
    """A sentence with its tags.

    Attributes:
        source: the sentence.
        tags: of each token.
        confidences: the probability of each tag, None where it was not asked for.
        entity_confidences: that of each of the `entities` of these tags.
        others: the tags of further tasks, a list for each.
    """

    source: Source
    tags: list[str]
    confidences: list[float] | None = None
    entity_confidences: list[float] | None = None
    others: Sequence[list[str]] = ()


def token_spans(text: str, tokenizer: Tokenizer = "whitespace") -> list[Span]:
    """Cut a line of text into words.

    Args:
        text: the line.
        tokenizer: `whitespace`; `words`: runs of letters, their marks and digits, which may hold
            apostrophes and hyphens inside, and single other characters; `characters`, for scripts
            without spaces: every character that is not white space, with its marks.

    Returns:
        Start and end of each word.

    Raises:
        ValueError: an unknown tokenizer.
    """
    if tokenizer == "whitespace":
        return [match.span() for match in re.finditer(r"\S+", text)]
    if tokenizer == "words":
        shape = "".join(map(_shape, text))
        return [match.span() for match in _WORD.finditer(shape)]
    if tokenizer != "characters":
        raise ValueError(f"tokenizer: expected whitespace, words or characters, got {tokenizer!r}")
    spans: list[Span] = []
    for place, character in enumerate(text):
        if character.isspace():
            continue
        joins = unicodedata.category(character)[0] == "M" or character in "\u200c\u200d"
        if joins and spans and spans[-1][1] == place:
            spans[-1] = spans[-1][0], place + 1
        else:
            spans.append((place, place + 1))
    return spans


def tokenize(text: str, tokenizer: Tokenizer = "whitespace") -> list[str]:
    """Return the words of a line of text; the arguments are those of `token_spans`."""
    return [text[start:end] for start, end in token_spans(text, tokenizer)]


def _shape(character: str) -> str:
    """Stands for a character of a word, for white space, or for itself."""
    if character.isalnum() or character in _JOINERS or unicodedata.category(character)[0] == "M":
        return "w"
    return " " if character.isspace() else character


def read_text(lines: Iterable[str], tokenizer: Tokenizer = "whitespace") -> Iterator[Source]:
    r"""Read raw text, a sentence a line.

    Args:
        lines: with their line ends; one without counts as if it ended in "\n".
        tokenizer: as for `token_spans`.
    """
    offset = 0
    for line in lines:
        text = line.rstrip("\r\n")
        yield Source(text, token_spans(text, tokenizer), offset)
        offset += max(len(line), len(text) + 1)


def read_columns(
    lines: Iterable[str], token_column: int = 0, conllu: bool = False
) -> Iterator[Source]:
    r"""Read columns, a token a line, with blank lines between sentences.

    Args:
        lines: separated by tabs or, where there is none, by spaces. In columns, lines that start
            with `# ` are comments, unless they have a tab or, inside a sentence, as many columns as
            the token before; and one that is `-DOCSTART-` is no token.
        token_column: index of the token; of CoNLL-U it is 1.
        conllu: whether only tabs separate, words are numbered, every line that starts with `#` is a
            comment, and ranges and empty nodes (`1-2`, `8.1`) are not tokens.

    Raises:
        BadLine: a line without that column, or, of CoNLL-U, without the number of a word.
    """
    token_column = 1 if conllu else token_column
    width = 0
    kept: list[str] = []
    tokens: list[str] = []
    rows: list[int] = []
    for number, line in enumerate(chain(lines, [""]), start=1):
        line = line.rstrip("\r\n")
        if not line.strip():
            if kept:
                yield _joined(tokens, kept, rows)
            kept, tokens, rows = [], [], []
            continue
        kept.append(line)
        cells = cells_of(line, tabs=conllu or "\t" in line)
        hash_token = "\t" in line or (bool(tokens) and len(cells) == width)
        comment = line.startswith("#") if conllu else line.startswith("# ") and not hash_token
        if comment or cells[0] == "-DOCSTART-" or (conllu and NOT_A_WORD.fullmatch(cells[0])):
            continue
        if conllu and not cells[0].isdecimal():
            raise BadLine(number, f"expected the number of a word and a tab, got {line!r}")
        if not -len(cells) <= token_column < len(cells) or not cells[token_column].strip():
            raise BadLine(number, f"expected a token in column {token_column}, got {line!r}")
        width = len(cells)
        rows.append(len(kept) - 1)
        tokens.append(cells[token_column])


def _joined(tokens: list[str], lines: list[str], rows: list[int]) -> Source:
    spans, start = [], 0
    for token in tokens:
        spans.append((start, start + len(token)))
        start += len(token) + 1
    return Source(" ".join(tokens), spans, 0, lines, rows)


def entities(tags: Sequence[str], scheme: str | None) -> list[Chunk]:
    """Return the entities that the tags of a sentence mark; without a scheme every tag does."""
    if scheme is None:
        return [Chunk(tag, place, place + 1) for place, tag in enumerate(tags)]
    return chunks(tags)


def _entities(sentence: Tagged, scheme: str | None) -> list[tuple[Chunk, float | None]]:
    """Return the entities of a sentence, each with its confidence if that was asked for."""
    found = entities(sentence.tags, scheme)
    confidences = sentence.entity_confidences
    return list(
        zip(found, [None] * len(found) if confidences is None else confidences, strict=True)
    )


def _extent(sentence: Tagged, entity: Chunk) -> Span:
    spans = sentence.source.spans
    return spans[entity.start][0], spans[entity.end - 1][1]


def as_text(sentences: Iterable[Tagged], scheme: str | None = None) -> Iterator[str]:
    """Write `word/TAG word/TAG ...`, a line a sentence.

    After it stand the tags of further tasks, `word/TAG/TAG`, and last a confidence, `word/TAG/0.9`.
    """
    for sentence in sentences:
        cells: list[Iterable[str]] = [sentence.source.tokens, sentence.tags, *sentence.others]
        if sentence.confidences is not None:
            cells.append(f"{value:.4f}" for value in sentence.confidences)
        yield " ".join("/".join(parts) for parts in zip(*cells, strict=True))


def as_conll(sentences: Iterable[Tagged], scheme: str | None = None) -> Iterator[str]:
    """Write columns: the token, or all the columns that were read, then the tag of each task.

    A confidence is one more column. Lines that are not tokens stay as they are.
    """
    for sentence in sentences:
        source = sentence.source
        lines, rows = list(source.lines or source.tokens), source.rows or range(len(source.spans))
        gap = "\t" if not source.lines or any("\t" in line for line in lines) else " "
        for place, row in enumerate(rows):
            tags = [sentence.tags, *sentence.others]
            lines[row] += "".join(gap + column[place] for column in tags)
            if sentence.confidences is not None:
                lines[row] += f"{gap}{sentence.confidences[place]:.4f}"
        yield "".join(f"{line}\n" for line in lines)


def as_json(sentences: Iterable[Tagged], scheme: str | None = None) -> Iterator[str]:
    """Write an object a sentence, with offsets in characters into its `text`."""
    for sentence in sentences:
        text, spans = sentence.source.text, sentence.source.spans
        tokens: list[dict[str, Any]] = [
            {"text": text[start:end], "start": start, "end": end, "tag": tag}
            for (start, end), tag in zip(spans, sentence.tags, strict=True)
        ]
        for place, token in enumerate(tokens if sentence.others else ()):
            token["other_tags"] = [column[place] for column in sentence.others]
        for token, value in zip(tokens, sentence.confidences or (), strict=False):
            token["confidence"] = round(value, 4)
        result: dict[str, Any] = {"text": text, "tokens": tokens}
        if scheme is not None:
            result["entities"] = [_entity(sentence, *e) for e in _entities(sentence, scheme)]
        yield json.dumps(result, ensure_ascii=False)


def _entity(sentence: Tagged, entity: Chunk, confidence: float | None) -> dict[str, Any]:
    start, end = _extent(sentence, entity)
    found: dict[str, Any] = {"type": entity.kind, "start": start, "end": end}
    found["text"] = sentence.source.text[start:end]
    return found if confidence is None else found | {"confidence": round(confidence, 4)}


def as_brat(sentences: Iterable[Tagged], scheme: str | None = None) -> Iterator[str]:
    """Write stand-off annotations as brat reads them (https://brat.nlplab.org/standoff.html).

    Offsets are in characters into the whole input, a byte-order mark not counted. A confidence is a
    note (`#1`) to its entity.

    Raises:
        ValueError: the sentences come from columns, so there is no text to point into.
    """
    number = 0
    for sentence in sentences:
        source = sentence.source
        if source.lines:
            raise ValueError("format: brat points into raw text, and the input is columns")
        for entity, confidence in _entities(sentence, scheme):
            number += 1
            start, end = _extent(sentence, entity)
            place = f"{source.offset + start} {source.offset + end}"
            yield f"T{number}\t{entity.kind} {place}\t{source.text[start:end]}"
            if confidence is not None:
                yield f"#{number}\tAnnotatorNotes T{number}\tconfidence {confidence:.4f}"


_PAGE = """<!doctype html>
<html><head><meta charset="utf-8"><title>Tagged text</title><style>
body { font: 16px/2.2 sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; color: #222 }
mark { padding: .25em .35em; border-radius: .35em; color: inherit }
mark b { font-size: .65em; margin-inline-start: .5em; opacity: .75 }
</style></head><body>"""


def as_html(sentences: Iterable[Tagged], scheme: str | None = None) -> Iterator[str]:
    """Write a page that needs nothing else, entities coloured, confidences under the pointer."""
    yield _PAGE
    for sentence in sentences:
        marked = _marked(sentence, scheme, html.escape, _mark)
        yield f'<p dir="auto">{marked}</p>'
    yield "</body></html>"


def _mark(text: str, kind: str, confidence: float | None) -> str:
    title = "" if confidence is None else f' title="confidence {confidence:.4f}"'
    colour = f"hsl({_hue(kind)}, 75%, 85%)"
    label = html.escape(kind)
    return f'<mark style="background:{colour}"{title}>{html.escape(text)}<b>{label}</b></mark>'


def as_ansi(sentences: Iterable[Tagged], scheme: str | None = None) -> Iterator[str]:
    """Write the text for a terminal, entities coloured."""
    for sentence in sentences:
        yield _marked(sentence, scheme, _printable, _colour)


def _colour(text: str, kind: str, confidence: float | None) -> str:
    label = kind if confidence is None else f"{kind} {confidence:.2f}"
    number = 41 + _hue(kind) % 6
    return f"\x1b[{number};97m{_printable(text)}\x1b[0m\x1b[2m {_printable(label)}\x1b[0m"


def _printable(text: str) -> str:
    """Leave out what would steer the terminal."""
    return "".join(c for c in text if c == "\t" or unicodedata.category(c) != "Cc")


def _hue(kind: str) -> int:
    return zlib.crc32(kind.encode()) % 360


def _marked(
    sentence: Tagged,
    scheme: str | None,
    plain: Callable[[str], str],
    mark: Callable[[str, str, float | None], str],
) -> str:
    text, pieces, done = sentence.source.text, [], 0
    for entity, confidence in _entities(sentence, scheme):
        start, end = _extent(sentence, entity)
        marked = mark(text[start:end], entity.kind, confidence)
        pieces += [plain(text[done:start]), marked]
        done = end
    return "".join([*pieces, plain(text[done:])])


WRITERS: dict[str, Callable[[Iterable[Tagged], str | None], Iterator[str]]] = {
    "text": as_text,
    "conll": as_conll,
    "json": as_json,
    "brat": as_brat,
    "html": as_html,
    "ansi": as_ansi,
}
"""How tagged sentences are written; each takes the scheme of their tags too, None for labels."""
