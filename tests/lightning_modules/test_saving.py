"""The networks of the tasks as folders, used where there is no Lightning."""

import inspect
import json
import subprocess
import sys

import pytest
import torch

import fusedrnn
from lightning_modules.seq2seq_model import Seq2SeqModel
from lightning_modules.tagger_model import TaggerModel

WORDS, LENGTHS = torch.tensor([[1, 2, 5], [4, 0, 0]]), torch.tensor([3, 1])


def tagger(head):
    vectors = torch.randn(6, 3)
    vectors[2] = torch.nan
    return TaggerModel(
        4, 2, 7, ["O", "B-X", "I-X"], "BIO", word_size=3, hidden_sizes=(4, 3), head=head,
        vectors=vectors, freeze_vectors=True,
    )  # fmt: skip


def tag(model):
    spellings = torch.tensor([[0, 1, 2], [3, 0, 0]])
    characters = torch.tensor([[1, 2], [3, 0], [4, 5], [6, 0]])
    emissions = model(WORDS, LENGTHS, characters, torch.tensor([2, 1, 2, 1]), spellings)
    return [emissions, model.decode(emissions, LENGTHS)]


def translate(model):
    state = model.encode(WORDS, LENGTHS)
    return [state.source.keys, *(s for layer in state.layers for s in layer)]


def seq2seq():
    return Seq2SeqModel(6, 5, 4, [3, 2], (4,), input_feeding=True, tied_embeddings=True)


MODELS = {
    "tagger_crf": (lambda: tagger("crf"), tag),
    "tagger_softmax": (lambda: tagger("softmax"), tag),
    "seq2seq": (seq2seq, translate),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_network_round_trips(name, tmp_path):
    build, use = MODELS[name]
    model = build().eval()
    fusedrnn.save(model, tmp_path)
    loaded = fusedrnn.load(tmp_path)
    assert str(loaded) == str(model) and not loaded.training
    torch.testing.assert_close(use(loaded), use(model), rtol=0, atol=0)
    again = tmp_path / "again"
    fusedrnn.save(loaded, again)
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (tmp_path / file).read_bytes()
    if name == "seq2seq":
        assert loaded.output.weight is loaded.target_embedding.weight


@pytest.mark.parametrize("name", ["tagger_crf", "seq2seq"])
def test_lightning_is_not_needed(name, tmp_path):
    build, use = MODELS[name]
    model = build().eval()
    fusedrnn.save(model, tmp_path)
    torch.save(use(model), tmp_path / "expected.pt")
    module = json.loads((tmp_path / "config.json").read_text())["module"]
    code = f"""
import sys
for name in ("lightning", "torchmetrics", "datasets", "wandb", "jsonargparse", "matplotlib"):
    sys.modules[name] = None  # whoever imports it fails
import torch
import fusedrnn, {module}
model = fusedrnn.load({str(tmp_path)!r})
WORDS, LENGTHS = torch.{WORDS}, torch.{LENGTHS}
"""
    code += inspect.getsource(use)
    code += f"""
expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close({use.__name__}(model), expected, rtol=0, atol=0)
print(type(model).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{type(model).__name__}\n", "")
