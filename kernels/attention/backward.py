"""The decoder's backward time loop as one Triton kernel: a program per tile of batch rows.

It gives the gradients that need order in time: of the gates, the features before tanh, the
contexts, the scores and the projected queries. Every gradient of a weight, of the keys and of the
projected keys is a product over all steps outside. What bounds it is what bounds forward.py; the
tanh of an additive score is computed again here, and once more outside. No GPU has run it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..persistent.primitives import tanh
from .tiles import covered, over_source, product, rows_of, sight, source_tile, vector


@triton.jit(do_not_specialize=("T", "B", "S"))
def backward_kernel(
    matrices, sources, combine, saved, given, grads, carried, between, mask, lengths, T, B, S,
    C: tl.constexpr,
):  # fmt: skip
    """All steps of R rows, from the last; the grid is tiles of rows."""
    LAYERS: tl.constexpr = C.LAYERS
    row = (tl.program_id(0) * C.R + tl.arange(0, C.R)).to(tl.int64)
    real = row < B
    length = tl.zeros([C.R], tl.int32) + S
    if lengths is not None:
        length = tl.load(lengths + row, mask=real, other=0).to(tl.int32)
    source = (row, real, length, S)
    for step in range(0, T):
        now = (T - 1 - step) * B + row
        if C.FEEDBACK == 1:
            features_grad(saved, given, grads, carried, mask, now, row, real, C)
            tl.debug_barrier()
            joined_grad(combine, grads, now, real, C)
            tl.debug_barrier()
        if C.FEEDBACK != 2:
            attention_grad(sources, saved, given, grads, carried, now, source, C)
        for layer in tl.static_range(LAYERS - 1, -1, -1):
            cell_grad(sources, saved, grads, carried, between, now, row, real, layer, C)
            tl.debug_barrier()
            seen_grad(matrices, grads, carried, now, row, real, layer, C)
            tl.debug_barrier()
        if C.FEEDBACK == 2:
            context_grad(grads, carried, now, row, real, C)
            tl.debug_barrier()
            attention_grad(sources, saved, given, grads, carried, now, source, C)
            query_grad(sources, grads, carried, now, row, real, C)
            tl.debug_barrier()


@triton.jit
def features_grad(saved, given, grads, carried, mask, now, row, real, C: tl.constexpr):
    """Gradient of the features before tanh: from outside, and from the next step."""
    features, d_features, out, carry = saved[4], given[0], grads[1], carried[0]
    for start in range(0, C.F, C.NB):
        n = start + tl.arange(0, C.NB)
        valid = real[:, None] & (n < C.F)[None, :]
        at = (now * C.F)[:, None] + n[None, :]
        d = tl.load(sight(carry, row, 0, C)[:, None] + n[None, :], mask=valid, other=0.0)
        d += tl.load(d_features + at, mask=valid, other=0.0).to(tl.float32)
        if mask is not None:
            d = d * tl.load(mask + at, mask=valid, other=0.0).to(tl.float32)
        a = tl.load(features + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(out + at, (d * (1.0 - a * a)).to(out.dtype.element_ty), mask=valid)


@triton.jit
def joined_grad(combine, grads, now, real, C: tl.constexpr):
    """Add to the gradients of context and output those through the features."""
    d_features, d_joined = grads[1] + now * C.F, grads[2]
    for start in range(0, C.K + C.Q, C.NB):
        n = start + tl.arange(0, C.NB)
        valid = n < C.K + C.Q
        acc = product(d_features, real, combine, 1, C.K + C.Q, n, valid, C.F, C)
        at = d_joined + (now * (C.K + C.Q))[:, None] + n[None, :]
        mask = real[:, None] & valid[None, :]
        tl.store(at, acc + tl.load(at, mask=mask, other=0.0), mask=mask)


@triton.jit
def attention_grad(sources, saved, given, grads, carried, now, source, C: tl.constexpr):
    """Gradients of the scores, and of what they were multiplied with or added to, [R, A]."""
    keys, alpha, d_weights = sources[0], saved[2], given[1]
    d_joined, d_score, seen_by = grads[2] + now * (C.K + C.Q), grads[3], carried[2]
    row, real, length, S = source
    total = tl.zeros([C.R], tl.float32)
    for start in range(0, S, C.SB):
        s = start + tl.arange(0, C.SB)
        inside = real[:, None] & (s[None, :] < length[:, None])
        d = tl.zeros([C.R, C.SB], tl.float32)
        for first in range(0, C.K, C.AB):
            tile = source_tile(keys, row, s, inside, first, S, C.K, C)
            d += tl.sum(tile * rows_of(d_joined, real, first, C.K, C)[:, None, :], 2)
        if d_weights is not None:
            d += over_source(d_weights, now, s, inside, S).to(tl.float32)
        if sources[4] is not None:
            d += over_source(seen_by, row, s, inside, S)
        total += tl.sum(d * over_source(alpha, now, s, inside, S), 1)
        tl.store(d_score + (now * S)[:, None] + s[None, :], d, mask=inside)
    tl.debug_barrier()
    for start in range(0, S, C.SB):
        s = start + tl.arange(0, C.SB)
        inside = real[:, None] & (s[None, :] < length[:, None])
        d = over_source(d_score, now, s, inside, S) - total[:, None]
        d = d * over_source(alpha, now, s, inside, S)
        exists = real[:, None] & (s[None, :] < S)
        tl.store(d_score + (now * S)[:, None] + s[None, :], d, mask=exists)
    tl.debug_barrier()
    score_grad(sources, saved, grads, carried, now, source, C)
    tl.debug_barrier()


@triton.jit
def score_grad(sources, saved, grads, carried, now, source, C: tl.constexpr):
    """From the gradients of the scores to that of W_q q or q, and of the coverage."""
    _, projected, w_q, energy, w_c = sources
    coverage, d_score, d_query, seen_by = saved[3], grads[3], grads[4], carried[2]
    asks = sight(saved[0], now, C.LAYERS - 1, C) + C.FED[C.LAYERS - 1]
    if C.FEEDBACK != 2:
        asks = saved[1] + now * (C.K + C.Q) + C.K
    if w_q is not None:
        asks = saved[5] + now * C.A
    row, real, length, S = source
    for start in range(0, C.A, C.AB):
        q = rows_of(asks, real, start, C.A, C)[:, None, :]
        d_q = tl.zeros([C.R, C.AB], tl.float32)
        for first in range(0, S, C.SB):
            s = first + tl.arange(0, C.SB)
            inside = real[:, None] & (s[None, :] < length[:, None])
            d = over_source(d_score, now, s, inside, S)
            given = tl.zeros([C.R, C.SB], tl.float32)
            if w_c is not None:
                given = over_source(coverage, now, s, inside, S)
            tile = covered(projected, w_c, given, row, s, inside, start, S, C)
            if energy is not None:
                hidden = tanh(tile + q)
                slope = vector(energy, start, C.A, C)[None, None, :] * (1.0 - hidden * hidden)
                by_hidden = d[:, :, None] * slope
                d_q += tl.sum(by_hidden, 1)
            else:
                by_hidden = d[:, :, None] * q
                d_q += tl.sum(d[:, :, None] * tile, 1)
            if w_c is not None:
                through = tl.sum(by_hidden * vector(w_c, start, C.A, C)[None, None, :], 2)
                at = seen_by + (row * S)[:, None] + s[None, :]
                old = tl.load(at, mask=inside, other=0.0)
                tl.store(at, old + through, mask=inside)
        n = start + tl.arange(0, C.AB)
        at = d_query + (now * C.A)[:, None] + n[None, :]
        mask = real[:, None] & (n < C.A)[None, :]
        tl.store(at, d_q.to(d_query.dtype.element_ty), mask=mask)
        tl.debug_barrier()


@triton.jit
def asked(sources, grads, now, real, unit, valid, C: tl.constexpr):
    """Gradient [R, NB] of units of the state that asked, from that of the query."""
    w_q, d_query = sources[2], grads[4]
    if w_q is not None:
        return product(d_query + now * C.A, real, w_q, 1, C.Q, unit, valid, C.A, C)
    else:
        at = d_query + (now * C.A)[:, None] + unit[None, :]
        return tl.load(at, mask=real[:, None] & valid[None, :], other=0.0).to(tl.float32)


@triton.jit
def cell_grad(
    sources, saved, grads, carried, between, now, row, real, L: tl.constexpr, C: tl.constexpr
):
    """Gradients of layer L's blocks; dc of the step before, for the GRU what h gets directly."""
    seen, cells, blocks = saved[0], saved[6], saved[7]
    out, d_joined, carry, dc_carry = grads[0], grads[2], carried[0], carried[1]
    H: tl.constexpr = C.HIDDEN[L]
    N: tl.constexpr = C.FED[L]
    for start in range(0, H, C.NB):
        unit = start + tl.arange(0, C.NB)
        valid = unit < H
        mask = real[:, None] & valid[None, :]
        own = sight(carry, row, L, C) + N
        dh = tl.load(own[:, None] + unit[None, :], mask=mask, other=0.0)
        if L + 1 < C.LAYERS:
            above = sight(carry, row, L + 1, C)
            through = tl.load(above[:, None] + unit[None, :], mask=mask, other=0.0)
            if len(between) > 0:
                scale = between[L] + (now * H)[:, None] + unit[None, :]
                through *= tl.load(scale, mask=mask, other=0.0).to(tl.float32)
            dh += through
        else:
            above = d_joined + now * (C.K + C.Q) + C.K
            dh += tl.load(above[:, None] + unit[None, :], mask=mask, other=0.0)
            if C.FEEDBACK != 2:
                dh += asked(sources, grads, now, real, unit, valid, C)
        z = blocks[L] + (now * (4 * H))[:, None] + unit[None, :]
        b0 = tl.load(z, mask=mask, other=0.0).to(tl.float32)
        b1 = tl.load(z + H, mask=mask, other=0.0).to(tl.float32)
        b2 = tl.load(z + 2 * H, mask=mask, other=0.0).to(tl.float32)
        b3 = tl.load(z + 3 * H, mask=mask, other=0.0).to(tl.float32)
        direct = dc_carry[L] + (row * H)[:, None] + unit[None, :]
        if C.LSTM:
            old = tl.load(cells[L] + (now * H)[:, None] + unit[None, :], mask=mask, other=0.0)
            squashed = tanh(b1 * old + b0 * b2)
            dc = tl.load(direct, mask=mask, other=0.0)
            dc += dh * b3 * (1.0 - squashed * squashed)
            d0, d1 = dc * b2 * b0 * (1.0 - b0), dc * old * b1 * (1.0 - b1)
            d2, d3 = dc * b0 * (1.0 - b2 * b2), dh * squashed * b3 * (1.0 - b3)
            tl.store(direct, dc * b1, mask=mask)
        else:
            before = sight(seen, now, L, C) + N
            old = tl.load(before[:, None] + unit[None, :], mask=mask, other=0.0).to(tl.float32)
            d2 = dh * (1.0 - b1) * (1.0 - b2 * b2)
            d0, d1 = d2 * b3 * b0 * (1.0 - b0), dh * (old - b2) * b1 * (1.0 - b1)
            d3 = d2 * b0
            tl.store(direct, dh * b1, mask=mask)
        dz = out[L] + (now * (4 * H))[:, None] + unit[None, :]
        blocks_grad = (d0, d1, d2, d3)
        for g in tl.static_range(4):
            tl.store(dz + g * H, blocks_grad[g].to(dz.dtype.element_ty), mask=mask)


@triton.jit
def seen_grad(matrices, grads, carried, now, row, real, L: tl.constexpr, C: tl.constexpr):
    """Gradient of what layer L saw, [fed; h]: of h for the step before."""
    H: tl.constexpr = C.HIDDEN[L]
    N: tl.constexpr = C.FED[L]
    d_gates, carry, direct = grads[0][L] + now * (4 * H), carried[0], carried[1][L]
    for start in range(0, N + H, C.NB):
        n = start + tl.arange(0, C.NB)
        valid = n < N + H
        acc = product(d_gates, real, matrices[L], 1, N + H, n, valid, 4 * H, C)
        mask = real[:, None] & valid[None, :]
        if not C.LSTM:
            place = direct + (row * H)[:, None] + (n - N)[None, :]
            acc += tl.load(place, mask=mask & (n >= N)[None, :], other=0.0)
        tl.store(sight(carry, row, L, C)[:, None] + n[None, :], acc, mask=mask)


@triton.jit
def context_grad(grads, carried, now, row, real, C: tl.constexpr):
    """Add to the gradient of the context that of what was fed to the cell."""
    for start in range(0, C.K, C.NB):
        n = start + tl.arange(0, C.NB)
        mask = real[:, None] & (n < C.K)[None, :]
        at = grads[2] + (now * (C.K + C.Q))[:, None] + n[None, :]
        fed = tl.load(sight(carried[0], row, 0, C)[:, None] + n[None, :], mask=mask, other=0.0)
        tl.store(at, fed + tl.load(at, mask=mask, other=0.0), mask=mask)


@triton.jit
def query_grad(sources, grads, carried, now, row, real, C: tl.constexpr):
    """Add to the gradient of the top layer's h_{t-1} that of its having asked."""
    for start in range(0, C.Q, C.NB):
        unit = start + tl.arange(0, C.NB)
        valid = unit < C.Q
        mask = real[:, None] & valid[None, :]
        at = sight(carried[0], row, C.LAYERS - 1, C) + C.FED[C.LAYERS - 1]
        d = asked(sources, grads, now, real, unit, valid, C)
        old = tl.load(at[:, None] + unit[None, :], mask=mask, other=0.0)
        tl.store(at[:, None] + unit[None, :], d + old, mask=mask)
