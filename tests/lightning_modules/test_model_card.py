"""The page beside the checkpoints."""

import sys
from pathlib import Path

import pytest

from fusedrnn.train import main
from lightning_modules.model_card import LICENCE, NAME
from tests.fusedrnn.test_train import CONFIG


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", ["/bin/python3", "-m", "train", "fit", "--x", "a b"])
    (tmp_path / "toy.yaml").write_text(CONFIG)
    return tmp_path


def section(card: str, title: str) -> list[str]:
    _, _, rest = card.partition(f"\n## {title}\n")
    return [line.removeprefix("- ") for line in rest.partition("\n## ")[0].split("\n") if line]


def test_card_of_a_run_and_of_its_tests(here):
    cli = main(["fit", "--config", "toy.yaml"])
    folder = Path("runs/toy/latest/checkpoints")
    card = (folder / NAME).read_text()
    assert card.startswith(
        "---\nlibrary_name: fusedrnn\ntags: [ToyTask]\n---\n\n# toy: a ToyTask\n"
    )
    assert section(card, "Data") == ["training examples: 20", "validation examples: 7"]
    count = sum(parameter.numel() for parameter in cli.model.parameters())
    assert section(card, "Model")[0] == f"parameters: {count:,}"
    assert "hidden_size: 8" in section(card, "Model")
    best = cli.trainer.checkpoint_callback.best_model_score
    assert f"best.ckpt: val/accuracy {best:.4f}" in section(card, "Scores")
    accuracy = cli.trainer.callback_metrics["val/accuracy"]
    assert f"last validation: val/accuracy {accuracy:.4f}" in section(card, "Scores")
    training = dict(line.split(": ", 1) for line in section(card, "Training"))
    assert training["command"] == "`python -m train fit --x 'a b'`"
    assert training["epochs"] == "2"
    assert training["seed"] == "42"
    assert {"fusedrnn", "torch", "lightning", "Python"} <= set(training["versions"].split())
    assert section(card, "Licence") == [LICENCE]

    for _ in range(2):
        tested = main(["test", "--config", "toy.yaml", "--ckpt_path", str(folder / "best.ckpt")])
    after = (folder / NAME).read_text()
    assert after.startswith(card.rstrip())
    assert after.count("## Test of best.ckpt") == 1
    lines = section(after, "Test of best.ckpt")
    assert lines[0] == "test examples: 9"
    assert f"test/accuracy {tested.trainer.callback_metrics['test/accuracy']:.4f}" in lines


def test_no_card_without_checkpoints(here):
    main(["fit", "--config", "toy.yaml", "--trainer.fast_dev_run", "true"])
    assert not list(here.rglob(NAME))


def test_card_of_a_tagger_says_what_its_data_were(here):
    Path("a.conll").write_text("Ann\tB-PER\nLee\tI-PER\nsaw\tO\n\nRome\tB-LOC\n" * 9)
    files = ["--data.train=a.conll", "--data.val=a.conll"]
    quick = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    main(["fit", "--config", "ner", *quick, *files, "--trainer.enable_progress_bar=false"])
    card = Path("runs/ner/latest/checkpoints", NAME).read_text()
    data = dict(line.split(": ", 1) for line in section(card, "Data"))
    assert data["train"] == data["val"] == "a.conll"
    assert data["scheme"] == "BIO"
    assert data["words of train"] == "36"
    assert data["training examples"] == "10"
    model = dict(line.split(": ", 1) for line in section(card, "Model"))
    assert model["tags"] == "4"  # O, B-PER, E-PER, S-LOC
