"""The CRF's kernels on a card: what the interpreter cannot show, races, graphs, no host stop."""

import pytest
import torch

from fusedrnn import CRF
from kernels import crf
from kernels.crf import ops
from tests.kernels.crf.crf_cases import (
    assert_paths_agree,
    assert_sums_agree,
    random_problem,
    results,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tags", [1, 5, 16, 20, 33, 64])
def test_sums_agree_with_float64(num_tags, dtype):
    assert_sums_agree(random_problem(300, 40, num_tags, forbid=num_tags > 3, dtype=dtype))


@pytest.mark.parametrize("n", [1, 2, 5, 32])
@pytest.mark.parametrize("num_tags", [1, 16, 20, 64])
def test_paths_agree_with_float64(num_tags, n):
    assert_paths_agree(random_problem(40, 30, num_tags, forbid=num_tags > 3), n)


def test_ten_thousand_words():
    problem = random_problem(2, 10_000, 20)
    assert_sums_agree(problem)
    assert_paths_agree(problem, 1)


def test_a_hundred_runs_are_bitwise_equal():
    problem = random_problem(300, 64, 20)
    scores = tuple(value.detach() for value in problem[:5])
    first, path = results(problem, "triton"), crf.n_best(*scores, n=5)
    for _ in range(100):
        for name, value in results(problem, "triton").items():
            assert torch.equal(value, first[name]), name
        for value, expected in zip(crf.n_best(*scores, n=5), path, strict=True):
            assert torch.equal(value, expected)


def test_no_stop_of_the_host():
    problem = random_problem(32, 64, 20)
    results(problem, "auto")
    crf.n_best(*problem[:5], n=1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(problem, "auto")
        crf.n_best(*problem[:5], n=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_auto_takes_the_kernels(monkeypatch):
    used = []
    real = ops.n_best
    monkeypatch.setattr(ops, "n_best", lambda *rest: used.append(1) or real(*rest))
    module = CRF(20).cuda()
    emissions = torch.randn(4, 6, 20, device="cuda")
    module.decode(emissions)
    module.double().decode(emissions.double())
    assert used == [1]
    wide = CRF(80).cuda()
    paths, _ = wide.decode(torch.randn(4, 6, 80, device="cuda"))
    assert paths.shape == (4, 6)


def test_captured_in_a_graph():
    problem = random_problem(32, 20, 20)
    scores = tuple(value.detach() for value in problem[1:4])
    emissions, lengths = problem.emissions.detach().nan_to_num(), problem.lengths
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = ops.n_best(emissions, *scores, lengths, 3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paths, values = ops.n_best(emissions, *scores, lengths, 3)
    for _ in range(3):
        graph.replay()
        assert torch.equal(paths, expected[0]) and torch.equal(values, expected[1])


def test_compiled_by_inductor():
    module = CRF(20, backend="triton").cuda()
    problem = random_problem(32, 20, 20)
    emissions, tags, lengths = problem.emissions, problem.tags, problem.lengths
    actual = torch.compile(module, fullgraph=True)(emissions, tags, lengths)
    torch.testing.assert_close(actual, module(emissions, tags, lengths))
    actual.sum().backward()
    assert module.transitions.grad.isfinite().all()
