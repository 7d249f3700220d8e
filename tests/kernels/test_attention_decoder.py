"""The attention decoder: its oracle against torch.nn, its written-out backward against that."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kernels.attention import (
    FEEDBACKS,
    Decoded,
    Masks,
    decode,
    reference,
    sources,
    torch_loop,
)
from tests.kernels.attention_cases import (
    KINDS,
    assert_drawn,
    flatten,
    outputs_and_gradients,
    random_case,
    sampled,
)

BACKENDS = {"torch": torch_loop.decode, "reference": reference.decode}
VARIANTS = [
    pytest.param(*v, id="-".join(v)) for v in itertools.product(("lstm", "gru"), FEEDBACKS, KINDS)
]


def assert_close(actual, expected, **tolerances):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerances
        )


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("feedback", FEEDBACKS)
@torch.no_grad()
def test_reference_is_made_of_the_building_blocks_of_torch(cell, feedback):
    """Cells and softmax attention of torch.nn, one row at a time without padding."""
    case = random_case(cell, feedback, "product", lengths=[4, 2, 3])
    v = case.leaves
    found = reference.decode(*case.arguments())
    module = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}[cell](v["w_ih_0"].shape[1], 5).double()
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ours = (v[f"{n}_0"] for n in ("w_ih", "w_hh", "b_ih", "b_hh"))
    module.load_state_dict(dict(zip(names, ours, strict=True)))
    for row, length in enumerate(case.lengths.tolist()):
        keys, projected = v["keys"][row, :length], v["projected"][row, :length]

        def attend(h, keys=keys, projected=projected):
            # scaled_dot_product_attention divides by the root of the size unless told
            return nn.functional.scaled_dot_product_attention(h, projected, keys, scale=1.0)

        h = v["h_0"][row : row + 1]
        state = (h, v["c_0"][row : row + 1]) if cell == "lstm" else h
        fed = v["feed"][row : row + 1] if feedback == "features" else None
        for t in range(3):
            x = v["x"][t, row : row + 1]
            context = attend(h)
            if feedback != "none":
                x = torch.cat([x, fed if feedback == "features" else context], 1)
            state = module(x, state)
            h = state[0] if cell == "lstm" else state
            context = context if feedback == "context" else attend(h)
            fed = torch.tanh(torch.cat([context, h], 1) @ v["combine"].T)
            torch.testing.assert_close(found.outputs[t, row], h[0])
            torch.testing.assert_close(found.context[t, row], context[0])
            torch.testing.assert_close(found.features[t, row], fed[0])


@torch.no_grad()
def test_reference_coverage_is_its_equation():
    """See et al. 2017, equations 10 and 11, with Python sums."""
    case = random_case("gru", "none", "additive", coverage=True, start=False)
    v, found = case.leaves, reference.decode(*case.arguments())
    for row in range(3):
        seen = [0.0] * 4
        for t in range(3):
            query = v["query"] @ found.outputs[t, row]
            score = [
                v["energy"]
                @ torch.tanh(query + v["projected"][row, s] + seen[s] * v["coverage_weight"])
                for s in range(4)
            ]
            alpha = torch.softmax(torch.stack(score), 0)
            torch.testing.assert_close(found.weights[t, row], alpha)
            seen = [a + float(b) for a, b in zip(seen, alpha, strict=True)]


@pytest.mark.parametrize(("cell", "feedback", "kind"), VARIANTS)
@pytest.mark.parametrize("coverage", [False, True], ids=["", "coverage"])
@pytest.mark.parametrize("hidden", [(5,), (3, 5)], ids=["one-layer", "two-layers"])
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["", "dropout"])
def test_torch_loop_agrees_with_the_reference(cell, feedback, kind, coverage, hidden, dropout):
    case = random_case(
        cell, feedback, kind, coverage=coverage, hidden=hidden, dropout=dropout, lengths=[4, 1, 2]
    )
    expected = outputs_and_gradients(reference.decode, case)
    assert all(v.any() for v in expected.values())
    assert_close(outputs_and_gradients(torch_loop.decode, case), expected)


@pytest.mark.parametrize(("cell", "feedback", "kind"), VARIANTS)
def test_written_out_backward_is_the_derivative(cell, feedback, kind):
    case = random_case(
        cell, feedback, kind, coverage=True, hidden=(2, 3), lengths=[2, 1], batch=2,
        source=2, inputs=2, keys=2, features=2, steps=2,
    )  # fmt: skip
    names = list(case.leaves)

    def run(*leaves):
        other = case._replace(leaves=dict(zip(names, leaves, strict=True)))
        return tuple(flatten(torch_loop.decode(*other.arguments())).values())

    assert torch.autograd.gradcheck(run, tuple(case.leaves.values()), fast_mode=True)


@pytest.mark.parametrize("only", ["features", "outputs", "context", "weights", "h_n_0", "c_n_0"])
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_gradient_of_one_result(feedback, only):
    case = random_case("lstm", feedback, "additive", coverage=True)
    expected, actual = (
        outputs_and_gradients(run, case, only=(only,))
        for run in (reference.decode, torch_loop.decode)
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("chunk", [1, 100, 10**9])
def test_chunks_of_factors_change_nothing(chunk, monkeypatch):
    case = random_case("lstm", "features", "additive", coverage=True, steps=7)
    expected = outputs_and_gradients(reference.decode, case)
    monkeypatch.setattr(sources, "CHUNK", chunk)
    assert_close(outputs_and_gradients(torch_loop.decode, case), expected)


def row_by_row(
    counts, problem, x, keys, projected, lengths, weights, states, feed, coverage, masks, _
):
    """The reference, each row alone for as many steps as it has, with zeros after them."""
    parts = []
    for row in range(x.shape[1]):
        its, steps = slice(row, row + 1), sum(count > row for count in counts)
        mask = Masks([m[:steps, its] for m in masks.between], masks.features[:steps, its])
        found = reference.decode(
            problem, x[:steps, its], keys[its], projected[its], lengths[its], weights,
            [tuple(s[its] for s in state) for state in states], None if feed is None else feed[its],
            coverage[its], mask,
        )  # fmt: skip
        rest = (0, 0, 0, 0, 0, len(x) - steps)
        parts.append([*(nn.functional.pad(v, rest) for v in found[:4]), found.states])
    *results, states = zip(*parts, strict=True)
    after = [tuple(map(torch.cat, zip(*layer, strict=True))) for layer in zip(*states, strict=True)]
    return Decoded(*(torch.cat(r, 1) for r in results), after)


@pytest.mark.parametrize(("cell", "feedback", "kind"), VARIANTS)
@pytest.mark.parametrize("counts", [(4, 3, 3, 1, 1), (2, 1, 1, 1, 1), (4, 4, 4, 4, 4)], ids=str)
def test_rows_that_leave_are_as_rows_alone(cell, feedback, kind, counts, monkeypatch):
    case = random_case(
        cell, feedback, kind, steps=5, lengths=[4, 2, 3, 1][: counts[0]], batch=counts[0],
        hidden=(4, 5), coverage=True, dropout=0.3,
    )  # fmt: skip
    expected = outputs_and_gradients(partial(row_by_row, counts), case)
    for chunk in (1, 1 << 18):
        monkeypatch.setattr(sources, "CHUNK", chunk)
        found = outputs_and_gradients(partial(torch_loop.decode, counts=counts), case)
        assert_close(found, expected)


def test_without_biases_or_anything_to_start_from():
    case = random_case("gru", "features", "product", coverage=True, bias=False, start=False)
    expected = outputs_and_gradients(reference.decode, case)
    assert_close(outputs_and_gradients(torch_loop.decode, case), expected)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    draw = data.draw
    source, batch = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    lengths = st.lists(st.integers(1, source), min_size=batch, max_size=batch)
    case = random_case(
        draw(st.sampled_from(["lstm", "gru"])),
        draw(st.sampled_from(FEEDBACKS)),
        draw(st.sampled_from(KINDS)),
        steps=draw(st.integers(1, 5)),
        lengths=draw(st.none() | lengths),
        batch=batch,
        source=source,
        inputs=draw(st.integers(1, 4)),
        hidden=tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))),
        keys=draw(st.integers(1, 5)),
        features=draw(st.integers(1, 5)),
        coverage=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    expected = outputs_and_gradients(reference.decode, case)
    assert_close(outputs_and_gradients(torch_loop.decode, case), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("cell", "feedback", "kind"), VARIANTS)
def test_padding_never_matters_even_where_it_is_nan(cell, feedback, kind, backend):
    only = ("features", "outputs", "context")
    case = random_case(cell, feedback, kind, coverage=True, lengths=[4, 1, 2])
    expected = outputs_and_gradients(BACKENDS[backend], case, only)
    leaves = dict(case.leaves)
    for name in ("keys", "projected", "coverage"):
        value = leaves[name].detach()
        padding = torch.arange(4) >= case.lengths[:, None]
        fill = 0.0 if name == "coverage" else float("nan")
        value = value.masked_fill(padding if value.dim() == 2 else padding[..., None], fill)
        longer = value.new_full((3, 3, *value.shape[2:]), fill)
        leaves[name] = torch.cat([value, longer], 1).requires_grad_()
    actual = outputs_and_gradients(BACKENDS[backend], case._replace(leaves=leaves), only)
    for name in ("weights", "dkeys", "dprojected"):
        actual[name], beyond = actual[name].split((4, 3), -1 if name == "weights" else 1)
        assert not beyond.any(), name
    del actual["dcoverage"], expected["dcoverage"]  # given at padding too, where it is not used
    assert_close(actual, expected)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["", "dropout"])
def test_scheduled_sampling(cell, feedback, dropout):
    """Both backends draw the same symbols, and differentiate as if those had been given."""
    case = random_case(cell, feedback, "additive", steps=8, batch=5, hidden=(3, 5), dropout=dropout)
    case = sampled(case, dropout=dropout)
    sampling, expected = case.sampling, outputs_and_gradients(reference.decode, case)
    assert_close(outputs_and_gradients(torch_loop.decode, case), expected)
    found = reference.decode(*case.arguments())
    assert_drawn(case, found, 1e-12)
    assert torch.equal(torch_loop.decode(*case.arguments()).symbols, found.symbols)
    assert (found.symbols != sampling.symbols).any()
    x = sampling.inputs(found.symbols).detach().requires_grad_()
    forced = case._replace(leaves=case.leaves | {"x": x}, sampling=None)
    given_x = outputs_and_gradients(reference.decode, forced)
    dx = given_x.pop("dx") * (1.0 if sampling.mask is None else sampling.mask)
    given_x.pop("dembedding")  # unused where x is given
    embedded = torch.zeros_like(sampling.embedding)
    embedded.index_add_(0, found.symbols.flatten(), dx.flatten(0, 1))
    embedded[sampling.padding_idx] = 0
    assert_close({n: expected[n] for n in given_x}, given_x)
    torch.testing.assert_close(expected["dembedding"], embedded)


@torch.no_grad()
def test_samples_follow_the_prediction():
    """20,000 draws after the same step: frequencies within 5 standard deviations."""
    n = 20_000
    case = sampled(random_case(batch=n, steps=2), 6, probability=1.0)
    features = torch.randn(1, 6, dtype=torch.float64).expand(n, -1)
    drawn = case.sampling.draw(1, features).bincount(minlength=6) / n
    p = (features[0] @ case.sampling.weight.mT + case.sampling.bias).softmax(-1)
    assert ((drawn - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_draws_at_the_ends_of_the_interval():
    """Neither 0 nor the number below 1 takes a symbol that has no probability."""
    case = sampled(random_case(batch=2, steps=2), 4, probability=1.0)
    uniform = torch.tensor([[0.0, 0.0], [0.0, 1 - 2.0**-24]])
    bias = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf], dtype=torch.float64)
    sampling = case.sampling._replace(uniform=uniform, bias=bias)
    features = torch.zeros(2, 6, dtype=torch.float64)
    assert sampling.draw(1, features).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("uniform", [3, 2]), ("replaced", [2, 3]), ("weight", [7, 5]), ("bias", [6]), ("mask", [3])],
)
def test_wrong_shapes_of_sampling_are_named(name, shape):
    case = sampled(random_case())
    case = case._replace(sampling=case.sampling._replace(**{name: torch.zeros(shape)}))
    with pytest.raises(ValueError, match=rf"sampling.{name} must have shape .* got "):
        decode(*case.arguments())


def test_sampling_goes_with_whole_rows_alone():
    with pytest.raises(ValueError, match="counts: expected None with sampling"):
        decode(*sampled(random_case()).arguments(), counts=[3, 2, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_in_half_precision(backend):
    """A CPU computes in float32, and draws by numbers that are not rounded."""
    case = sampled(random_case("lstm", "features", "additive", steps=6, batch=5)).to(torch.bfloat16)
    found = decode(*case.arguments(), backend=backend)
    wide = decode(*case.to(torch.float32).arguments(), backend=backend)
    assert found.features.dtype == torch.bfloat16
    assert torch.equal(found.symbols, wide.symbols)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    """On a CPU they compute in float32: results differ from it by one rounding."""
    case = random_case("lstm", "features", "additive", coverage=True).to(dtype)
    wide = outputs_and_gradients(decode, case.to(torch.float32))
    actual = outputs_and_gradients(decode, case)
    for name, value in actual.items():
        assert value.dtype == dtype
        eps = torch.finfo(dtype).eps
        # gradients come from rounded gradients of the results: the tensor's size counts
        torch.testing.assert_close(
            value.float(), wide[name], rtol=eps, atol=8 * eps * float(wide[name].abs().max())
        )


def test_gradients_of_gradients_need_the_reference():
    case = random_case("gru", "features", "product")
    found = decode(*case.arguments(), backend="torch").features.sum()
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(found, case.leaves["x"], create_graph=True)
    found = decode(*case.arguments(), backend="reference").features.sum()
    (grad,) = torch.autograd.grad(found, case.leaves["x"], create_graph=True)
    assert torch.autograd.grad(grad.sum(), case.leaves["w_hh_0"])[0].any()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("keys", torch.zeros(2, 4, 4), r"keys must have shape \[3, 4, 4\], got \[2, 4, 4\]"),
        ("projected", torch.zeros(3, 4, 9), "projected must have size 5, got 9"),
        ("x", torch.zeros(3, 3), r"x must have 3 dimensions, got shape \[3, 3\]"),
        ("w_hh_0", torch.zeros(19, 5), r"w_hh of layer 0 must have shape \[20, 5\]"),
        ("h_0", torch.zeros(3, 4), r"h of layer 0 must have shape \[3, 5\]"),
        ("combine", torch.zeros(6, 8), r"combine must have shape \[6, 9\]"),
    ],
)
def test_wrong_shapes_are_named(name, value, message):
    case = random_case()
    with pytest.raises(ValueError, match=message):
        decode(*case._replace(leaves=case.leaves | {name: value}).arguments())


@pytest.mark.parametrize("lengths", [[0, 1, 2], [5, 1, 1]], ids=str)
def test_wrong_lengths_are_named(lengths):
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.4"):
        decode(*random_case(lengths=lengths).arguments())


def test_wrong_names_are_named():
    arguments = random_case().arguments()
    with pytest.raises(ValueError, match="feedback must be one of none, features, context"):
        decode(arguments[0].__class__("lstm", "all"), *arguments[1:])
    with pytest.raises(ValueError, match="backend must be one of"):
        decode(*arguments, backend="cuda")
