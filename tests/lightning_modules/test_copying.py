"""The pointer-generator: numbers of unknown symbols, its distribution, search, and whole runs."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules import Seq2Seq
from lightning_modules.data.pairs import PairCodec, PairData, Symbols
from lightning_modules.search import SearchOptions, beam_search, greedy_search
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
    if model.decoder.covers:
        torch.nn.init.normal_(model.attention.coverage)  # it starts at zero, where it has no effect
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


def search(model, source, lengths):
    """What greedy and beam search find for each row, and how sure they are."""
    state, limits = model.encode(source, lengths), 2 * lengths + 2
    greedy = greedy_search(model.step, state, limits, 2, 3)
    beam = beam_search(model.step, state, limits, 2, 3, 3, 2, 0.6)
    return [(found.sequences(3), found.scores) for found in (greedy, beam)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention": "dot"},
        {"attention": "general", "cell": "gru", "input_feeding": True, "tied_embeddings": True},
        {"attention": "additive", "feedback": "context", "coverage": True},
    ],
    ids=lambda a: "-".join(a),
)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_padding_order_and_company_change_nothing(arguments, data):
    model = make(**arguments, seed=data.draw(st.integers(0, 99)))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    source, lengths, target = batch(sizes, lacking=4, seed=data.draw(st.integers(0, 99)))
    order = torch.tensor(data.draw(st.permutations(range(len(sizes)))))
    padded = torch.nn.functional.pad(source, (0, 0, 0, data.draw(st.integers(1, 3))))
    logits, weights = model(source, lengths, target)
    again, more = model(padded[order], lengths[order], target[order])
    torch.testing.assert_close(again.exp(), logits[order].exp())
    torch.testing.assert_close(more[:, :, : source.shape[1]], weights[order])
    assert (more[:, :, source.shape[1] :] == 0).all()
    together = search(model, source, lengths)
    shuffled = search(model, padded[order], lengths[order])
    for (found, scores), (moved, moved_scores) in zip(together, shuffled, strict=True):
        assert [found[i] for i in order.tolist()] == moved
        torch.testing.assert_close(moved_scores, scores[order])
    for row, size in enumerate(sizes):
        one = source[row : row + 1, :size], lengths[row : row + 1]
        alone, _ = model(*one, target[row : row + 1])
        known = alone.shape[2]
        torch.testing.assert_close(logits[row, :, :known].exp(), alone[0].exp())
        assert (logits[row, :, known:].exp() < 1e-20).all()
        for (found, scores), (single, its) in zip(together, search(model, *one), strict=True):
            assert single[0] == found[row]
            torch.testing.assert_close(its[0], scores[row])


@torch.no_grad()
def test_steps_are_teacher_forcing_in_any_order():
    model = make(coverage=True)
    source, lengths, target = batch([4, 2], lacking=3)
    expected, _ = model(source, lengths, target)
    state = model.encode(source, lengths).select(torch.tensor([1, 0, 1]))
    for t in range(3):
        log_probs, state = model.step(target[[1, 0, 1], t], state)
        torch.testing.assert_close(log_probs.exp(), expected[[1, 0, 1], t].exp())


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


COMBINED = [
    pytest.param({"cell": cell, "attention": kind, "feedback": feedback}, id=f"{cell}-{kind}")
    for cell, kind, feedback in (
        ("lstm", "dot", "features"),
        ("gru", "general", "context"),
        ("lstm", "additive", "features"),
    )
]


@pytest.mark.parametrize("arguments", COMBINED)
def test_samples_may_be_copies(arguments):
    """Feedback, coverage, copying and scheduled sampling in one model, all of which learns."""
    model = make(coverage=True, **arguments)
    source, lengths, target = batch([4] * 64, lacking=3, steps=6)
    model.target_embedding.register_forward_pre_hook(lambda _, given: embedded.append(given[0]))
    fed, step, embedded = [], model._copy_step, []
    model._copy_step = lambda symbols, state: (fed.append(symbols), step(symbols, state))[1]
    found, weights = model(source, lengths, target, 0.5)
    fed = torch.stack(fed, 1)
    assert torch.equal(torch.stack(embedded, 1), torch.where(fed < SIZE, fed, 1))
    assert torch.equal(fed[:, 0], target[:, 0])
    kept = (fed == target)[:, 1:]
    # half of the symbols are the given ones, and of the others fewer than half by chance
    assert 0.45 < kept.double().mean() < 0.75
    assert (kept.any(1) & ~kept.all(1)).double().mean() > 0.8
    assert (fed[:, 1:][~kept] >= SIZE).any() and (fed[:, 1:][~kept] < SIZE).any()
    forced, expected = model(source, lengths, fed)
    counts = fed[:, -1] != 0  # what is given to the end, and so has results to the end
    assert counts.double().mean() > 0.8
    torch.testing.assert_close(found[counts], forced[counts])
    torch.testing.assert_close(weights[counts], expected[counts])
    leaves = [*model.parameters()]
    ours, plain = (torch.autograd.grad(f[counts, :, 4:SIZE].sum(), leaves) for f in (found, forced))
    for (name, _), a, b in zip(model.named_parameters(), ours, plain, strict=True):
        assert a.any(), name
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_samples_follow_the_mixture():
    """20,000 draws after the same step: frequencies within 5 standard deviations."""
    n, model = 20_000, make()
    source, lengths, target = batch([4], lacking=3, steps=2)
    fed, step = [], model._copy_step
    model._copy_step = lambda symbols, state: (fed.append(symbols), step(symbols, state))[1]
    found, _ = model(source.expand(n, -1, -1), lengths.expand(n), target.expand(n, -1), 1.0)
    p = found[0, 0].exp()
    shares = fed[1].bincount(minlength=len(p)) / n
    assert ((shares - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()


def test_label_smoothing_is_spread_over_the_vocabulary():
    c = codec()
    size = len(c.target)
    model = Seq2Seq(c, **SIZES, label_smoothing=0.1)
    log_probs = torch.randn(2, 3, size + 2, generator=torch.Generator().manual_seed(0))
    log_probs = log_probs.log_softmax(-1)
    target = torch.tensor([[2, 5, size + 1, 0], [2, 4, 6, 3]])
    losses = [
        -0.9 * log_probs[b, t, target[b, t + 1]] - 0.1 * log_probs[b, t, :size].mean()
        for b, t in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))
    ]
    torch.testing.assert_close(model._loss(log_probs, target, 0.1), torch.stack(losses).mean())


def test_everything_together_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.tsv").write_text("source\ttarget\n" + "\n".join("\t".join(p) for p in PAIRS))
    data = PairData(train="t.tsv", val="t.tsv", copy=True, batch_size=2)
    together = {"attention": "general", "feedback": "features", "coverage": True, "dropout": 0.1}
    together |= {"tied_embeddings": True, "label_smoothing": 0.1, "sampling_probability": 0.3}
    torch.manual_seed(0)
    model = Seq2Seq(data.codec, **SIZES, **together, score="per")
    data.setup("fit")
    (batch,) = data.train_dataloader()
    model.log = lambda *_, **__: None
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.02), []
    for _ in range(30):
        losses.append(model.training_step(batch, 0))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


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
