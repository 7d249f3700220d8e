import pytest
import torch
from torch import nn

import fusedrnn

X, LENGTHS = torch.randn(5, 3, 4), torch.tensor([2, 5, 3])
LAYERS = [
    pytest.param(lambda: fusedrnn.LSTM(4, 6, 2, bidirectional=True), id="LSTM"),
    pytest.param(lambda: fusedrnn.LSTM(4, 6, peephole=True), id="LSTM-peephole"),
    pytest.param(lambda: fusedrnn.LSTM(4, 6, 2, layer_norm=True), id="LSTM-layer_norm"),
    pytest.param(lambda: fusedrnn.GRU(4, 6, reset_after=False), id="GRU-reset_before"),
]


class Ragged(nn.Module):
    def __init__(self, layer, ragged):
        super().__init__()
        self.layer = layer
        self.ragged = ragged

    def forward(self, x, lengths):
        return self.layer(x, lengths=lengths if self.ragged else None)[0]


@pytest.mark.parametrize(
    ("build", "ragged"),
    [
        pytest.param(LAYERS[0].values[0], False, id="LSTM-full"),
        *(pytest.param(*layer.values, True, id=f"{layer.id}-lengths") for layer in LAYERS),
    ],
)
def test_compiled_model_trains_as_the_eager_one(build, ragged):
    model = Ragged(build(), ragged)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        y = run(X, LENGTHS)
        y.square().sum().backward()
        gradients.append([y, *(p.grad for p in model.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("build", LAYERS[1:3])
def test_no_part_of_a_layer_is_compiled_where_its_kernels_are_not(build):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(build(), backend=count)
    for steps in (5, 4, 3):
        compiled(X[:steps])
    assert graphs == []


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize(
    ("build", "strict"),
    [
        *(pytest.param(*layer.values, False, id=layer.id) for layer in LAYERS),
        pytest.param(*LAYERS[0].values, True, id="LSTM-strict"),
    ],
)
def test_export(build, strict, ragged):
    model = Ragged(build(), ragged).eval()
    exported = torch.export.export(model, (X, LENGTHS), strict=strict).module()
    for lengths in (LENGTHS, torch.tensor([5, 1, 4])):
        torch.testing.assert_close(exported(2 * X, lengths), model(2 * X, lengths))
