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


def test_bad_states():
    stack = fusedrnn.RecurrentStack(I, [4, 4])
    with pytest.raises(ValueError, match="states must have one entry per layer, 2, got 1"):
        stack(torch.randn(T, B, I), [None])


def test_bidirectional_stack_refuses_to_stream():
    stack = fusedrnn.RecurrentStack(I, [4, 4], bidirectional=True)
    with pytest.raises(RuntimeError, match="bidirectional layer cannot stream"):
        stack.step(torch.randn(B, I))
