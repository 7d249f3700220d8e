import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm

import fusedrnn
from fusedrnn.stack import LAYERS
from kernels import CELLS

I, B, T = 5, 4, 6  # noqa: E741
LENGTHS = torch.tensor([3, 6, 1, 5])


def test_every_cell_has_a_layer():
    assert set(CELLS) <= set(LAYERS)


def test_the_notes_architecture():
    stack = fusedrnn.RecurrentStack(I, [512, 512, 256], bidirectional=True, dropout=0.5)
    assert [layer.input_size for layer in stack.layers] == [I, 1024, 1024]
    assert (stack.hidden_sizes, stack.num_directions, stack.output_size) == (
        [512, 512, 256],
        2,
        512,
    )
    assert stack(torch.randn(2, 1, I))[0].shape == (2, 1, 512)


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_is_the_layers_one_over_another(cell, batch_first):
    stack = fusedrnn.RecurrentStack(
        I, [4, 3], cell=cell, bidirectional=True, batch_first=batch_first, dtype=torch.float64
    )
    x = torch.randn(*((B, T) if batch_first else (T, B)), I, dtype=torch.float64)
    y, states = stack(x, lengths=LENGTHS)
    below, first = stack.layers[0](x, lengths=LENGTHS)
    above, second = stack.layers[1](below, lengths=LENGTHS)
    assert torch.equal(y, above)
    for actual, expected in zip(states, (first, second), strict=True):
        assert type(actual) is type(expected)
    again, _ = stack(x, states, lengths=LENGTHS)
    assert not torch.equal(again, y)


def test_residual_and_layer_norm():
    stack = fusedrnn.RecurrentStack(I, [4, 4, 3], "gru", residual=True, layer_norm=True)
    x = torch.randn(T, B, I)
    one = stack.layers[0](x)[0]
    two = one + stack.layers[1](layer_norm(one, (4,)))[0]
    three = two @ stack.shortcuts[1].weight.T + stack.layers[2](layer_norm(two, (4,)))[0]
    torch.testing.assert_close(stack(x)[0], three)
    assert isinstance(stack.shortcuts[0], nn.Identity)


def test_output_past_the_end_is_zero_with_residual_and_layer_norm():
    stack = fusedrnn.RecurrentStack(
        I, [4, 4, 3], residual=True, layer_norm=True, bidirectional=True
    )
    for norm in stack.norms:
        nn.init.normal_(norm.bias)
    y, _ = stack(torch.randn(T, B, I), lengths=LENGTHS)
    assert not y[torch.arange(T)[:, None] >= LENGTHS].any()


def test_dropout_acts_between_layers_in_training_only():
    stack = fusedrnn.RecurrentStack(I, [4, 4], dropout=0.5)
    x = torch.randn(T, B, I)
    assert not torch.equal(stack(x)[0], stack(x)[0])
    assert torch.equal(stack.eval()(x)[0], stack(x)[0])
    single = fusedrnn.RecurrentStack(I, [4], dropout=0.5)
    assert torch.equal(single(x)[0], single(x)[0])


def test_cell_options_reach_every_layer():
    stack = fusedrnn.RecurrentStack(I, [4, 3], peephole=True, recurrent_dropout=0.25, bias=False)
    assert all(layer.peephole and layer.recurrent_dropout == 0.25 for layer in stack.layers)
    assert "bias_ih_l0" not in dict(stack.layers[1].named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_sizes": []}, "hidden_sizes must name at least one layer"),
        ({"hidden_sizes": [4, 0]}, "hidden_size must be greater than zero"),
        ({"hidden_sizes": [4], "cell": "qrnn"}, "cell must be one of lstm, "),
        ({"hidden_sizes": [4, 4], "dropout": 1.5}, "dropout probability has to be between 0 and 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fusedrnn.RecurrentStack(I, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_sizes": 4}, "hidden_sizes must be a list with one size a layer, got 4"),
        ({"hidden_sizes": [4], "num_layers": 2}, "num_layers is not an argument: hidden_sizes"),
    ],
)
def test_layers_are_named_by_their_sizes(arguments, message):
    with pytest.raises(TypeError, match=message):
        fusedrnn.RecurrentStack(3, **arguments)


def test_bad_states():
    stack = fusedrnn.RecurrentStack(I, [4, 4])
    with pytest.raises(ValueError, match="states must have one entry per layer, 2, got 1"):
        stack(torch.randn(T, B, I), [None])


def test_packed_sequences_are_refused():
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(T, B, I), LENGTHS, enforce_sorted=False)
    with pytest.raises(TypeError, match="x must be a tensor, with lengths if padded, got Packed"):
        fusedrnn.RecurrentStack(I, [4, 4])(packed)


def test_bidirectional_stack_refuses_to_stream():
    stack = fusedrnn.RecurrentStack(I, [4, 4], bidirectional=True)
    with pytest.raises(RuntimeError, match="bidirectional layer cannot stream"):
        stack.step(torch.randn(B, I))


def test_each_layer_has_its_own_cell_direction_and_masks():
    stack = fusedrnn.RecurrentStack(
        I,
        [4, 3, 2],
        ["lstm_peephole", "gru", "rnn_relu"],
        bidirectional=[True, False, True],
        recurrent_dropout=[0.1, 0.2, 0.3],
        zoneout=[0.0, 0.1, 0.0],
        dtype=torch.float64,
    )
    assert [layer.cell for layer in stack.layers] == ["lstm_peephole", "gru", "rnn_relu"]
    assert [layer.input_size for layer in stack.layers] == [I, 8, 3]
    assert [layer.recurrent_dropout for layer in stack.layers] == [0.1, 0.2, 0.3]
    assert [layer.zoneout for layer in stack.layers] == [0.0, 0.1, 0.0]
    assert (stack.output_size, stack.num_directions) == (4, 2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    y, states = stack.eval()(x, lengths=LENGTHS)
    expected = x
    for layer, state in zip(stack.layers, states, strict=True):
        expected, final = layer(expected, lengths=LENGTHS)
        assert type(final) is type(state)
    assert torch.equal(y, expected)


def test_projected_layers_fit_on_each_other():
    stack = fusedrnn.RecurrentStack(I, [4, 5], bidirectional=True, proj_size=2)
    assert stack(torch.randn(T, B, I))[0].shape == (T, B, stack.output_size) == (T, B, 4)


def test_highway():
    stack = fusedrnn.RecurrentStack(I, [4, 4, 3], "gru", highway=True)
    x = torch.randn(T, B, I)
    expected = [stack.layers[0](x)[0]]
    for layer, gate, shortcut in zip(stack.layers[1:], stack.gates, stack.shortcuts, strict=True):
        assert (gate.bias == -1).all()
        below = expected[-1]
        g = torch.sigmoid(gate(below))
        expected.append(g * layer(below)[0] + (1 - g) * shortcut(below))
    y, _, layers = stack(x, return_layers=True)
    assert layers[-1] is y
    for actual, wanted in zip(layers, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    padded, _ = stack(x, lengths=LENGTHS)
    assert not padded[torch.arange(T)[:, None] >= LENGTHS].any()


@pytest.mark.parametrize("batch_first", [False, True], ids=["time-first", "batch-first"])
def test_variational_dropout_draws_one_mask_for_a_sequence(batch_first):
    stack = fusedrnn.RecurrentStack(
        I, [40, 3], dropout=0.5, variational_dropout=True, batch_first=batch_first
    )
    x = torch.randn(*((B, T) if batch_first else (T, B)), I)
    time = 1 if batch_first else 0
    first = stack(x, return_layers=True)[2][0]
    whole = stack.layers[0](x)[0]
    kept = (first / whole).detach()
    assert torch.allclose(kept, kept.narrow(time, 0, 1).expand_as(kept))
    assert set(kept.round().unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(kept.select(1 - time, 0), kept.select(1 - time, 1))
    assert torch.equal(stack.eval()(x)[0], stack.layers[1](whole)[0])
    row = stack.train()(x.select(1 - time, 0), return_layers=True)[2][0]
    shares = row / stack.layers[0](x.select(1 - time, 0))[0]
    assert torch.allclose(shares, shares[:1].expand_as(shares))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_learned_initial_states(cell):
    stack = fusedrnn.RecurrentStack(
        I, [4, 3], cell, bidirectional=[True, False], learned_states=True, dtype=torch.float64
    )
    plain = fusedrnn.RecurrentStack(I, [4, 3], cell, bidirectional=[True, False]).double()
    plain.load_state_dict(stack.state_dict(), strict=False)
    x = torch.randn(T, B, I, dtype=torch.float64)
    assert torch.equal(stack(x)[0], plain(x)[0])
    for state in stack.initial_states.parameters():
        nn.init.normal_(state)
    given = [[s.expand(-1, B, -1).contiguous() for s in layer] for layer in stack.initial_states]
    given = [tuple(layer) if cell == "lstm" else layer[0] for layer in given]
    for lengths in (None, LENGTHS):
        torch.testing.assert_close(
            stack(x, lengths=lengths)[0], plain(x, given, lengths=lengths)[0]
        )
    torch.testing.assert_close(stack(x, [None, given[1]])[0], plain(x, given)[0])
    torch.testing.assert_close(stack(x[:, 0])[0], stack(x)[0][:, 0])
    stack(x)[0].sum().backward()
    assert all(state.grad.abs().sum() > 0 for state in stack.initial_states.parameters())


def test_a_state_dict_of_a_plain_stack_still_loads():
    names = list(fusedrnn.RecurrentStack(I, [4, 3], residual=True, layer_norm=True).state_dict())
    lstm = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    above = ["norms.0.weight", "norms.0.bias", "shortcuts.0.weight"]
    assert names == [*(f"layers.{i}.{name}" for i in (0, 1) for name in lstm), *above]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cell": ["lstm"]}, "cell must be one value or one per layer, 2, got 1"),
        ({"cell": ["lstm", "qrnn"]}, "cell must be one of lstm, "),
        ({"bidirectional": [True] * 3}, "bidirectional must be one value or one per layer, 2, got"),
        ({"zoneout": [0.5]}, "zoneout must be one value or one per layer, 2, got 1"),
        ({"zoneout": [0.5, 1.5]}, "zoneout must be "),
        ({"residual": True, "highway": True}, "residual and highway exclude each other"),
    ],
)
def test_bad_values_of_each_layer(arguments, message):
    with pytest.raises(ValueError, match=message):
        fusedrnn.RecurrentStack(I, [4, 3], **arguments)
