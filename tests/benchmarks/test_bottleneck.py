"""The study of the bottleneck: its strings, its scores, its picture."""

import torch

from benchmarks.bottleneck import BEGIN, END, draw, reversal, score, train
from benchmarks.registry import BENCHMARKS, write


def test_strings_are_written_backwards():
    source, target = reversal(torch.tensor([3, 1, 5]), torch.Generator().manual_seed(0))
    for row, length in enumerate((3, 1, 5)):
        digits = source[row, :length].tolist()
        assert min(digits) > END and source[row, length:].sum() == 0
        expected = [BEGIN, *reversed(digits), END]
        assert target[row, : length + 2].tolist() == expected
        assert target[row, length + 2 :].sum() == 0


class Oracle:
    """Knows the string, but for the last of its digits where told so."""

    def __init__(self, forgets):
        self.forgets = forgets

    def encode(self, source, lengths):
        self.source = source
        return State(torch.arange(len(source)), 0)

    def step(self, symbols, state):
        place = self.source.shape[1] - 1 - state.time
        if place < 0:
            right = torch.full((len(state.rows),), END)
        elif place == 0 and self.forgets:
            right = torch.where(self.source[state.rows, 0] == 3, 4, 3)
        else:
            right = self.source[state.rows, place]
        log_probs = torch.full((len(symbols), 13), -50.0)
        log_probs[torch.arange(len(symbols)), right] = 0.0
        return log_probs, State(state.rows, state.time + 1)


class State:
    def __init__(self, rows, time):
        self.rows, self.time = rows, time

    def select(self, rows, sources=None):
        return State(self.rows[rows], self.time)


def test_scores_are_shares_of_digits_and_strings():
    assert score(Oracle(False), 4, 10) == {"length": 4, "digits": 1.0, "strings": 1.0}
    assert score(Oracle(True), 4, 10) == {"length": 4, "digits": 0.75, "strings": 0.0}


def test_a_short_run_learns_something_and_is_drawn(tmp_path):
    rows = []
    for attention in ("none", "additive"):
        model = train(attention, 0, steps=60, longest=2)
        found = {"attention": attention, "seed": 0, **score(model, 2, 50)}
        assert found["digits"] > 0.2
        rows.append(found)
    path = tmp_path / "bottleneck.csv"
    write(path, rows)
    assert draw(path).is_file()
    lines = list(
        BENCHMARKS["bottleneck"].findings([{k: str(v) for k, v in r.items()} for r in rows])
    )
    assert len(lines) == 2 and "attention none: right digits by source length 2: 0." in lines[0]
