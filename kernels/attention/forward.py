"""The decoder's forward time loop as one Triton kernel: a program per tile of batch rows.

States stay with their program for all steps: nothing is launched and nobody is waited for between
them. What bounds it: every program streams all weights of the loop, 4H (N + H) of each layer and
F (K + Q) numbers, from the L2 cache at every step through one multiprocessor's port, and only B / R
multiprocessors work. Sharing a tile among several programs, as kernels/persistent does, would
divide that by their number at the price of three or four barriers a step. No GPU has run it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..persistent.primitives import sigmoid, tanh
from .sampling import resample
from .tiles import over_source, product, score, sight, source_tile


@triton.jit(do_not_specialize=("T", "B", "S"))
def forward_kernel(
    gates, matrices, sources, combine, buffers, between, mask, lengths, words, T, B, S,
    C: tl.constexpr,
):  # fmt: skip
    """All steps of R rows; the grid is tiles of rows."""
    seen, cells, joined, _, _, _, features = buffers
    LAYERS: tl.constexpr = C.LAYERS
    row = (tl.program_id(0) * C.R + tl.arange(0, C.R)).to(tl.int64)
    real = row < B
    length = tl.zeros([C.R], tl.int32) + S
    if lengths is not None:
        length = tl.load(lengths + row, mask=real, other=0).to(tl.int32)
    for t in range(0, T):
        now = t * B + row
        if C.V > 0:
            fed = features + (now - B) * C.F
            if C.FEEDBACK == 1:
                fed = sight(seen, now, 0, C)
            resample(words, gates[0], fed, now, t, row, real, C)
        if C.FEEDBACK == 2:
            h = sight(seen, now, LAYERS - 1, C) + C.FED[LAYERS - 1]
            attend(sources, buffers, h, now, B, row, real, length, S, C)
        for layer in tl.static_range(LAYERS):
            cell(gates, matrices, seen, cells, joined, between, now, B, real, layer, C)
            tl.debug_barrier()
        if C.FEEDBACK != 2:
            h = sight(seen, now + B, LAYERS - 1, C) + C.FED[LAYERS - 1]
            attend(sources, buffers, h, now, B, row, real, length, S, C)
        if C.FEEDBACK == 1 or C.V > 0:
            combine_features(combine, joined, features, seen, mask, now, B, real, C)
            tl.debug_barrier()


@triton.jit
def cell(
    gates, matrices, seen, cells, joined, between, now, B, real, L: tl.constexpr, C: tl.constexpr
):
    """Activate layer L's blocks in place of their input part; store its state where it is read."""
    H: tl.constexpr = C.HIDDEN[L]
    N: tl.constexpr = C.FED[L]
    before = sight(seen, now, L, C)
    for start in range(0, H, C.NB):
        unit = start + tl.arange(0, C.NB)
        valid = unit < H
        mask = real[:, None] & valid[None, :]
        at = gates[L] + (now * (4 * H))[:, None] + unit[None, :]
        blocks = ()
        for g in tl.static_range(4):
            n = unit + g * H
            acc = product(before, real, matrices[L], N + H, 1, n, valid, N + H, C)
            blocks = blocks + (acc + tl.load(at + g * H, mask=mask, other=0.0).to(tl.float32),)
        if C.LSTM:
            i, f = sigmoid(blocks[0]), sigmoid(blocks[1])
            g, o = tanh(blocks[2]), sigmoid(blocks[3])
            c = f * tl.load(cells[L] + (now * H)[:, None] + unit[None, :], mask=mask, other=0.0)
            c += i * g
            tl.store(cells[L] + ((now + B) * H)[:, None] + unit[None, :], c, mask=mask)
            h = o * tanh(c)
            blocks = (i, f, g, o)
        else:
            r, z = sigmoid(blocks[0]), sigmoid(blocks[1])
            n = tanh(blocks[2] + r * blocks[3])
            old = before[:, None] + N + unit[None, :]
            h = (1.0 - z) * n + z * tl.load(old, mask=mask, other=0.0).to(tl.float32)
            blocks = (r, z, n, blocks[3])
        for g in tl.static_range(4):
            tl.store(at + g * H, blocks[g].to(at.dtype.element_ty), mask=mask)
        h = h.to(joined.dtype.element_ty)
        kept = sight(seen, now + B, L, C) + N
        tl.store(kept[:, None] + unit[None, :], h, mask=mask)
        reader = joined + now * (C.K + C.Q) + C.K
        if L + 1 < C.LAYERS:
            reader = sight(seen, now, L + 1, C)
            if len(between) > 0:
                scale = between[L] + (now * H)[:, None] + unit[None, :]
                h = h.to(tl.float32) * tl.load(scale, mask=mask, other=0.0).to(tl.float32)
                h = h.to(joined.dtype.element_ty)
        tl.store(reader[:, None] + unit[None, :], h, mask=mask)


@triton.jit
def attend(sources, buffers, h, now, B, row, real, length, S, C: tl.constexpr):
    """Attention of the states at the pointers h [R]; its last act is a barrier."""
    keys, projected, w_q, energy, w_c = sources
    seen, _, joined, alpha, coverage, query, _ = buffers
    asks = h
    if w_q is not None:
        for start in range(0, C.A, C.NB):
            n = start + tl.arange(0, C.NB)
            q = product(h, real, w_q, C.Q, 1, n, n < C.A, C.Q, C)
            at = query + (now * C.A)[:, None] + n[None, :]
            tl.store(at, q.to(query.dtype.element_ty), mask=real[:, None] & (n < C.A)[None, :])
        tl.debug_barrier()
        asks = query + now * C.A
    top = tl.zeros([C.R], tl.float32) - float("inf")
    for start in range(0, S, C.SB):
        s = start + tl.arange(0, C.SB)
        inside = real[:, None] & (s[None, :] < length[:, None])
        given = tl.zeros([C.R, C.SB], tl.float32)
        if w_c is not None:
            given = over_source(coverage, now, s, inside, S)
        e = score(projected, w_c, energy, asks, given, row, real, s, inside, S, C)
        tl.store(alpha + (now * S)[:, None] + s[None, :], e, mask=inside)
        top = tl.maximum(top, tl.max(tl.where(inside, e, -float("inf")), 1))
    top = tl.where(real, top, 0.0)
    tl.debug_barrier()
    total = tl.zeros([C.R], tl.float32)
    for start in range(0, S, C.SB):
        s = start + tl.arange(0, C.SB)
        inside = real[:, None] & (s[None, :] < length[:, None])
        e = tl.exp(over_source(alpha, now, s, inside, S) - top[:, None])
        total += tl.sum(tl.where(inside, e, 0.0), 1)
    total = tl.where(real, total, 1.0)
    tl.debug_barrier()
    for start in range(0, S, C.SB):
        s = start + tl.arange(0, C.SB)
        exists = real[:, None] & (s[None, :] < S)
        inside = exists & (s[None, :] < length[:, None])
        e = tl.exp(over_source(alpha, now, s, inside, S) - top[:, None])
        w = tl.where(inside, e / total[:, None], 0.0)
        tl.store(alpha + (now * S)[:, None] + s[None, :], w, mask=exists)
        if w_c is not None:
            old = over_source(coverage, now, s, exists, S)
            tl.store(coverage + ((now + B) * S)[:, None] + s[None, :], old + w, mask=exists)
    tl.debug_barrier()
    for start in range(0, C.K, C.AB):
        k = start + tl.arange(0, C.AB)
        context = tl.zeros([C.R, C.AB], tl.float32)
        for first in range(0, S, C.SB):
            s = first + tl.arange(0, C.SB)
            inside = real[:, None] & (s[None, :] < length[:, None])
            w = over_source(alpha, now, s, inside, S)
            context += tl.sum(
                w[:, :, None] * source_tile(keys, row, s, inside, start, S, C.K, C), 1
            )
        mask = real[:, None] & (k < C.K)[None, :]
        context = context.to(joined.dtype.element_ty)
        tl.store(joined + (now * (C.K + C.Q))[:, None] + k[None, :], context, mask=mask)
        if C.FEEDBACK == 2:
            fed = sight(seen, now, 0, C)[:, None] + k[None, :]
            tl.store(fed, context, mask=mask)
    tl.debug_barrier()


@triton.jit
def combine_features(combine, joined, features, seen, mask, now, B, real, C: tl.constexpr):
    """Store tanh(W [context; output]), and after dropout where the next step reads it."""
    x = joined + now * (C.K + C.Q)
    for start in range(0, C.F, C.NB):
        n = start + tl.arange(0, C.NB)
        valid = real[:, None] & (n < C.F)[None, :]
        acc = product(x, real, combine, C.K + C.Q, 1, n, n < C.F, C.K + C.Q, C)
        acc = tanh(acc)
        at = (now * C.F)[:, None] + n[None, :]
        reader = features + at
        if C.FEEDBACK == 1:
            tl.store(reader, acc.to(joined.dtype.element_ty), mask=valid)
            reader = sight(seen, now + B, 0, C)[:, None] + n[None, :]
        if mask is not None:
            acc = acc * tl.load(mask + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(reader, acc.to(joined.dtype.element_ty), mask=valid)
