"""The attention decoder's Triton kernels against float64; on a CPU, in Triton's interpreter."""

import itertools

import pytest
import torch

from kernels.attention import FEEDBACKS, decode, launch, ops, reference
from tests.kernels.attention_cases import (
    KINDS,
    assert_accurate,
    assert_drawn,
    outputs_and_gradients,
    random_case,
    sampled,
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


@pytest.mark.parametrize(("cell", "feedback", "kind"), VARIANTS)
def test_layers_of_unequal_sizes(cell, feedback, kind):
    hidden = (3, 6, 5) if kind == "product" else (6, 4)
    case = random_case(
        cell, feedback, kind, coverage=kind == "additive", lengths=LENGTHS, dropout=0.3, steps=2,
        hidden=hidden,
    )  # fmt: skip
    assert_accurate(ops.decode, case.to(torch.float32, DEVICE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layers_in_half_precision(cell, dtype):
    case = random_case(cell, "features", "product", lengths=LENGTHS, dropout=0.3, hidden=(4, 5))
    assert_accurate(ops.decode, case.to(dtype, DEVICE))


@pytest.mark.parametrize(("cell", "feedback", "kind"), VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_scheduled_sampling(cell, feedback, kind, dropout):
    """The symbols are those that the reference draws in float64; so are results and gradients."""
    case = random_case(
        cell, feedback, kind, coverage=kind == "additive", lengths=LENGTHS, dropout=dropout,
        hidden=(3, 5) if kind == "product" else (5,), seed=2,
    )  # fmt: skip
    case = sampled(case, dropout=dropout, bias=kind == "product").to(torch.float32, DEVICE)
    drawn = reference.decode(*case.to(torch.float64, DEVICE).arguments()).symbols
    assert torch.equal(ops.decode(*case.arguments()).symbols, drawn)
    assert (drawn != case.sampling.symbols).any()
    assert_accurate(ops.decode, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_scheduled_sampling_in_half_precision(feedback, dtype):
    case = sampled(random_case("lstm", feedback, "product", dropout=0.3), dropout=0.3)
    case = case.to(dtype, DEVICE)
    assert_accurate(ops.decode, case)
    assert_drawn(case, ops.decode(*case.arguments()), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("symbols", [1, 32, 257, 700])
def test_draws_over_tiles_of_symbols(symbols):
    case = random_case("gru", "context", "product", batch=18, inputs=35, features=34, steps=4)
    case = sampled(case, symbols, gain=0.3).to(torch.float32, DEVICE)
    found = ops.decode(*case.arguments())
    assert_drawn(case, found, 1e-5)
    drawn = reference.decode(*case.to(torch.float64, DEVICE).arguments()).symbols
    assert torch.equal(found.symbols, drawn)


def test_draws_at_the_ends_of_the_interval():
    """Neither 0 nor the number below 1 takes a symbol, or a tile, that has no probability."""
    case = sampled(random_case("gru", "none", "product", batch=2, steps=2), 900, probability=1.0)
    bias = torch.full((900,), -torch.inf, dtype=torch.float64)
    bias[300:600] = 0.0
    uniform = torch.tensor([[0.0, 0.0], [0.0, 1 - 2.0**-24]])
    weight = torch.zeros_like(case.sampling.weight)
    sampling = case.sampling._replace(uniform=uniform, bias=bias, weight=weight)
    found = ops.decode(*case._replace(sampling=sampling).to(torch.float32, DEVICE).arguments())
    assert found.symbols[1].tolist() == [300, 599]


@torch.no_grad()
def test_draws_follow_the_softmax():
    """Features of zero leave the bias: 1,008 draws from one distribution, within 5 deviations."""
    case = random_case("gru", "none", "product", batch=126, steps=9)
    case = sampled(case, 6, probability=1.0).to(torch.float32, DEVICE)
    case.leaves["combine"].zero_()
    uniform = torch.rand(9, 126, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    case = case._replace(sampling=case.sampling._replace(uniform=uniform))
    drawn = ops.decode(*case.arguments()).symbols[1:]
    p, n = case.sampling.bias.double().softmax(-1), drawn.numel()
    found = drawn.flatten().bincount(minlength=6) / n
    assert ((found - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_bfloat16_through_upcast_products(feedback):
    case = random_case("lstm", feedback, "additive", coverage=True, lengths=LENGTHS, steps=2)
    assert_accurate(ops.decode, case.to(torch.bfloat16, DEVICE))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"hidden": (33, 2, 35), "batch": 17}, id="tiles-of-layers"),
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
    case = random_case(
        cell, "features", "product", coverage=True, bias=False, start=False, hidden=(4, 5)
    )
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
        ("context", "h_n_1"),
        ("features", "c_n_1"),
    ],
)
def test_gradient_of_one_result(feedback, only):
    hidden = (4, 5) if only.endswith("1") else (5,)
    case = random_case("lstm", feedback, "product", coverage=True, steps=2, hidden=hidden)
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
@pytest.mark.parametrize("hidden", [(5,), (3, 5)], ids=["one-layer", "two-layers-sampling"])
def test_neither_padding_nor_unwritten_memory_is_looked_at(
    cell, feedback, kind, hidden, monkeypatch
):
    """Both are NaN here."""
    case = random_case(
        cell, feedback, kind, coverage=True, lengths=LENGTHS, dropout=0.3, hidden=hidden
    )
    case = sampled(case, dropout=0.3) if len(hidden) > 1 else case
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


def test_lengths_need_not_lie_densely():
    case = random_case(lengths=LENGTHS).to(torch.float32, DEVICE)
    spread = torch.stack([case.lengths, torch.full_like(case.lengths, 4)], 1)[:, 0]
    expected = outputs_and_gradients(ops.decode, case)
    actual = outputs_and_gradients(ops.decode, case._replace(lengths=spread))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def arguments_of(case):
    """What the forward operator is called with for a case."""
    found = []
    real = ops.decoder_op

    def copied(argument):
        if isinstance(argument, list):
            return [copied(a) for a in argument]
        return argument.detach().clone() if isinstance(argument, torch.Tensor) else argument

    def keep(*arguments):
        found.extend(map(copied, arguments))
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "decoder_op", keep)
        ops.decode(*case.arguments())
    return found


@cpu
@pytest.mark.parametrize(
    ("cell", "feedback", "kind", "hidden"),
    [("lstm", "features", "additive", (3, 5)), ("gru", "none", "product", (5,))],
    ids=["lstm-features-additive-two-layers-sampling", "gru-none-product"],
)
def test_operators(cell, feedback, kind, hidden):
    case = random_case(
        cell, feedback, kind, coverage=kind == "additive", lengths=LENGTHS, dropout=0.3, steps=2,
        hidden=hidden,
    )  # fmt: skip
    case = sampled(case) if len(hidden) > 1 else case
    inputs, start, words, *rest = arguments_of(case.to(torch.float32))
    assert len(words) == (9 if len(hidden) > 1 else 0)
    torch.library.opcheck(ops.decoder_op, (inputs, start, words, *rest))
    kept = ops.decoder_op(inputs, start, words, *rest)
    out = launch.Buffers.of(kept, len(hidden))
    states = launch.Start.of(start, len(hidden))
    grads = launch.Incoming(
        *map(torch.randn_like, (out.features, out.joined, out.weights)), states.h, states.c
    )
    torch.library.opcheck(ops.backward_op, (inputs, kept, grads.flat(), *rest))


@cpu
@pytest.mark.parametrize("sampling", [False, True], ids=["", "sampling"])
def test_compiles_whole(sampling):
    def run(x, case):
        problem, _, *rest = case.arguments()
        return ops.decode(problem, x, *rest).features

    case = random_case(
        "lstm", "features", "additive", coverage=True, steps=2, hidden=(4, 5), dropout=0.3,
        dtype=torch.float32,
    )  # fmt: skip
    case = sampled(case) if sampling else case
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 3, requires_grad=True)
    names = ("embedding" if sampling else "h_0", "w_ih_0", "w_hh_0", "w_ih_1", "b_hh_1")
    wanted = [case.leaves[name] for name in names] + ([] if sampling else [x])
    expected = torch.autograd.grad(run(x, case).sum(), wanted)
    actual = torch.autograd.grad(compiled(x, case).sum(), wanted)
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
        ({"dtype": torch.float64}, "float32, float16 or bfloat16, not torch.float64"),
    ],
    ids=["float64"],
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
