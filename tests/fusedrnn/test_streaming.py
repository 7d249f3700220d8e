import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import fusedrnn
from fusedrnn import streaming
from fusedrnn.stack import LAYERS

I, H = 3, 4  # noqa: E741
MODULES = {name: partial(layer, I, H) for name, layer in LAYERS.items()} | {
    "two_layers": partial(fusedrnn.LSTM, I, H, 2, dropout=0.5),
    "no_bias": partial(fusedrnn.GRU, I, H, bias=False, reset_after=False),
    "projection": partial(fusedrnn.LSTM, I, H, proj_size=2),
    "peephole_projection": partial(fusedrnn.LSTM, I, H, proj_size=2, peephole=True),
    "zoneout": partial(fusedrnn.LSTM, I, H, zoneout=0.3, recurrent_dropout=0.3),
    "stack": partial(
        fusedrnn.RecurrentStack,
        I,
        [H, 5, 2],
        ["lstm", "gru_reset_before", "rnn"],
        highway=True,
        layer_norm=True,
        learned_states=True,
    ),
}


def build(name, **options):
    torch.manual_seed(0)
    module = MODULES[name](**options).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def assert_same(actual, expected, **tolerance):
    actual, expected = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.integers(0, 3), st.booleans(), st.integers(0, 99))
def test_is_the_whole_sequence(name, steps, batch, continued, seed):
    module = build(name, dtype=torch.float64)
    torch.manual_seed(seed)
    shape = (steps, batch, I) if batch else (steps, I)
    x, before = torch.randn(2, *shape, dtype=torch.float64)
    state = module(before)[1] if continued else None
    y, final = module(x, state)
    stream = module.stream(state)
    assert_same(torch.stack([stream(x_t) for x_t in x]), y.detach())
    assert_same(stream.state, pytree.tree_map(torch.Tensor.detach, final))


@pytest.mark.parametrize("name", MODULES)
def test_in_single_precision_to_its_last_bits(name):
    module, x = build(name), torch.randn(50, 2, I)
    stream = module.stream()
    streamed = torch.stack([stream(x_t) for x_t in x])
    assert_same(streamed, module(x)[0].detach(), rtol=0, atol=50 * torch.finfo().eps)


@pytest.mark.parametrize("name", ["lstm", "gru_reset_before"])
def test_in_bfloat16(name):
    module, x = build(name, dtype=torch.bfloat16), torch.randn(9, 2, I).bfloat16()
    stream = module.stream()
    streamed = torch.stack([stream(x_t) for x_t in x])
    assert streamed.dtype == torch.bfloat16
    assert_same(streamed, module(x)[0].detach(), rtol=0, atol=2**-8)


def test_follows_no_gradients_and_draws_no_dropout():
    layer = fusedrnn.LSTM(I, H, 2, dropout=0.5, recurrent_dropout=0.5).train()
    x = torch.randn(5, 2, I, requires_grad=True)
    stream = layer.stream()
    streamed = torch.stack([stream(x_t) for x_t in x])
    assert not streamed.requires_grad
    assert_same(streamed, layer.eval()(x)[0].detach())


@pytest.mark.parametrize(
    "module",
    [
        fusedrnn.GRU(I, H, bidirectional=True),
        fusedrnn.RecurrentStack(I, [H, H], bidirectional=[False, True]),
    ],
    ids=["layer", "stack"],
)
def test_a_bidirectional_layer_refuses_and_says_why(module):
    with pytest.raises(RuntimeError, match="its second direction starts at the last step"):
        module.stream()


def test_bad_arguments():
    layer = fusedrnn.LSTM(I, H)
    stream = layer.stream()
    stream(torch.randn(2, I))
    for x_t, message in (
        (torch.randn(2, 5), "x_t must have shape [B, 3] or [3], got [2, 5]"),
        (torch.randn(3, I), "x_t must have 2 rows, as the state has, got 3"),
        (torch.randn(1, 2, I), "x_t must have shape [B, 3] or [3], got [1, 2, 3]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            stream(x_t)
    with pytest.raises(ValueError, match=re.escape("state must hold [1, B, 4], got [2, 2, 4]")):
        layer.stream((torch.zeros(2, 2, H), torch.zeros(2, 2, H)))
    with pytest.raises(ValueError, match="states must have one entry per layer, 2, got 1"):
        fusedrnn.RecurrentStack(I, [H, H]).stream([None])


@pytest.mark.parametrize("name", MODULES)
def test_steps_keep_their_memory(name):
    """What a CUDA graph of a step reads and writes stays where it is."""
    module = build(name)
    stream = module.stream()
    y = stream(torch.randn(2, I))
    kept = y.clone()
    streams = getattr(stream, "_streams", [stream])
    places = [[t.data_ptr() for s in it._steppers for t in s.state] for it in streams]
    stream(torch.randn(2, I))
    assert [[t.data_ptr() for s in it._steppers for t in s.state] for it in streams] == places
    assert torch.equal(y, kept)


def test_given_states_stay_as_they_are():
    for name in ("lstm", "gru", "stack"):
        module = build(name)
        state = module(torch.randn(3, 2, I))[1]
        before = pytree.tree_map(torch.clone, state)
        stream = module.stream(state)
        stream(torch.randn(2, I))
        stream(torch.randn(2, I))
        assert_same(state, before, rtol=0, atol=0)


def test_a_step_that_cannot_be_captured_goes_on_without(monkeypatch):
    def refuse(step, x):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(streaming, "Captured", refuse)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("lstm", "stack"):
        module, x = build(name), torch.randn(4, 2, I)
        stream = module.stream()
        with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted$"):
            streamed = torch.stack([stream(x_t.as_subclass(OnGpu)) for x_t in x])
        assert_same(streamed.as_subclass(torch.Tensor), module(x)[0].detach())


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("batch", [0, 1, 3], ids=["unbatched", "one", "three"])
def test_replays_a_graph_on_a_gpu(name, batch):
    module = build(name)
    x = torch.randn(6, batch, I) if batch else torch.randn(6, I)
    expected, final = module(x)
    module.cuda()
    stream = module.stream()
    outputs = [stream(x_t) for x_t in x.cuda()]
    assert isinstance(stream._advance, streaming.Captured)
    assert_same(torch.stack(outputs).cpu(), expected.detach(), rtol=0, atol=1e-5)
    assert_same(
        pytree.tree_map(lambda s: s.detach().cpu(), stream.state),
        pytree.tree_map(torch.Tensor.detach, final),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.gpu
def test_steps_of_another_kind_between_replays():
    """Another dtype takes the step itself, on the same state."""
    module = fusedrnn.RecurrentStack(I, [H, H]).cuda()
    x = torch.randn(6, 2, I, device="cuda")
    expected = module(x)[0]
    stream = module.stream()
    outputs = []
    for t, x_t in enumerate(x):
        outputs.append(stream(x_t.double() if t == 3 else x_t).float())
    assert_same(torch.stack(outputs), expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_inside_another_capture_a_step_is_part_of_it():
    layer = build("lstm").cuda()
    x = torch.randn(2, I, device="cuda")
    stream = layer.stream()
    stream(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream(x)
    graph.replay()
    expected = layer(x.expand(2, 2, I))[1]
    assert_same(stream.state, pytree.tree_map(torch.Tensor.detach, expected), rtol=0, atol=1e-5)
