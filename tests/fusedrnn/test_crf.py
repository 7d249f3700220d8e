"""The CRF against enumeration of all paths, against pytorch-crf, and against its own promises."""

import itertools
import math

import pytest
import torch
import torchcrf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedrnn.crf import CRF, PADDING, allowed_transitions, split_tag
from kernels.crf import chain
from lightning_modules.data.schemes import chunks

TAGS = {
    "BIO": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
    "IOB1": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
    "BIOES": ["O", "B-PER", "I-PER", "E-PER", "S-PER"],
}
LEGAL_NEXT = {
    "BIO": "O>O O>B B>O B>B B>b B>I I>O I>B I>b I>I",
    "IOB1": "O>O O>I B>O B>B B>I B>i I>O I>B I>I I>i",
    "BIOES": "O>O O>B O>S B>I B>E I>I I>E E>O E>B E>b E>S E>s S>O S>B S>b S>S S>s",
}
"""`B>b` is a B- of another type; upper case after `>` a tag of the same type."""


def make(num_tags: int = 3, scheme: str | None = None, seed: int = 0, scale: float = 1.0) -> CRF:
    torch.manual_seed(seed)
    crf = CRF(num_tags) if scheme is None else CRF(len(TAGS[scheme]), TAGS[scheme], scheme)
    for parameter in crf.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return crf.double()


def legal(crf: CRF, path: tuple[int, ...]) -> bool:
    if crf.scheme is None:
        return True
    start, between, end = allowed_transitions(TAGS[crf.scheme], crf.scheme)
    steps = all(between[a, b] for a, b in itertools.pairwise(path))
    return bool(start[path[0]] and steps and end[path[-1]])


def enumerate_paths(crf: CRF, emissions: Tensor) -> dict[tuple[int, ...], float]:
    """Scores of all legal paths over emissions [T, K]."""
    scores = {}
    for path in itertools.product(range(crf.num_tags), repeat=len(emissions)):
        if legal(crf, path):
            score = crf.start[path[0]] + crf.end[path[-1]]
            score = score + sum(emissions[t, k] for t, k in enumerate(path))
            score = score + sum(crf.transitions[a, b] for a, b in itertools.pairwise(path))
            scores[path] = score.item()
    return scores


@st.composite
def problems(draw: st.DrawFn) -> tuple[CRF, Tensor, Tensor]:
    """A CRF, emissions [B, T, K] and lengths [B], few enough to enumerate all paths."""
    scheme = draw(st.sampled_from([None, "BIO", "IOB1", "BIOES"]))
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    scale = draw(st.sampled_from([0.1, 1.0, 30.0]))
    crf = make(scheme=scheme, seed=draw(st.integers(0, 1000)), scale=scale)
    emissions = scale * torch.randn(len(lengths), max(lengths), crf.num_tags, dtype=torch.float64)
    return crf, emissions, torch.tensor(lengths)


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_agrees_with_enumeration(problem: tuple[CRF, Tensor, Tensor]) -> None:
    crf, emissions, sizes = problem
    lengths = sizes.tolist()
    partition = crf.log_partition(emissions, sizes)
    marginals = crf.marginals(emissions, sizes)
    paths, best = crf.decode(emissions, sizes)
    for row, length in enumerate(lengths):
        scores = enumerate_paths(crf, emissions[row, :length])
        log_z = torch.tensor(list(scores.values()), dtype=torch.float64).logsumexp(0)
        torch.testing.assert_close(partition[row], log_z)
        expected = torch.zeros_like(marginals[row])
        for path, score in scores.items():
            for t, k in enumerate(path):
                expected[t, k] += math.exp(score - log_z)
        torch.testing.assert_close(marginals[row], expected, atol=1e-9, rtol=1e-7)
        found = tuple(paths[row, :length].tolist())
        assert scores[found] == pytest.approx(max(scores.values()))
        assert float(best[row]) == pytest.approx(scores[found])
        assert (paths[row, length:] == PADDING).all()
        tags = torch.zeros(1, length, dtype=torch.int64) + torch.tensor(found)
        likelihood = crf(emissions[row : row + 1, :length], tags)
        torch.testing.assert_close(likelihood[0], scores[found] - log_z)


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from([None, "BIO", "IOB1", "BIOES"]),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    n=st.sampled_from([1, 2, 5, 40]),
    seed=st.integers(0, 1000),
)
def test_n_best_agrees_with_enumeration(
    scheme: str | None, lengths: list[int], n: int, seed: int
) -> None:
    crf = make(scheme=scheme, seed=seed)
    emissions = torch.randn(len(lengths), max(lengths), crf.num_tags, dtype=torch.float64)
    paths, found = crf.n_best(emissions, n, torch.tensor(lengths))
    assert paths.shape == (len(lengths), n, max(lengths))
    for row, length in enumerate(lengths):
        scores = enumerate_paths(crf, emissions[row, :length])
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:n]
        assert [tuple(path[:length].tolist()) for path in paths[row, : len(best)]] == best
        expected = [scores[path] for path in best] + [-math.inf] * (n - len(best))
        assert found[row].tolist() == pytest.approx(expected)
        assert (paths[row, len(best) :] == PADDING).all()
        assert (paths[row, :, length:] == PADDING).all()


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_span_marginals_agree_with_enumeration(problem: tuple[CRF, Tensor, Tensor]) -> None:
    """Of every span of a likely path: the share of the paths that have it, whole and no longer."""
    crf, emissions, sizes = problem
    lengths = sizes.tolist()
    tags = crf.n_best(emissions, 2, sizes)[0][:, -1]
    spans, expected = [], []
    for row, length in enumerate(lengths):
        scores = enumerate_paths(crf, emissions[row, :length])
        log_z = torch.tensor(list(scores.values()), dtype=torch.float64).logsumexp(0)
        path = tuple(tags[row, :length].tolist())
        if PADDING in path:
            continue
        found = spans_of(crf, path)
        spans += [(row, *span) for span in found]
        expected += [
            sum(
                math.exp(score - log_z)
                for other, score in scores.items()
                if other[a:b] == path[a:b] and (a, b) in spans_of(crf, other)
            )
            for a, b in found
        ]
    places = torch.tensor(spans, dtype=torch.int64).view(-1, 3)
    actual = crf.span_marginals(emissions, tags, places, sizes)
    assert actual.tolist() == pytest.approx(expected, rel=1e-7, abs=1e-9)


def spans_of(crf: CRF, path: tuple[int, ...]) -> list[tuple[int, int]]:
    """The entities of a legal path; without a scheme all spans."""
    if crf.scheme is None:
        return list(itertools.combinations(range(len(path) + 1), 2))
    names = [TAGS[crf.scheme][tag] for tag in path]
    return [(chunk.start, chunk.end) for chunk in chunks(names)]


def test_the_probability_of_a_span_is_no_product_of_marginals() -> None:
    """Two tags that always come together have twice their probability in the product."""
    crf = make(2)
    with torch.no_grad():
        crf.start.zero_()
        crf.end.zero_()
        crf.transitions.copy_(torch.tensor([[0.0, -50.0], [-50.0, 0.0]]))
    emissions, tags = torch.zeros(1, 2, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=int)
    span = crf.span_marginals(emissions, tags, torch.tensor([[0, 0, 2]]))
    assert span.item() == pytest.approx(0.5)
    assert crf.marginals(emissions)[0, :, 0].prod().item() == pytest.approx(0.25)
    assert crf.span_marginals(emissions, tags, torch.zeros(0, 3, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_bad_n(n: int) -> None:
    with pytest.raises(ValueError, match="n must be an integer of at least 1"):
        make().n_best(torch.zeros(1, 2, 3), n)


@pytest.mark.parametrize("scheme", [None, "BIO", "IOB1", "BIOES"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0, 200.0])
def test_products_of_exponentials_agree_with_logsumexp(
    scheme: str | None, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the products are taken; at the largest scale they are not."""
    crf = make(scheme=scheme)
    emissions = scale * torch.rand(4, 60, crf.num_tags, dtype=torch.float64)
    lengths = torch.tensor([60, 1, 33, 2])
    taken = []
    real = chain.factors
    monkeypatch.setattr(chain, "factors", lambda *rest: taken.append(real(*rest)) or taken[-1])

    def run() -> list[Tensor]:
        leaves = [emissions.clone().requires_grad_(), *crf.parameters()]
        weights = torch.tensor([1.0, -2, 3, 0.5], dtype=torch.float64)
        value = crf.log_partition(leaves[0], lengths)
        gradients = torch.autograd.grad((value * weights).sum(), leaves)
        return [value.detach(), crf.marginals(leaves[0], lengths), *gradients]

    actual = run()
    assert all((given is None) == (scale == 200) for given in taken)
    monkeypatch.setattr(chain, "factors", lambda *_: None)
    for first, second in zip(actual, run(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


def test_sums_from_the_end_only_for_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []
    real = chain.products
    monkeypatch.setattr(chain, "products", lambda g, both: wanted.append(both) or real(g, both))
    crf, emissions, tags = make(), torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)
    with torch.no_grad():
        crf(emissions, tags)
    crf(emissions, tags)
    assert wanted == [False, True]


def test_a_tag_that_the_emissions_forbid() -> None:
    crf = make(4)
    emissions = torch.randn(2, 5, 4, dtype=torch.float64)
    emissions[0, 2, 1] = -math.inf
    marginals = crf.marginals(emissions)
    assert marginals.isfinite().all()
    assert marginals[0, 2, 1] == 0
    forbidden = emissions.clone()
    forbidden[0, 2, 1] = -1000.0
    torch.testing.assert_close(marginals, crf.marginals(forbidden))
    assert 1 not in crf.n_best(emissions, 5)[0][0, :, 2]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of log(0) in Triton's interpreter
def test_backend() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, got 'cuda'"):
        CRF(3, backend="cuda")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    emissions = torch.randn(2, 3, 4, device=device)
    crf = CRF(4, backend="triton").to(device)
    plain = CRF(4, backend="torch").to(device)
    plain.load_state_dict(crf.state_dict())
    torch.testing.assert_close(crf.log_partition(emissions), plain.log_partition(emissions))
    assert torch.equal(crf.decode(emissions)[0], plain.decode(emissions)[0])


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_agrees_with_pytorch_crf(scale: float) -> None:
    crf, theirs = make(7, scale=scale), torchcrf.CRF(7, batch_first=True).double()
    theirs.start_transitions.data = crf.start.data.clone()
    theirs.end_transitions.data = crf.end.data.clone()
    theirs.transitions.data = crf.transitions.data.clone()
    lengths = torch.tensor([9, 1, 4, 12, 2, 12])
    mask = torch.arange(12) < lengths[:, None]
    tags = torch.randint(7, mask.shape)
    inputs = [(scale * torch.randn(6, 12, 7, dtype=torch.float64)).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    ours = crf.log_likelihood(inputs[0], tags, lengths)
    reference = theirs(inputs[1], tags, mask, reduction="none")
    torch.testing.assert_close(ours, reference)
    weights = torch.randn(6)
    (ours * weights).sum().backward()
    (reference * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    pairs = ((crf.start, "start_"), (crf.transitions, ""), (crf.end, "end_"))
    for parameter, name in pairs:
        expected = getattr(theirs, f"{name}transitions").grad
        torch.testing.assert_close(parameter.grad, expected)
    found, _ = crf.decode(inputs[0], lengths)
    assert [row[:n].tolist() for row, n in zip(found, lengths, strict=True)] == theirs.decode(
        inputs[0], mask
    )


@pytest.mark.parametrize("scheme", [None, "BIO", "IOB1", "BIOES"])
@pytest.mark.parametrize("exact", [False, True], ids=["product", "logsumexp"])
def test_gradients(scheme: str | None, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both ways to sum: by matrix products, and by the logsumexp that accelerators take."""
    if exact:
        monkeypatch.setattr(chain, "factors", lambda *_: None)
    crf = make(scheme=scheme)
    emissions = torch.randn(3, 4, crf.num_tags, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 1, 3])

    def partition(emissions: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(("start", "transitions", "end"), parameters, strict=True))
        return torch.func.functional_call(
            Partition(crf), {f"crf.{k}": v for k, v in named.items()}, (emissions, lengths)
        )

    parameters = [crf.start, crf.transitions, crf.end]
    assert torch.autograd.gradcheck(partition, (emissions, *parameters), atol=1e-6)


class Partition(torch.nn.Module):
    def __init__(self, crf: CRF) -> None:
        super().__init__()
        self.crf = crf

    def forward(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        return self.crf.log_partition(emissions, lengths)


@settings(max_examples=25, deadline=None)
@given(
    scheme=st.sampled_from([None, "BIO", "BIOES"]),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_of_equal_paths_the_first(scheme: str | None, lengths: list[int], seed: int) -> None:
    """In the order of tags from the start; so neither padding nor the batch changes a path."""
    crf = make(scheme=scheme, seed=seed)
    with torch.no_grad():
        for parameter in crf.parameters():
            parameter.round_()
    emissions = torch.randint(2, (len(lengths), max(lengths) + 1, crf.num_tags)).double()
    paths, _ = crf.decode(emissions, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        scores = enumerate_paths(crf, emissions[row, :length])
        best = min(path for path in scores if scores[path] == max(scores.values()))
        assert tuple(paths[row, :length].tolist()) == best


def test_backward_twice() -> None:
    """The sums that it needs stay as they are."""
    crf, tags = make(), torch.zeros(2, 4, dtype=torch.int64)
    emissions = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    loss = crf(emissions, tags).sum()
    leaves = [emissions, *crf.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(once, again)


def test_paths_and_scores_serve_autograd() -> None:
    """They come out of inference mode, whose tensors a backward pass would refuse."""
    crf, factor = make(), torch.ones((), dtype=torch.float64, requires_grad=True)
    emissions = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    paths, scores = crf.decode(emissions)
    (scores * factor).sum().backward()
    torch.testing.assert_close(factor.grad, scores.sum())
    crf(emissions, paths).sum().backward()
    assert emissions.grad is not None


def test_gradient_is_the_marginals() -> None:
    crf = make(scheme="BIO")
    emissions = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([6, 3])
    crf.log_partition(emissions, lengths).sum().backward()
    torch.testing.assert_close(emissions.grad, crf.marginals(emissions, lengths))


def test_refuses_a_second_derivative() -> None:
    crf = make()
    emissions = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    partition = crf.log_partition(emissions).sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(partition, emissions, create_graph=True)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    filling=st.sampled_from([0.0, 1e30, -math.inf, math.inf, math.nan]),
    extra=st.integers(0, 3),
    scheme=st.sampled_from([None, "BIO", "BIOES"]),
)
def test_padding_changes_nothing(seed: int, filling: float, extra: int, scheme: str | None) -> None:
    crf = make(scheme=scheme, seed=seed)
    lengths = torch.randint(1, 6, (4,))
    lengths[0] = 5
    clean = torch.randn(4, 5, crf.num_tags, dtype=torch.float64)
    padded = torch.nn.functional.pad(clean, (0, 0, 0, extra))
    past = torch.arange(5 + extra) >= lengths[:, None]
    padded = padded.masked_fill(past[..., None], filling)
    tags = crf.decode(clean, lengths)[0]
    padded_tags = torch.nn.functional.pad(tags, (0, extra)).masked_fill(past, -100)
    runs = []
    for emissions, gold in ((clean, tags), (padded, padded_tags)):
        emissions.requires_grad_()
        crf.zero_grad()
        likelihood = crf.log_likelihood(emissions, gold, lengths)
        likelihood.sum().backward()
        paths, scores = crf.decode(emissions, lengths)
        marginals = crf.marginals(emissions, lengths)
        gradients = [p.grad.clone() for p in crf.parameters()]
        cut = [emissions.grad[:, :5], paths[:, :5], marginals[:, :5]]
        runs.append([likelihood.detach(), scores, *gradients, *cut])
    assert (padded.grad[past] == 0).all()
    for first, second in zip(*runs, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("scheme", sorted(LEGAL_NEXT))
def test_scheme_table(scheme: str) -> None:
    letters = "OBI" if scheme != "BIOES" else "OBIES"
    tags = ["O"] + [f"{letter}-{kind}" for kind in ("X", "Y") for letter in letters[1:]]
    start, between, end = allowed_transitions(tags, scheme)
    legal_pairs = set(LEGAL_NEXT[scheme].split())
    for a, b in itertools.product(range(len(tags)), repeat=2):
        other = "O" not in (tags[a], tags[b]) and tags[a][-1] != tags[b][-1]
        right = tags[b][0].lower() if other else tags[b][0]
        assert bool(between[a, b]) == (f"{tags[a][0]}>{right}" in legal_pairs), (tags[a], tags[b])
    opening = {"BIO": "OB", "IOB1": "OI", "BIOES": "OBS"}[scheme]
    closing = {"BIO": "OBI", "IOB1": "OBI", "BIOES": "OES"}[scheme]
    assert [bool(flag) for flag in start] == [tag[0] in opening for tag in tags]
    assert [bool(flag) for flag in end] == [tag[0] in closing for tag in tags]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scheme=st.sampled_from(sorted(TAGS)))
def test_decodes_legal_paths_whatever_the_scores(seed: int, scheme: str) -> None:
    crf = make(scheme=scheme, seed=seed, scale=10.0)
    emissions = 10 * torch.randn(5, 8, 5, dtype=torch.float64)
    lengths = torch.randint(1, 9, (5,))
    paths, _ = crf.decode(emissions, lengths)
    for row, length in zip(paths, lengths, strict=True):
        assert legal(crf, tuple(row[:length].tolist()))


def test_illegal_gold_path_has_probability_zero() -> None:
    crf = make(scheme="BIO")
    tags = torch.tensor([[2, 0], [1, 2]])
    likelihood = crf(torch.randn(2, 2, 5, dtype=torch.float64), tags)
    assert likelihood[0] == -math.inf
    assert likelihood[1].isfinite()


def test_a_length_without_a_legal_path() -> None:
    """It leaves the other rows alone."""
    torch.manual_seed(0)
    crf = CRF(2, ["B-X", "E-X"], "BIOES")
    emissions, lengths = torch.randn(3, 4, 2), torch.tensor([2, 3, 4])
    gold = torch.tensor([[0, 1, 0, 1]] * 3)
    possible = torch.tensor([True, False, True])
    assert (crf.log_partition(emissions, lengths) > -math.inf).equal(possible)
    likelihood = crf(emissions, gold, lengths)
    assert likelihood[possible].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert likelihood[1].isnan()
    paths, scores = crf.decode(emissions, lengths)
    assert paths.tolist() == [[0, 1, -1, -1], [-1] * 4, [0, 1, 0, 1]]
    assert scores[1] == -math.inf
    assert crf.marginals(emissions, lengths)[2].argmax(-1).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_computes_in_float32(dtype: torch.dtype) -> None:
    crf = make(6).float()
    emissions = torch.randn(2, 50, 6).to(dtype)
    expected = crf.log_partition(emissions.float())
    assert torch.equal(crf.log_partition(emissions), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crf.log_partition(emissions.float()), expected)
        assert torch.equal(crf.decode(emissions.float())[1], crf.decode(emissions)[1])
        crf.log_partition(emissions.float()).sum().backward()
    low = crf.transitions.grad
    crf.zero_grad()
    crf.log_partition(emissions.float()).sum().backward()
    assert torch.equal(low, crf.transitions.grad)


def test_float32_stays_exact_over_long_sequences_and_extreme_scores() -> None:
    """Log-probabilities keep their digits: 5,000 steps, and gaps beyond the range of exp."""
    exact = make(scheme="BIO")
    crf = CRF(5, TAGS["BIO"], "BIO")
    crf.load_state_dict({name: value.float() for name, value in exact.state_dict().items()})
    for emissions in (torch.randn(1, 5000, 5), 200 * torch.randn(3, 40, 5)):
        reference = exact.log_partition(emissions.double())
        torch.testing.assert_close(
            crf.log_partition(emissions).double(), reference, rtol=3e-6, atol=0
        )
        expected = exact.marginals(emissions.double())
        torch.testing.assert_close(crf.marginals(emissions).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        (torch.tensor([2, 0]), r"lengths must lie in 1..3, row 1 has 0"),
        (torch.tensor([-1, 2]), r"lengths must lie in 1..3, row 0 has -1"),
        (torch.tensor([2, 4]), r"lengths must lie in 1..3"),
        (torch.tensor([2.0, 1.0]), r"lengths must have dtype torch.int64"),
        (torch.tensor([2]), r"lengths must have shape \[2\]"),
        (torch.tensor([2, 1], device="meta"), r"lengths must be on cpu"),
    ],
    ids=["zero", "negative", "too-long", "float", "too-few", "other-device"],
)
def test_bad_lengths(lengths: Tensor, expected: str) -> None:
    crf, emissions = make(4), torch.randn(2, 3, 4, dtype=torch.float64)
    for call in (crf.log_partition, crf.decode, crf.marginals):
        with pytest.raises((TypeError, ValueError), match=expected):
            call(emissions, lengths)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (torch.tensor([[0, 4]]), "tags must lie in 0..3"),
        (torch.tensor([[0, -100]]), "tags must lie in 0..3"),
        (torch.tensor([[0, 1, 2]]), r"tags must be int64 \[B, T\] = \[1, 2\]"),
        (torch.tensor([[0.0, 1.0]]), "tags must be int64"),
    ],
    ids=["too-large", "negative", "shape", "float"],
)
def test_bad_tags(tags: Tensor, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make(4)(torch.randn(1, 2, 4, dtype=torch.float64), tags)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 0, 4)], ids=str)
def test_bad_emissions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"emissions must be \[B, T, K = 4\]"):
        make(4).decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_tags": 0}, "num_tags must be at least 1"),
        ({"num_tags": 2, "tags": ["O"]}, "tags must hold num_tags = 2 names"),
        ({"num_tags": 2, "scheme": "BIO"}, "needs the tag names"),
        ({"num_tags": 1, "tags": ["O"], "scheme": "IOB2"}, "scheme must be None or one of"),
        ({"num_tags": 1, "tags": ["B"], "scheme": "BIO"}, "tag 'B' is outside the scheme BIO"),
        ({"num_tags": 1, "tags": ["E-X"], "scheme": "BIO"}, "expected O, B-TYPE, I-TYPE"),
    ],
)
def test_bad_arguments(arguments: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        CRF(**arguments)


def test_split_tag_keeps_hyphens_of_the_type() -> None:
    assert split_tag("B-film-noir", "BIO") == ("B", "film-noir")
    assert split_tag("O", "BIOES") == ("O", "")
