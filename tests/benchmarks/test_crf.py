import sys
import types
from importlib.machinery import ModuleSpec

import pytest

from benchmarks import crf
from benchmarks.registry import BENCHMARKS


@pytest.fixture
def small(monkeypatch):
    for name, value in {"STEPS": 6, "BATCH": 3, "TAGS": 4, "ROUNDS": 2}.items():
        monkeypatch.setattr(crf, name, value)


@pytest.fixture
def no_flair(monkeypatch):
    monkeypatch.setitem(sys.modules, "flair", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_compares_with_what_is_installed(small, no_flair):
    rows = [key | row for key, run in crf.crf() for row in run()]
    timed = [(row["shortest"], row["what"], row["name"]) for row in rows if "ratio" in row]
    whats, names = ("loss", "decode", "loss and decode"), ("CRF", "pytorch-crf")
    assert timed == [(n, what, name) for n in (6, 1) for what in whats for name in names]
    text = {name: str(value) for row in rows for name, value in row.items()}
    assert "flair" in text["status"]
    findings = list(
        BENCHMARKS["crf"].findings([{k: str(v) for k, v in row.items()} for row in rows])
    )
    assert len(findings) == 8
    assert findings[0].startswith("flair, loss and decode, lengths from 6: not installed")


def test_other_results_are_no_comparison(small):
    problem = crf.Problem("cpu", 3, 4)
    loss, decode = problem.ours()
    with pytest.raises(ValueError, match="rival: loss"):
        crf._check("rival", (loss, decode), (lambda: loss() + 1, decode))
    with pytest.raises(ValueError, match="rival: other paths"):
        crf._check("rival", (loss, decode), (loss, lambda: decode()[::-1]))


def test_two_files_of_a_package_are_loaded_alone(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "sequence_tagger_utils"
    folder.mkdir(parents=True)
    (folder / "crf.py").write_text("import flair\ndevice = flair.device\n")
    (folder / "viterbi.py").write_text("from flair.data import Dictionary, Label, Sentence\n")
    for name in ("flair", "flair.data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = ModuleSpec("flair", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)

    def broken(name):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", broken)
    before = dict(sys.modules)
    try:
        first, second = crf.flair_modules()
    finally:
        for name in sys.modules.keys() - before.keys():
            del sys.modules[name]
    assert isinstance(first, types.ModuleType) and str(first.device) == "cpu"
    assert second.Label.__name__ == "Label"
