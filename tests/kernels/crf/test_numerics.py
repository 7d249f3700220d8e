"""The CRF's Triton kernels against the torch path in float64; on a CPU, interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import crf
from kernels.crf import ops, spans
from tests.kernels.crf.crf_cases import (
    DEVICE,
    assert_paths_agree,
    assert_sums_agree,
    random_problem,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of log(0)
SIZES = [1, 5, 16, 17, 40, 64]


@pytest.mark.parametrize("num_tags", SIZES)
def test_sums(num_tags):
    assert_sums_agree(random_problem(batch=2, steps=4, num_tags=num_tags))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_sums_of_low_precision_emissions(dtype):
    assert_sums_agree(random_problem(dtype=dtype))


@settings(max_examples=12, deadline=None)
@given(
    steps=st.integers(1, 5),
    batch=st.integers(1, 3),
    forbid=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 100.0]),
    seed=st.integers(0, 1000),
    n=st.sampled_from([1, 2, 3, 5]),
)
def test_sums_and_paths_of_any_sentences(steps, batch, forbid, scale, seed, n):
    problem = random_problem(batch, steps, 4, forbid=forbid, scale=scale, seed=seed)
    assert_sums_agree(problem)
    assert_paths_agree(problem, n)


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("num_tags", [1, 17, 64])
def test_paths(num_tags, n):
    assert_paths_agree(random_problem(batch=2, steps=3, num_tags=num_tags), n)


@pytest.mark.parametrize("forbid", [False, True], ids=["all", "forbidden"])
def test_spans(forbid):
    """Of one row each length of span; tag 2 goes on with tag 3, and tag 3 with itself."""
    problem = random_problem(batch=2, steps=4, forbid=forbid)
    continued = torch.tensor([-1, -1, 3, 3, -1], device=DEVICE)
    exact = problem.to(torch.float64, "cpu")
    tags = crf.n_best(*exact[:5], n=1)[0][:, 0]
    spans = torch.tensor([[0, a, b] for a in range(4) for b in range(a + 1, 5)])
    expected = crf.span_marginals(*exact[:4], continued.cpu(), tags, spans, exact.lengths)
    actual = crf.span_marginals(
        *problem[:4], continued, *(x.to(DEVICE) for x in (tags, spans)), problem.lengths,
        backend="triton",
    )  # fmt: skip
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-4, atol=1e-6)


def test_long_sentences_keep_their_digits():
    """The logarithms of sums over 300 steps near 1,000 each: float32 sums would be off by 0.02."""
    problem = random_problem(batch=1, steps=300, num_tags=3)
    with torch.no_grad():
        problem.emissions.add_(1000)
    exact = problem.to(torch.float64, "cpu")
    arguments = (*problem[1:5],)
    actual = crf.log_likelihood(problem.emissions, problem.tags, *arguments, backend="triton")
    expected = crf.log_likelihood(exact.emissions, exact.tags, *exact[1:5])
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-4, atol=0)


def test_more_rows_than_programs_of_the_gradient(monkeypatch):
    monkeypatch.setattr("kernels.crf.sums.PARTIAL_SUMS", 2)
    assert_sums_agree(random_problem(batch=5, steps=3))


def test_strided_arguments():
    problem = random_problem(batch=3, steps=4, num_tags=5)
    expected = crf.log_likelihood(
        problem.emissions, problem.tags, *problem[1:5], backend="triton"
    ).detach()

    def stride(value):
        wide = torch.stack([value, torch.zeros_like(value)], -1).detach()
        return wide[..., 0].requires_grad_(value.is_floating_point())

    strided = type(problem)(*map(stride, problem))
    actual = crf.log_likelihood(strided.emissions, strided.tags, *strided[1:5], backend="triton")
    assert torch.equal(actual.detach(), expected)
    actual.sum().backward()
    problem.emissions.grad = None
    assert strided.emissions.grad.isfinite().all()


def arguments(problem):
    return tuple(value.detach() for value in problem)


@pytest.mark.parametrize("tagged", [True, False], ids=["tags", "no tags"])
def test_operators(tagged):
    emissions, start, transitions, end, lengths, tags = arguments(random_problem(2, 3, 4))
    # opcheck compares all of every output, and past the end the states are not filled in.
    emissions, lengths = emissions.nan_to_num(), torch.full_like(lengths, 3)
    tags = tags.clamp(min=0) if tagged else None
    for save in (True, False):
        torch.library.opcheck(
            ops.forward_op, (emissions, start, transitions, end, lengths, tags, save)
        )
    _, states = ops.forward_op(emissions, start, transitions, end, lengths, tags, True)
    grad = torch.ones(2, device=DEVICE)
    for cotangent in (grad, None):
        torch.library.opcheck(
            ops.backward_op, (cotangent, states, emissions, transitions, end, lengths, tags)
        )
    torch.library.opcheck(ops.decode_op, (emissions, start, transitions, end, lengths, 3))


def test_compiles_whole_with_dynamic_sentences():
    def run(emissions, start, transitions, end, lengths, tags):
        scores = (start, transitions, end, lengths)
        loss = crf.log_likelihood(emissions, tags, *scores, backend="triton").sum()
        return loss, crf.n_best(emissions, *scores, n=2, backend="triton")[0]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, batch in [(2, 3), (4, 2), (3, 5)]:
        problem = random_problem(batch, steps, 4, seed=steps)
        leaves = problem.differentiable
        (actual, paths), (expected, wanted) = compiled(*problem), run(*problem)
        torch.testing.assert_close(actual, expected)
        assert torch.equal(paths, wanted)
        for a, e in zip(
            torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(a, e)


def test_refuses_a_second_derivative():
    problem = random_problem()
    value = crf.log_partition(problem.emissions, *problem[1:5], backend="triton").sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(value, problem.emissions, create_graph=True)


def test_autocast_leaves_float32():
    problem = random_problem()
    call = (problem.emissions, *problem[1:5])
    expected = crf.log_partition(*call, backend="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(crf.log_partition(*call, backend="triton"), expected)


@pytest.mark.parametrize(
    ("changes", "n", "expected"),
    [
        ({"num_tags": 65}, 1, "backend='triton' takes up to 64 tags, got 65: use backend='torch'"),
        ({}, 33, "backend='triton' takes up to 32 paths, got 33"),
        ({"dtype": torch.float64}, 1, "backend='triton' computes in float32, not torch.float64"),
    ],
    ids=["tags", "paths", "float64"],
)
def test_what_the_kernels_do_not_take(changes, n, expected):
    emissions, *scores = arguments(random_problem(**changes))[:5]
    with pytest.raises(ValueError, match=expected):
        crf.n_best(emissions, *scores, n=n, backend="triton")
    paths, _ = crf.n_best(emissions, *scores, n=n)
    assert paths.shape[1] == n


def test_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(ops, "interpreted", lambda _: False)
    emissions, *scores = (value.cpu() for value in arguments(random_problem())[:5])
    with pytest.raises(ValueError, match="backend='triton' needs CUDA tensors, got emissions on"):
        crf.n_best(emissions, *scores, n=1, backend="triton")


def test_nothing_about_spans_has_a_shape_that_depends_on_values():
    """Else an accelerator would stop for it."""
    with FakeTensorMode():
        sums, tags = torch.empty(2, 6, 5), torch.ones(2, 6, dtype=torch.int64)
        given = torch.empty(5, 5), torch.ones(5, dtype=torch.int64), tags, tags[:, :3]
        found = spans.probabilities(sums, sums, *given, torch.ones(2, dtype=torch.int64))
    assert found.shape == (2,)
