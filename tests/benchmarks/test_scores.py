"""The scores of packaged configurations, on corpora of a few made-up lines."""

from benchmarks import input_wait, scores
from benchmarks.__main__ import main
from benchmarks.registry import read
from benchmarks.scores import Corpus

SENTENCES = "Ann\tB-PER\nLee\tI-PER\nsaw\tO\n\nRome\tB-LOC\nis\tO\nold\tO\n\n" * 9
WORDS = "ab\tA B\nba\tB A\nabba\tA B B A\nb\tB\n" * 9
PARTS = ("train", "val", "test")


def test_rows_of_each_head_and_seed(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.conll").write_text(SENTENCES)
    options = ("--trainer.max_epochs=2", "--data.batch_size=2", "--model.hidden_sizes=[8]")
    files = dict.fromkeys(PARTS, "a.conll")
    part = Corpus("ner", files, True, options, ("crf", "softmax"))
    absent = part._replace(files=files | {"test": "absent.conll"})
    monkeypatch.setattr(scores, "TAGGING", {"names": part, "absent": absent})
    monkeypatch.setattr(scores, "TAGGER_SEEDS", (1, 2))
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
    assert f"names, crf: test_f1 {mean:.5g} +- " in out
    assert "2 seeds" in out
    assert not (tmp_path / "lightning_logs").exists()


def test_a_test_part_is_decoded_twice(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.tsv").write_text(WORDS)
    options = (
        "--trainer.max_epochs=1",
        "--model.encoder_sizes=[8]",
        "--model.decoder_sizes=[8]",
        "--model.embedding_size=8",
    )
    words = Corpus("sigmorphon", dict.fromkeys(PARTS, "a.tsv"), True, options, beam=True)
    monkeypatch.setattr(scores, "SEQ2SEQ", {"words": words})
    monkeypatch.setattr(scores, "SEQ2SEQ_SEEDS", (1,))
    monkeypatch.setenv("FUSEDRNN_CORPORA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    main(["seq2seq_scores", "--output", str(tmp_path / "results")])
    (row,) = read(tmp_path / "results" / "seq2seq_scores.csv")
    assert row["val_per"] == row["test_per"]
    assert row["test_accuracy"] == row["beam_accuracy"], "of teacher forcing"
    assert float(row["beam_per"]) > 0
    assert f"words: beam_wer {float(row['beam_wer']):.5g} (" in capsys.readouterr().out


def test_two_files_are_a_list(tmp_path):
    corpus = Corpus("multi30k", {"train": ("a.en", "a.de")}, False)
    assert not corpus.is_in(tmp_path)
    for name in ("a.en", "a.de"):
        (tmp_path / name).touch()
    assert corpus.is_in(tmp_path)
    assert corpus.arguments(tmp_path) == [
        f"--data.train=[{tmp_path / 'a.en'}, {tmp_path / 'a.de'}]"
    ]


def test_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FUSEDRNN_CORPORA", raising=False)
    main(["tagger_scores", "--output", str(tmp_path)])
    assert "set FUSEDRNN_CORPORA" in capsys.readouterr().out
    assert not (tmp_path / "tagger_scores.csv").exists()


def test_time_that_input_is_waited_for(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.tsv").write_text(WORDS * 20)
    files = dict.fromkeys(PARTS, "a.tsv")
    options = ("--model.encoder_sizes=[8]", "--model.decoder_sizes=[8]", "--data.batch_size=16")
    monkeypatch.setattr(
        input_wait, "SEQ2SEQ", {"words": Corpus("sigmorphon", files, True, options)}
    )
    monkeypatch.setattr(input_wait, "BUILTIN", ())
    monkeypatch.setattr(input_wait, "STEPS", 20)
    monkeypatch.setenv("FUSEDRNN_CORPORA", str(tmp_path))
    main(["input_wait", "--output", str(tmp_path / "results")])
    (row,) = read(tmp_path / "results" / "input_wait.csv")
    assert (row["config"], row["data"]) == ("sigmorphon", "words")
    assert 0 < float(row["input_wait_percent"]) < 100
    assert int(row["tokens_per_second"]) > 0
    assert f"at most {row['input_wait_percent']} % of the time" in capsys.readouterr().out
