"""A trained model is used where `datasets` is not installed."""

import subprocess
import sys

import lightning as L

from lightning_modules import Seq2Seq, Tagger
from lightning_modules.data import PairData, TaggingData

USE = """
import sys
for absent in ("datasets", "pyarrow"):
    sys.modules[absent] = None  # which raises ImportError when it is imported
from fusedrnn.train import main
from lightning_modules import Task
folder = sys.argv[1]
for name in ("Tagger", "Seq2Seq"):
    path = f"{folder}/{name}.ckpt"
    print(type(Task.load_from_checkpoint(path)).__name__, flush=True)
    main(["predict", "--ckpt_path", path, "--input", f"{folder}/in.txt"])
"""


def test_from_checkpoint_to_predictions(tmp_path):
    (tmp_path / "in.txt").write_text("ab ba\n")
    words, pairs = str(tmp_path / "a.conll"), str(tmp_path / "a.tsv")
    (tmp_path / "a.conll").write_text("ab\tX\nba\tX\n")
    (tmp_path / "a.tsv").write_text("source\ttarget\nab ba\tY\n")
    for task, data in (
        (Tagger, TaggingData(train=words, val=words)),
        (Seq2Seq, PairData(train=pairs, val=pairs)),
    ):
        run = L.Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False)
        run.fit(task(data.codec), data)
        run.save_checkpoint(tmp_path / f"{task.__name__}.ckpt")
    done = subprocess.run(
        [sys.executable, "-c", USE, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tagger, tags, seq2seq, text = done.stdout.splitlines()
    assert (tagger, tags, seq2seq) == ("Tagger", "ab/X ba/X", "Seq2Seq")
    assert set(text.split()) <= {"Y"}
