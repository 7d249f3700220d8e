import re
from functools import cache, partial

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

import fusedrnn
import fusedrnn.onnx

I, H = 3, 4  # noqa: E741
LAYERS = {
    "lstm": partial(fusedrnn.LSTM, I, H),
    "lstm_deep": partial(fusedrnn.LSTM, I, H, num_layers=2, dropout=0.5),
    "lstm_peephole": partial(fusedrnn.LSTM, I, H, peephole=True, recurrent_dropout=0.5),
    "gru": partial(fusedrnn.GRU, I, H),
    "gru_reset_before": partial(fusedrnn.GRU, I, H, num_layers=2, reset_after=False),
    "rnn_tanh": partial(fusedrnn.RNN, I, H),
    "rnn_relu": partial(fusedrnn.RNN, I, H, nonlinearity="relu"),
    "no_bias": partial(fusedrnn.GRU, I, H, bias=False),
    "stack_lstm": partial(
        fusedrnn.RecurrentStack, I, [5, 4], residual=True, layer_norm=True, dropout=0.5
    ),
    "stack_highway": partial(
        fusedrnn.RecurrentStack,
        I,
        [4, 3],
        ["lstm_peephole", "gru"],
        highway=True,
        learned_states=True,
        variational_dropout=True,
        dropout=0.5,
    ),
    "stack_gru": partial(fusedrnn.RecurrentStack, I, [4, 4], cell="gru_reset_before"),
}


def load(path):
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model, onnxruntime.InferenceSession(path)


@cache
def exported(name, bidirectional, batch_first, option, folder):
    """A module, and the session of its export."""
    torch.manual_seed(0)
    module = LAYERS[name](bidirectional=bidirectional, batch_first=batch_first)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    path = folder / f"{name}-{bidirectional}-{batch_first}-{option}.onnx"
    fusedrnn.onnx.export(
        module, path, lengths="lengths" in option, initial_state="initial_state" in option
    )
    return module.eval(), *load(path)


def run(module, session, lengths, extra, seed):
    """Outputs of both, as flat lists, for random inputs with the given lengths."""
    torch.manual_seed(seed)
    feeds = {}
    for node in session.get_inputs():
        shape = [{"B": len(lengths), "T": max(lengths) + extra}.get(n, n) for n in node.shape]
        is_lengths = node.name == "lengths"
        feeds[node.name] = torch.tensor(lengths) if is_lengths else torch.randn(*shape)
    theirs = session.run(None, {k: v.numpy() for k, v in feeds.items()})
    x, given = feeds.pop("x"), feeds.pop("lengths", None)
    hx = None
    if feeds and isinstance(module, fusedrnn.RecurrentStack):
        pairs = [[v for k, v in feeds.items() if k.endswith(f"_l{n}")] for n in range(2)]
        hx = [tuple(pair) if len(pair) > 1 else pair[0] for pair in pairs]
    elif feeds:
        hx = tuple(feeds.values()) if len(feeds) > 1 else feeds["h_0"]
    with torch.no_grad():
        ours = module(x, hx, lengths=given)
    return pytree.tree_leaves(ours), [torch.from_numpy(t) for t in theirs]


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other, mine, rtol=0, atol=1e-5)


CONFIGURATIONS = [
    ("lstm", False, False, "plain"),
    ("lstm", True, True, "lengths"),
    ("lstm_deep", True, False, "lengths+initial_state"),
    ("lstm_peephole", False, True, "initial_state"),
    ("lstm_peephole", True, False, "lengths+initial_state"),
    ("gru", True, True, "lengths+initial_state"),
    ("gru_reset_before", True, False, "lengths+initial_state"),
    ("rnn_tanh", True, True, "lengths+initial_state"),
    ("rnn_relu", False, False, "lengths"),
    ("no_bias", True, False, "lengths"),
    ("stack_lstm", True, True, "lengths+initial_state"),
    ("stack_gru", False, False, "lengths"),
    ("stack_highway", True, True, "lengths"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: "-".join(map(str, c)))
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 99))
def test_onnxruntime_agrees_for_every_shape(configuration, folder, lengths, extra, seed):
    module, _, session = exported(*configuration, folder)
    assert_close(*run(module, session, lengths, extra, seed))


@pytest.mark.parametrize(
    ("configuration", "node", "count"),
    [(CONFIGURATIONS[2], "LSTM", 2), (CONFIGURATIONS[6], "GRU", 2), (CONFIGURATIONS[7], "RNN", 1)],
    ids=["LSTM", "GRU", "RNN"],
)
def test_layers_are_standard_nodes(configuration, node, count, folder):
    _, model, _ = exported(*configuration, folder)
    nodes = [n for n in model.graph.node if n.op_type in ("LSTM", "GRU", "RNN")]
    assert [n.op_type for n in nodes] == [node] * count
    assert {n.domain for n in model.graph.node} == {""}
    assert not {"Loop", "Scan", "MatMul", "Gemm"} & {n.op_type for n in model.graph.node}


def test_any_module_that_holds_layers(tmp_path):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fusedrnn.GRU(I, H, batch_first=True)
            self.head = nn.Linear(H, 2)

        def forward(self, features, sizes):
            return self.head(self.rnn(features, lengths=sizes)[1][0])

    module = Classifier().train()
    names = list(module.state_dict())
    x, sizes = torch.randn(5, 7, I), torch.tensor([7, 1, 3, 2, 7])
    example = {"features": x[:2], "sizes": sizes[:2]}
    dimensions = {"features": ("N", "T", None), "sizes": ("N",)}
    fusedrnn.onnx.export(module, tmp_path / "c.onnx", example, dimensions, ["scores"])
    _, session = load(tmp_path / "c.onnx")
    theirs = session.run(["scores"], {"features": x.numpy(), "sizes": sizes.numpy()})
    assert_close([module(x, sizes).detach()], [torch.from_numpy(theirs[0])])
    assert module.training and list(module.state_dict()) == names
    assert type(module.rnn) is fusedrnn.GRU


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (fusedrnn.LSTM(I, H, zoneout=0.1), "LSTM: ONNX's LSTM node has no zoneout"),
        (fusedrnn.LSTM(I, H, proj_size=2), "LSTM: ONNX's LSTM node has no projection (proj_size)"),
        (
            nn.Sequential(nn.Identity(), fusedrnn.LSTM(I, H, layer_norm=True)),
            "1: ONNX's LSTM node has no layer normalisation inside the cell",
        ),
        (fusedrnn.RNN(I, H, dtype=torch.float64), "RNN: the export needs float32, got torch.flo"),
        (nn.Sequential(fusedrnn.GRU(I, H)), "inputs, dimensions and outputs are needed for a Seq"),
    ],
    ids=["zoneout", "projection", "layer_norm", "float64", "no-inputs"],
)
def test_what_onnx_cannot_express_is_refused(module, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        fusedrnn.onnx.export(module, tmp_path / "no.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    find = fusedrnn.onnx.importlib.util.find_spec
    absent = lambda name: None if name == package else find(name)  # noqa: E731
    monkeypatch.setattr(fusedrnn.onnx.importlib.util, "find_spec", absent)
    with pytest.raises(ImportError, match=re.escape(f"needs {package}, which is not installed")):
        fusedrnn.onnx.export(fusedrnn.GRU(I, H), tmp_path / "no.onnx")
