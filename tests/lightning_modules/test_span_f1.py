"""Entity scores against conlleval's own rules, written down again here, and against seqeval."""

import random

import pytest
import seqeval.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.metrics import SpanF1, precision_recall_f1

BIO = ["O", "B-A", "I-A", "B-B", "I-B"]
BIOES = [*BIO, "E-A", "S-A", "E-B", "S-B"]


def sequences(tags: list[str]) -> st.SearchStrategy:
    pair = st.tuples(st.sampled_from(tags), st.sampled_from(tags))
    return st.lists(st.lists(pair, min_size=1, max_size=8), min_size=1, max_size=5)


def score(pairs: list[list[tuple[str, str]]]) -> dict[str, torch.Tensor]:
    metric = SpanF1(["A", "B"])
    for row in pairs:
        metric.update([[p for p, _ in row]], [[g for _, g in row]])
    return metric.compute()


def conlleval(pairs: list[list[tuple[str, str]]]) -> tuple[float, float, float]:
    """The loop of conlleval.pl over (predicted, gold) tags in B, I and O: three running counts."""

    def closes(last: str, last_kind: str, tag: str, kind: str) -> bool:
        return (last + tag in ("BB", "BO", "IB", "IO")) or (last != "O" and last_kind != kind)

    def opens(last: str, last_kind: str, tag: str, kind: str) -> bool:
        return (last + tag in ("BB", "IB", "OB", "OI")) or (tag != "O" and last_kind != kind)

    correct = guessed = gold = 0
    running = False
    last = [("O", ""), ("O", "")]
    stream = [pair for row in pairs for pair in [*row, ("O", "O")]]
    for pair in stream:
        now = [(tag[0], tag[2:]) for tag in pair]
        ended = [closes(*before, *after) for before, after in zip(last, now, strict=True)]
        begun = [opens(*before, *after) for before, after in zip(last, now, strict=True)]
        if running:
            if all(ended) and last[0][1] == last[1][1]:
                running = False
                correct += 1
            elif ended[0] != ended[1] or now[0][1] != now[1][1]:
                running = False
        if all(begun) and now[0][1] == now[1][1]:
            running = True
        guessed += begun[0]
        gold += begun[1]
        last = now
    precision = correct / guessed if guessed else 0.0
    recall = correct / gold if gold else 0.0
    both = precision + recall
    return precision, recall, 2 * precision * recall / both if both else 0.0


@settings(max_examples=300, deadline=None)
@given(pairs=sequences(BIO))
def test_agrees_with_conlleval(pairs: list) -> None:
    scores = score(pairs)
    expected = conlleval(pairs)
    found = [float(scores[name]) for name in ("precision", "recall", "f1")]
    assert found == pytest.approx(expected, abs=1e-15)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("tags", [BIO, BIOES], ids=["BIO", "BIOES"])
def test_agrees_with_seqeval(tags: list[str]) -> None:
    draw = random.Random(0)
    for _ in range(200):
        size = draw.randint(1, 30)
        pairs = [[(draw.choice(tags), draw.choice(tags)) for _ in range(size)] for _ in range(3)]
        predicted, gold = ([[pair[i] for pair in row] for row in pairs] for i in (0, 1))
        scores = score(pairs)
        for name in ("precision", "recall", "f1"):
            function = getattr(seqeval.metrics, f"{name}_score")
            expected = function(gold, predicted, zero_division=0)
            assert float(scores[name]) == pytest.approx(expected, abs=1e-15)


def test_counts_each_label_and_puts_unseen_ones_together() -> None:
    metric = SpanF1(["A"])
    metric.update([["B-A", "O", "B-A"]], [["B-A", "B-NEW", "I-NEW"]])
    metric.update([["O"]], [["B-A"]])
    assert metric.labels == ["A", "<other>"]
    scores = metric.compute()
    assert scores["counts"].tolist() == [[1, 2, 2], [0, 0, 1]]
    assert [float(scores[name]) for name in ("precision", "recall")] == [1 / 2, 1 / 3]


def test_nothing_to_find_is_zero_and_not_nan() -> None:
    metric = SpanF1(["A"])
    metric.update([["O"]], [["O"]])
    assert float(metric.compute()["f1"]) == 0.0


def test_batches_and_order_do_not_matter() -> None:
    rows = [(["B-A"], ["B-A"]), (["O", "B-A"], ["B-B", "O"]), (["I-B"], ["B-B"])]
    whole, parts = SpanF1(["A", "B"]), SpanF1(["A", "B"])
    whole.update(*map(list, zip(*rows, strict=True)))
    for predicted, gold in reversed(rows):
        parts.update([predicted], [gold])
    for name, value in whole.compute().items():
        assert torch.equal(value, parts.compute()[name])


@pytest.mark.parametrize("predicted", [[["O"]], [["O", "O"], ["O"]]], ids=["tokens", "sentences"])
def test_refuses_other_lengths(predicted: list[list[str]]) -> None:
    with pytest.raises(ValueError):
        SpanF1(["A"]).update(predicted, [["O", "O"]])


def test_precision_recall_f1_by_hand() -> None:
    counts = torch.tensor([[2, 4, 3], [0, 0, 5], [0, 0, 0]])
    expected = [[0.5, 2 / 3, 4 / 7], [0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(
        precision_recall_f1(counts), torch.tensor(expected, dtype=torch.float64)
    )
