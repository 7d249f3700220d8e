"""The cells as their kernels see them: one step and its gradient each, a few lines.

A step takes the input part of its gates, the state and the parameters, all float32 tiles [U, R]
(parameters [U, 1]), and gets the recurrent part from `recur`. It returns the new state and what the
gradient needs: blocks stored one after another, and statistics stored per batch row.

A gradient takes the gradients of the new state, what was saved, the previous state and the
parameters. It returns the gradients of the input part of the gates, and of the previous state.
`recur_grad` stores the gradients of the recurrent part; where both are the same, it does so for
both.

Gate order and equations are those of kernels/reference.py.
"""

import triton
import triton.language as tl

from .primitives import moments, normalised_grad, recur, recur_grad, sigmoid, tanh


@triton.jit
def rnn_tanh(x, state, params, link, C: tl.constexpr):
    """One block saved: h."""
    (r,) = recur(link, state[0], 0, 0, 1, C)
    h = tanh(x[0] + r)
    return (h,), (h,), ()


@triton.jit
def rnn_tanh_grad(d, saved, stats, previous, params, link, C: tl.constexpr):
    """Gradient of `rnn_tanh`."""
    grads = (d[0] * (1.0 - saved[0] * saved[0]),)
    return grads, (recur_grad(link, grads, 0, 0, C),)


@triton.jit
def rnn_relu(x, state, params, link, C: tl.constexpr):
    """One block saved: h."""
    (r,) = recur(link, state[0], 0, 0, 1, C)
    h = tl.maximum(x[0] + r, 0.0)
    return (h,), (h,), ()


@triton.jit
def rnn_relu_grad(d, saved, stats, previous, params, link, C: tl.constexpr):
    """Gradient of `rnn_relu`."""
    grads = (tl.where(saved[0] > 0.0, d[0], 0.0),)
    return grads, (recur_grad(link, grads, 0, 0, C),)


@triton.jit
def lstm(x, state, params, link, C: tl.constexpr):
    """Four blocks saved: i f g o."""
    h, c = state
    ri, rf, rg, ro = recur(link, h, 0, 0, 4, C)
    i, f, g, o = sigmoid(x[0] + ri), sigmoid(x[1] + rf), tanh(x[2] + rg), sigmoid(x[3] + ro)
    c = f * c + i * g
    return (o * tanh(c), c), (i, f, g, o), ()


@triton.jit
def lstm_grad(d, saved, stats, previous, params, link, C: tl.constexpr):
    """Gradient of `lstm`; the new c is computed again, so that zoneout needs no second copy."""
    dh, dc = d
    i, f, g, o = saved
    c = previous[1]
    u = tanh(f * c + i * g)
    do = dh * u * o * (1.0 - o)
    dc += dh * o * (1.0 - u * u)
    grads = (dc * g * i * (1.0 - i), dc * c * f * (1.0 - f), dc * i * (1.0 - g * g), do)
    return grads, (recur_grad(link, grads, 0, 0, C), dc * f)


@triton.jit
def lstm_peephole(x, state, params, link, C: tl.constexpr):
    """Four blocks saved: i f g o; parameters: weight_ci, weight_cf, weight_co."""
    h, c = state
    ri, rf, rg, ro = recur(link, h, 0, 0, 4, C)
    i, f = sigmoid(x[0] + ri + params[0] * c), sigmoid(x[1] + rf + params[1] * c)
    g = tanh(x[2] + rg)
    c = f * c + i * g
    o = sigmoid(x[3] + ro + params[2] * c)
    return (o * tanh(c), c), (i, f, g, o), ()


@triton.jit
def lstm_peephole_grad(d, saved, stats, previous, params, link, C: tl.constexpr):
    """Gradient of `lstm_peephole`."""
    dh, dc = d
    i, f, g, o = saved
    c = previous[1]
    u = tanh(f * c + i * g)
    do = dh * u * o * (1.0 - o)
    dc += dh * o * (1.0 - u * u) + do * params[2]
    di, df = dc * g * i * (1.0 - i), dc * c * f * (1.0 - f)
    grads = (di, df, dc * i * (1.0 - g * g), do)
    dh = recur_grad(link, grads, 0, 0, C)
    return grads, (dh, dc * f + di * params[0] + df * params[1])


@triton.jit
def lstm_layernorm(x, state, params, link, C: tl.constexpr):
    """Eight blocks saved: i f g o and the normalised W h.

    Parameters: the four gains of the normalised W h, gain and bias of the normalised c.

    Three exchanges: h, the moments of W h, the moments of c. Publishing c, o and moments together
    would save one, at the price of o * tanh(LN(c)) computed for all H units by every program and
    twice the bytes.
    """
    h, c = state
    place, weights, w, bias, keep, buffers, sync, step = link
    plain = (place, weights, w, (), keep, buffers, sync, step)
    r = recur(plain, h, 0, 0, 4, C)
    mean, rstd = moments(place, buffers, sync, step, r, 1, C)
    gates, normed = (), ()
    for k in tl.static_range(4):
        normed = normed + ((r[k] - mean) * rstd,)
        gate = x[k] + params[k] * normed[k]
        if len(bias) > 0:
            gate += bias[k]
        gates = gates + (gate,)
    i, f, g, o = sigmoid(gates[0]), sigmoid(gates[1]), tanh(gates[2]), sigmoid(gates[3])
    c = f * c + i * g
    mean_c, rstd_c = moments(place, buffers, sync, step, (c,), 2, C)
    h = o * tanh(params[4] * ((c - mean_c) * rstd_c) + params[5])
    return (h, c), (i, f, g, o) + normed, (rstd, mean_c, rstd_c)


@triton.jit
def lstm_layernorm_grad(d, saved, stats, previous, params, link, C: tl.constexpr):
    """Gradient of `lstm_layernorm`; a fifth one, of LN(c), is for the gain and bias of c."""
    dh, dc = d
    place, buffers, sync, step = link[0], link[8], link[9], link[10]
    i, f, g, o, n0, n1, n2, n3 = saved
    rstd, mean_c, rstd_c = stats
    c = previous[1]
    normed_c = (f * c + i * g - mean_c) * rstd_c
    u = tanh(params[4] * normed_c + params[5])
    do = dh * u * o * (1.0 - o)
    du = dh * o * (1.0 - u * u)
    (d_new,) = normalised_grad(
        place, buffers, sync, step, (du * params[4],), (normed_c,), rstd_c, 0, C
    )
    dc += d_new
    di, df, dg = dc * g * i * (1.0 - i), dc * c * f * (1.0 - f), dc * i * (1.0 - g * g)
    scaled = (di * params[0], df * params[1], dg * params[2], do * params[3])
    grads = normalised_grad(place, buffers, sync, step, scaled, (n0, n1, n2, n3), rstd, 1, C)
    return (di, df, dg, do, du), (recur_grad(link, grads, 2, 0, C), dc * f)


@triton.jit
def gru(x, state, params, link, C: tl.constexpr):
    """Four blocks saved: r z n and the recurrent part of n."""
    (h,) = state
    hr, hz, hn = recur(link, h, 0, 0, 3, C)
    r, z = sigmoid(x[0] + hr), sigmoid(x[1] + hz)
    n = tanh(x[2] + r * hn)
    return ((1.0 - z) * n + z * h,), (r, z, n, hn), ()


@triton.jit
def gru_grad(d, saved, stats, previous, params, link, C: tl.constexpr):
    """Gradient of `gru`; the recurrent part of n has its own."""
    (dh,) = d
    r, z, n, hn = saved
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dr, dz = dn * hn * r * (1.0 - r), dh * (previous[0] - n) * z * (1.0 - z)
    return (dr, dz, dn), (recur_grad(link, (dr, dz, dn * r), 0, 0, C) + dh * z,)


@triton.jit
def gru_reset_before(x, state, params, link, C: tl.constexpr):
    """Three blocks saved: r z n. Two exchanges: h, then r h."""
    (h,) = state
    hr, hz = recur(link, h, 0, 0, 2, C)
    r, z = sigmoid(x[0] + hr), sigmoid(x[1] + hz)
    (hn,) = recur(link, r * h, 1, 2, 1, C)
    n = tanh(x[2] + hn)
    return ((1.0 - z) * n + z * h,), (r, z, n), ()


@triton.jit
def gru_reset_before_grad(d, saved, stats, previous, params, link, C: tl.constexpr):
    """Gradient of `gru_reset_before`."""
    (dh,) = d
    r, z, n = saved
    h = previous[0]
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dq = recur_grad(link, (dn,), 0, 2, C)
    dr, dz = dq * h * r * (1.0 - r), dh * (h - n) * z * (1.0 - z)
    d_previous = recur_grad(link, (dr, dz), 1, 0, C) + dq * r + dh * z
    return (dr, dz, dn), (d_previous,)
