"""Every packaged configuration of the tagger, on a few sentences of its own kind of data."""

import csv
from pathlib import Path

import datasets
import pytest
import torch

from fusedrnn.train import main

QUICK = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=2",
    "--trainer.limit_test_batches=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
]


def columns(folder: Path) -> list[str]:
    (folder / "a.conll").write_text("Ann\tB-PER\nLee\tI-PER\nsaw\tO\n\nRome\tB-LOC\n" * 9)
    return [f"--data.{split}=a.conll" for split in ("train", "val", "test")]


def conllu(folder: Path) -> list[str]:
    rows = [("1", "We", "PRON"), ("2-3", "can't", "_"), ("2", "ca", "AUX"), ("3", "n't", "PART")]
    lines = ["\t".join([n, form, "_", tag, *"_" * 6]) for n, form, tag in rows]
    (folder / "a.conllu").write_text("\n".join([*lines, "", ""]) * 9)
    return [f"--data.{split}=a.conllu" for split in ("train", "val", "test")]


def hub(folder: Path) -> list[str]:
    """A local file in the place of the dataset on the hub, with its columns."""
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-PER", "I-PER"]))
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags}
    )
    rows = {"tokens": [["Ann", "Lee", "ran"]] * 9, "ner_tags": [[1, 2, 0]] * 9}
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "a.parquet")
    vectors = "\n".join(f"{word} " + " ".join(["0.1"] * 100) for word in ("ann", "bob"))
    (folder / "vectors.txt").write_text(vectors)
    places = [f"--data.{split}=a.parquet" for split in ("train", "val", "test")]
    return ["--data.dataset=null", "--data.vectors=vectors.txt", *places]


def builtin(_: Path) -> list[str]:
    return ["--data.batch_size=2"]


def deep(_: Path) -> list[str]:
    """Its three layers, narrow: checkpoints of the whole take longer than all the rest."""
    return ["--data.batch_size=2", "--model.hidden_sizes=[12, 12, 6]"]


@pytest.mark.parametrize(
    ("config", "source", "score"),
    [
        ("pos", builtin, "accuracy"),
        ("pos_deep", deep, "accuracy"),
        ("ewt", conllu, "accuracy"),
        ("ner", columns, "f1"),
        ("slots", columns, "f1"),
        ("conll2003", hub, "f1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_config(
    config: str, source, score: str, tmp_path: Path, monkeypatch, capsys
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = source(tmp_path)
    main(["fit", "--config", config, *QUICK, *places])
    run = Path("runs") / config / "version_0"
    assert Path("runs", config, "latest").resolve() == run.resolve()
    with open(run / "metrics.csv", newline="") as file:
        logged = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    expected = {"train/loss", "val/loss", "val/accuracy", f"val/{score}"}
    expected |= {"train/tokens_per_second", "train/input_wait"}
    assert expected <= logged
    best = str(run / "checkpoints" / "best.ckpt")
    main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", best])
    capsys.readouterr()
    (tmp_path / "in.txt").write_text("Ann saw Rome\n\n", encoding="utf-8")
    main(["predict", "--ckpt_path", best, "--input", "in.txt", "--tags_only", "true"])
    first, second = capsys.readouterr().out.splitlines()
    assert len(first.split()) == 3
    assert second == ""


def test_a_run_that_is_cut_short_before_its_first_validation_goes_on(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--config", "ner", *QUICK, *columns(tmp_path), "--data.batch_size=4"]
    main(fit)
    main([*fit, "--trainer.max_steps=1"])
    last = "runs/ner/version_{}/checkpoints/last.ckpt".format
    main([*fit, "--ckpt_path", last(1)])
    whole, cut, resumed = (torch.load(last(run), weights_only=True) for run in range(3))
    assert cut["global_step"] == 1
    assert whole["global_step"] == resumed["global_step"] == 3
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_tasks_of_a_treebank_together(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    places = conllu(tmp_path)
    tasks = ["--data.tag_column=[upos, xpos, feats]", "--model.head=[crf, softmax, softmax]"]
    main(["fit", "--config", "ewt", *QUICK, *places, *tasks])
    run = Path("runs/ewt/version_0")
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val/accuracy", "val/xpos/accuracy", "val/feats/accuracy"} <= set(header)
    best = str(run / "checkpoints" / "best.ckpt")
    main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", best])
    capsys.readouterr()
    predict = ["predict", "--ckpt_path", best, "--input", "a.conllu", "--output", "out.conllu"]
    main([*predict, "--input_format", "conllu", "--format", "conll"])
    lines = Path("out.conllu").read_text().splitlines()
    assert {len(line.split("\t")) for line in lines if line} == {10, 13}
    assert {line.split("\t")[0] for line in lines if line.count("\t") == 9} == {"2-3"}


def test_files_must_be_given(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "ner", *QUICK])
    assert "train, dataset: expected one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.scheme=BIOES"], "a.conll:4: tag"),
        (["--data.tag_column=4"], "a.conll:1: no column tag_column = 4"),
        (["--data.val=absent.conll"], "absent.conll: no such file"),
        (["--model.hidden_sizes=[0]"], "hidden_sizes: expected positive numbers"),
    ],
)
def test_wrong_input_is_refused_in_one_line(
    options: list[str], expected: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    places = columns(tmp_path)
    if "BIOES" in options[0]:
        (tmp_path / "a.conll").write_text("a\tO\nb\tO\n\nc\tX-PER\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "ner", *QUICK, *places, *options])
    assert expected in capsys.readouterr().err
