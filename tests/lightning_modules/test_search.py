"""Search against exhaustive enumeration on models small enough to enumerate."""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.search import Constraints, beam_search, ensemble, greedy_search, sample

PAD, BEGIN, END = 0, 1, 2


class Prefixes(NamedTuple):
    """The model's state: which table a row uses, and all symbols it has seen."""

    table: Tensor
    seen: Tensor

    def select(self, rows, sources=None):
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


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    limit=st.integers(1, 4),
    min_length=st.integers(0, 3),
    ngram=st.integers(0, 3),
    alpha=st.sampled_from([0.0, 1.0]),
    early_stop=st.booleans(),
)
def test_constraints_leave_what_exhaustive_search_leaves(
    seed, limit, min_length, ngram, alpha, early_stop
):
    model = TableModel(seed, 1, vocabulary=6)
    constraints = Constraints(min_length, ngram)
    arguments = (model.step, model.start(), torch.tensor([limit]), BEGIN, END)
    options = {"alpha": alpha, "early_stop": early_stop, "constraints": constraints}
    found = beam_search(*arguments, 4**4, 4, **options)

    def fits(symbols):
        ngrams = [tuple(symbols[i : i + ngram]) for i in range(len(symbols) - ngram + 1)]
        ends_early = symbols[-1] == END and len(symbols) <= min_length
        return not ends_early and (ngram == 0 or len(set(ngrams)) == len(ngrams))

    best = [pair for pair in model.everything(0, limit, alpha) if fits(pair[1])][:4]
    assert listed(found)[0][: len(best)] == [symbols for _, symbols in best]
    expected = torch.tensor([score for score, _ in best], dtype=torch.float64)
    torch.testing.assert_close(found.scores[0, : len(best)], expected)
    assert found.scores[0, len(best) :].isneginf().all()
    narrow = beam_search(*arguments, 1, **options)
    greedy = greedy_search(*arguments, alpha=alpha, constraints=constraints)
    assert fits(listed(greedy)[0][0]) and listed(narrow) == listed(greedy)


def test_constraints_that_leave_nothing_give_way():
    """Three symbols, none of them twice, and an end that may not come before four."""
    model = TableModel(3, 2, vocabulary=6)
    arguments = (model.step, model.start(), torch.tensor([6, 2]), BEGIN, END)
    strict = Constraints(min_length=4, no_repeat_ngram_size=1)
    for found in (
        greedy_search(*arguments, constraints=strict),
        beam_search(*arguments, 3, constraints=strict),
        sample(*arguments, torch.rand(2, 3, 6), constraints=strict),
    ):
        for hypothesis in listed(found)[0]:
            assert len(set(hypothesis[:3])) == 3 and END not in hypothesis[:3]
        assert found.lengths[1].tolist() == [2] * found.lengths.shape[1]
        assert found.scores.isfinite().all()


def chances(model, table=0):
    return model.log_probs(table, [BEGIN]).exp()


def drawn(model, count, **options):
    """Shares of the first symbols that an even grid of random numbers draws."""
    grid = ((torch.arange(count) + 0.5) / count).double().view(1, count, 1)
    found = sample(model.step, model.start(), torch.tensor([1]), BEGIN, END, grid, **options)
    return torch.bincount(found.symbols.flatten(), minlength=model.vocabulary) / count


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 7),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
)
def test_samples_follow_the_distribution_that_was_asked_for(seed, temperature, top_k, top_p):
    model = TableModel(seed, 1, vocabulary=6)
    sharp = chances(model) ** (1 / temperature)
    expected = torch.zeros(6, dtype=torch.float64)
    order = sharp.argsort(descending=True).tolist()[: top_k or 6]
    total, mass = sum(float(sharp[s]) for s in order), 0.0
    for symbol in order:
        if mass < top_p:
            expected[symbol] = sharp[symbol]
        mass += float(sharp[symbol]) / total
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    shares = drawn(model, 2000, **options).double()
    torch.testing.assert_close(shares, expected / expected.sum(), atol=2e-3, rtol=0)
    assert ((shares > 0) <= (expected > 0)).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 3), data=st.data())
def test_samples_are_scored_by_the_model_and_do_not_depend_on_company(seed, count, data):
    limits = torch.tensor(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4)))
    draws = torch.rand(len(limits), count, 6, generator=torch.Generator().manual_seed(seed))
    model = TableModel(seed, len(limits), vocabulary=6)

    def run(tables):
        arguments = (model.step, model.start(tables), limits[tables], BEGIN, END)
        return sample(*arguments, draws[tables], temperature=0.7, top_p=0.9, alpha=0.6)

    together = run(torch.arange(len(limits)))
    for row in range(len(limits)):
        alone = run(torch.tensor([row]))
        assert listed(alone)[0] == listed(together)[row]
        assert torch.equal(alone.scores[0], together.scores[row])
        known = {tuple(symbols): s for s, symbols in model.everything(row, int(limits[row]), 0.6)}
        for symbols, score in zip(listed(alone)[0], alone.scores[0].tolist(), strict=True):
            assert score == pytest.approx(known[tuple(symbols)])
    assert (together.scores.diff(dim=1) <= 0).all()


def test_sampling_the_likeliest_alone_is_greedy():
    model = TableModel(5, 3, vocabulary=6)
    arguments = (model.step, model.start(), torch.tensor([5, 3, 7]), BEGIN, END)
    greedy = greedy_search(*arguments)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}):
        assert listed(sample(*arguments, torch.rand(3, 1, 7), **options)) == listed(greedy)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), limit=st.integers(1, 4), alpha=st.sampled_from([0.0, 1.0]))
def test_an_ensemble_averages_probabilities(seed, limit, alpha):
    models = [TableModel(seed + i, 1, vocabulary=6) for i in range(3)]

    class Mean(TableModel):
        def log_probs(self, table, prefix):
            return torch.stack([m.log_probs(table, prefix).exp() for m in models]).mean(0).log()

    step, state = ensemble([m.step for m in models], [m.start() for m in models])
    mean = Mean(0, 1, vocabulary=6)
    found = beam_search(step, state, torch.tensor([limit]), BEGIN, END, 4**4, 2, alpha)
    best = mean.everything(0, limit, alpha)[:2]
    assert listed(found)[0] == [symbols for _, symbols in best]
    expected = torch.tensor([score for score, _ in best], dtype=torch.float64)
    torch.testing.assert_close(found.scores[0], expected)
    greedy = greedy_search(step, state, torch.tensor([limit]), BEGIN, END)
    alone = greedy_search(mean.step, mean.start(), torch.tensor([limit]), BEGIN, END)
    assert listed(greedy) == listed(alone)


def test_hypotheses_share_their_source():
    """The search says which rows go on, so that a state need not copy a source per hypothesis."""
    seen = []

    class Counted(Prefixes):
        def select(self, rows, sources=None):
            seen.append((len(rows), sources.tolist()))
            return Counted(self.table[rows], self.seen[rows])

    model = TableModel(1, 3, vocabulary=6)
    limits = torch.tensor([1, 4, 2])
    start = Counted(*model.start())

    def step(symbols, state):
        log_probs, after = model.step(symbols, state)
        log_probs[:, END] = -torch.inf
        return log_probs, Counted(*after)

    beam_search(step, start, limits, BEGIN, END, beam_size=2)
    assert seen == [(4, [1, 2]), (2, [0]), (2, [0])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected more than 0, got 0.0"),
        ({"top_k": -1}, "top_k: expected at least 0, got -1"),
        ({"top_p": 0.0}, "top_p: expected 0 < top_p <= 1, got 0.0"),
        ({"draws": torch.rand(2, 1, 2)}, r"draws: expected \[2, N, at least 3\], got \[2, 1, 2\]"),
    ],
    ids=["temperature", "k", "p", "draws"],
)
def test_wrong_sampling_is_named(options, message):
    model = TableModel(0, 2, 4)
    options = {"draws": torch.rand(2, 1, 3), **options}
    with pytest.raises(ValueError, match=message):
        sample(model.step, model.start(), torch.tensor([3, 3]), BEGIN, END, **options)


def test_wrong_constraints_are_named():
    with pytest.raises(ValueError, match="min_length: expected at least 0, got -1"):
        Constraints(min_length=-1)
