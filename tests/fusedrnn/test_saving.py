import json
import re
import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree as pytree

import fusedrnn
from fusedrnn import saving

MODULES = {
    "lstm": lambda: fusedrnn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, dropout=0.25),
    "lstm_all": lambda: fusedrnn.LSTM(
        3, 4, bias=True, proj_size=2, peephole=True, forget_bias=1.5, zoneout=0.1
    ),
    "lstm_layernorm": lambda: fusedrnn.LSTM(3, 4, layer_norm=True, recurrent_dropout=0.1),
    "gru": lambda: fusedrnn.GRU(3, 4, bias=False, reset_after=False, backend="reference"),
    "rnn": lambda: fusedrnn.RNN(3, 4, nonlinearity="relu", dtype=torch.float64),
    "rnn_recompute": lambda: fusedrnn.RNN(3, 4, recompute=True),
    "stack": lambda: fusedrnn.RecurrentStack(
        3, (4, 2), "gru", residual=True, layer_norm=True, dropout=0.5, zoneout=0.2, recompute=True
    ),
    "stack_bfloat16": lambda: fusedrnn.RecurrentStack(3, [4, 2], peephole=True).bfloat16(),
    "stack_each": lambda: fusedrnn.RecurrentStack(
        3,
        [4, 2],
        ["lstm", "gru"],
        bidirectional=(True, False),
        zoneout=[0.1, 0.2],
        highway=True,
        learned_states=True,
        variational_dropout=True,
        dtype=torch.float64,
    ),
    "crf": lambda: fusedrnn.CRF(3, ["O", "B-X", "I-X"], "BIO"),
}


def outputs(module):
    torch.manual_seed(0)
    dtype = next(module.parameters()).dtype
    if isinstance(module, fusedrnn.CRF):
        return list(module.decode(torch.randn(2, 5, 3, dtype=dtype)))
    return pytree.tree_leaves(module(torch.randn(5, 2, 3, dtype=dtype)))


@pytest.mark.parametrize("name", MODULES)
def test_round_trip(name, tmp_path):
    module = MODULES[name]()
    state = torch.get_rng_state()
    fusedrnn.save(module, tmp_path / "a" / "b")
    loaded = fusedrnn.load(tmp_path / "a" / "b")
    torch.set_rng_state(state)
    assert type(loaded) is type(module) and not loaded.training and module.training
    assert str(loaded) == str(module)
    for actual, expected in zip(outputs(loaded), outputs(module.eval()), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    assert all(p.requires_grad for p in loaded.parameters())
    fusedrnn.save(loaded, tmp_path / "c")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "c" / file).read_bytes() == (tmp_path / "a/b" / file).read_bytes()


def test_lightning_is_not_needed(tmp_path):
    fusedrnn.save(MODULES["stack"](), tmp_path)
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['torchmetrics'] = None\n"
        f"import fusedrnn; print(type(fusedrnn.load({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "RecurrentStack\n"


def test_a_class_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "CLASSES", dict(saving.CLASSES))

    @saving.saveable
    class Scaled(torch.nn.Module):
        def __init__(self, size, sizes=(1,), factor=None, *, tied=True):
            super().__init__()
            factor = torch.ones(size, dtype=torch.float64) if factor is None else factor
            self.register_buffer("factor", factor)
            self.a, self.b = torch.nn.Linear(size, size), torch.nn.Linear(size, size)
            if tied:
                self.b.weight = self.a.weight

    factor = torch.arange(3, dtype=torch.float64)
    module = Scaled(3, sizes=(4, 5), factor=factor)
    assert module.arguments == {"size": 3, "sizes": (4, 5), "factor": None, "tied": True}
    fusedrnn.save(module, tmp_path)
    loaded = fusedrnn.load(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert loaded.a.weight is loaded.b.weight
    with pytest.raises(ValueError, match="there is another class Scaled"):
        saving.saveable(type("Scaled", (torch.nn.Module,), {}))
    del saving.CLASSES["Scaled"]
    with pytest.raises(ValueError, match=f"'Scaled'; if it is your own, first import {__name__}$"):
        fusedrnn.load(tmp_path)


def test_only_own_modules_are_saved(tmp_path):
    class Mine(fusedrnn.LSTM):
        pass

    for module in (torch.nn.LSTM(3, 4), Mine(3, 4)):
        with pytest.raises(TypeError, match="module must be one of LSTM, GRU, RNN, "):
            fusedrnn.save(module, tmp_path)
    assert not list(tmp_path.iterdir())


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json: no such file"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            FileNotFoundError,
            "model.safetensors: no such file",
        ),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json: not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "config.json: not a config"),
        (lambda f: edit(f, format=99), ValueError, "config.json: written by fusedrnn 0.1.0, newer"),
        (
            lambda f: edit(f, **{"class": "os.system"}),
            ValueError,
            "class must be one of LSTM, GRU, RNN, RecurrentStack, CRF, ",
        ),
        (
            lambda f: edit(f, arguments={"input_size": 3, "hidden_sise": 4}),
            ValueError,
            "config.json: arguments do not fit LSTM",
        ),
        (
            lambda f: edit(f, arguments={"input_size": 3, "hidden_size": 5}),
            ValueError,
            "model.safetensors: weight_ih_l0 is (16, 3), but config.json wants (20, 3)",
        ),
        (
            lambda f: edit(f, arguments={"input_size": 3, "hidden_size": 4, "bias": False}),
            ValueError,
            "model.safetensors: bias_hh_l0 is (16,), but config.json wants none",
        ),
        (truncate, ValueError, "model.safetensors: damaged, or not a safetensors file"),
    ],
    ids=[
        "no-configuration",
        "no-weights",
        "not-json",
        "foreign",
        "later",
        "class",
        "arguments",
        "shape",
        "surplus",
        "truncated",
    ],
)
def test_a_bad_folder_is_one_clear_line(damage, error, message, tmp_path):
    fusedrnn.save(fusedrnn.LSTM(3, 4), tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=re.escape(message)) as caught:
        fusedrnn.load(tmp_path)
    assert "\n" not in str(caught.value)
