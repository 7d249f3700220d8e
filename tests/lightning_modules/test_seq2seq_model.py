"""The encoder-decoder against its equations, and what must not change its outputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.search import beam_search, greedy_search
from lightning_modules.seq2seq_model import Bridge, Seq2SeqModel

SOURCE, TARGET, BEGIN, END = 9, 8, 2, 3


def make(seed=0, **arguments):
    torch.manual_seed(seed)
    sizes = {"embedding_size": 5, "encoder_sizes": [4], "decoder_sizes": [8], **arguments}
    model = Seq2SeqModel(SOURCE, TARGET, **sizes)
    if model.decoder.covers:
        torch.nn.init.normal_(model.attention.coverage)  # it starts at zero, where it has no effect
    return model.double().eval()


def batch(lengths, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(2, SOURCE, (len(lengths), max(lengths)), generator=generator)
    for row, length in enumerate(lengths):
        source[row, length:] = 0
    target = torch.randint(2, TARGET, (len(lengths), steps), generator=generator)
    target[:, 0] = BEGIN
    return source, torch.tensor(lengths), target


def lstm_step(layer, x, h, c):
    """The equations of the LSTM, one gate at a time."""
    w, u = layer.weight_ih_l0.chunk(4), layer.weight_hh_l0.chunk(4)
    b = (layer.bias_ih_l0 + layer.bias_hh_l0).chunk(4)
    i, f, candidate, o = (w[k] @ x + u[k] @ h + b[k] for k in range(4))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(candidate)
    return torch.sigmoid(o) * torch.tanh(c), c


@torch.no_grad()
def test_plain_encoder_decoder_is_the_textbook_one():
    """h_0^dec = h_T^enc and c_0^dec = c_T^enc, layer by layer; p(y_t) = softmax(W h_t)."""
    model = make(encoder_sizes=[6, 4], decoder_sizes=[6, 4], bidirectional=False, attention="none")
    source, lengths, target = batch([3, 5], 4)
    logits, weights = model(source, lengths, target)
    assert weights is None
    for row in range(2):
        states = [(torch.zeros(n).double(), torch.zeros(n).double()) for n in (6, 4)]
        for symbol in source[row, : lengths[row]]:
            x = model.source_embedding.weight[symbol]
            for k, layer in enumerate(model.encoder.layers):
                states[k] = lstm_step(layer, x, *states[k])
                x = states[k][0]
        for t, symbol in enumerate(target[row]):
            x = model.target_embedding.weight[symbol]
            for k, layer in enumerate(model.decoder.stack.layers):
                states[k] = lstm_step(layer, x, *states[k])
                x = states[k][0]
            expected = model.output.weight @ x + model.output.bias
            torch.testing.assert_close(logits[row, t], expected, rtol=1e-10, atol=1e-10)


def test_bidirectional_states_of_matching_size_pass_unchanged():
    model = make(encoder_sizes=[3, 4], decoder_sizes=[6, 8])
    source, lengths, _ = batch([4, 2], 1)
    _, finals = model.encoder(model.source_embedding(source), lengths=lengths)
    started = model.encode(source, lengths).layers
    assert not list(model.bridge.parameters())
    for (h, c), (h0, c0) in zip(finals, started, strict=True):
        assert torch.equal(h0[0], torch.cat([h[0], h[1]], -1))
        assert torch.equal(c0[0], torch.cat([c[0], c[1]], -1))


@pytest.mark.parametrize("decoder_cell", ["lstm", "gru"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["bi", "uni"])
@pytest.mark.parametrize(
    ("encoder_sizes", "decoder_sizes"),
    [([4], [8]), ([4], [5, 6, 7]), ([3, 4, 5], [6]), ([2, 6], [6, 2])],
    ids=["1-1", "1-3", "3-1", "2-2"],
)
def test_bridge_carries_every_layer_and_every_cell(
    cell, decoder_cell, bidirectional, encoder_sizes, decoder_sizes
):
    model = make(
        cell=cell,
        decoder_cell=decoder_cell,
        bidirectional=bidirectional,
        encoder_sizes=encoder_sizes,
        decoder_sizes=decoder_sizes,
    )
    directions = 2 if bidirectional else 1

    def state(size):
        return torch.randn(directions, 2, size, dtype=torch.float64, requires_grad=True)

    if cell == "lstm":
        states = [(state(n), state(n)) for n in encoder_sizes]
        leaves = [tensor for pair in states for tensor in pair]
    else:
        states = leaves = [state(n) for n in encoder_sizes]
    bridged = model.bridge(states)
    flat = [t for s in bridged for t in (s if decoder_cell == "lstm" else (s,))]
    per_layer = 2 if decoder_cell == "lstm" else 1
    assert [t.shape for t in flat] == [(1, 2, n) for n in decoder_sizes for _ in range(per_layer)]
    sum(t.sum() for t in flat).backward()
    for leaf in leaves:
        assert (leaf.grad != 0).all()


def test_learnt_bridge_is_its_equation():
    torch.manual_seed(0)
    bridge = Bridge([4, 6], [5], has_cell=True).double()
    states = [(torch.randn(2, 3, n).double(), torch.randn(2, 3, n).double()) for n in (2, 3)]
    ((h, c),) = bridge(states)
    everything = [
        torch.cat([s[part][direction] for s in states for direction in (0, 1)], -1)
        for part in (0, 1)
    ]
    hidden, cell = bridge.hidden[0], bridge.cell[0]
    torch.testing.assert_close(h[0], torch.tanh(everything[0] @ hidden.weight.T + hidden.bias))
    torch.testing.assert_close(c[0], everything[1] @ cell.weight.T + cell.bias)


def test_bridge_to_another_cell_is_its_equation():
    torch.manual_seed(0)
    given = torch.randn(1, 3, 5).double(), torch.randn(1, 3, 5).double()
    bridge = Bridge([5], [5], has_cell=False, given_cell=True).double()
    (h,) = bridge([given])
    hidden = bridge.hidden[0]
    everything = torch.cat([given[0][0], given[1][0]], -1)
    torch.testing.assert_close(h[0], torch.tanh(everything @ hidden.weight.T + hidden.bias))
    bridge = Bridge([5], [5], has_cell=True, given_cell=False).double()
    ((h, c),) = bridge([given[0]])
    hidden, cell = bridge.hidden[0], bridge.cell[0]
    torch.testing.assert_close(h[0], torch.tanh(given[0][0] @ hidden.weight.T + hidden.bias))
    torch.testing.assert_close(c[0], given[0][0] @ cell.weight.T + cell.bias)


VARIANTS = [
    pytest.param({"cell": cell, "attention": kind, **more}, id="-".join([cell, kind, *more]))
    for cell in ("lstm", "gru")
    for kind, more in (
        ("none", {}),
        ("dot", {}),
        ("general", {"decoder_sizes": [6, 7]}),
        ("additive", {"encoder_sizes": [3, 5]}),
        ("dot", {"input_feeding": True}),
        ("general", {"input_feeding": True, "tied_embeddings": True}),
        ("additive", {"input_feeding": True, "decoder_sizes": [7, 6]}),
        ("general", {"feedback": "context", "decoder_sizes": [7, 6]}),
        ("additive", {"feedback": "context", "coverage": True}),
        ("dot", {"coverage": True}),
    )
]
VARIANTS += [
    pytest.param(
        {"cell": cell, "decoder_cell": other, "decoder_sizes": [7, 6], "input_feeding": True},
        id=f"{cell}-to-{other}",
    )
    for cell, other in (("lstm", "gru"), ("gru", "lstm"))
]


@pytest.mark.parametrize("arguments", VARIANTS)
@torch.no_grad()
def test_teacher_forcing_equals_going_step_by_step(arguments):
    model = make(**arguments)
    source, lengths, target = batch([5, 2, 3], 6)
    logits, weights = model(source, lengths, target)
    state = model.encode(source, lengths)
    for t in range(target.shape[1]):
        log_probs, state = model.step(target[:, t], state)
        torch.testing.assert_close(log_probs, logits[:, t].log_softmax(-1))
    if model.attention is not None:
        assert weights.shape == (3, 6, 5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 6).double())
        assert (weights[1, :, 2:] == 0).all()


@torch.no_grad()
def test_attention_decoder_is_its_equation():
    """One step with input feeding, written out."""
    model = make(attention="general", input_feeding=True)
    source, lengths, target = batch([4], 2)
    logits, weights = model(source, lengths, target)
    keys, finals = model.encoder(model.source_embedding(source), lengths=lengths)
    h, c = (torch.cat([s[0, 0], s[1, 0]]) for s in finals[0])
    features = torch.zeros(8, dtype=torch.float64)
    for t in range(2):
        x = torch.cat([model.target_embedding.weight[target[0, t]], features])
        h, c = lstm_step(model.decoder.stack.layers[0], x, h, c)
        alpha = torch.softmax(keys[0] @ model.attention.key.weight.T @ h, 0)
        torch.testing.assert_close(weights[0, t], alpha)
        features = torch.tanh(model.decoder.combine.weight @ torch.cat([alpha @ keys[0], h]))
        expected = model.output.weight @ features + model.output.bias
        torch.testing.assert_close(logits[0, t], expected)


@torch.no_grad()
def test_attention_before_the_step_with_coverage_is_its_equation():
    """Bahdanau et al. 2014, appendix A.2.2, a GRU; coverage as in See et al. 2017, equation 11."""
    model = make(cell="gru", attention="additive", feedback="context", coverage=True)
    attention, layer = model.attention, model.decoder.stack.layers[0]
    attention.coverage.normal_()
    source, lengths, target = batch([5, 3], 3)
    logits, weights = model(source, lengths, target)
    keys, finals = model.encoder(model.source_embedding(source), lengths=lengths)
    for row, length in enumerate(lengths):
        k, h = keys[row, :length], torch.cat([finals[0][0, row], finals[0][1, row]])
        seen = torch.zeros(length, dtype=torch.float64)
        for t in range(3):
            asked = attention.query.weight @ h + k @ attention.key.weight.T + attention.key.bias
            hidden = torch.tanh(asked + seen[:, None] * attention.coverage)
            alpha = torch.softmax(hidden @ attention.energy.weight[0], 0)
            torch.testing.assert_close(weights[row, t, :length], alpha)
            seen, context = seen + alpha, alpha @ k
            x = torch.cat([model.target_embedding.weight[target[row, t]], context])
            r, z, n = (layer.weight_ih_l0 @ x + layer.bias_ih_l0).chunk(3)
            u_r, u_z, u_n = (layer.weight_hh_l0 @ h + layer.bias_hh_l0).chunk(3)
            z = torch.sigmoid(z + u_z)
            h = (1 - z) * torch.tanh(n + torch.sigmoid(r + u_r) * u_n) + z * h
            features = torch.tanh(model.decoder.combine.weight @ torch.cat([context, h]))
            expected = model.output.weight @ features + model.output.bias
            torch.testing.assert_close(logits[row, t], expected)


@pytest.mark.parametrize("arguments", VARIANTS)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_padding_order_and_company_change_nothing(arguments, data):
    model = make(**arguments, seed=data.draw(st.integers(0, 99)))
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    source, lengths, target = batch(sizes, 3, seed=data.draw(st.integers(0, 99)))
    padded = torch.nn.functional.pad(source, (0, data.draw(st.integers(1, 4))))
    order = torch.tensor(data.draw(st.permutations(range(len(sizes)))))
    logits, weights = model(source, lengths, target)
    again, more = model(padded[order], lengths[order], target[order])
    torch.testing.assert_close(again, logits[order])
    if weights is not None:
        torch.testing.assert_close(more[:, :, : source.shape[1]], weights[order])
        assert (more[:, :, source.shape[1] :] == 0).all()

    def search(source, lengths):
        state = model.encode(source, lengths)
        greedy = greedy_search(model.step, state, 2 * lengths + 2, BEGIN, END)
        beam = beam_search(model.step, state, 2 * lengths + 2, BEGIN, END, 3, 2, 0.6)
        return [(found.sequences(END), found.scores) for found in (greedy, beam)]

    together, shuffled = search(source, lengths), search(padded[order], lengths[order])
    for (found, scores), (moved, moved_scores) in zip(together, shuffled, strict=True):
        assert [found[i] for i in order.tolist()] == moved
        torch.testing.assert_close(moved_scores, scores[order])
    for row, size in enumerate(sizes):
        alone, _ = model(
            source[row : row + 1, :size], lengths[row : row + 1], target[row : row + 1]
        )
        torch.testing.assert_close(alone[0], logits[row])
        for (found, _), (single, _) in zip(
            together, search(source[row : row + 1, :size], lengths[row : row + 1]), strict=True
        ):
            assert single[0] == found[row]


def fed_symbols(model, *arguments):
    """The symbols that the decoder is fed in one forward pass, [B, T]."""
    fed = []
    handle = model.decoder.register_forward_hook(
        lambda _, args, found: fed.append(found[0].symbols)
    )
    logits, _ = model(*arguments)
    handle.remove()
    return fed[0], logits


@torch.no_grad()
def test_scheduled_sampling_decides_for_each_symbol():
    model = make()
    source, lengths, target = batch([5] * 64, 8)
    torch.manual_seed(1)
    fed, _ = fed_symbols(model, source, lengths, target, 0.5)
    assert torch.equal(fed[:, 0], target[:, 0])
    kept = (fed == target)[:, 1:]
    # half of the symbols are the given ones, and of the others one in eight by chance
    assert 0.45 < kept.double().mean() < 0.68
    assert (kept.any(1) & ~kept.all(1)).double().mean() > 0.9
    assert (kept.any(0) & ~kept.all(0)).all()


@torch.no_grad()
def test_scheduled_sampling_at_its_ends():
    model = make()
    source, lengths, target = batch([3, 5], 6)
    other = target.clone()
    other[:, 1:] = target[:, 1:].flip(0).roll(1, 1)
    plain, _ = model(source, lengths, target)
    almost_never, _ = model(source, lengths, target, 1e-12)
    torch.testing.assert_close(almost_never, plain)
    results = []
    for given_target in (target, other):
        torch.manual_seed(3)
        fed, logits = fed_symbols(model, source, lengths, given_target, 1.0)
        results.append((fed, logits))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_without_feedback_layers_and_attention_are_called_once():
    model = make()
    source, lengths, target = batch([3, 5], 6)
    calls = []
    for module in (model.decoder.stack, model.attention):
        module.register_forward_hook(lambda _, args, __: calls.append(args[0].shape))
    model(source, lengths, target)
    assert calls == [(2, 6, 5), (2, 6, 8)]


def test_tied_embeddings_share_one_parameter():
    model = make(tied_embeddings=True)
    assert model.output.weight is model.target_embedding.weight
    assert sum(p.shape == (TARGET, 5) for p in model.parameters()) == 1


def test_dropout_acts_in_training_only():
    model = make(dropout=0.5)
    arguments = batch([4, 4], 5)
    assert torch.equal(model(*arguments)[0], model(*arguments)[0])
    model.train()
    assert not torch.equal(model(*arguments)[0], model(*arguments)[0])


@pytest.mark.parametrize("arguments", VARIANTS)
def test_every_parameter_learns(arguments):
    model = make(**arguments)
    source, lengths, target = batch([3, 5], 6)
    model(source, lengths, target)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embedding_size": 0}, "embedding_size must be at least 1, got 0"),
        ({"encoder_sizes": []}, r"encoder_sizes must be one or more positive sizes, got \[\]"),
        ({"decoder_sizes": [8, 0]}, r"decoder_sizes must be one or more positive .* \[8, 0\]"),
        ({"attention": "bilinear"}, "attention must be one of none, dot"),
        ({"attention": "dot", "decoder_sizes": [6]}, "query_size == key_size, got 6 and 8"),
        ({"attention": "none", "input_feeding": True}, "input_feeding .* needs an attention"),
        ({"attention": "none", "tied_embeddings": True}, "embedding_size == decoder_sizes"),
        ({"cell": "qrnn"}, "cell must be one of lstm"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize("lengths", [[0, 3], [4, 3], [-1, 2]], ids=str)
def test_wrong_lengths_are_refused(lengths):
    source, _, target = batch([3, 2], 2)
    with pytest.raises(ValueError, match="lengths"):
        make()(source, torch.tensor(lengths), target)


@pytest.mark.parametrize("arguments", VARIANTS)
def test_autocast_to_bfloat16(arguments):
    """Tolerance: bf16 has 8 bits, so each of a dozen roundings is off by at most 2^-9."""
    model = make(**arguments).float()
    source, lengths, target = batch([3, 5], 4)
    exact, _ = model(source, lengths, target)
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights = model(source, lengths, target)
        state = model.encode(source, lengths)
        log_probs, _ = model.step(target[:, 0], state)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(logits.float(), exact, atol=12 * 2**-9, rtol=12 * 2**-9)
    if weights is not None:
        assert (weights[0, :, 3:] == 0).all()
    logits.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("arguments", VARIANTS)
@torch.no_grad()
def test_hypotheses_that_share_a_source_are_as_with_copies_of_it(arguments):
    model = make(**arguments)
    source, lengths, _ = batch([5, 2, 4], 3)
    shared = copied = model.encode(source, lengths)
    symbols = torch.tensor([3, 4, 5, 3, 4, 5])
    for rows, sources in (
        ([0, 0, 1, 1, 2, 2], [0, 1, 2]),
        ([1, 0, 2, 2, 5, 4], [0, 1, 2]),
        ([1, 1, 5, 4], [0, 2]),
        ([3, 2, 1], None),
    ):
        kept = None if sources is None else torch.tensor(sources)
        shared, copied = shared.select(torch.tensor(rows), kept), copied.select(torch.tensor(rows))
        assert len(shared.source.lengths) == len(rows if sources is None else sources)
        found, shared = model.step(symbols[: len(rows)], shared)
        expected, copied = model.step(symbols[: len(rows)], copied)
        torch.testing.assert_close(found, expected)
