"""The scores of the tagger's configurations, on a corpus of nothing but names."""

from benchmarks import tagger_scores
from benchmarks.__main__ import main
from benchmarks.registry import read
from benchmarks.tagger_scores import Corpus

SENTENCES = "Ann\tB-PER\nLee\tI-PER\nsaw\tO\n\nRome\tB-LOC\nis\tO\nold\tO\n\n" * 9


def test_rows_of_each_head_and_seed(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.conll").write_text(SENTENCES)
    options = ("--trainer.max_epochs=2", "--data.batch_size=2", "--model.hidden_sizes=[8]")
    part = Corpus("ner", "a.conll", "a.conll", "a.conll", options, ("crf", "softmax"))
    absent = part._replace(test="absent.conll")
    monkeypatch.setattr(tagger_scores, "CORPORA", {"names": part, "absent": absent})
    monkeypatch.setattr(tagger_scores, "SEEDS", (1, 2))
    monkeypatch.setenv("FUSEDRNN_CORPORA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    main(["tagger_scores", "--output", str(tmp_path / "results")])
    rows = read(tmp_path / "results" / "tagger_scores.csv")
    assert [(r["corpus"], r["head"], r["seed"]) for r in rows] == [
        ("names", head, seed) for seed in "12" for head in ("crf", "softmax")
    ]
    for row in rows:
        assert row["epochs"] == "2"
        assert row["val_f1"] == row["test_f1"]
        assert 0 <= float(row["val_f1"]) <= 100
    out = capsys.readouterr().out
    mean = sum(float(r["test_f1"]) for r in rows if r["head"] == "crf") / 2
    assert f"names, crf: test_f1 {mean:.2f} +- " in out
    assert "2 seeds" in out
    assert not (tmp_path / "lightning_logs").exists()


def test_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FUSEDRNN_CORPORA", raising=False)
    main(["tagger_scores", "--output", str(tmp_path)])
    assert "set FUSEDRNN_CORPORA" in capsys.readouterr().out
    assert not (tmp_path / "tagger_scores.csv").exists()
