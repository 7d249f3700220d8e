import pytest
import torch

from kernels import CELLS
from kernels.reference import STEPS, recurrence
from tests.kernels.cases import outputs, random_layer


def test_every_cell_has_a_step():
    assert STEPS.keys() == CELLS.keys()


@pytest.mark.parametrize("lengths", [None, [3, 1]], ids=["full", "lengths"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell, lengths):
    layer = random_layer(cell, steps=3, batch=2, inputs=2, hidden=3, directions=2)
    lengths = None if lengths is None else torch.tensor(lengths)
    leaves = layer.leaves()

    def run(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        fresh = layer._replace(
            **{name: named.get(name) for name in ("x", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")},
            params={name: named[name] for name in layer.params},
            state=[named[name] for name in ("h_0", "c_0") if name in named],
        )
        return tuple(outputs(recurrence, fresh, lengths=lengths).values())

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


@pytest.mark.parametrize("cell", ["lstm_peephole", "gru_reset_before"])
def test_gradients_of_gradients(cell):
    layer = random_layer(cell, steps=2, batch=1, inputs=2, hidden=2)

    def run(x, w_hh):
        return outputs(recurrence, layer._replace(x=x, w_hh=w_hh))["y"]

    assert torch.autograd.gradgradcheck(run, (layer.x, layer.w_hh))


def test_zoneout_keeps_the_expectation_in_evaluation():
    layer = random_layer("lstm", steps=1)
    new, old = outputs(recurrence, layer), layer.state
    zoned = outputs(recurrence, layer, zoneout=0.25)
    for name, before in zip(("h_n", "c_n"), old, strict=True):
        torch.testing.assert_close(zoned[name], 0.75 * new[name] + 0.25 * before)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_dropout_of_everything_but_epsilon_leaves_the_input_alone(cell):
    """With h hidden from the product, the gates see the input only, whatever W_hh holds."""
    layer = random_layer(cell, steps=1)
    options = {"recurrent_dropout": 1 - 2**-32, "training": True}
    changed = layer._replace(w_hh=layer.w_hh * 3)
    torch.testing.assert_close(
        outputs(recurrence, layer, **options)["y"], outputs(recurrence, changed, **options)["y"]
    )
