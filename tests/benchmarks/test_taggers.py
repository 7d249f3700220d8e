"""The comparison of taggers, on a few sentences; tests install neither flair nor stanza."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import taggers
from benchmarks.registry import BENCHMARKS

COLUMNS = "{}\t{}\t_\t{}\t_\t_\t_\t_\t_\t_\n"


@pytest.fixture
def few(tmp_path, monkeypatch):
    sentences = [["we", "saw", "Ann"], ["go"], ["the", "cat", "saw", "the", "dog"]] * 3
    lines = (
        "".join(COLUMNS.format(n, word, word[0]) for n, word in enumerate(s, start=1)) + "\n"
        for s in sentences
    )
    (tmp_path / "few.conllu").write_text("".join(lines))
    monkeypatch.setenv(taggers.DATA, str(tmp_path / "few.conllu"))
    monkeypatch.setattr(taggers, "SENTENCES", 8)
    monkeypatch.setattr(taggers, "ROUNDS", 2)
    monkeypatch.setattr(taggers, "BATCH", 3)


def test_rows(few, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("flair", "stanza") else find(name),
    )
    measured = [(key, list(measure())) for key, measure in BENCHMARKS["taggers"].cases()]
    assert [key["task"] for key, _ in measured] == ["training", "prediction"]
    for key, rows in measured:
        assert (key["data"], key["sentences"], key["words"]) == ("few.conllu", 8, 22)
        assert [row["name"] for row in rows] == ["fusedrnn"]
        expected = 8 * 1e3 / rows[0]["milliseconds"]
        assert rows[0]["sentences_per_second"] == pytest.approx(expected, abs=0.1)


def test_an_epoch_trains_on_every_sentence_and_prediction_tags_it(few):
    from lightning_modules.data.readers import Sentence

    sentences = [Sentence(["we", "saw"], ["P", "V"]), Sentence(["cat"], ["N"])] * 4
    train, predict = taggers._ours(sentences, [[0, 2, 4, 6], [1, 3], [5, 7]])
    for _ in range(60):
        train()
    assert predict() == [list(zip(s.tokens, s.tags, strict=True)) for s in sentences]


def test_findings():
    row = {"task": "training", "name": "fusedrnn", "baseline": "fusedrnn", "ratio": "1.0"}
    other = row | {"name": "flair", "ratio": "3.0", "ratio_q1": "2.9", "ratio_q3": "3.1"}
    findings = BENCHMARKS["taggers"].findings
    assert list(findings([row, other])) == [
        "training: flair takes 3.0 times as long as fusedrnn (quartiles 2.9 and 3.1)"
    ]
    assert list(findings([row])) == [
        "neither flair nor stanza is installed, so nothing was compared"
    ]


def test_the_other_benchmarks_need_no_lightning():
    code = "import sys, benchmarks.taggers; sys.exit('lightning' in sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)
