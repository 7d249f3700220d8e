"""The equations as textbooks write them, over [h_{t-1}, x_t], step by step in float64."""

import pytest
import torch

import kernels

T, B, M, D = 6, 3, 4, 5


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def split(weights):
    """W [d, d + m] of each gate -> w_ih [G*d, m] and w_hh [G*d, d]."""
    joined = torch.cat(weights)
    return joined[:, D:].contiguous(), joined[:, :D].contiguous()


def lstm_by_hand(x, w, b, u):
    """Gates by name; u: peepholes by name, zero for none."""
    h = c = x.new_zeros(B, D)
    ys = []
    for x_t in x:
        v = torch.cat([h, x_t], 1)
        f = torch.sigmoid(v @ w["f"].T + u["f"] * c + b["f"])
        i = torch.sigmoid(v @ w["i"].T + u["i"] * c + b["i"])
        candidate = torch.tanh(v @ w["c"].T + b["c"])
        c = f * c + i * candidate
        o = torch.sigmoid(v @ w["o"].T + u["o"] * c + b["o"])
        h = o * torch.tanh(c)
        ys.append(h)
    return torch.stack(ys), h, c


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("peephole", [False, True], ids=["plain", "peephole"])
def test_lstm(draw, backend, peephole):
    x = draw(T, B, M)
    w, b = {g: draw(D, D + M) for g in "ifco"}, {g: draw(D) for g in "ifco"}
    u = {g: draw(D) if peephole else torch.zeros(D).double() for g in "ifo"}
    extra = {f"weight_c{g}": u[g] for g in "ifo"} if peephole else {}
    w_ih, w_hh = split([w[g] for g in "ifco"])
    bias = torch.cat([b[g] for g in "ifco"])
    y, (h, c) = kernels.lstm(x, w_ih, w_hh, bias, **extra, backend=backend)
    for actual, expected in zip((y, h, c), lstm_by_hand(x, w, b, u), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gru_whose_update_gate_is_the_complement(draw, backend):
    x = draw(T, B, M)
    w, b = {g: draw(D, D + M) for g in "rzh"}, {g: draw(D) for g in "rzh"}
    h = x.new_zeros(B, D)
    ys = []
    for x_t in x:
        v = torch.cat([h, x_t], 1)
        r = torch.sigmoid(v @ w["r"].T + b["r"])
        z = torch.sigmoid(v @ w["z"].T + b["z"])
        candidate = torch.tanh(torch.cat([r * h, x_t], 1) @ w["h"].T + b["h"])
        h = (1 - z) * h + z * candidate
        ys.append(h)
    w_ih, w_hh = split([w["r"], -w["z"], w["h"]])
    bias = torch.cat([b["r"], -b["z"], b["h"]])
    y, h_n = kernels.gru(x, w_ih, w_hh, bias, reset_after=False, backend=backend)
    torch.testing.assert_close(y, torch.stack(ys))
    torch.testing.assert_close(h_n, h)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn(draw, backend, nonlinearity):
    x, w, b = draw(T, B, M), draw(D, D + M), draw(D)
    h = x.new_zeros(B, D)
    for x_t in x:
        h = getattr(torch, nonlinearity)(torch.cat([h, x_t], 1) @ w.T + b)
    _, h_n = kernels.rnn(x, *split([w]), b, nonlinearity=nonlinearity, backend=backend)
    torch.testing.assert_close(h_n, h)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_layer_norm_lstm(draw, backend):
    """Ba et al. 2016, equations 20-22."""

    def norm(v, gain, bias=0.0):
        mean, variance = v.mean(-1, keepdim=True), v.var(-1, correction=0, keepdim=True)
        return gain * (v - mean) / torch.sqrt(variance + 1e-5) + bias

    x, w_ih, w_hh, bias = draw(T, B, M), draw(4 * D, M), draw(4 * D, D), draw(4 * D)
    gain_ih, gain_hh, gain_c, bias_c = draw(4 * D), draw(4 * D), draw(D), draw(D)
    h = c = x.new_zeros(B, D)
    for x_t in x:
        gates = norm(h @ w_hh.T, gain_hh) + norm(x_t @ w_ih.T, gain_ih) + bias
        i, f, g, o = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(norm(c, gain_c, bias_c))
    _, (h_n, c_n) = kernels.lstm(
        x,
        w_ih,
        w_hh,
        bias,
        weight_ln_ih=gain_ih,
        weight_ln_hh=gain_hh,
        weight_ln_c=gain_c,
        bias_ln_c=bias_c,
        backend=backend,
    )
    torch.testing.assert_close(h_n, h)
    torch.testing.assert_close(c_n, c)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_two_directions_are_two_layers_concatenated(draw, backend):
    x, w_ih, w_hh = draw(T, B, M), draw(2, 4 * D, M), draw(2, 4 * D, D)
    peepholes = {f"weight_c{g}": draw(2, D) for g in "ifo"}
    y, (h_n, _) = kernels.lstm(x, w_ih, w_hh, **peepholes, backend=backend)
    one = {name: value[0] for name, value in peepholes.items()}
    two = {name: value[1] for name, value in peepholes.items()}
    forward, _ = kernels.lstm(x, w_ih[0], w_hh[0], **one, backend=backend)
    backward, _ = kernels.lstm(x.flip(0), w_ih[1], w_hh[1], **two, backend=backend)
    torch.testing.assert_close(y, torch.cat([forward, backward.flip(0)], -1))
    torch.testing.assert_close(h_n, torch.stack([forward[-1], backward[-1]]))
