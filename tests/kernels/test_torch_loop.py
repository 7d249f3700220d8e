import pytest
import torch

from kernels import CELLS, reference, torch_loop
from tests.kernels.cases import assert_same, outputs, outputs_and_gradients, random_layer

SHAPES = [
    pytest.param({"steps": 6, "batch": 4, "inputs": 3, "hidden": 7}, [3, 6, 1, 5], id="T6-B4-H7"),
    pytest.param({"steps": 1, "batch": 2, "inputs": 1, "hidden": 3}, [1, 1], id="T1-B2-H3"),
    pytest.param({"steps": 5, "batch": 1, "inputs": 2, "hidden": 1}, [3], id="T5-B1-H1"),
]
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"recurrent_dropout": 0.4, "training": True, "seed": 3}, id="recurrent_dropout"),
    pytest.param({"zoneout": 0.4, "training": True, "seed": 3}, id="zoneout"),
    pytest.param({"zoneout": 0.4}, id="zoneout-eval"),
]
# float64: a few hundred roundings of 1e-16 each.
TOLERANCE = 1e-12


@pytest.fixture(params=[torch_loop.BY_GATE, (0, 0)], ids=["together", "by_gate"])
def product(request, monkeypatch):
    """The recurrent product of small sizes, with all gates at once and gate by gate."""
    monkeypatch.setattr(torch_loop, "BY_GATE", request.param)


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize(("shape", "lengths"), SHAPES)
@pytest.mark.parametrize("directions", [1, 2], ids=["D1", "D2"])
@pytest.mark.parametrize("cell", CELLS)
def test_agrees_with_the_reference(cell, directions, shape, lengths, ragged, options):
    layer = random_layer(cell, directions=directions, **shape)
    options = options | {"lengths": torch.tensor(lengths) if ragged else None}
    assert_same(
        outputs_and_gradients(torch_loop.recurrence, layer, **options),
        outputs_and_gradients(reference.recurrence, layer, **options),
        TOLERANCE,
    )


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cell", [name for name, spec in CELLS.items() if "c" in spec.states])
def test_projection(cell, options):
    layer = random_layer(cell, directions=2, projected=2, hidden=5)
    options = options | {"lengths": torch.tensor([2, 5, 3])}
    assert_same(
        outputs_and_gradients(torch_loop.recurrence, layer, **options),
        outputs_and_gradients(reference.recurrence, layer, **options),
        TOLERANCE,
    )


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("cell", CELLS)
def test_without_bias(cell):
    layer = random_layer(cell, bias=False)
    assert_same(
        outputs_and_gradients(torch_loop.recurrence, layer),
        outputs_and_gradients(reference.recurrence, layer),
        TOLERANCE,
    )


@pytest.mark.parametrize("given", ["b_ih", "b_hh"])
@pytest.mark.parametrize("cell", ["gru", "lstm_peephole"])
def test_with_one_bias(cell, given):
    layer = random_layer(cell)._replace(
        **{"b_ih": None, "b_hh": None, given: random_layer(cell).b_ih}
    )
    assert_same(
        outputs_and_gradients(torch_loop.recurrence, layer),
        outputs_and_gradients(reference.recurrence, layer),
        TOLERANCE,
    )


@pytest.mark.parametrize("result", ["y", "h_n", "c_n"])
def test_gradient_through_one_result_alone(result):
    layer = random_layer("lstm_peephole", directions=2)
    gradients = [
        torch.autograd.grad(
            outputs(run, layer)[result].sum(), [layer.x, layer.w_hh, layer.state[1]]
        )
        for run in (torch_loop.recurrence, reference.recurrence)
    ]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_low_precision_computes_in_float32(cell):
    """Only inputs and results are rounded: at most half a unit of bfloat16's 8 bits."""
    low = random_layer(cell, dtype=torch.bfloat16, steps=12, hidden=16)
    exact = low._replace(
        **{name: getattr(low, name).double() for name in ("x", "w_ih", "w_hh", "b_ih", "b_hh")},
        params={name: value.double() for name, value in low.params.items()},
        state=[s.double() for s in low.state],
    )
    expected = outputs(reference.recurrence, exact)
    for name, value in outputs(torch_loop.recurrence, low).items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.double(), expected[name], rtol=2**-8, atol=1e-5)


def test_backward_twice_over_a_kept_graph():
    layer = random_layer("gru_reset_before")
    y = outputs(torch_loop.recurrence, layer)["y"].sum()
    first = torch.autograd.grad(y, layer.x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(y, layer.x)[0], first)


def test_gradients_of_gradients_name_the_reference():
    layer = random_layer("lstm_peephole")
    y = outputs(torch_loop.recurrence, layer)["y"].sum()
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(y, layer.x, create_graph=True)
