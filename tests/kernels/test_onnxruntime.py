"""onnxruntime's LSTM, GRU and RNN as an independent implementation.

It computes in float32 with its own approximations of tanh and sigmoid, good to about 1e-6 each.
"""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from kernels import CELLS
from kernels.api import recurrence
from tests.kernels.cases import outputs, random_layer

ORDER = {"LSTM": "iofc", "GRU": "zrh", "RNN": "h"}
OURS = {"LSTM": "ifco", "GRU": "rzh", "RNN": "h"}
NODES = {
    "rnn_tanh": ("RNN", {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", {"activations": ["Relu"]}),
    "lstm": ("LSTM", {}),
    "lstm_peephole": ("LSTM", {}),
    "gru": ("GRU", {"linear_before_reset": 1}),
    "gru_reset_before": ("GRU", {"linear_before_reset": 0}),
}


def reorder(op, tensor):
    """Gate blocks of [D, G*H, ...] from our order to ONNX's."""
    blocks = dict(zip(OURS[op], tensor.chunk(len(OURS[op]), 1), strict=True))
    return torch.cat([blocks[gate] for gate in ORDER[op]], 1)


def onnx_outputs(layer, lengths):
    op, attributes = NODES[layer.cell]
    directions, hidden = layer.w_ih.shape[0], layer.w_hh.shape[2]
    if "activations" in attributes:
        attributes = {"activations": attributes["activations"] * directions}
    feeds = {
        "X": layer.x,
        "W": reorder(op, layer.w_ih),
        "R": reorder(op, layer.w_hh),
        "B": torch.cat([reorder(op, layer.b_ih), reorder(op, layer.b_hh)], 1),
        "sequence_lens": lengths,
        "initial_h": layer.state[0],
    }
    if op == "LSTM":
        feeds["initial_c"] = layer.state[1]
    if layer.params:
        feeds["P"] = torch.cat([layer.params[f"weight_c{gate}"] for gate in "iof"], 1)
    arrays = {
        name: value.detach().numpy().astype(np.int32 if name == "sequence_lens" else np.float32)
        for name, value in feeds.items()
    }
    results = ["Y", "Y_h", "Y_c"][: 3 if op == "LSTM" else 2]
    node = helper.make_node(
        op,
        list(arrays),
        results,
        hidden_size=hidden,
        direction="bidirectional" if directions == 2 else "forward",
        **attributes,
    )
    kinds = {np.dtype(np.int32): TensorProto.INT32, np.dtype(np.float32): TensorProto.FLOAT}
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(n, kinds[a.dtype], a.shape) for n, a in arrays.items()],
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * (4 if n == "Y" else 3))
            for n in results
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    y, *final = (torch.from_numpy(r) for r in session.run(results, arrays))
    return {"y": y.transpose(1, 2).flatten(2), **dict(zip(("h_n", "c_n"), final, strict=False))}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("lengths", [[6, 6, 6], [2, 6, 4]], ids=["full", "lengths"])
@pytest.mark.parametrize("directions", [1, 2], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("cell", NODES)
def test_agrees(cell, directions, lengths, backend):
    layer = random_layer(cell, steps=6, directions=directions)
    lengths = torch.tensor(lengths)
    ours = outputs(recurrence, layer, lengths=lengths, backend=backend)
    theirs = onnx_outputs(layer, lengths)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].float(), value, rtol=0, atol=1e-5)


def test_every_cell_that_onnx_has_is_compared():
    assert CELLS.keys() - NODES.keys() == {"lstm_layernorm"}
