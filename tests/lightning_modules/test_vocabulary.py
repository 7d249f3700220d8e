from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.data.vocabulary import SPECIALS, Vocabulary

words = st.text(max_size=4)
specials = st.lists(st.sampled_from(SPECIALS[1:]), unique=True).map(lambda s: ["<pad>", *s])


@given(st.lists(words | st.sampled_from(SPECIALS)), specials)
def test_round_trip_and_text_never_reaches_a_special_symbol(text, front):
    vocabulary = Vocabulary.from_counts(Counter(text), specials=front)
    restored = Vocabulary(vocabulary.to_list(), ())
    assert restored == vocabulary
    assert vocabulary.symbols[: len(front)] == front
    for symbol in text:
        number = restored.index(symbol, default=-100)
        if symbol in SPECIALS:
            assert number == -100
        else:
            assert restored.decode([number]) == [symbol]


def test_from_counts_orders_by_count_then_symbol():
    vocabulary = Vocabulary.from_counts({"b": 2, "a": 2, "z": 5, "rare": 1}, min_count=2)
    assert vocabulary.symbols == ["<pad>", "<unk>", "z", "a", "b"]


def test_special_numbers():
    vocabulary = Vocabulary(["a"], SPECIALS)
    assert (vocabulary.pad, vocabulary.unk, vocabulary.bos, vocabulary.eos) == (0, 1, 2, 3)
    labels = Vocabulary(["NOUN", "VERB"], ())
    assert (labels.pad, labels.unk, labels.bos, labels.eos) == (None,) * 4
    assert labels.encode(["VERB", "NOUN"]) == [1, 0]


def test_unknown_symbols():
    vocabulary = Vocabulary(["a"])
    assert vocabulary.encode(["a", "other"]) == [2, vocabulary.unk]
    assert "other" not in vocabulary
    assert "<pad>" not in vocabulary
    with pytest.raises(ValueError, match="'X' is not in this vocabulary"):
        Vocabulary(["NOUN"], ()).index("X")


@pytest.mark.parametrize(
    ("symbols", "front", "error", "message"),
    [
        (["a", "a"], (), ValueError, "more than one a"),
        (["<pad>", "<pad>"], (), ValueError, "more than one <pad>"),
        (["<unk>", "<pad>"], (), ValueError, "<pad> not in first place"),
        (["a", 3], (), TypeError, "expected strings, got 3"),
        (["a"], ("<mask>",), ValueError, "'<mask>' is not one of"),
    ],
)
def test_bad_symbols(symbols, front, error, message):
    with pytest.raises(error, match=message):
        Vocabulary(symbols, front)
