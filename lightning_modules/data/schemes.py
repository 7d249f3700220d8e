"""Tag schemes: which entities a sequence of tags marks, and the tags that mark given entities."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Chunk(NamedTuple):
    """One entity: its type and the tokens [start, end) it covers."""

    kind: str
    start: int
    end: int


def chunks(tags: Sequence[str]) -> list[Chunk]:
    """Find the entities that tags mark, by the rules of conlleval, in any scheme.

    Ill-formed sequences have a reading too: an I- opens an entity wherever none of its type is
    open. S- and E-, which conlleval does not have in this sense, close an entity, as in seqeval's
    default mode.

    Args:
        tags: the tags of one sentence: O, or a prefix B, I, E or S, a hyphen and a type.
    """
    found = []
    start, before, kind_before = 0, "O", ""
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        if prefix in ("O", "B", "S") or before in ("O", "E", "S") or kind != kind_before:
            if before != "O":
                found.append(Chunk(kind_before, start, position))
            start = position
        before, kind_before = prefix, kind
    return found


def encode(entities: Iterable[Chunk], length: int, scheme: str) -> list[str]:
    """Write entities as tags.

    Args:
        entities: entities that do not overlap, in order.
        length: tokens of the sentence.
        scheme: "BIO", "IOB1" or "BIOES".
    """
    tags = ["O"] * length
    for kind, start, end in entities:
        touching = start > 0 and tags[start - 1].partition("-")[2] == kind
        letters = ["I"] * (end - start)
        if scheme != "IOB1" or touching:
            letters[0] = "B"
        if scheme == "BIOES":
            letters[-1] = "S" if len(letters) == 1 else "E"
        tags[start:end] = [f"{letter}-{kind}" for letter in letters]
    return tags


def convert(tags: Sequence[str], scheme: str) -> list[str]:
    """Rewrite tags in a scheme, well-formed, marking the same entities.

    Args:
        tags: the tags of one sentence, in any scheme and even ill-formed.
        scheme: "BIO", "IOB1" or "BIOES".
    """
    return encode(chunks(tags), len(tags), scheme)
