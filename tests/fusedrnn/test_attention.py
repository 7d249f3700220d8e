"""Attention against written-out formulas in float64, and the promises about padding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedrnn.attention import ATTENTIONS, AdditiveAttention, build_attention

KINDS = sorted(ATTENTIONS)


@torch.no_grad()
def written_out_score(module, kind, q, k):
    """One score of one query and one key, as in the papers, with Python sums."""
    if kind == "dot":
        return sum(float(a) * float(b) for a, b in zip(q, k, strict=True))
    if kind == "general":
        w = module.key.weight
        return sum(
            float(q[i]) * float(w[i, j]) * float(k[j]) for i in range(len(q)) for j in range(len(k))
        )
    w, u, b, v = module.query.weight, module.key.weight, module.key.bias, module.energy.weight[0]
    total = 0.0
    for a in range(len(v)):
        inner = float(b[a])
        inner += sum(float(w[a, i]) * float(q[i]) for i in range(len(q)))
        inner += sum(float(u[a, j]) * float(k[j]) for j in range(len(k)))
        total += float(v[a]) * math.tanh(inner)
    return total


def make(kind, query_size=4, key_size=4, seed=0):
    torch.manual_seed(seed)
    return build_attention(kind, query_size, key_size).double()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_written_out_formula(kind):
    module = make(kind, 4, 4 if kind == "dot" else 3)
    query = torch.randn(2, 3, 4, dtype=torch.float64)
    keys = torch.randn(2, 5, module.key_size, dtype=torch.float64)
    lengths = torch.tensor([5, 2])
    context, weights = module(query, keys, lengths)
    for b in range(2):
        n = int(lengths[b])
        for t in range(3):
            exps = [
                math.exp(written_out_score(module, kind, query[b, t], keys[b, s])) for s in range(n)
            ]
            expected = torch.tensor([e / sum(exps) for e in exps], dtype=torch.float64)
            torch.testing.assert_close(weights[b, t, :n], expected, rtol=1e-12, atol=1e-12)
            averaged = sum(expected[s] * keys[b, s] for s in range(n))
            torch.testing.assert_close(context[b, t], averaged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_padding_has_no_weight_and_no_influence(kind, data):
    batch = data.draw(st.integers(1, 4))
    size = data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, size), min_size=batch, max_size=batch))
    extra = data.draw(st.integers(0, 3))
    filler = data.draw(st.floats(-1e6, 1e6, width=32))
    module = make(kind, 3, 3, seed=data.draw(st.integers(0, 99)))
    query = torch.randn(batch, 2, 3, dtype=torch.float64)
    keys = torch.randn(batch, size, 3, dtype=torch.float64)
    dirty = torch.full((batch, size + extra, 3), filler, dtype=torch.float64)
    for row, length in enumerate(lengths):
        dirty[row, :length] = keys[row, :length]
    context, weights = module(query, dirty, torch.tensor(lengths))
    torch.testing.assert_close(weights.sum(-1), torch.ones(batch, 2, dtype=torch.float64))
    for row, length in enumerate(lengths):
        assert (weights[row, :, length:] == 0).all()
        alone, alone_weights = module(query[row : row + 1], keys[row : row + 1, :length])
        torch.testing.assert_close(context[row], alone[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            weights[row, :, :length], alone_weights[0], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("kind", KINDS)
def test_keys_projected_once_give_the_same_result_step_by_step(kind):
    module = make(kind)
    query, keys = (
        torch.randn(2, 6, 4, dtype=torch.float64),
        torch.randn(2, 5, 4, dtype=torch.float64),
    )
    lengths = torch.tensor([3, 5])
    context, weights = module(query, keys, lengths)
    projected = module.project(keys)
    for t in range(6):
        step_context, step_weights = module(query[:, t : t + 1], keys, lengths, projected)
        torch.testing.assert_close(step_context[:, 0], context[:, t])
        torch.testing.assert_close(step_weights[:, 0], weights[:, t])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    module = make(kind)
    query = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([3, 1])
    assert torch.autograd.gradcheck(lambda q, k: module(q, k, lengths), (query, keys))
    module(query, keys, lengths)[0].sum().backward()
    assert (keys.grad[1, 1:] == 0).all()


def test_row_of_length_zero_gets_nothing():
    context, weights = make("dot")(
        torch.randn(2, 1, 4).double(), torch.randn(2, 3, 4).double(), torch.tensor([0, 3])
    )
    assert (weights[0] == 0).all() and (context[0] == 0).all()
    assert torch.isfinite(context).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_masks_too(kind, dtype):
    module = make(kind).to(dtype)
    context, weights = module(
        torch.randn(2, 2, 4, dtype=dtype), torch.randn(2, 3, 4, dtype=dtype), torch.tensor([1, 3])
    )
    assert context.dtype == dtype
    assert (weights[0, :, 0] == 1).all() and (weights[0, :, 1:] == 0).all()


def test_none_is_no_module():
    assert build_attention("none", 4, 4) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_attention("bilinear", 4, 4), "attention must be one of none, dot"),
        (lambda: build_attention("dot", 4, 6), "query_size == key_size, got 4 and 6"),
        (lambda: build_attention("general", 0, 4), "query_size must be at least 1, got 0"),
        (
            lambda: make("dot")(torch.zeros(2, 1, 3), torch.zeros(2, 3, 4)),
            r"query must have shape \[B, \*, 4\], got \[2, 1, 3\]",
        ),
        (
            lambda: make("dot")(torch.zeros(3, 1, 4), torch.zeros(2, 3, 4)),
            "query has 3 rows, keys have 2",
        ),
        (
            lambda: make("dot")(
                torch.zeros(2, 1, 4), torch.zeros(2, 3, 4), torch.tensor([1, 2, 3])
            ),
            r"lengths must be an integer tensor of shape \[2\]",
        ),
        (
            lambda: make("dot")(
                torch.zeros(2, 1, 4),
                torch.zeros(2, 3, 4),
                torch.zeros(2, dtype=torch.int64, device="meta"),
            ),
            "lengths are on meta, keys on cpu",
        ),
    ],
    ids=[
        "unknown-kind",
        "dot-sizes",
        "zero-size",
        "query-shape",
        "batch",
        "lengths-shape",
        "lengths-device",
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("coverage", [False, True], ids=["", "coverage"])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 18])
def test_additive_scores_in_parts_are_those_of_the_whole(monkeypatch, chunk, coverage):
    monkeypatch.setattr("fusedrnn.attention.CHUNK", chunk)
    torch.manual_seed(0)
    module = AdditiveAttention(3, 4, 5, coverage=coverage).double()
    torch.nn.init.normal_(module.energy.weight)
    if module.coverage is not None:
        torch.nn.init.normal_(module.coverage)
    query, keys, seen = (torch.randn(5, *size).double() for size in ((2, 3), (6, 4), (2, 6)))
    for lengths in (None, torch.tensor([3, 0, 6, 1, 5])):
        arguments = query, keys, lengths, None, seen if coverage else None
        expected = module(*arguments)
        with torch.no_grad():
            torch.testing.assert_close(module(*arguments), expected, rtol=1e-12, atol=1e-12)
