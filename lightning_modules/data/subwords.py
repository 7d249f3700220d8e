"""Pieces of words, learnt from text by byte-pair encoding (Sennrich et al., 2016)."""

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

SPACE = "▁"
"""Stands in front of the first piece of every word."""

_UNKNOWN = "<unk>"


def _library() -> Any:
    # its threads would outlive it in the workers of a data loader, and one text needs none
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "symbols: subwords need the library tokenizers: pip install 'fusedrnn[subwords]'"
        ) from error
    return tokenizers


def learn(texts: Iterable[str], size: int) -> str:
    """Learn the pieces of words that make texts short.

    Args:
        texts: the training split.
        size: most pieces, the single characters counted.

    Returns:
        The pieces and how they are found, as text (JSON).

    Raises:
        ValueError: the library is not installed.
    """
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE(unk_token=_UNKNOWN))
    cut = library.pre_tokenizers  # no piece reaches over a space or holds both letters and signs
    tokenizer.pre_tokenizer = cut.Sequence(
        [cut.Metaspace(SPACE, prepend_scheme="always"), cut.Punctuation()]
    )
    trainer = library.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[_UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator((" ".join(text.split()) for text in texts), trainer)
    return tokenizer.to_str()


def split(text: str, model: str) -> list[str]:
    """Cut a text into learnt pieces; a character never seen is a piece of its own.

    Args:
        text: any text; how wide its white space is makes no difference.
        model: what `learn` returned.
    """
    if not model:
        raise ValueError("symbols: the subwords have not been learnt")
    text = " ".join(text.split())
    encoding = _load(model).encode(text, add_special_tokens=False)
    return [
        text[start:end] if token == _UNKNOWN else token
        for token, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True)
    ]


def join(pieces: Sequence[str]) -> str:
    """Put pieces together to words with single spaces between them."""
    return "".join(pieces).replace(SPACE, " ").strip()


@lru_cache(maxsize=16)
def _load(model: str) -> Any:
    return _library().Tokenizer.from_str(model)
