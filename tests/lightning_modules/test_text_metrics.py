"""Text metrics against sacreBLEU, torchmetrics and hand-made cases."""

import itertools

import pytest
import sacrebleu
import torch
import torchmetrics.functional.text as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.text_metrics import (
    SacreBLEU,
    SymbolErrorRate,
    WordErrorRate,
    edit_distance,
)

WORDS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(first=WORDS, second=WORDS)
def test_edit_distance_equals_torchmetrics(first, second):
    expected = oracle.edit_distance("".join(first), "".join(second), reduction="none")
    assert edit_distance(first, second) == int(expected)
    assert edit_distance(second, first) == int(expected)
    assert edit_distance(first, []) == len(first)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6), cut=st.integers(0, 6))
def test_one_reference_is_the_usual_error_rate_over_all_batches(rows, cut):
    metric = SymbolErrorRate()
    for part in (rows[:cut], rows[cut:]):
        metric.update([p for p, _ in part], [[r] for _, r in part])
    joined = [" ".join(p) for p, _ in rows], [" ".join(r) for _, r in rows]
    assert float(metric.compute()) == pytest.approx(float(oracle.word_error_rate(*joined)))


def test_the_closest_reference_counts():
    per, wer = SymbolErrorRate(), WordErrorRate()
    predictions = [list("abc"), list("xyz"), list("q")]
    references = [
        [list("abcdef"), list("abc")],
        [list("xy"), list("xyzuvw")],
        [list("rs"), list("t")],
    ]
    for metric in (per, wer):
        metric.update(predictions, references)
    assert float(per.compute()) == pytest.approx((0 + 1 + 1) / (3 + 2 + 1))
    assert float(wer.compute()) == pytest.approx(2 / 3)


def test_the_first_of_equally_close_references_gives_the_length():
    metric = SymbolErrorRate()
    metric.update([list("ab")], [[list("abc"), list("a")]])
    assert float(metric.compute()) == pytest.approx(1 / 3)


TEXTS = st.lists(
    st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "The", "it's", "U.S.", "3.5", "!"]),
    min_size=0,
    max_size=9,
).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(TEXTS, st.lists(TEXTS, min_size=2, max_size=2)), min_size=1, max_size=8
    ),
    cuts=st.lists(st.integers(0, 8), max_size=2),
    lowercase=st.booleans(),
    tokenize=st.sampled_from(["13a", "none"]),
    number=st.sampled_from([1, 2]),
)
def test_bleu_equals_the_corpus_score_of_sacrebleu(rows, cuts, lowercase, tokenize, number):
    metric = SacreBLEU(lowercase, tokenize)
    edges = [0, *sorted(cuts), len(rows)]
    for start, end in itertools.pairwise(edges):
        part = rows[start:end]
        metric.update([p for p, _ in part], [r[:number] for _, r in part])
    whole = sacrebleu.BLEU(lowercase=lowercase, tokenize=tokenize)
    streams = [[r[i] for _, r in rows] for i in range(number)]
    expected = whole.corpus_score([p for p, _ in rows], streams)
    assert float(metric.compute()) == expected.score
    assert metric.signature == str(whole.get_signature())


def test_bleu_with_different_numbers_of_references():
    predictions = ["the cat sat on the mat", "a dog is in the house now"]
    references = [["the cat sat on a mat", "the cat is on the mat"], ["a dog is in a house now"]]
    metric = SacreBLEU()
    for prediction, answers in zip(predictions, references, strict=True):
        metric.update([prediction], [answers])
    whole = sacrebleu.BLEU()
    streams = [[references[0][0], references[1][0]], [references[0][1], None]]
    assert float(metric.compute()) == whole.corpus_score(predictions, streams).score
    assert metric.signature == str(whole.get_signature())
    assert "nrefs:var" in metric.signature


@pytest.mark.parametrize("metric", [SymbolErrorRate(), WordErrorRate(), SacreBLEU()], ids=repr)
def test_rows_and_references_must_match(metric):
    with pytest.raises(ValueError, match="1 predictions and 0 lists of references"):
        metric.update(["a"], [])
    with pytest.raises(ValueError, match="row 1 has none"):
        metric.update(["a", "b"], [["a"], []])


@pytest.mark.parametrize("make", [SymbolErrorRate, WordErrorRate, SacreBLEU])
def test_two_processes_add_up(make):
    """Merge states as torchmetrics does between processes, and compare with one process."""
    texts = ["the cat sat on the mat", "a dog is in the house", "it rains here a lot"]
    answers = [["the cat sat on a mat"], ["the dog is in the house"], ["it rains here a lot"]]
    if make is not SacreBLEU:
        texts = [text.split() for text in texts]
        answers = [[answer.split() for answer in row] for row in answers]
    one, ranks = make(), [make(), make()]
    one.update(texts, answers)
    ranks[0].update(texts[:1], answers[:1])
    ranks[1].update(texts[1:], answers[1:])
    merged = make()
    for name, reduce in merged._reductions.items():
        setattr(merged, name, reduce(torch.stack([getattr(rank, name) for rank in ranks])))
    merged._update_count = 1
    assert float(merged.compute()) == float(one.compute())
