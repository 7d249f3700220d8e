import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedrnn

CELLS = {
    "lstm": lambda **k: fusedrnn.LSTM(3, 4, **k),
    "lstm_peephole": lambda **k: fusedrnn.LSTM(3, 4, peephole=True, **k),
    "lstm_layernorm": lambda **k: fusedrnn.LSTM(3, 4, layer_norm=True, **k),
    "gru": lambda **k: fusedrnn.GRU(3, 4, **k),
    "gru_reset_before": lambda **k: fusedrnn.GRU(3, 4, reset_after=False, **k),
    "rnn": lambda **k: fusedrnn.RNN(3, 4, **k),
    "stack": lambda **k: fusedrnn.RecurrentStack(
        3, [4, 2, 5], residual=True, layer_norm=True, bidirectional=k.get("bidirectional", False)
    ).to(k["dtype"]),
}
batches = st.lists(st.integers(1, 7), min_size=1, max_size=5)
cells = st.sampled_from(sorted(CELLS))
seeds = st.integers(0, 2**31)


def build(cell, seed, **options):
    torch.manual_seed(seed)
    return CELLS[cell](dtype=torch.float64, **options)


def states(final):
    """Every state tensor, batch in the second dimension."""
    if isinstance(final, torch.Tensor):
        return [final]
    return [tensor for part in final for tensor in states(part)]


@settings(max_examples=60, deadline=None)
@given(cells, batches, seeds, st.booleans(), st.sampled_from([1e3, -1e30, float("nan")]))
def test_content_and_amount_of_padding_change_nothing(cell, lengths, seed, bidirectional, garbage):
    layer = build(cell, seed, bidirectional=bidirectional)
    lengths = torch.tensor(lengths)
    steps = int(lengths.max())
    x = torch.randn(steps, len(lengths), 3, dtype=torch.float64)
    longer = torch.cat([x, x.new_zeros(2, len(lengths), 3)])
    longer[torch.arange(steps + 2)[:, None] >= lengths] = garbage
    y, final = layer(x, lengths=lengths)
    y_longer, final_longer = layer(longer, lengths=lengths)
    torch.testing.assert_close(y_longer[:steps], y)
    assert not y_longer[steps:].any()
    for actual, expected in zip(states(final_longer), states(final), strict=True):
        torch.testing.assert_close(actual, expected)


@settings(max_examples=60, deadline=None)
@given(cells, batches, seeds, st.booleans(), st.randoms(use_true_random=False))
def test_order_of_the_batch_is_kept(cell, lengths, seed, bidirectional, random):
    layer = build(cell, seed, bidirectional=bidirectional)
    lengths = torch.tensor(lengths)
    x = torch.randn(int(lengths.max()), len(lengths), 3, dtype=torch.float64)
    order = torch.tensor(random.sample(range(len(lengths)), len(lengths)))
    y, final = layer(x, lengths=lengths)
    y_other, final_other = layer(x[:, order], lengths=lengths[order])
    torch.testing.assert_close(y_other, y[:, order])
    for actual, expected in zip(states(final_other), states(final), strict=True):
        torch.testing.assert_close(actual, expected[:, order])


@settings(max_examples=60, deadline=None)
@given(cells, st.integers(1, 6), st.integers(1, 3), seeds)
def test_streaming_equals_the_whole_sequence(cell, steps, batch, seed):
    layer = build(cell, seed)
    x = torch.randn(steps, batch, 3, dtype=torch.float64)
    y, final = layer(x)
    state, outputs = None, []
    for x_t in x:
        y_t, state = layer.step(x_t, state)
        outputs.append(y_t)
    torch.testing.assert_close(torch.stack(outputs), y)
    for actual, expected in zip(states(state), states(final), strict=True):
        torch.testing.assert_close(actual, expected)
