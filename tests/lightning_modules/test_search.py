"""Search against exhaustive enumeration on models small enough to enumerate."""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.search import beam_search, greedy_search

PAD, BEGIN, END = 0, 1, 2


class Prefixes(NamedTuple):
    """The model's state: which table a row uses, and all symbols it has seen."""

    table: Tensor
    seen: Tensor

    def select(self, rows):
        return Prefixes(self.table[rows], self.seen[rows])


class TableModel:
    """Next-symbol probabilities that depend on the whole prefix: one random table per row."""

    def __init__(self, seed, rows, vocabulary, sharpness=2.0):
        self.rows, self.vocabulary, self.sharpness, self.seed = rows, vocabulary, sharpness, seed

    def log_probs(self, table, prefix):
        mixed = hash((self.seed, int(table), tuple(prefix))) % (2**31)
        generator = torch.Generator().manual_seed(mixed)
        logits = self.sharpness * torch.randn(
            self.vocabulary, generator=generator, dtype=torch.float64
        )
        logits[[PAD, BEGIN]] = -torch.inf
        return logits.log_softmax(-1)

    def start(self, tables=None):
        tables = torch.arange(self.rows) if tables is None else tables
        return Prefixes(tables, torch.empty(len(tables), 0, dtype=torch.int64))

    def step(self, symbols, state):
        seen = torch.cat([state.seen, symbols[:, None]], 1)
        rows = [self.log_probs(t, s) for t, s in zip(state.table, seen.tolist(), strict=True)]
        return torch.stack(rows), Prefixes(state.table, seen)

    def everything(self, table, limit, alpha):
        """All hypotheses of a row with their scores, best first."""
        ordinary = [s for s in range(self.vocabulary) if s not in (PAD, BEGIN, END)]
        found = []
        for length in range(1, limit + 1):
            for body in itertools.product(ordinary, repeat=length - 1):
                lasts = [END, *ordinary] if length == limit else [END]
                for last in lasts:
                    symbols = [*body, last]
                    total = sum(
                        float(self.log_probs(table, [BEGIN, *symbols[:i]])[s])
                        for i, s in enumerate(symbols)
                    )
                    found.append((total / ((5 + length) / 6) ** alpha, symbols))
        return sorted(found, key=lambda pair: -pair[0])


def listed(hypotheses):
    return [
        [h[:n] for h, n in zip(row, lengths, strict=True)]
        for row, lengths in zip(
            hypotheses.symbols.tolist(), hypotheses.lengths.tolist(), strict=True
        )
    ]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    limits=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    alpha=st.sampled_from([0.0, 0.6, 1.0, 3.0]),
    n_best=st.integers(1, 4),
    early_stop=st.booleans(),
)
def test_a_beam_that_prunes_nothing_finds_what_exhaustive_search_finds(
    seed, limits, alpha, n_best, early_stop
):
    model = TableModel(seed, len(limits), vocabulary=6)
    found = beam_search(
        model.step, model.start(), torch.tensor(limits), BEGIN, END, 4**4, n_best, alpha, early_stop
    )
    for row, limit in enumerate(limits):
        best = model.everything(row, limit, alpha)[:n_best]
        assert listed(found)[row][: len(best)] == [symbols for _, symbols in best]
        expected = torch.tensor([score for score, _ in best], dtype=torch.float64)
        torch.testing.assert_close(found.scores[row, : len(best)], expected)
        assert found.scores[row, len(best) :].isneginf().all()
        assert (found.lengths[row, len(best) :] == 0).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    beam_size=st.integers(1, 4),
    alpha=st.sampled_from([0.0, 0.6, 1.0, 3.0]),
    sharpness=st.sampled_from([0.5, 2.0, 5.0]),
    data=st.data(),
)
def test_stopping_early_changes_nothing(seed, beam_size, alpha, sharpness, data):
    n_best = data.draw(st.integers(1, beam_size))
    limits = torch.tensor(data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4)))
    model = TableModel(seed, len(limits), vocabulary=6, sharpness=sharpness)
    arguments = (limits, BEGIN, END, beam_size, n_best, alpha)
    early = beam_search(model.step, model.start(), *arguments, early_stop=True)
    late = beam_search(model.step, model.start(), *arguments, early_stop=False)
    assert torch.equal(early.scores, late.scores)
    assert listed(early) == listed(late)


def test_the_stop_rule_does_stop():
    calls = []

    def step(symbols, state):
        calls.append(len(symbols))
        row = torch.tensor([-torch.inf, -torch.inf, -0.01, -5.0], dtype=torch.float64)
        return row.expand(len(symbols), 4), state.select(torch.arange(len(symbols)))

    state = TableModel(0, 3, 4).start()
    beam_search(step, state, torch.full((3,), 50), BEGIN, END, beam_size=2)
    assert calls == [3]
    calls.clear()
    beam_search(step, state, torch.full((3,), 50), BEGIN, END, beam_size=2, early_stop=False)
    assert len(calls) == 50


def test_rows_that_are_done_leave_the_batch():
    sizes = []

    def step(symbols, state):
        sizes.append(len(symbols))
        ends_now = state.table < len(sizes)
        row = torch.full((len(symbols), 4), -torch.inf, dtype=torch.float64)
        row[ends_now, END] = 0.0
        row[~ends_now, 3] = 0.0
        return row, state

    state = TableModel(0, 4, 4).start()
    found = greedy_search(step, state, torch.full((4,), 9), BEGIN, END)
    assert sizes == [4, 3, 2, 1]
    assert found.lengths.flatten().tolist() == [1, 2, 3, 4]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    limits=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    alpha=st.sampled_from([0.0, 0.6, 2.0]),
)
def test_beam_one_is_greedy(seed, limits, alpha):
    model = TableModel(seed, len(limits), vocabulary=6)
    arguments = (torch.tensor(limits), BEGIN, END)
    greedy = greedy_search(model.step, model.start(), *arguments, alpha=alpha)
    beam = beam_search(model.step, model.start(), *arguments, beam_size=1, alpha=alpha)
    assert listed(greedy) == listed(beam)
    torch.testing.assert_close(greedy.scores, beam.scores)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), beam_size=st.integers(0, 3), data=st.data())
def test_order_and_company_change_nothing(seed, beam_size, data):
    limits = torch.tensor(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5)))
    order = torch.tensor(data.draw(st.permutations(range(len(limits)))))
    model = TableModel(seed, len(limits), vocabulary=6)

    def run(tables):
        arguments = (model.step, model.start(tables), limits[tables], BEGIN, END)
        if beam_size == 0:
            return greedy_search(*arguments)
        return beam_search(*arguments, beam_size=beam_size, n_best=beam_size, alpha=0.6)

    together = run(torch.arange(len(limits)))
    shuffled = run(order)
    assert [listed(together)[i] for i in order.tolist()] == listed(shuffled)
    assert torch.equal(together.scores[order], shuffled.scores)
    for row in range(len(limits)):
        alone = run(torch.tensor([row]))
        assert listed(alone)[0] == listed(together)[row]
        assert torch.equal(alone.scores[0], together.scores[row])


def test_length_normalisation_prefers_the_longer_when_its_symbols_are_likelier():
    def step(symbols, state):
        seen = torch.cat([state.seen, symbols[:, None]], 1)
        rows = []
        for prefix in seen.tolist():
            p = torch.full((4,), 1e-9, dtype=torch.float64)
            p[[END, 3]] = torch.tensor([0.5, 0.5] if len(prefix) < 3 else [0.999, 0.001]).double()
            rows.append(p.log())
        return torch.stack(rows), Prefixes(state.table, seen)

    state = TableModel(0, 1, 4).start()
    limit = torch.tensor([6])
    short = beam_search(step, state, limit, BEGIN, END, beam_size=4, alpha=0.0)
    long = beam_search(step, state, limit, BEGIN, END, beam_size=4, alpha=5.0)
    assert listed(short)[0][0] == [END]
    assert listed(long)[0][0] == [3, 3, END]


def test_sequences_drop_the_end_symbol_and_empty_places():
    model = TableModel(1, 2, vocabulary=4)
    found = beam_search(
        model.step, model.start(), torch.tensor([1, 2]), BEGIN, END, beam_size=3, n_best=3
    )
    rows = found.sequences(END)
    assert sorted(rows[0]) == [[], [3]]
    assert all(END not in hypothesis for row in rows for hypothesis in row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limits": torch.tensor([3, 0])}, r"limits must be \[B\] numbers of at least 1"),
        ({"alpha": -0.1}, "alpha must be at least 0"),
        ({"beam_size": 0}, "1 <= n_best <= beam_size, got n_best=1, beam_size=0"),
        ({"beam_size": 2, "n_best": 3}, "got n_best=3, beam_size=2"),
    ],
    ids=["limit", "alpha", "beam", "n-best"],
)
def test_wrong_arguments_are_named(arguments, message):
    model = TableModel(0, 2, 4)
    given_arguments = {"limits": torch.tensor([3, 3]), "beam_size": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        beam_search(model.step, model.start(), begin=BEGIN, end=END, **given_arguments)
