import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import diagnostics
from fusedrnn.stack import LAYERS

T, B, I, H = 7, 3, 3, 4  # noqa: E741
LENGTHS = torch.tensor([4, 7, 2])
GATED = [name for name in LAYERS if not name.startswith("rnn")]


def build(cell="lstm", **options):
    torch.manual_seed(0)
    layer = LAYERS[cell](I, H, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.6)
    return layer


def draw_input(steps=T, batch=B):
    return torch.randn(steps, batch, I, dtype=torch.float64, generator=torch.manual_seed(1))


def run_recorded(layer, x, loss, **arguments):
    with diagnostics.record(layer) as records:
        loss(layer(x, **arguments)[0]).backward()
    (record,) = records.values()
    return record


@pytest.mark.parametrize("cell", ["lstm", "lstm_layernorm"])
def test_along_the_cell_path_the_gradient_is_the_product_of_forget_gates(cell):
    layer, x = build(cell), draw_input()
    c_0 = torch.zeros(1, B, H, dtype=torch.float64, requires_grad=True)
    state = (torch.zeros_like(c_0), c_0)
    for x_t in x:
        _, (h, c) = layer.step(x_t, state)
        state = (h.detach(), c)
    c.sum().backward()
    carry = run_recorded(layer, x, torch.sum).carry()
    torch.testing.assert_close(c_0.grad, carry[:, -1], rtol=1e-12, atol=0)


def test_with_the_path_of_h_cut_the_losses_of_all_steps_add_up():
    layer, x = build(), draw_input()
    weight = torch.randn(T, B, H, dtype=torch.float64)
    c_0 = torch.zeros(1, B, H, dtype=torch.float64, requires_grad=True)
    state, loss, through = (torch.zeros_like(c_0), c_0), 0.0, []
    for x_t, w_t in zip(x, weight, strict=True):
        _, (h, c) = layer.step(x_t, state)
        loss = loss + (w_t * h).sum()
        through.append((w_t * (1 - c.tanh() ** 2)).detach())
        state = (h.detach(), c)
    loss.backward()
    record = run_recorded(layer, x, torch.sum)
    terms = torch.stack(through, 1) * record.gates["o"] * record.carry()
    torch.testing.assert_close(c_0.grad, terms.sum(1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("t", [0, 3, T - 1])
@pytest.mark.parametrize("cell", LAYERS)
def test_gradients_are_those_of_a_sequence_cut_in_two(cell, t):
    layer, x = build(cell), draw_input()
    record = run_recorded(layer, x, lambda y: y.square().sum())
    with torch.no_grad():
        _, state = layer(x[: t + 1])
    leaves = [s.clone().requires_grad_() for s in (state if cell.startswith("lstm") else [state])]
    loss = leaves[0].square().sum()
    if t < T - 1:
        after = tuple(leaves) if len(leaves) > 1 else leaves[0]
        loss = loss + layer(x[t + 1 :], after)[0].square().sum()
    loss.backward()
    torch.testing.assert_close(record.gradient(0)[:, t], leaves[0].grad)
    if cell == "lstm":
        o, c = record.gates["o"][:, t], leaves[1]
        later = torch.zeros_like(c) if c.grad is None else c.grad
        total = later + leaves[0].grad * o * (1 - c.detach().tanh() ** 2)
        torch.testing.assert_close(record.gradient(1)[:, t], total)


def test_gates_are_those_of_the_equations():
    layer, x = build(), draw_input()
    record = run_recorded(layer, x, torch.sum)
    y = torch.cat([torch.zeros(1, B, H, dtype=torch.float64), layer(x)[0][:-1]])
    w = dict(layer.named_parameters())
    z = x @ w["weight_ih_l0"].T + y @ w["weight_hh_l0"].T + w["bias_ih_l0"] + w["bias_hh_l0"]
    i, f, g, o = z.detach().chunk(4, -1)
    expected = {"i": i.sigmoid(), "f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid()}
    assert record.gates.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(record.gates[name][0], value)


@pytest.mark.parametrize("cell", LAYERS)
def test_rows_of_different_lengths_keep_apart(cell):
    layer, x = build(cell, bidirectional=True), draw_input()
    batch = run_recorded(layer, x, lambda y: y.square().sum(), lengths=LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = run_recorded(layer, x[:length, row : row + 1], lambda y: y.square().sum())
        for name, gate in alone.gates.items():
            torch.testing.assert_close(batch.gates[name][:, :length, row], gate[:, :, 0])
            assert not batch.gates[name][:, length:, row].any()
        for state in range(len(batch.states[0][0])):
            own, alone_ = batch.gradient(state), alone.gradient(state)
            torch.testing.assert_close(own[:, :length, row], alone_[:, :, 0])
            assert not own[:, length:, row].any()
        if cell in GATED:
            carry, own_carry = batch.carry()[:, :length, row], alone.carry()[:, :, 0]
            torch.testing.assert_close(carry, own_carry)


def test_padding_counts_in_no_mean():
    layer, x = build(bidirectional=True), draw_input()
    poisoned = x.clone()
    poisoned[torch.arange(T)[:, None] >= LENGTHS] = float("nan")

    def loss(y):
        return y.square().sum()

    (padded,) = diagnostics.gradient_flow(layer, poisoned, loss, lengths=LENGTHS).values()
    alone = run_recorded(layer, x[:, 1:2], loss).flow()
    assert all(v.isfinite().all() for v in (padded.hidden, padded.cell, padded.carry))
    record = run_recorded(layer, x, loss, lengths=LENGTHS)
    for name, mean in padded.unit_mean.items():
        rows = [record.gates[name][:, :n, row] for row, n in enumerate(LENGTHS.tolist())]
        torch.testing.assert_close(mean, torch.cat(rows, 1).mean(1))
    for name, mean in padded.gate_mean.items():
        torch.testing.assert_close(mean[:, 4:], alone.gate_mean[name][:, 4:])


@pytest.mark.parametrize("cell", LAYERS)
def test_a_recorded_pass_is_the_same_pass(cell):
    layer = build(cell, recurrent_dropout=0.3, zoneout=0.2)
    x = draw_input()
    results = []
    for recorded in (False, True):
        torch.manual_seed(3)
        layer.zero_grad()
        if recorded:
            run_recorded(layer, x, lambda y: y.square().sum(), lengths=LENGTHS)
        else:
            layer(x, lengths=LENGTHS)[0].square().sum().backward()
        results.append([p.grad.clone() for p in layer.parameters()])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_only_what_is_asked_for_changes():
    stack = fusedrnn.RecurrentStack(I, [4, 3], backend="torch")
    flows = diagnostics.gradient_flow(stack, torch.randn(T, B, I), torch.sum)
    assert list(flows) == ["layers.0", "layers.1"]
    assert all(p.grad is None for p in stack.parameters())
    with pytest.raises(ZeroDivisionError), diagnostics.record(stack):
        raise ZeroDivisionError
    assert [layer.backend for layer in stack.layers] == ["torch", "torch"]
    assert "recurrence" not in vars(stack.layers[0])


def test_names_of_layers():
    x = torch.randn(T, B, I)
    for module, names in (
        (fusedrnn.GRU(I, H), ["l0"]),
        (fusedrnn.GRU(I, H, 2), ["l0", "l1"]),
        (nn.ModuleDict({"a": fusedrnn.GRU(I, H, 2)}), ["a.l0", "a.l1"]),
    ):
        run = module["a"] if isinstance(module, nn.ModuleDict) else module
        with diagnostics.record(module) as records:
            run(x)[0].sum().backward()
            run(x[:3])[0].sum().backward()
        assert list(records) == names
        assert all(r.flow().hidden.shape == (1, 3) for r in records.values())


def test_spectral_radius():
    layer = fusedrnn.LSTM(I, H, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(H, H, dtype=torch.float64))[0]
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.cat([scale * turn for scale in (0.5, 1.0, 0.0, 2.0)]))
    (flow,) = diagnostics.gradient_flow(layer, draw_input(), torch.sum).values()
    found = {name: value.item() for name, value in flow.spectral_radius.items()}
    assert found == pytest.approx({"i": 0.5, "f": 1.0, "g": 0.0, "o": 2.0})


def test_gradients_vanish_in_a_contracting_rnn_and_not_in_an_open_lstm():
    steps = 60
    x = draw_input(steps)
    rnn = fusedrnn.RNN(I, H, dtype=torch.float64)
    lstm = fusedrnn.LSTM(I, H, forget_bias=6.0, dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(0.5 * torch.eye(H))

    def last(y):
        return y[-1].sum()

    (short,) = diagnostics.gradient_flow(rnn, x, last).values()
    bound = short.hidden[0, -1] * 0.5 ** torch.arange(steps - 1, -1, -1.0, dtype=torch.float64)
    assert (short.hidden[0] <= bound * (1 + 1e-9)).all()
    assert short.carry is None and short.cell is None
    (long,) = diagnostics.gradient_flow(lstm, x, last).values()
    assert long.cell[0, 0] > 0.5 * long.cell[0, -1]
    assert long.carry[0, -1] > 0.5


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0], ids=["vanish", "stay", "explode"])
def test_gradients_of_a_linear_rnn_are_powers_of_its_matrix(radius):
    """dh_t/dh_0 is the product of the recurrent matrices; relu is linear where all is positive."""
    steps = 60
    rnn = fusedrnn.RNN(I, H, nonlinearity="relu", bias=False, dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_ih_l0.abs_()
        rnn.weight_hh_l0.uniform_()
        rnn.weight_hh_l0.mul_(radius / torch.linalg.eigvals(rnn.weight_hh_l0).abs().max())
    record = run_recorded(rnn, draw_input(steps).abs(), lambda y: y[-1].sum())
    row = torch.ones(H, dtype=torch.float64)
    for gradient in record.gradient(0)[0].flip(0):
        torch.testing.assert_close(gradient, row.expand(B, H), rtol=1e-9, atol=0)
        row = row @ rnn.weight_hh_l0.detach()
    found = record.flow()
    assert found.spectral_radius["h"].item() == pytest.approx(radius)
    grown = found.hidden[0, 0] / found.hidden[0, 10]
    assert grown.item() == pytest.approx(radius**10, rel=1e-6)


def test_saturation():
    layer = fusedrnn.GRU(I, H)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.bias_ih_l0[:H] = 20.0
        layer.bias_ih_l0[2 * H :] = -20.0
    (flow,) = diagnostics.gradient_flow(layer, torch.randn(T, B, I), torch.sum).values()
    assert {n: s.item() for n, s in flow.gate_saturation.items()} == {"r": 1.0, "z": 0.0, "n": 1.0}


def test_gradients_before_a_backward_are_refused():
    layer = build()
    with diagnostics.record(layer) as records:
        layer(draw_input())
    with pytest.raises(RuntimeError, match="call backward"):
        records["l0"].flow()


def test_without_gradients_nothing_is_recorded():
    layer = build()
    with diagnostics.record(layer) as records, torch.no_grad():
        layer(draw_input())
    assert not records


def test_figures(tmp_path):
    stack = fusedrnn.RecurrentStack(I, [4, 3], bidirectional=True)
    flows = diagnostics.gradient_flow(stack, torch.randn(T, B, I), torch.sum)
    figure = diagnostics.draw(flows)
    assert len(figure.axes) == 6
    norms = flows["layers.1"].hidden
    lines = [line.get_ydata() for line in figure.axes[3].lines]
    assert any((line == norms[1].numpy()).all() for line in lines)
    history = {0: norms, 10: norms[:, :4], 20: torch.zeros_like(norms)}
    heat = diagnostics.draw_history(history, "h")
    (image,) = heat.axes[0].images
    shown = torch.from_numpy(image.get_array().filled(float("nan")))
    torch.testing.assert_close(shown[:, 0], norms[0].log10())
    assert shown[4:, 1].isnan().all() and shown[:, 2].isnan().all()
    for number, drawn in enumerate((figure, heat)):
        drawn.savefig(tmp_path / f"{number}.png")
