import subprocess
import sys

import pytest
import torch

import kernels
from kernels import CELLS, reference
from kernels.api import precision
from tests.kernels.cases import assert_same, outputs, outputs_and_gradients, random_layer

T, B, I, H = 4, 3, 5, 6  # noqa: E741


def tensors(gates=4, directions=()):
    torch.manual_seed(0)
    return {
        "x": torch.randn(T, B, I),
        "w_ih": torch.randn(*directions, gates * H, I),
        "w_hh": torch.randn(*directions, gates * H, H),
        "b_ih": torch.randn(*directions, gates * H),
        "b_hh": torch.randn(*directions, gates * H),
    }


def peepholes(*shape):
    return {f"weight_c{gate}": torch.randn(*shape) for gate in "ifo"}


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("directions", [1, 2], ids=["D1", "D2"])
@pytest.mark.parametrize("cell", CELLS)
def test_torch_backend_agrees_with_the_reference(cell, directions, ragged):
    """torch's own kernels where it has the cell; float64, as above."""
    layer = random_layer(cell, directions=directions)
    options = {"lengths": torch.tensor([4, 2, 5]) if ragged else None}
    assert_same(
        outputs_and_gradients(kernels.recurrence, layer, **options, backend="torch"),
        outputs_and_gradients(reference.recurrence, layer, **options),
        1e-12,
    )


def test_without_and_with_direction_axis():
    plain, leading = tensors(), {k: v if k == "x" else v[None] for k, v in tensors().items()}
    h_0, c_0, extra = torch.randn(B, H), torch.randn(B, H), peepholes(H)
    y, (h_n, c_n) = kernels.lstm(**plain, h_0=h_0, c_0=c_0, **extra)
    extra = {name: value[None] for name, value in extra.items()}
    y_d, (h_d, c_d) = kernels.lstm(**leading, h_0=h_0[None], c_0=c_0[None], **extra)
    assert h_n.shape == (B, H)
    assert h_d.shape == (1, B, H)
    for actual, expected in ((y, y_d), (h_n, h_d[0]), (c_n, c_d[0])):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("peephole", [False, True], ids=["plain", "peephole"])
def test_inputs_need_not_be_contiguous(backend, peephole):
    given = tensors(directions=(2,)) | (peepholes(2, H) if peephole else {})
    strided = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in given.items()}
    assert not strided["x"].is_contiguous()
    expected, _ = kernels.lstm(**given, backend=backend)
    torch.testing.assert_close(kernels.lstm(**strided, backend=backend)[0], expected)


@pytest.mark.parametrize("run", [kernels.gru, kernels.rnn], ids=["gru", "rnn"])
def test_masks_follow_the_seed(run):
    given = tensors(gates=3 if run is kernels.gru else 1)
    options = {"recurrent_dropout": 0.5, "zoneout": 0.2, "training": True}
    first, again = (run(**given, **options, seed=1)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, run(**given, **options, seed=2)[0])
    torch.manual_seed(3)
    drawn = run(**given, **options)[0]
    assert not torch.equal(drawn, run(**given, **options)[0])
    torch.manual_seed(3)
    assert torch.equal(drawn, run(**given, **options)[0])


@pytest.mark.parametrize("peephole", [False, True], ids=["plain", "peephole"])
def test_autocast_gives_its_dtype_and_computes_in_float32(peephole):
    given = tensors() | (peepholes(H) if peephole else {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, (h_n, c_n) = kernels.lstm(**given)
        assert precision(given["x"]) == (torch.float32, torch.bfloat16)
    assert {t.dtype for t in (y, h_n, c_n)} == {torch.bfloat16}
    torch.testing.assert_close(y, kernels.lstm(**given)[0].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_content_of_padding_changes_nothing_even_where_it_is_not_a_number(cell):
    layer, lengths = random_layer(cell, directions=2), torch.tensor([2, 5, 1])
    beyond = (torch.arange(5)[:, None] >= lengths)[..., None]
    poisoned = layer._replace(x=layer.x.detach().masked_fill(beyond, float("nan")).requires_grad_())
    for backend in ("torch", "reference"):
        expected = outputs_and_gradients(
            kernels.recurrence, layer, lengths=lengths, backend=backend
        )
        actual = outputs_and_gradients(
            kernels.recurrence, poisoned, lengths=lengths, backend=backend
        )
        for name, value in expected.items():
            assert torch.equal(actual[name], value), name


def test_output_past_the_end_is_zero():
    layer, lengths = random_layer("lstm_peephole", directions=2), torch.tensor([2, 5, 1])
    for backend in ("torch", "reference"):
        y = outputs(kernels.recurrence, layer, lengths=lengths, backend=backend)["y"]
        assert not y[torch.arange(5)[:, None] >= lengths].any()


BAD = [
    ({"x": torch.randn(T, I)}, ValueError, r"x must have shape \[T, B, I\]"),
    ({"x": torch.zeros(T, B, I).long()}, TypeError, "x must be a floating point tensor"),
    ({"x": torch.randn(0, B, I)}, RuntimeError, "sequence length to be larger than 0"),
    ({"x": torch.randn(T, B, I + 1)}, ValueError, r"w_ih must have shape \[1, 24, 6\]"),
    ({"w_ih": torch.randn(4 * H + 1, I)}, ValueError, r"w_ih must have shape \[D, 4\*H, I\]"),
    ({"w_ih": torch.randn(0, I)}, ValueError, r"w_ih must have shape \[D, 4\*H, I\]"),
    ({"w_hh": torch.randn(4 * H, H + 1)}, ValueError, r"w_hh must have shape \[1, 24, 6\]"),
    ({"w_hh": torch.randn(4 * H, H).double()}, ValueError, "w_hh must have dtype torch.float32"),
    ({"w_hh": torch.randn(4 * H, H, device="meta")}, ValueError, "w_hh must be on cpu like x"),
    ({"b_hh": torch.randn(H)}, ValueError, r"b_hh must have shape \[1, 24\]"),
    ({"b_ih": 0.0}, TypeError, "b_ih must be a tensor, got float"),
    ({"h_0": torch.randn(B + 1, H)}, ValueError, r"h_0 must have shape \[1, 3, 6\]"),
    ({"c_0": torch.randn(B, H + 1)}, ValueError, r"c_0 must have shape \[1, 3, 6\]"),
    ({"w_hr": torch.randn(2, H)}, ValueError, r"w_hh must have shape \[1, 24, 2\]"),
    ({"weight_ci": torch.randn(H)}, ValueError, "weight_ci, weight_cf, weight_co; or weight_ln_ih"),
    (
        {**peepholes(H), "weight_co": torch.randn(H + 1)},
        ValueError,
        r"weight_co must have shape \[1, 6\]",
    ),
    ({"lengths": [4, 3, 2]}, TypeError, r"lengths must be an int64 tensor of shape \[3\]"),
    ({"lengths": torch.tensor([4, 3, 2]).int()}, TypeError, "lengths must have dtype torch.int64"),
    ({"lengths": torch.tensor([4, 3])}, ValueError, r"lengths must have shape \[3\]"),
    ({"lengths": torch.tensor([4, 0, 2])}, ValueError, r"lengths must lie in 1\.\.4, row 1 has 0"),
    (
        {"lengths": torch.tensor([4, 2, -1])},
        ValueError,
        r"lengths must lie in 1\.\.4, row 2 has -1",
    ),
    ({"lengths": torch.tensor([5, 2, 1])}, ValueError, r"lengths must lie in 1\.\.4, row 0 has 5"),
    (
        {"lengths": torch.ones(B, device="meta").long()},
        ValueError,
        "lengths must be on cpu like the input",
    ),
    ({"recurrent_dropout": 1.0}, ValueError, r"recurrent_dropout must be a number in \[0, 1\)"),
    ({"zoneout": -0.1}, ValueError, r"zoneout must be a number in \[0, 1\)"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, reference"),
    ({"recompute": True, "backend": "torch"}, ValueError, "recompute=True needs backend='triton'"),
]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [pytest.param(*case, id=f"{next(reversed(case[0]))}-{i}") for i, case in enumerate(BAD)],
)
def test_bad_input_names_the_argument(wrong, error, message):
    with pytest.raises(error, match=message) as caught:
        kernels.lstm(**(tensors() | wrong))
    assert "\n" not in str(caught.value)


def test_recompute_of_a_named_backend_that_has_it_not_is_refused():
    for backend in ("torch", "reference"):
        with pytest.raises(ValueError, match=f"got backend='{backend}'"):
            outputs(kernels.recurrence, random_layer("gru"), recompute=True, backend=backend)


@pytest.mark.parametrize(("run", "gates"), [(kernels.lstm, 4), (kernels.gru, 3), (kernels.rnn, 1)])
def test_recompute_has_no_effect_where_auto_takes_torch(run, gates):
    given = tensors(gates)
    assert torch.equal(run(**given, recompute=True)[0], run(**given)[0])


def test_unknown_nonlinearity():
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        kernels.rnn(**tensors(gates=1), nonlinearity="gelu")


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_kernels_alone_needs_neither_fusedrnn_nor_triton():
    code = """
import sys
sys.modules["triton"] = sys.modules["fusedrnn"] = None
import torch, kernels
y, h = kernels.gru(torch.ones(2, 1, 3), torch.ones(12, 3), torch.ones(12, 4), reset_after=False)
print(*y.shape, "lightning" in sys.modules)
"""
    assert run_python(code) == ["2", "1", "4", "False"]


def test_import_does_not_load_triton():
    assert run_python("import sys, kernels, fusedrnn\nprint('triton' in sys.modules)") == ["False"]


def test_explicit_triton_without_triton_says_so():
    code = """
import importlib.util, torch, kernels
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
try:
    kernels.rnn(torch.ones(2, 1, 3), torch.ones(4, 3), torch.ones(4, 4), backend="triton")
except RuntimeError as error:
    print(error)
"""
    assert " ".join(run_python(code)).startswith("backend='triton' needs the package triton")
