import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedrnn
from fusedrnn import RecurrentStack
from lightning_modules import memory_model
from lightning_modules.memory_model import Problem

lengths = st.integers(10, 60)
seeds = st.integers(0, 2**31)


@settings(deadline=None, max_examples=40)
@given(lengths, seeds)
def test_adding(length, seed):
    torch.manual_seed(seed)
    x, _, target = memory_model.adding(5, length)
    values, marks = x.unbind(-1)
    assert x.shape == (length, 5, 2)
    assert marks.sum(0).tolist() == [2.0] * 5
    assert marks[: length // 2].sum(0).tolist() == [1.0] * 5
    torch.testing.assert_close(target, (values * (marks == 1)).sum(0))
    assert ((values >= 0) & (values <= 1)).all()


def test_chance_of_adding_is_the_variance_of_the_sum():
    target = memory_model.adding(200_000, 10).target
    assert Problem("adding", 10).chance == pytest.approx(target.var().item(), rel=0.02)


@settings(deadline=None, max_examples=40)
@given(lengths, seeds)
def test_temporal_order(length, seed):
    torch.manual_seed(seed)
    x, sizes, target = memory_model.temporal_order(6, length)
    assert torch.equal(x.sum(-1), torch.ones(x.shape[:2]))
    symbols = x.argmax(-1)
    assert ((sizes >= length) & (sizes <= length + length // 10)).all()
    for row in range(6):
        sequence = symbols[: sizes[row], row].tolist()
        assert (sequence[0], sequence[-1]) == (4, 5)
        (first, a), (second, b) = [(t, s) for t, s in enumerate(sequence) if s >= 6]
        assert length // 10 <= first <= length // 5
        assert length // 2 <= second <= 6 * length // 10
        assert target[row] == 2 * (a - 6) + (b - 6)
        assert all(s < 4 for t, s in enumerate(sequence[1:-1], 1) if t not in (first, second))


@settings(deadline=None, max_examples=40)
@given(lengths, seeds)
def test_copy_memory(length, seed):
    torch.manual_seed(seed)
    x, _, target = memory_model.copy_memory(4, length)
    symbols = x.argmax(-1)
    assert symbols.shape == target.shape == (length + 20, 4)
    assert torch.equal(target[-10:], symbols[:10])
    assert ((symbols[:10] >= 1) & (symbols[:10] <= 8)).all()
    assert not target[:-10].any()
    assert (symbols == 9).nonzero()[:, 0].tolist() == [length + 9] * 4
    assert not symbols[10 : length + 9].any() and not symbols[length + 10 :].any()


@pytest.mark.parametrize(("cell", "gates"), [("lstm", 4), ("lstm_peephole", 4), ("gru", 3)])
def test_carry_biases(cell, gates):
    for bias in get_args(memory_model.Bias):
        stack = RecurrentStack(3, [200], cell)
        memory_model.set_carry_bias(stack, bias, 50)
        (layer,) = stack.layers
        total = (layer.bias_ih_l0 + layer.bias_hh_l0).detach().chunk(gates)
        if bias != "chrono":
            assert (total[1] == float(bias)).all()
            continue
        spans = total[1].exp()
        assert spans.min() >= 1 and spans.max() <= 49 + 1e-3
        assert spans.mean() == pytest.approx(25, abs=4)
        if gates == 4:
            assert torch.equal(total[0], -total[1])


def test_the_carry_bias_of_a_cell_without_one_changes_nothing():
    stack = RecurrentStack(3, [4], "rnn")
    before = stack.layers[0].bias_ih_l0.clone()
    memory_model.set_carry_bias(stack, "chrono", 50)
    assert torch.equal(stack.layers[0].bias_ih_l0, before)


def test_chance_of_the_other_problems():
    assert Problem("order", 100).chance == pytest.approx(math.log(4))
    assert Problem("copy", 100).chance == pytest.approx(10 * math.log(8) / 120)


@pytest.mark.parametrize("name", memory_model.GENERATORS)
def test_a_generator_says_all_of_a_batch(name):
    problem = Problem(name, 12)
    assert Problem.from_dict(problem.to_dict()).to_dict() == {"name": name, "length": 12}
    first, again = (problem.generate(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.x, again.x) and torch.equal(first.target, again.target)
    other = problem.generate(5, torch.Generator().manual_seed(4))
    assert not torch.equal(first.x, other.x)
    steps = len(first.x) * 5 if first.lengths is None else first.lengths.sum()
    assert first.num_tokens == steps


@pytest.mark.parametrize("name", memory_model.GENERATORS)
def test_the_network_answers_and_is_saved(name, tmp_path):
    problem = Problem(name, 12)
    model = memory_model.MemoryModel(name, 12, "gru", "chrono", 4).eval()
    batch = problem.generate(3)
    outputs = model(batch)
    assert outputs.shape == (*batch.target.shape, problem.outputs)
    assert problem.loss(outputs, batch).isfinite()
    fusedrnn.save(model, tmp_path)
    assert torch.equal(fusedrnn.load(tmp_path)(batch), outputs)
