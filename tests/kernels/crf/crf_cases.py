"""Random sentences for the CRF's kernels, and what the torch path makes of them in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import crf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Problem(NamedTuple):
    emissions: Tensor
    start: Tensor
    transitions: Tensor
    end: Tensor
    lengths: Tensor
    tags: Tensor

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        return self[:4]

    def to(self, dtype: torch.dtype, device: str = DEVICE) -> "Problem":
        """The same values as leaves, emissions in `dtype`, scores in float32 or float64."""
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [
            value.detach().to(device, dtype if name == "emissions" else wide).requires_grad_()
            for name, value in zip(self._fields, self.differentiable, strict=False)
        ]
        return Problem(*leaves, self.lengths.to(device), self.tags.to(device))


def random_problem(
    batch: int = 4,
    steps: int = 5,
    num_tags: int = 5,
    *,
    forbid: bool = False,
    scale: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """Values that `dtype` can hold; padding holds NaN, and tags out of range.

    With `forbid` tag 0 may neither begin nor follow itself, and tag 1 may not end; -inf says so.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    emissions = normal(batch, steps, num_tags)
    start, transitions, end = normal(num_tags), normal(num_tags, num_tags), normal(num_tags)
    if forbid:
        start[0] = transitions[0, 0] = end[1] = -torch.inf
    lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
    lengths[0] = steps
    tags = torch.randint(2 if forbid else 0, num_tags, (batch, steps), generator=generator)
    past = torch.arange(steps) >= lengths[:, None]
    emissions[past], tags[past] = torch.nan, -100
    return Problem(emissions.to(dtype), start, transitions, end, lengths, tags).to(dtype)


def results(problem: Problem, backend: str) -> dict[str, Tensor]:
    """Everything that sums, and the gradients of both likelihoods weighted differently by row."""
    emissions, start, transitions, end, lengths, tags = problem
    scores = (start, transitions, end, lengths)
    found = {
        "likelihood": crf.log_likelihood(emissions, tags, *scores, backend=backend),
        "partition": crf.log_partition(emissions, *scores, backend=backend),
        "marginals": crf.marginals(emissions, *scores, backend=backend),
    }
    weights = torch.linspace(-1, 2, len(lengths), device=lengths.device)
    for name in ("likelihood", "partition"):
        total = (found[name] * weights).sum()
        gradients = torch.autograd.grad(total, problem.differentiable)
        for argument, gradient in zip(problem._fields, gradients, strict=False):
            found[f"d {name} / d {argument}"] = gradient
    return {name: value.detach() for name, value in found.items()}


def assert_sums_agree(problem: Problem) -> None:
    """Against float64 on the same values: ten units of float32, gradients of emissions their own.

    A gradient is a sum over steps of probabilities, whose logarithms are sums of two states that
    reach the size of the scores: their error grows with both.
    """
    exact = results(problem.to(torch.float64, "cpu"), "torch")
    actual = results(problem, "triton")
    assert actual.keys() == exact.keys()
    finite = [x.detach().abs()[x.isfinite()].max().item() for x in problem.differentiable]
    unit = torch.finfo(torch.float32).eps
    tolerance = 10 * unit * (1 + sum(finite)) * problem.emissions.shape[1] ** 0.5
    for name, value in exact.items():
        low = name.endswith("emissions") and problem.emissions.dtype != torch.float32
        rtol = torch.finfo(problem.emissions.dtype).eps if low else 10 * unit
        wanted = problem.emissions.dtype if name.endswith("emissions") else torch.float32
        assert actual[name].dtype == wanted, name
        torch.testing.assert_close(
            actual[name].cpu().double(),
            value,
            rtol=rtol,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_paths_agree(problem: Problem, n: int) -> None:
    """The same paths as in float64 where their scores differ, and the same scores."""
    emissions, *scores = (value.detach() for value in problem[:5])
    exact = problem.to(torch.float64, "cpu")
    wanted, expected = crf.n_best(*exact[:5], n=n, backend="torch")
    paths, found = crf.n_best(emissions, *scores, n=n, backend="triton")
    assert paths.dtype == torch.int64 and found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-6, atol=1e-4)
    apart = expected.diff(dim=1, append=expected.new_full((len(expected), 1), -torch.inf)) < -1e-3
    apart = apart & torch.cat([torch.ones_like(apart[:, :1]), apart[:, :-1]], 1)
    assert apart[:, 0].any()
    assert torch.equal(paths.cpu()[apart], wanted[apart])
    assert torch.equal(paths.cpu() < 0, wanted < 0)
