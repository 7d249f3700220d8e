"""The layer: all its ways to the same result, and what its options promise."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedrnn import AttentionDecoder
from fusedrnn.attention_decoder import ScheduledSampling
from kernels.attention import sources

VARIANTS = [
    pytest.param(
        {"cell": c, "attention": a, "feedback": f, "coverage": v},
        id="-".join([c, a, f, *(["coverage"] if v else [])]),
    )
    for c, a, f, v in itertools.product(
        ("lstm", "gru"),
        ("dot", "general", "additive"),
        ("none", "features", "context"),
        (False, True),
    )
] + [
    pytest.param({"attention": "none"}, id="no-attention"),
    pytest.param(
        {"cell": "lstm_layernorm", "feedback": "features", "coverage": True}, id="layernorm"
    ),
]


def make(seed=0, sizes=(5, 4), **options):
    torch.manual_seed(seed)
    decoder = AttentionDecoder(3, sizes, 4, **options).double()
    if decoder.covers:
        torch.nn.init.normal_(decoder.attention.coverage)
    return decoder


def problem(decoder, lengths=(4, 1, 3), steps=5, seed=0):
    """Inputs and the state before the first step, all with gradients."""
    torch.manual_seed(seed)
    batch = len(lengths)

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    keys, x = random(batch, max(lengths), 4), random(batch, steps, 3)
    lstm = decoder.cell.startswith("lstm")
    sizes = decoder.stack.hidden_sizes
    layers = [
        (random(1, batch, n), random(1, batch, n)) if lstm else random(1, batch, n) for n in sizes
    ]
    flat = [t for s in layers for t in (s if lstm else (s,))]
    return x, decoder.start(keys, torch.tensor(lengths), layers), [x, keys, *flat]


def flatten(result):
    output, state = result
    tensors = [t for t in output if t is not None]
    tensors += [t for s in state.layers for t in (s if isinstance(s, tuple) else (s,))]
    return tensors + [t for t in (state.feed, state.coverage) if t is not None]


def gradients(tensors, leaves):
    generator = torch.Generator().manual_seed(0)
    total = sum(
        (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in tensors
    )
    return torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("options", VARIANTS)
def test_one_call_equals_going_step_by_step(options):
    decoder = make(**options)
    x, state, leaves = problem(decoder)
    leaves = [*leaves, *decoder.parameters()]
    found = flatten(decoder(x, state))
    slow = flatten(decoder._steps(x, state, None))
    for a, b in zip(found, slow, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(found, leaves), gradients(slow, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", VARIANTS)
@torch.no_grad()
def test_in_two_parts_as_in_one(options):
    decoder = make(**options)
    x, state, _ = problem(decoder)
    whole, end = decoder(x, state)
    first, state = decoder(x[:, :2], state)
    second, state = decoder(x[:, 2:], state)
    for all_, a, b in zip(whole, first, second, strict=True):
        if all_ is not None:
            torch.testing.assert_close(all_, torch.cat([a, b], 1))
    for a, b in zip(flatten((whole, end)), flatten((whole, state)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", VARIANTS)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_padding_order_and_company_change_nothing(options, data):
    decoder = make(**options)
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    x, state, _ = problem(decoder, lengths, seed=data.draw(st.integers(0, 99)))
    order = torch.tensor(data.draw(st.permutations(range(len(lengths)))))
    result, _ = decoder(x, state)
    moved, _ = decoder(x[order], state.select(order))
    alone, _ = decoder(x[:1], state.select(torch.tensor([0])))
    for value, shuffled, one in zip(result, moved, alone, strict=True):
        if value is not None:
            torch.testing.assert_close(shuffled, value[order])
            torch.testing.assert_close(one, value[:1])
    keys, wide = state.source.keys, 2
    padding = torch.arange(keys.shape[1]) >= state.source.lengths[:, None]
    longer = torch.cat(
        [keys.masked_fill(padding[..., None], 7.0), keys[:, :1].repeat(1, wide, 1)], 1
    )
    padded, _ = decoder(x, decoder.start(longer, state.source.lengths, state.layers))
    torch.testing.assert_close(padded.features, result.features)
    if result.weights is not None:
        torch.testing.assert_close(padded.weights[..., :-wide], result.weights)
        assert not padded.weights[..., -wide:].any()


@pytest.mark.parametrize("options", VARIANTS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_rows_that_share_what_they_continue_are_as_rows_of_their_own(options, data):
    """A step and the one after, whichever rows continue the same and have the same input."""
    decoder = make(**options).eval()
    x, state, _ = problem(decoder, seed=data.draw(st.integers(0, 99)))
    width = data.draw(st.integers(1, 4))
    _, state = decoder.step(x[:, 0], state)
    copied = state
    for t in (1, 2):
        now, each = state.size // 3, [st.integers(0, state.size // 3 - 1)] * width
        rows = torch.tensor([now * s + n for s in range(3) for n in data.draw(st.tuples(*each))])
        inputs = torch.tensor(
            data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
        )
        state, copied = state.select(rows, torch.arange(3)), copied.select(rows)
        found, state = decoder.step(x[:, t], state, inputs)
        slow, copied = decoder._step(x[inputs, t], copied.apart())
        for a, b in zip(found, slow, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b)
    for a, b in zip(flatten((found, state)), flatten((found, copied)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", VARIANTS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_what_counts_of_rows_of_different_lengths_is_as_without_lengths(options, data):
    """Results and gradients, however many steps share a computation and long the padding."""
    decoder = make(**options)
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5)))
    x, state, leaves = problem(decoder, [3, 1, 4, 2, 4][: len(lengths)], steps=6)
    leaves = [*leaves, *decoder.parameters()]
    inside = torch.arange(6) < lengths[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK", data.draw(st.sampled_from([1, 300, 1 << 18])))
        found = decoder.ragged(x, state, lengths)
    results = []
    whole, _ = decoder(x, state)
    for value, expected in zip(found, (whole.features, whole.weights), strict=True):
        assert (value is None) == (expected is None)
        if value is not None:
            assert value.shape == expected.shape and value.isfinite().all()
            torch.testing.assert_close(value[inside], expected[inside])
            results.append((value[inside], expected[inside]))
    ours, plain = (gradients(side, leaves) for side in zip(*results, strict=True))
    for a, b in zip(ours, plain, strict=True):
        a, b = (None if g is None or not g.any() else g for g in (a, b))
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("feedback", ["none", "features", "context"])
@pytest.mark.parametrize("cell", ["lstm", "lstm_layernorm"])
def test_dropout_masks_inputs_layers_and_features(feedback, cell):
    decoder = make(dropout=0.5, feedback=feedback, coverage=True, cell=cell, sizes=(40, 40))
    x, state, _ = problem(decoder, lengths=(4, 4, 4, 4), steps=6)
    torch.manual_seed(0)
    result, _ = decoder(x, state)
    assert 0.4 < (result.features == 0).double().mean() < 0.6
    assert (result.outputs != 0).all()
    torch.manual_seed(0)
    again, _ = decoder(x, state)
    assert torch.equal(result.features, again.features)
    assert not torch.equal(result.features, decoder(x, state)[0].features)
    decoder.eval()
    assert torch.equal(decoder(x, state)[0].features, decoder(x, state)[0].features)


def sampling_of(probability, features=4, size=3, batch=3, steps=5):
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(7, size).double()
    logits = torch.nn.Linear(features, 7).double()
    symbols = torch.randint(7, (batch, steps))
    return ScheduledSampling(symbols, embedding, logits, probability), embedding


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_scheduled_sampling_feeds_its_own_predictions(options, dropout):
    decoder = make(**options, dropout=dropout)
    _, state, _ = problem(decoder, lengths=[4] * 64)
    sampling, embedding = sampling_of(0.5, batch=64)
    result, _ = decoder(embedding(sampling.symbols), state, sampling)
    kept = (result.symbols == sampling.symbols)[:, 1:]
    assert torch.equal(result.symbols[:, 0], sampling.symbols[:, 0])
    # half of the symbols are the given ones, and of the others one in seven by chance
    assert 0.45 < kept.double().mean() < 0.7
    result.features.sum().backward()
    assert embedding.weight.grad.any()
    if not dropout:
        forced, _ = decoder(embedding(result.symbols), state)
        torch.testing.assert_close(forced.features, result.features)


@pytest.mark.skipif(torch.cuda.is_available(), reason="written for the interpreter's CPU tensors")
@pytest.mark.parametrize("feedback", ["none", "features", "context"])
def test_one_seed_draws_the_same_symbols_on_every_backend(feedback):
    pytest.importorskip("triton")
    results = []
    for backend in ("reference", "torch", "triton"):
        decoder = make(feedback=feedback, dropout=0.3, backend=backend).float()
        keys = torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(1))
        zeros = [(torch.zeros(1, 8, n), torch.zeros(1, 8, n)) for n in decoder.stack.hidden_sizes]
        state = decoder.start(keys, torch.full((8,), 4), zeros)
        sampling, embedding = sampling_of(0.8, batch=8, steps=3)
        sampling.output.float()
        x = embedding.float()(sampling.symbols)
        torch.manual_seed(5)
        results.append(decoder(x, state, sampling)[0])
    assert (results[0].symbols != sampling.symbols).any()
    for found in results[1:]:
        assert torch.equal(found.symbols, results[0].symbols)
        torch.testing.assert_close(found.features, results[0].features)


@torch.no_grad()
def test_no_sampling_where_its_probability_is_zero():
    decoder = make(feedback="features")
    _, state, _ = problem(decoder)
    sampling, embedding = sampling_of(0.0)
    x = embedding(sampling.symbols)
    result, _ = decoder(x, state, sampling)
    assert result.symbols is None
    assert torch.equal(result.features, decoder(x, state)[0].features)


@pytest.mark.parametrize("feedback", ["none", "features", "context"])
def test_autocast(feedback):
    """bf16 has 8 bits: each of a dozen roundings is off by at most 2^-9."""
    decoder = make(feedback=feedback, coverage=True).float()
    x, state, _ = problem(decoder.double())
    exact, _ = decoder(x, state)
    decoder.float()
    x, keys = x.detach().float(), state.source.keys.detach().float()
    layers = [tuple(t.detach().float() for t in s) for s in state.layers]
    with torch.autocast("cpu", torch.bfloat16):
        state = decoder.start(keys, state.source.lengths, layers)
        result, end = decoder(x, state)
        step, _ = decoder.step(x[:, 0], end)
    assert result.features.dtype == step.features.dtype == torch.bfloat16
    torch.testing.assert_close(
        result.features.double(), exact.features, atol=12 * 2**-9, rtol=12 * 2**-9
    )
    result.features.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_coverage_starts_from_the_attention_without():
    plain = make(feedback="features")
    covering = AttentionDecoder(3, (5, 4), 4, feedback="features", coverage=True).double()
    missing = covering.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["attention.coverage"] and not missing.unexpected_keys
    x, state, _ = problem(plain)
    other = covering.start(state.source.keys, state.source.lengths, state.layers)
    torch.testing.assert_close(plain(x, state)[0].features, covering(x, other)[0].features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedback": "all"}, "feedback must be one of none, features, context, got 'all'"),
        ({"attention": "none", "feedback": "context"}, "feedback='context' needs an attention"),
        ({"attention": "none", "coverage": True}, "coverage needs an attention"),
        ({"attention": "none", "features_size": 9}, "features_size cannot be 9"),
        ({"sizes": ()}, "hidden_sizes must name at least one layer"),
        ({"attention": "dot", "sizes": (6,)}, "query_size == key_size, got 6 and 4"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
