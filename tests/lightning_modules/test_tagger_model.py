"""The tagger's network: what may not change its output, and its constructor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.tagger_model import (
    CharacterEncoder,
    SequenceDropout,
    TaggerModel,
    WordEmbedding,
)

TAGS = ["O", "B-X", "I-X"]
SIZES = {
    "num_words": 12,
    "num_fixed": 3,
    "num_characters": 9,
    "num_casings": 4,
    "word_size": 6,
    "character_size": 4,
}
SPELLING = [
    {"character_hidden_size": 5},
    {"character_hidden_size": 0, "character_filters": 4},
    {
        "character_hidden_size": 3,
        "character_filters": 4,
        "character_filter_width": 5,
        "casing_size": 2,
    },
    {"character_hidden_size": 0, "casing_size": 3},
]
"""The ways to look at how a word is written."""


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
    characters, spellings, casings = draw(1, 9, 10, 6), draw(0, 10, *words.shape), draw(0, 4, 10)
    return [words, torch.tensor(lengths), characters, sizes, spellings, casings]


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
    spelling=st.sampled_from(SPELLING),
)
def test_batch_order_and_padding_change_nothing(
    lengths: list[int], extra: int, seed: int, head: str, cell: str, spelling: dict
) -> None:
    model = make(head=head, cell=cell, **spelling).eval()
    words, sizes, characters, character_lengths, spellings, casings = batch(lengths, seed)
    whole = model(words, sizes, characters, character_lengths, spellings, casings)
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
        garbled[0][order], sizes[order], garbled[2], character_lengths, garbled[4][order], casings
    )
    for place, row in enumerate(order.tolist()):
        size = lengths[row]
        single = model(
            words[row : row + 1, :size],
            sizes[row : row + 1],
            characters,
            character_lengths,
            spellings[row : row + 1, :size],
            casings,
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


def test_parameters_keep_their_names_and_order() -> None:
    """Checkpoints, and optimizer states in them, go by these."""
    names = list(make(hidden_sizes=[7], character_hidden_size=5).state_dict())
    weights = [f"{kind}_{part}_l0" for kind in ("weight", "bias") for part in ("ih", "hh")]
    lstm = [*weights, *(f"{name}_reverse" for name in weights)]
    assert names == [
        "words.words",
        "words.fixed",
        "words.frozen",
        "characters.embedding.weight",
        *(f"characters.lstm.{name}" for name in lstm),
        *(f"stack.layers.0.{name}" for name in lstm),
        "emission.weight",
        "emission.bias",
        *(f"crf.{name}" for name in ("start", "transitions", "end")),
    ]


@pytest.mark.parametrize("width", [1, 3, 5])
def test_convolution_by_hand(width: int) -> None:
    """Each filter's greatest response over the windows of the word alone, zeros around it."""
    torch.manual_seed(0)
    encoder = CharacterEncoder(9, 4, 0, filters=3, filter_width=width).double()
    words = [[1, 2, 3, 8], [5], [7, 7]]
    padded = torch.tensor([[*word, *[6] * (4 - len(word))] for word in words])
    encoded = encoder(padded, torch.tensor([4, 1, 2]))
    edge = torch.zeros(width // 2, 4, dtype=torch.double)
    for word, found in zip(words, encoded, strict=True):
        rows = torch.cat([edge, encoder.embedding.weight[word], edge])
        windows = torch.stack([rows[i : i + width] for i in range(len(word))])
        weight, bias = encoder.convolution.weight, encoder.convolution.bias
        responses = torch.einsum("twc,fcw->tf", windows, weight) + bias
        torch.testing.assert_close(found, responses.amax(0))


def test_one_mask_for_a_sentence() -> None:
    torch.manual_seed(0)
    drop = SequenceDropout(0.25)
    ones = torch.ones(50, 6, 40)
    dropped = drop(ones)
    assert torch.equal(dropped, dropped[:, :1].expand_as(ones))
    assert {round(value, 5) for value in dropped.unique().tolist()} == {0, round(4 / 3, 5)}
    assert abs(float(dropped.mean()) - 1) < 0.05
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(drop.eval()(ones), ones)


def test_variational_dropout_everywhere() -> None:
    """Of a sentence of one word repeated, nothing but the recurrence tells words apart."""
    model = make(variational_dropout=True, dropout=0.5, hidden_sizes=[7, 6, 5]).train()
    assert isinstance(model.dropout, SequenceDropout)
    assert model.stack.variational_dropout
    kept = model.encode(*batch([6])) != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    kept = make(dropout=0.5).train().encode(*batch([6])) != 0
    assert not torch.equal(kept, kept[:, :1].expand_as(kept))


@pytest.mark.parametrize(
    "options",
    [
        {"cell": "gru"},
        {"residual": True},
        {"layer_norm": True},
        {"recurrent_dropout": 0.5},
        {"character_dropout": 0.5},
        {"word_dropout": 0.9},
        {"unk_probability": 0.9},
        {"character_filters": 3},
        {"casing_size": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_reaches_the_network(options: dict) -> None:
    found = []
    for chosen in ({}, options):
        model = make(hidden_sizes=[7, 7], dropout=0.0, first_rare=6, **chosen).train()
        torch.manual_seed(1)
        found.append(model.encode(*batch([6, 4])))
    assert not torch.allclose(*found)


def test_dropout_before_between_and_after_the_layers() -> None:
    """Half of the last layer's output is zero, and of what each layer gets."""
    model = make(dropout=0.5, hidden_sizes=[40, 40]).train()
    inputs: list[Tensor] = []
    for layer in model.stack.layers:
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    encoded = model.encode(*batch([6] * 20))
    assert len(inputs) == 2
    for value in (*inputs, encoded):
        assert 0.4 < float((value == 0).float().mean()) < 0.6


def test_heads_of_several_tasks() -> None:
    model = make(other_tasks=[(["X", "Y"], None), (TAGS, "BIO")], head=["crf", "softmax", "crf"])
    first, second, third = model.heads
    assert first is model
    assert second.crf is None
    assert third.crf is not None
    inputs = batch([4, 2])
    features = model.encode(*inputs)
    assert [head.emission(features).shape[-1] for head in model.heads] == [3, 2, 3]
    losses = [
        head.loss(head.emission(features), torch.zeros(2, 4, dtype=torch.int64), inputs[1])[0]
        for head in model.heads
    ]
    sum(losses).backward()
    assert all(p.grad is not None for p in model.parameters())


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
        ({"character_filters": -1}, "character_filters: expected 0 or more"),
        ({"casing_size": -1}, "casing_size: expected 0 or more"),
        ({"character_filter_width": 4}, "character_filter_width: expected an odd number, got 4"),
        ({"head": ["crf", "crf"]}, "head: expected one for each of 1 tasks"),
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
