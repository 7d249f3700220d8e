"""LSTMs over padded batches on a CPU: padded steps that hold the state against a packed batch."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kernels import narrow, native

T, I, H = 6, 5, 7  # noqa: E741
LENGTHS = torch.tensor([6, 5, 3, 6])


def lstm(**options):
    torch.manual_seed(0)
    return nn.LSTM(I, H, **options)


def zeros(layer, rows):
    directions = 2 if layer.bidirectional else 1
    return [torch.zeros(layer.num_layers * directions, rows, H) for _ in range(2)]


def run(layer, x, lengths, state=None):
    """Our function with the weights of a layer of torch: output and both final states."""
    y, state = native.padded_stack(
        "lstm",
        x,
        list(layer.parameters()),
        zeros(layer, len(lengths)) if state is None else state,
        layers=layer.num_layers,
        directions=2 if layer.bidirectional else 1,
        training=layer.training,
        batch_first=layer.batch_first,
        lengths=lengths,
    )
    return y, *state


def packed(layer, x, lengths):
    batch = pack_padded_sequence(x, lengths, layer.batch_first, enforce_sorted=False)
    y, state = layer(batch)
    steps = x.shape[1 if layer.batch_first else 0]
    return pad_packed_sequence(y, layer.batch_first, total_length=steps)[0], *state


@pytest.fixture
def unpacked(monkeypatch):
    """A batch that is packed is a failure."""
    monkeypatch.delattr(native, "packed_stack")


@pytest.fixture
def not_held(monkeypatch):
    """A batch whose padded steps hold the state is a failure."""
    monkeypatch.delattr(native, "_held_stack")


@pytest.fixture(params=["together", "in-groups", "as-columns"])
def each_way(request, monkeypatch):
    """The ways to run padded rows, even where they do not pay."""
    if request.param == "in-groups":
        monkeypatch.setattr(native, "STEP", 0)
        monkeypatch.setattr(native, "CALL", 0)
    monkeypatch.setattr(narrow, "short", lambda *_: request.param == "as-columns")
    monkeypatch.setattr(narrow, "suits", lambda *_: True)


@pytest.mark.usefixtures("unpacked", "each_way")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("result", [0, 1, 2, None], ids=["y", "h_n", "c_n", "all"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"bidirectional": True, "num_layers": 2}, id="2-layers-bidirectional"),
        pytest.param({"bidirectional": True, "bias": False, "batch_first": True}, id="no-bias"),
    ],
)
def test_agrees_with_a_packed_batch(options, result, training):
    layer = lstm(**options).train(training)
    shape = (len(LENGTHS), T) if layer.batch_first else (T, len(LENGTHS))
    x = torch.randn(*shape, I, requires_grad=True)
    both = []
    for function in (run, packed):
        results = function(layer, x, LENGTHS)
        chosen = results if result is None else results[result : result + 1]
        loss = sum((r * torch.arange(r.numel()).view_as(r).cos()).sum() for r in chosen)
        both.append([*results, *torch.autograd.grad(loss, [x, *layer.parameters()])])
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("unpacked", "each_way")
def test_what_stands_in_the_padding_is_not_read():
    layer = lstm(bidirectional=True)
    x = torch.randn(T, len(LENGTHS), I)
    spoilt = x.masked_fill((torch.arange(T)[:, None] >= LENGTHS)[..., None], torch.nan)
    spoilt.requires_grad_()
    results = run(layer, spoilt, LENGTHS)
    for ours, theirs in zip(results, run(layer, x, LENGTHS), strict=True):
        assert torch.equal(ours, theirs)
    sum(r.sum() for r in results).backward()
    assert all(p.grad.isfinite().all() for p in [spoilt, *layer.parameters()])


@pytest.mark.usefixtures("unpacked")
@given(scale=st.sampled_from([1e-3, 1.0, 1e3]), shortest=st.integers(1, T), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_padding_holds_the_state_exactly(scale, shortest, seed):
    layer, lengths = lstm(bidirectional=True), torch.tensor([T, T, T, T, T, shortest])
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(scale)
        x = torch.randn(T, len(lengths), I)
        y, h, c = run(layer, x, lengths)
        alone = layer(x[:shortest, -1:])
    assert torch.equal(y[shortest:, -1], torch.zeros(T - shortest, 2 * H))
    assert torch.equal(h[0, -1], y[shortest - 1, -1, :H])
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * max(1.0, scale)}
    torch.testing.assert_close(y[:shortest, -1], alone[0][:, 0], **tolerance)
    torch.testing.assert_close(torch.stack([h, c])[:, :, -1], torch.stack(alone[1])[:, :, 0])


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), call=st.integers(0, 500))
def test_groups_cost_no_more_than_one(lengths, call):
    lengths = sorted(lengths, reverse=True)
    groups = native._groups(lengths, call)
    ends = list(itertools.accumulate(groups))
    assert ends[-1] == len(lengths) and min(groups) > 0
    assert all(lengths[end - 1] > lengths[end] for end in ends[:-1])
    starts = [0, *ends[:-1]]

    def cost(first, end):
        return lengths[first] * (end - first + native.STEP) + call

    assert sum(map(cost, starts, ends)) <= cost(0, len(lengths))
    assert len(groups) == 1 or call < 40 * len(lengths)


@pytest.mark.parametrize(
    ("hidden", "steps", "rows", "gradient", "way"),
    [
        pytest.param(128, 3, 12, True, "columns", id="narrow-and-short"),
        pytest.param(129, 3, 12, True, "groups", id="wide"),
        pytest.param(128, 3, 11, True, "groups", id="long"),
        pytest.param(64, 3, 12, False, "columns", id="narrow-without-gradient"),
        pytest.param(65, 3, 12, False, "packed", id="less-narrow-without-gradient"),
        pytest.param(129, 3, 12, False, "groups", id="wide-without-gradient"),
    ],
)
def test_many_short_rows_run_as_columns(monkeypatch, hidden, steps, rows, gradient, way):
    calls = []
    ways = {
        (narrow, "stack"): "columns",
        (native, "_grouped_stack"): "groups",
        (native, "packed_stack"): "packed",
    }
    for (module, name), said in ways.items():
        function = getattr(module, name)

        def counted(*args, function=function, said=said, **options):
            calls.append(said)
            return function(*args, **options)

        monkeypatch.setattr(module, name, counted)
    layer = nn.LSTM(2, hidden)
    zero = [torch.zeros(1, rows, hidden) for _ in range(2)]
    lengths = torch.full((rows,), steps)
    lengths[0] = 1
    x = torch.randn(steps, rows, 2)
    with torch.set_grad_enabled(gradient):
        results = run(layer, x, lengths, zero)
    assert calls == [way]
    for ours, theirs in zip(results, packed(layer, x, lengths), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def test_the_gradient_of_columns_is_not_differentiable():
    layer, zero = nn.LSTM(2, 3), [torch.zeros(1, 8, 3) for _ in range(2)]
    x = torch.randn(1, 8, 2, requires_grad=True)
    y, *_ = run(layer, x, torch.ones(8, dtype=torch.int64), zero)
    with pytest.raises(RuntimeError, match=r"differentiable once.*backend='reference'"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_long_row_among_short_ones_runs_alone():
    assert native._groups([500, *[20] * 31], 200) == [1, 31]
    assert native._groups([20] * 32, 0) == [32]


@pytest.mark.usefixtures("not_held")
@pytest.mark.parametrize("case", ["initial-state", "float64", "gradient-of-state"])
def test_what_is_packed_after_all(case):
    layer, x = lstm(bidirectional=True), torch.randn(T, len(LENGTHS), I)
    lengths, state = LENGTHS, zeros(layer, len(LENGTHS))
    if case == "initial-state":
        state[1][0, 0, 0] = 1.0
    if case == "gradient-of-state":
        state[0].requires_grad_()
    if case == "float64":
        layer, x, state = layer.double(), x.double(), [s.double() for s in state]
    results = run(layer, x, lengths, state)
    batch = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, final = layer(batch, tuple(state))
    expected = pad_packed_sequence(y, total_length=T)[0], *final
    assert all(map(torch.equal, results, expected))
