"""Scheduled sampling inside the decoder's forward loop: draw symbols, and feed them.

Inverse transform, as `spec.Sampling` has it, in two stages, so that no [B, V] logits are kept: one
pass over tiles of VB symbols leaves the logarithm of each tile's sum, then the tile that a row's
uniform number falls into is computed again. A step in which any row of a program draws streams V F
output weights from the L2 cache once, and those of the tiles drawn from again: with V = 50,000 and
F = 512 that is 51 MB in bfloat16, about what an H100's L2 cache holds, and many times the weights
of the cell. Steps without a draw cost one load.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import product


@triton.jit
def resample(words, gates, fed, now, t, row, real, C: tl.constexpr):
    """Replace symbols, and the input part of the lowest layer's gates, by draws.

    Args:
        words: what `launch.Words` holds, the symbols to write, sums [B, tiles], inputs [B, E].
        gates: of the lowest layer.
        fed: pointers [R] to the features of the step before.
        now: places of the rows in [T, B].
        t: the step; the first draws nothing.
        row: places of the rows in [B].
        real: bool [R].
        C: the configuration.
    """
    replaced = words[0]
    wanted = tl.load(replaced + now, mask=real & (t > 0), other=0) != 0
    if tl.max(wanted.to(tl.int32), 0) > 0:
        tile, fraction = draw_tile(words, fed, now, row, wanted, C)
        symbol = draw_symbol(words, fed, tile, fraction, wanted, C)
        feed_symbol(words, gates, symbol, now, row, wanted, C)
        tl.debug_barrier()


@triton.jit
def logits(words, fed, tile, wanted, C: tl.constexpr):
    """Logits [R, VB] of a tile of symbols, minus infinity past the last."""
    weight, bias = words[3], words[4]
    n = tile * C.VB + tl.arange(0, C.VB)
    valid = n < C.V
    found = product(fed, wanted, weight, C.F, 1, n, valid, C.F, C)
    if bias is not None:
        found += tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)[None, :]
    return tl.where(valid[None, :], found, -float("inf"))


@triton.jit
def draw_tile(words, fed, now, row, wanted, C: tl.constexpr):
    """Which tile of symbols each row draws from, and where in it, in [0, 1)."""
    uniform, sums = words[1], words[9]
    TILES: tl.constexpr = (C.V + C.VB - 1) // C.VB
    at = sums + row * TILES
    peak = tl.zeros([C.R], tl.float32) - float("inf")
    for tile in range(0, TILES):
        e = logits(words, fed, tile, wanted, C)
        top = tl.maximum(tl.max(e, 1), -1e30)  # finite, should no symbol of the tile be possible
        top += tl.log(tl.sum(tl.exp(e - top[:, None]), 1))
        tl.store(at + tile, top, mask=wanted)
        peak = tl.maximum(peak, top)
    tl.debug_barrier()
    total = tl.zeros([C.R], tl.float32)
    for tile in range(0, TILES):
        total += tl.exp(tl.load(at + tile, mask=wanted, other=0.0) - peak)
    place = total * tl.load(uniform + now, mask=wanted, other=0.0)
    chosen = tl.zeros([C.R], tl.int32)
    before = tl.zeros([C.R], tl.float32)
    low = tl.zeros([C.R], tl.float32)
    width = tl.zeros([C.R], tl.float32) + 1.0
    for tile in range(0, TILES):
        size = tl.exp(tl.load(at + tile, mask=wanted, other=0.0) - peak)
        reached = before <= place
        chosen = tl.where(reached, tile, chosen)
        low = tl.where(reached, before, low)
        width = tl.where(reached, size, width)
        before += size
    return chosen, (place - low) / width


@triton.jit
def draw_symbol(words, fed, tile, fraction, wanted, C: tl.constexpr):
    """The symbols [R]; each tile that any row draws from is computed once."""
    TILES: tl.constexpr = (C.V + C.VB - 1) // C.VB
    symbol = tl.zeros([C.R], tl.int32)
    left = tl.where(wanted, tile, TILES)
    now = tl.min(left, 0)
    while now < TILES:
        e = logits(words, fed, now, wanted, C)
        p = tl.exp(e - tl.max(e, 1)[:, None])
        under = tl.cumsum(p, 1) <= (fraction * tl.sum(p, 1))[:, None]
        found = tl.minimum(now * C.VB + tl.sum(under.to(tl.int32), 1), C.V - 1)
        symbol = tl.where(left == now, found, symbol)
        left = tl.where(left == now, TILES, left)
        now = tl.min(left, 0)
    return symbol


@triton.jit
def feed_symbol(words, gates, symbol, now, row, wanted, C: tl.constexpr):
    """Store the symbols, and the gates that their inputs reach."""
    embedding, keep, lowest, shift, symbols, inputs = (
        words[2], words[5], words[6], words[7], words[8], words[10],
    )  # fmt: skip
    tl.store(symbols + now, symbol.to(tl.int64), mask=wanted)
    source = embedding + symbol.to(tl.int64) * C.E
    target = inputs + row * C.E
    for start in range(0, C.E, C.NB):
        e = start + tl.arange(0, C.NB)
        mask = wanted[:, None] & (e < C.E)[None, :]
        x = tl.load(source[:, None] + e[None, :], mask=mask, other=0.0)
        if keep is not None:
            scale = tl.load(keep + (now * C.E)[:, None] + e[None, :], mask=mask, other=0.0)
            x = (x.to(tl.float32) * scale.to(tl.float32)).to(x.dtype)
        tl.store(target[:, None] + e[None, :], x, mask=mask)
    tl.debug_barrier()
    G: tl.constexpr = 4 * C.HIDDEN[0]
    for start in range(0, G, C.NB):
        n = start + tl.arange(0, C.NB)
        valid = n < G
        z = product(target, wanted, lowest, C.E, 1, n, valid, C.E, C)
        z += tl.load(shift + n, mask=valid, other=0.0).to(tl.float32)[None, :]
        at = gates + (now * G)[:, None] + n[None, :]
        tl.store(at, z.to(at.dtype.element_ty), mask=wanted[:, None] & valid[None, :])
