"""The pointer-generator: numbers of unknown symbols, its distribution, search, and whole runs."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules import Seq2Seq
from lightning_modules.data.pairs import PairCodec, PairData, Symbols
from lightning_modules.search import SearchOptions, beam_search
from lightning_modules.seq2seq_model import Seq2SeqModel

PAIRS = [("call ann now", "ann was called"), ("call bob", "bob was called")]
SIZE = 7
SIZES = {"embedding_size": 5, "encoder_sizes": [4], "decoder_sizes": [8]}


def codec(**arguments):
    return PairCodec.from_pairs(PAIRS, Symbols(), Symbols(), copy=True, **arguments)


def test_unknown_symbols_have_numbers_of_their_own():
    c = codec()
    size = len(c.target)
    source = "call eve now eve and ann"
    numbers, copies = zip(*c.encode_source(source), strict=True)
    assert [c.source.symbols[n] for n in numbers] == [
        *("call", "<unk>", "now"),
        *("<unk>", "<unk>", "ann"),
    ]
    assert copies == (size, size + 1, size + 2, size + 1, size + 3, c.target.index("ann"))
    target = c.encode_target("eve was zork", source)
    assert target[1:-1] == [size + 1, c.target.index("was"), c.target.unk]
    assert c.decode_target(target[1:3], source) == ["eve", "was"]
    assert c.encode_target("eve")[1:-1] == [c.target.unk]


def test_codec_travels():
    c = codec()
    again = PairCodec.from_dict(json.loads(json.dumps(c.to_dict())))
    assert again.to_dict() == c.to_dict()
    assert again.encode_source("call eve") == c.encode_source("call eve")
    assert "copy" not in PairCodec.from_pairs(PAIRS, Symbols(), Symbols()).to_dict()


def make(seed=0, **arguments):
    torch.manual_seed(seed)
    model = Seq2SeqModel(6, SIZE, copy=True, **{**SIZES, "attention": "additive", **arguments})
    return model.double().eval()


def batch(lengths, lacking, steps=3, seed=0):
    """Sources whose every second symbol is copied under a number from SIZE on."""
    draw = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    source = torch.randint(1, 6, shape, generator=draw)
    copies = torch.randint(4, SIZE + lacking, shape, generator=draw)
    inside = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    target = torch.randint(4, SIZE + lacking, (len(lengths), steps), generator=draw)
    return torch.stack([source, copies], -1) * inside[..., None], torch.tensor(lengths), target


@torch.no_grad()
@pytest.mark.parametrize("coverage", [False, True])
def test_distribution_is_its_formula(coverage):
    """p(w) = g softmax(W a)[w] + (1 - g) sum of the weights of the places that hold w."""
    model = make(coverage=coverage, feedback="context")
    source, lengths, target = batch([4, 2], lacking=3)
    found, weights = model(source, lengths, target)
    fed = torch.where(target < SIZE, target, 1)
    embedded = model.target_embedding(fed)
    state = model.encode(source, lengths)
    features = model.decoder(embedded, state.decoder)[0].features
    gate = torch.sigmoid(
        torch.cat([features, embedded], -1) @ model.copy_gate.weight[0] + model.copy_gate.bias
    )
    generated = model.output(features).softmax(-1)
    assert found.shape[2] == max(SIZE, int(source[..., 1].max()) + 1)
    for b in range(2):
        for t in range(3):
            expected = torch.zeros(found.shape[2]).double()
            expected[:SIZE] = gate[b, t] * generated[b, t]
            for s in range(lengths[b]):
                expected[source[b, s, 1]] += (1 - gate[b, t]) * weights[b, t, s]
            torch.testing.assert_close(found[b, t].exp(), expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 3).double())


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3), extra=st.integers(0, 3))
@torch.no_grad()
def test_company_and_padding_change_nothing(lengths, extra):
    model = make()
    source, sizes, target = batch(lengths, lacking=4)
    padded = torch.nn.functional.pad(source, (0, 0, 0, extra))
    together, _ = model(padded, sizes, target)
    for row, length in enumerate(lengths):
        alone, _ = model(
            source[row : row + 1, :length], sizes[row : row + 1], target[row : row + 1]
        )
        size = alone.shape[2]
        torch.testing.assert_close(together[row, :, :size].exp(), alone[0].exp())
        assert (together[row, :, size:].exp() < 1e-20).all()


@torch.no_grad()
def test_steps_are_teacher_forcing_in_any_order():
    model = make(coverage=True)
    source, lengths, target = batch([4, 2], lacking=3)
    expected, _ = model(source, lengths, target)
    state = model.encode(source, lengths).select(torch.tensor([1, 0, 1]))
    for t in range(3):
        log_probs, state = model.step(target[[1, 0, 1], t], state)
        torch.testing.assert_close(log_probs.exp(), expected[[1, 0, 1], t].exp())


@torch.no_grad()
def test_beam_search_shares_sources():
    """Each row alone, with hypotheses that share its source, finds what the batch finds."""
    model = make()
    source, lengths, _ = batch([4, 2, 3], lacking=3)
    limits = torch.tensor([4, 4, 4])
    found = beam_search(model.step, model.encode(source, lengths), limits, 2, 3, 3, 2)
    for row in range(3):
        state = model.encode(source[row : row + 1, : lengths[row]], lengths[row : row + 1])
        alone = beam_search(model.step, state, limits[:1], 2, 3, 3, 2)
        assert alone.sequences(3)[0] == found.sequences(3)[row]
        torch.testing.assert_close(alone.scores[0], found.scores[row])


def test_loss_of_a_symbol_that_nothing_points_at_is_finite():
    model = make()
    source, lengths, target = batch([2], lacking=0)
    wide = torch.cat([source, source + torch.tensor([0, 9])], 0)  # a row with many more symbols
    logits, _ = model(wide, lengths.repeat(2), target.repeat(2, 1))
    loss = -logits.log_softmax(-1)[0, :, -1].sum()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "none"}, "copy needs an attention"),
        ({"source_features": 3}, "expected one of source_size and source_features"),
    ],
    ids=["attention", "features"],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
    with pytest.raises(ValueError, match=r"expected 0 with copy, got 0\.1 and 0\.0"):
        Seq2Seq(codec(), **SIZES, label_smoothing=0.1)


def test_a_run_copies_words_it_never_saw(tmp_path, monkeypatch):
    """With the gate shut, all that is written comes from the source, unknown words too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.tsv").write_text("source\ttarget\n" + "\n".join("\t".join(p) for p in PAIRS))
    data = PairData(train="t.tsv", val="t.tsv", copy=True, batch_size=2)
    model = Seq2Seq(data.codec, **SIZES, attention="additive", coverage=True, score="per")
    data.setup("fit")
    (train,) = data.train_dataloader()
    assert train.source.shape[-1] == 2
    model.log = lambda *_, **__: None
    model.training_step(train, 0).backward()
    assert model.model.copy_gate.weight.grad.abs().sum() > 0
    torch.nn.init.constant_(model.model.copy_gate.bias, -50.0)
    words = ["please", "call", "eve"]
    for beam in (1, 3):
        (text,) = model.translate([" ".join(words)], beam_size=beam)
        assert text and set(text.split()) <= set(words)
    (found,) = model.hypotheses(["call eve"], SearchOptions(), align=True)
    assert found[0].weights.shape == (len(found[0].symbols) + 1, 2)
    model._start("val")
    model._evaluate(next(iter(data.val_dataloader())), "val")
    assert 0 <= float(model.scores["val"]["accuracy"].compute()) <= 1
