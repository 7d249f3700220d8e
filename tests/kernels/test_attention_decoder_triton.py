"""The attention decoder's Triton kernels against float64; on a CPU, in Triton's interpreter."""

import itertools

import pytest
import torch

from kernels.attention import FEEDBACKS, decode, launch, ops, reference
from tests.kernels.attention_cases import (
    KINDS,
    assert_accurate,
    outputs_and_gradients,
    random_case,
)
from tests.kernels.triton_cases import DEVICE, poison

VARIANTS = [
    pytest.param(*v, id="-".join(v)) for v in itertools.product(("lstm", "gru"), FEEDBACKS, KINDS)
]
LENGTHS = [4, 1, 2]
cpu = pytest.mark.skipif(DEVICE == "cuda", reason="written for the interpreter's CPU tensors")


@pytest.mark.parametrize(("cell", "feedback", "kind"), VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "coverage"),
    [(torch.float32, False), (torch.float16, True)],
    ids=["fp32", "fp16-coverage"],
)
def test_agrees_with_float64(cell, feedback, kind, coverage, dtype):
    case = random_case(
        cell, feedback, kind, coverage=coverage, lengths=LENGTHS, dropout=0.3, steps=2
    )
    assert_accurate(ops.decode, case.to(dtype, DEVICE))


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_bfloat16_through_upcast_products(feedback):
    case = random_case("lstm", feedback, "additive", coverage=True, lengths=LENGTHS, steps=2)
    assert_accurate(ops.decode, case.to(torch.bfloat16, DEVICE))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"steps": 1, "batch": 1, "source": 1}, id="ones"),
        pytest.param({"batch": 18}, id="two-tiles-of-rows"),
        pytest.param({"source": 11}, id="two-tiles-of-keys"),
        pytest.param({"hidden": (35,), "keys": 34, "features": 33}, id="two-tiles-of-units"),
    ],
)
@pytest.mark.parametrize(
    ("cell", "feedback", "kind"),
    [("lstm", "features", "additive"), ("gru", "context", "product")],
    ids=["lstm-features-additive", "gru-context-product"],
)
def test_shapes(cell, feedback, kind, shape):
    case = random_case(cell, feedback, kind, coverage=True, **{"steps": 2} | shape)
    assert_accurate(ops.decode, case.to(torch.float32, DEVICE))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_without_biases_or_anything_to_start_from(cell):
    case = random_case(cell, "features", "product", coverage=True, bias=False, start=False)
    assert_accurate(ops.decode, case.to(torch.float32, DEVICE))


@pytest.mark.parametrize(
    ("feedback", "only"),
    [
        ("features", "features"),
        ("none", "features"),
        ("context", "outputs"),
        ("features", "context"),
        ("context", "weights"),
        ("none", "h_n_0"),
        ("features", "c_n_0"),
    ],
)
def test_gradient_of_one_result(feedback, only):
    case = random_case("lstm", feedback, "product", coverage=True, steps=2)
    case = case.to(torch.float32, DEVICE)
    exact = outputs_and_gradients(reference.decode, case.to(torch.float64, DEVICE), (only,))
    actual = outputs_and_gradients(ops.decode, case, (only,))
    for name, value in exact.items():
        torch.testing.assert_close(actual[name].double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cell", "feedback", "kind"),
    [
        pytest.param("lstm", "features", "additive", id="lstm-features-additive"),
        pytest.param("gru", "context", "additive", id="gru-context-additive"),
        pytest.param("gru", "none", "product", id="gru-none-product"),
    ],
)
def test_neither_padding_nor_unwritten_memory_is_looked_at(cell, feedback, kind, monkeypatch):
    """Both are NaN here."""
    case = random_case(cell, feedback, kind, coverage=True, lengths=LENGTHS, dropout=0.3)
    case = case.to(torch.float32, DEVICE)
    padding = (torch.arange(4, device=DEVICE) >= case.lengths[:, None])[..., None]
    expected = outputs_and_gradients(ops.decode, case)
    leaves = dict(case.leaves)
    for name in ("keys", "projected"):
        nan = leaves[name].detach().masked_fill(padding, float("nan"))
        leaves[name] = nan.requires_grad_()
    poison(monkeypatch)
    actual = outputs_and_gradients(ops.decode, case._replace(leaves=leaves))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    assert not actual["dkeys"].masked_select(padding).any()


def arguments_of(case):
    """What the forward operator is called with for a case."""
    found = []
    real = ops.decoder_op

    def keep(*arguments):
        found.extend(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "decoder_op", keep)
        ops.decode(*case.arguments())
    return found


@cpu
@pytest.mark.parametrize(
    ("cell", "feedback", "kind"),
    [("lstm", "features", "additive"), ("gru", "none", "product")],
    ids=["lstm-features-additive", "gru-none-product"],
)
def test_operators(cell, feedback, kind):
    case = random_case(
        cell, feedback, kind, coverage=kind == "additive", lengths=LENGTHS, dropout=0.3, steps=1
    )
    arguments = arguments_of(case.to(torch.float32))
    torch.library.opcheck(ops.decoder_op, tuple(arguments))
    kept = ops.decoder_op(*arguments)
    h, c = arguments[12:14]
    d_joined, d_weights = torch.randn_like(kept[1]), torch.randn_like(kept[2])
    grads = (kept, torch.randn_like(kept[4]), d_joined, d_weights, h, c)
    torch.library.opcheck(ops.backward_op, (*arguments[:12], *grads))


@cpu
def test_compiles_whole():
    def run(x, case):
        problem, _, *rest = case.arguments()
        return ops.decode(problem, x, *rest).features

    case = random_case("lstm", "features", "additive", coverage=True, steps=2, dtype=torch.float32)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 3, requires_grad=True)
    expected = torch.autograd.grad(run(x, case).sum(), [x, case.leaves["w_hh_0"]])
    actual = torch.autograd.grad(compiled(x, case).sum(), [x, case.leaves["w_hh_0"]])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_the_api_reaches_the_kernels(monkeypatch):
    case = random_case("gru", "context", "product").to(torch.float32, DEVICE)
    launched = []
    real = launch.dispatch
    monkeypatch.setattr(launch, "dispatch", lambda *a, **k: (launched.append(a[0]), real(*a, **k)))
    found = decode(*case.arguments(), backend="triton")
    assert len(launched) == 1
    torch.testing.assert_close(found.features, decode(*case.arguments(), backend="torch").features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": (4, 5)}, "several layers need backend='torch'"),
        ({"dtype": torch.float64}, "float32, float16 or bfloat16, not torch.float64"),
    ],
    ids=["layers", "float64"],
)
def test_what_the_kernels_cannot_do_is_said(options, message):
    case = random_case(**{"dtype": torch.float32} | options)
    with pytest.raises(ValueError, match=message):
        decode(*case.arguments(), backend="triton")


def test_gradients_of_gradients_need_the_reference():
    case = random_case("gru", "features", "product").to(torch.float32, DEVICE)
    found = ops.decode(*case.arguments()).features.sum()
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(found, case.leaves["x"], create_graph=True)
