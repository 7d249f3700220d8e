"""Configurations for corpora that are not packaged, on files in the corpora's formats."""

import gzip

import pytest
import torch

from fusedrnn.train import main

PARTS, FILES = ("train", "val", "test"), ("good", "good", "bad")
WORDS = ["ABBEY\tAE B IY", "ABBEY\tAE B EY", "AARON\tEH R AH N", "BAN\tB AE N", "NA\tN AA"]
CAPTIONS = {
    "en": ["Two young men are outside.", "A man rides a bike.", "NA", "A dog, a cat."] * 10,
    "de": ["Zwei junge Männer sind im Freien.", "Ein Mann fährt Rad.", "k. A.", "Ein Hund."] * 10,
}


def corpus(folder, name):
    """Writes the files of a corpus, and returns the options that name them."""
    if name.startswith("g014b2b"):
        many = [f"{chr(65 + n % 26)}{chr(65 + n // 26)}B\tAE B" for n in range(600)]
        (folder / "g014b2b.train").write_text("\n".join([*WORDS, *many]) + "\n")
        lines = [WORDS[0] + WORDS[1].removeprefix("ABBEY"), *WORDS[2:]]  # as it is published
        (folder / "g014b2b.ref").write_text("\n".join(lines) + "\n")
        return {"train": "g014b2b.train", "test": "g014b2b.ref"}
    if name == "sigmorphon":
        for split in ("train", "dev", "test"):
            (folder / f"fre_{split}.tsv").write_text("absence\ta p s ɑ̃ s\nabsolu\ta p s ɔ l y\n")
        return {split: f"fre_{split}.tsv" for split in ("train", "test")} | {"val": "fre_dev.tsv"}
    places = {}
    for split in ("train", "val", "test"):
        places[split] = [f"{split}.{language}.gz" for language in CAPTIONS]
        for place, lines in zip(places[split], CAPTIONS.values(), strict=True):
            (folder / place).write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return places


@pytest.mark.parametrize(
    "name", ["g014b2b", "g014b2b_full", "sigmorphon", "multi30k", "multi30k_full"]
)
def test_packaged_configs_run(tmp_path, monkeypatch, name):
    """Every setting as shipped, except that the run is short and on a CPU."""
    monkeypatch.chdir(tmp_path)
    places = corpus(tmp_path, name)
    data = [f"--data.{split}={place}" for split, place in places.items()]
    data.append("--data.max_tokens=60" if "multi30k" in name else "--data.batch_size=4")
    common = ["--config", name, *data, "--trainer.accelerator=cpu"]
    common += ["--trainer.precision=32-true", "--trainer.fast_dev_run=1"]
    cli = main(["fit", *common])
    assert torch.isfinite(cli.trainer.callback_metrics["val/loss"])
    cli = main(["test", *common])
    score = {"per": {"per", "wer"}, "bleu": {"bleu"}}[cli.model.score]
    cased = cli.model.score == "bleu" and not cli.model.codec.target_symbols.lowercase
    score |= {"bleu_lowercase"} if cased else set()
    assert {f"test/{name}" for name in score} <= cli.trainer.callback_metrics.keys()


def test_the_corpora_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus(tmp_path, "g014b2b")
    cli = main(["fit", "--config", "g014b2b", "--trainer.fast_dev_run=1", "--data.batch_size=8"])
    data = cli.datamodule
    assert len(data.pairs("train")) + len(data.pairs("val")) == 605
    assert 5 < len(data.pairs("val")) < 30
    data.setup("test")
    references = {r.text: r.references for r in data._rows["test"]}
    assert references["ABBEY"] == [["AE", "B", "IY"], ["AE", "B", "EY"]]
    assert references["NA"] == [["N", "AA"]]


@pytest.mark.parametrize("name", ["g014b2b", "ner"])
def test_a_file_for_testing_is_read_before_training(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good").write_text("A\tO\n")
    (tmp_path / "bad").write_text("A\tO\nB\n")
    data = [f"--data.{part}={text}" for part, text in zip(PARTS, FILES, strict=True)]
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", name, *data])
    assert caught.value.code == 2
    assert "error: bad:2: expected" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
