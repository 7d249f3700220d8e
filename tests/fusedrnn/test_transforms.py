"""Layers under the tools of torch that look into what is computed."""

import pytest
import torch
from torch import nn

import fusedrnn

WRITTEN_OUT = [
    pytest.param(lambda: fusedrnn.LSTM(4, 6, peephole=True, bidirectional=True), id="peephole"),
    pytest.param(lambda: fusedrnn.LSTM(4, 6, layer_norm=True), id="layer_norm"),
    pytest.param(lambda: fusedrnn.GRU(4, 6, reset_after=False), id="reset_before"),
    pytest.param(lambda: fusedrnn.LSTM(4, 6, zoneout=0.1).eval(), id="zoneout"),
]


class Ragged(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths):
        return self.layer(x, lengths=lengths)[0]


@pytest.mark.parametrize("build", WRITTEN_OUT)
def test_gradients_of_each_row_by_transforms(build):
    layer, x = build(), torch.randn(5, 3, 4)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(layer, parameters, (row,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x)
    for row in range(x.shape[1]):
        layer.zero_grad()
        layer(x[:, row])[0].square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][row], parameter.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_serves_other_batches():
    model = Ragged(fusedrnn.LSTM(4, 32, 2, bidirectional=True))
    groups = torch.tensor([12] * 9 + [1] * 30)  # which eager mode runs apart
    traced = torch.jit.trace(model, (torch.randn(12, 39, 4), groups))
    for steps, lengths in ((12, groups.flip(0)), (7, torch.tensor([5, 7, 2, 6]))):
        x = torch.randn(steps, len(lengths), 4)
        torch.testing.assert_close(traced(x, lengths), model(x, lengths))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("build", WRITTEN_OUT)
def test_a_trace_of_the_other_cells_serves_other_lengths(build):
    model = Ragged(build())
    traced = torch.jit.trace(model, (torch.randn(5, 3, 4), torch.tensor([5, 2, 3])))
    x, lengths = torch.randn(5, 2, 4), torch.tensor([1, 4])
    torch.testing.assert_close(traced(x, lengths), model(x, lengths))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: fusedrnn.GRU(4, 6), id="layer"),
        pytest.param(lambda: fusedrnn.RecurrentStack(4, [6], cell="gru"), id="stack"),
    ],
)
def test_scripting_is_refused_in_words(build):
    with pytest.raises(TypeError, match=r"jit\.script cannot compile a fusedrnn\.GRU: use torch"):
        torch.jit.script(build())
