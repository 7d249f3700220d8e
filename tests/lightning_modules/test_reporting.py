import csv
import json

import pytest
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from PIL import Image, ImageChops

from lightning_modules.loggers import RunLogger
from lightning_modules.reporting import log_figure, log_table, print_table
from tests.toy import ToyData, ToyTask


class Reporting(ToyTask):
    def on_validation_epoch_end(self):
        figure = Figure(figsize=(2, 1))
        figure.subplots().plot([0, 1])
        log_figure(self, "val/line", figure)
        log_table(self, "val/samples", ["word", "score"], [["a, b", 1.5], ["ç\n", 2]])


def fit(tmp_path, loggers):
    data = ToyData()
    trainer = Trainer(
        default_root_dir=tmp_path,
        logger=loggers,
        max_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Reporting(data.codec), data)
    return trainer.global_step


def test_files_and_wandb(tmp_path):
    table, run = CSVLogger(tmp_path, name="toy"), RunLogger(save_dir=str(tmp_path))
    step = fit(tmp_path, [table, run])
    folder = run.experiment.dir
    run.close()
    media = tmp_path / "toy" / "version_0" / "media" / "val"
    drawn = media / f"line_{step}.png"
    assert drawn.read_bytes().startswith(b"\x89PNG")
    with open(media / f"samples_{step}.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["word", "score"], ["a, b", "1.5"], ["ç\n", "2"]]
    sent = [*tmp_path.glob("wandb/offline-run-*/files/media/**/*.*")]
    assert str(sent[0]).startswith(folder)
    assert {path.suffix for path in sent} == {".png", ".json"}
    (picture,) = [path for path in sent if path.suffix == ".png"]
    assert ImageChops.difference(*map(Image.open, (picture, drawn))).getbbox() is None
    (shown,) = [path for path in sent if path.suffix == ".json"]
    assert json.loads(shown.read_text())["data"] == [["a, b", 1.5], ["ç\n", 2]]


@pytest.mark.parametrize("loggers", [False, []])
def test_no_logger_is_no_error(tmp_path, loggers):
    fit(tmp_path, loggers)
    assert not list(tmp_path.rglob("media"))


def test_print_table(capsys):
    print_table("title", ["name", "share", "n"], [["a", 0.5, 7], ["bcdef", 1.0, 10]])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "title",
        "name    share   n",
        "a      0.5000   7",
        "bcdef  1.0000  10",
    ]
    print_table("none", ["a"], [])
    assert capsys.readouterr().out == "\nnone\na\n"
