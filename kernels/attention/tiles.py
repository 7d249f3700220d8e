"""What the decoder's two kernels are made of: products of rows with weights, and attention tiles.

A program owns R batch rows. Tiles of vectors are [R, N], those over the source [R, SB, N]; what one
phase of a step leaves for the next goes through memory, with a barrier of the program between.
`C` is the compile-time `Config` of launch.py.
"""

import triton
import triton.language as tl

from ..persistent.primitives import dot, tanh


@triton.jit
def product(x, real, w, n_stride, k_stride, n, valid, SIZE: tl.constexpr, C: tl.constexpr):
    """Sum over k < SIZE of x[row, k] w[n, k], [R, N] in float32; weights come from the L2 cache.

    Args:
        x: pointers to the rows' first elements, [R].
        real: bool [R].
        w: pointer to the weights.
        n_stride: distance of neighbouring n in w.
        k_stride: distance of neighbouring k in w.
        n: int [N].
        valid: bool [N].
        SIZE: of the contraction.
        C: the configuration.
    """
    acc = tl.zeros([C.R, n.shape[0]], tl.float32)
    for start in range(0, SIZE, C.KB):
        k = start + tl.arange(0, C.KB)
        a = tl.load(x[:, None] + k[None, :], mask=real[:, None] & (k < SIZE)[None, :], other=0.0)
        b = tl.load(
            w + n[None, :] * n_stride + k[:, None] * k_stride,
            mask=valid[None, :] & (k < SIZE)[:, None],
            other=0.0,
        )
        acc = dot(a.to(w.dtype.element_ty), b, acc, C)
    return acc


@triton.jit
def sight(seen, now, L: tl.constexpr, C: tl.constexpr):
    """Pointers [R] to what layer L sees at the step `now`: first what it is fed, then its h."""
    return seen[L] + now * (C.FED[L] + C.HIDDEN[L])


@triton.jit
def source_tile(x, row, s, inside, start, S, SIZE: tl.constexpr, C: tl.constexpr):
    """[R, SB, NB] of x [B, S, SIZE] from element `start`, in float32; zero outside."""
    n = start + tl.arange(0, C.AB)
    offsets = (row[:, None] * S + s[None, :])[:, :, None] * SIZE + n[None, None, :]
    mask = inside[:, :, None] & (n < SIZE)[None, None, :]
    return tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def vector(x, start, SIZE: tl.constexpr, C: tl.constexpr):
    """Elements start .. of a vector [SIZE], in float32; zero outside."""
    n = start + tl.arange(0, C.AB)
    return tl.load(x + n, mask=n < SIZE, other=0.0).to(tl.float32)


@triton.jit
def rows_of(x, real, start, SIZE: tl.constexpr, C: tl.constexpr):
    """[R, AB] of rows at the pointers x [R], in float32; zero outside."""
    n = start + tl.arange(0, C.AB)
    mask = real[:, None] & (n < SIZE)[None, :]
    return tl.load(x[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def covered(projected, w_c, seen, row, s, inside, start, S, C: tl.constexpr):
    """Projected keys [R, SB, AB] with the coverage `seen` [R, SB], if there is one."""
    tile = source_tile(projected, row, s, inside, start, S, C.A, C)
    if w_c is not None:
        tile += seen[:, :, None] * vector(w_c, start, C.A, C)[None, None, :]
    return tile


@triton.jit
def over_source(x, row, s, inside, S):
    """[R, SB] of x [B, S]; zero outside."""
    return tl.load(x + row[:, None] * S + s[None, :], mask=inside, other=0.0)


@triton.jit
def score(projected, w_c, energy, query, seen, row, real, s, inside, S, C: tl.constexpr):
    """Scores [R, SB] of the queries at the pointers `query` [R]."""
    total = tl.zeros([C.R, C.SB], tl.float32)
    for start in range(0, C.A, C.AB):
        tile = covered(projected, w_c, seen, row, s, inside, start, S, C)
        q = rows_of(query, real, start, C.A, C)[:, None, :]
        if energy is not None:
            v = vector(energy, start, C.A, C)[None, None, :]
            total += tl.sum(v * tanh(tile + q), 2)
        else:
            total += tl.sum(tile * q, 2)
    return total
