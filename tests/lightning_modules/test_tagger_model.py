"""The tagger's network: what may not change its output, and its constructor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.tagger_model import TaggerModel, WordEmbedding

TAGS = ["O", "B-X", "I-X"]
SIZES = {"num_words": 12, "num_fixed": 3, "num_characters": 9, "word_size": 6, "character_size": 4}


def make(**options) -> TaggerModel:
    torch.manual_seed(0)
    arguments = {
        "tags": TAGS,
        "scheme": "BIO",
        "character_hidden_size": 5,
        "hidden_sizes": [7, 6],
        **SIZES,
        **options,
    }
    return TaggerModel(**arguments)


def batch(lengths: list[int], seed: int = 0) -> list[Tensor]:
    """Words, lengths, characters, their lengths, and which word has which."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    words = draw(1, 15, len(lengths), max(lengths))
    sizes = draw(1, 7, 10)
    sizes[0] = 6
    return [words, torch.tensor(lengths), draw(1, 9, 10, 6), sizes, draw(0, 10, *words.shape)]


def garble(value: Tensor, sizes: Tensor, high: int, extra: int) -> Tensor:
    """Widen rows, and put arbitrary numbers past their ends."""
    wide = torch.nn.functional.pad(value, (0, extra))
    past = torch.arange(wide.shape[1]) >= sizes[:, None]
    return torch.where(past, torch.randint(0, high, wide.shape), wide)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    extra=st.integers(0, 3),
    seed=st.integers(0, 100),
    head=st.sampled_from(["crf", "softmax"]),
    cell=st.sampled_from(["lstm", "gru"]),
)
def test_batch_order_and_padding_change_nothing(
    lengths: list[int], extra: int, seed: int, head: str, cell: str
) -> None:
    model = make(head=head, cell=cell).eval()
    words, sizes, characters, character_lengths, spellings = batch(lengths, seed)
    whole = model(words, sizes, characters, character_lengths, spellings)
    paths = model.decode(whole, sizes)
    garbled = [
        garble(words, sizes, 15, extra),
        sizes,
        garble(characters, character_lengths, 9, extra),
        character_lengths,
        garble(spellings, sizes, 10, extra),
    ]
    order = torch.randperm(len(lengths))
    shuffled = model(
        garbled[0][order], sizes[order], garbled[2], character_lengths, garbled[4][order]
    )
    for place, row in enumerate(order.tolist()):
        size = lengths[row]
        single = model(
            words[row : row + 1, :size],
            sizes[row : row + 1],
            characters,
            character_lengths,
            spellings[row : row + 1, :size],
        )
        torch.testing.assert_close(whole[row, :size], single[0])
        torch.testing.assert_close(shuffled[place, :size], single[0])
        alone = model.decode(single, sizes[row : row + 1])
        assert torch.equal(paths[row, :size], alone[0])
        assert (paths[row, size:] == -1).all()


@pytest.mark.parametrize("head", ["crf", "softmax"])
def test_loss_is_a_sum_over_sentences(head: str) -> None:
    model = make(head=head).eval()
    inputs = batch([4, 1, 3])
    emissions = model(*inputs)
    tags = model.decode(emissions, inputs[1])
    total, count = model.loss(emissions, tags, inputs[1])
    assert int(count) == 8
    parts = [model.loss(emissions[i : i + 1, :n], tags[i : i + 1, :n], inputs[1][i : i + 1])[0]
             for i, n in enumerate([4, 1, 3])]  # fmt: skip
    torch.testing.assert_close(total, torch.stack(parts).sum())
    total.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_unknown_gold_tags_leave_the_loss_finite() -> None:
    inputs = batch([4, 2])
    tags = torch.tensor([[0, -100, 0, 0], [1, 2, -100, -100]])
    for head, expected in (("softmax", 5), ("crf", 2)):
        model = make(head=head).eval()
        total, count = model.loss(model(*inputs), tags, inputs[1])
        assert int(count) == expected
        assert total.isfinite()
        assert total > 0
        total, count = model.loss(model(*inputs), torch.full_like(tags, -100), inputs[1])
        assert (total.item(), int(count)) == (0.0, 0)


def test_words_become_unknown_only_in_training() -> None:
    model = make(first_rare=8, unk_probability=0.5, word_dropout=0.2)
    words = torch.arange(15).repeat(600, 1)
    assert torch.equal(model.eval()._forget(words), words)
    forgotten = model.train()._forget(words)
    changed = (forgotten != words).double().mean(0)
    assert (forgotten[forgotten != words] == 1).all()
    assert (changed[:2] == 0).all()
    assert ((changed[[*range(2, 8), 12, 13, 14]] - 0.2).abs() < 0.08).all()
    assert ((changed[8:12] - 0.5).abs() < 0.08).all()


@pytest.mark.parametrize("freeze", [False, True])
def test_pretrained_vectors(freeze: bool) -> None:
    """Two known words have vectors, and one fixed word."""
    vectors = torch.full((5, 2), torch.nan)
    vectors[[2, 3, 4]] = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    embedding = WordEmbedding(4, 1, 2, vectors, freeze)
    numbers = torch.tensor([[0, 1, 2, 3, 4]])
    found = embedding(numbers)
    assert found[0, 2:].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert found[0, 0].tolist() == [0, 0]
    found.sum().backward()
    trained = embedding.words.grad.abs().sum(1) > 0
    assert trained.tolist() == [False, True, not freeze, not freeze]
    assert [name for name, _ in embedding.named_parameters()] == ["words"]


def test_words_alone() -> None:
    model = make(character_hidden_size=0)
    assert model.characters is None
    assert model(*batch([3, 2])).shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"hidden_sizes": [5, 0]}, r"hidden_sizes: expected positive numbers, got \[5, 0\]"),
        ({"hidden_sizes": []}, r"hidden_sizes: expected positive numbers, got \[\]"),
        ({"word_size": 0}, "word_size: expected positive"),
        ({"character_size": -1}, "character_size: expected positive"),
        ({"character_hidden_size": -1}, "character_hidden_size: expected 0 or more"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"unk_probability": -0.1}, "unk_probability: expected"),
        ({"recurrent_dropout": 2.0}, "recurrent_dropout must be a number in"),
        ({"head": "viterbi"}, "head: expected crf or softmax, got 'viterbi'"),
        ({"cell": "ltsm"}, "cell must be one of"),
        ({"tags": []}, "tags: expected at least one"),
        ({"tags": ["O", "X"]}, "tag 'X' is outside the scheme BIO"),
        ({"scheme": "IOB2"}, "scheme must be None or one of"),
        ({"vectors": torch.zeros(15, 4)}, "word_size: expected 4, the width of the pretrained"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make(**options)
