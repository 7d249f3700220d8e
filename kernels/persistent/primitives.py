"""What every recurrent kernel is made of: activations, tiles, the group barrier, the product.

A group is one direction of one tile of batch rows. Its hidden units are split into P slices, one
program each. Tiles are [U, R]: U units of this slice by R batch rows, float32. `C` is the
compile-time `Config` of plan.py; `link` carries what the products and exchanges of one step need.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return tl.sigmoid(x)


@triton.jit
def tanh(x):
    """2 sigmoid(2x) - 1: the quotient of exponentials is NaN for large |x|."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def load_blocks(ptr, offsets, mask, COUNT: tl.constexpr, C: tl.constexpr):
    """A tuple of COUNT float32 tiles that lie H elements apart."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (tl.load(ptr + i * C.H + offsets, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def store_blocks(ptr, offsets, tiles, mask, C: tl.constexpr):
    """The inverse of `load_blocks`."""
    for i in tl.static_range(len(tiles)):
        value = tiles[i].to(ptr.dtype.element_ty)
        tl.store(ptr + i * C.H + offsets, value, mask=mask)


@triton.jit
def split_gates(tile, COUNT: tl.constexpr, C: tl.constexpr):
    """[GP * U, R], row u * GP + g being gate g of unit u, to COUNT tiles [U, R]."""
    if COUNT == 1:
        return (tile,)
    elif COUNT == 2:
        pair = tl.permute(tl.reshape(tile, [C.U, 2, C.R]), [0, 2, 1])
        first, second = tl.split(pair)
        return (first, second)
    else:
        quad = tl.permute(tl.reshape(tile, [C.U, 2, 2, C.R]), [0, 3, 1, 2])
        even, odd = tl.split(quad)
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        if COUNT == 3:
            return (first, second, third)
        else:
            return (first, second, third, fourth)


@triton.jit
def dot(a, b, acc, C: tl.constexpr):
    """Return acc + a @ b; the interpreter cannot multiply bfloat16, so it upcasts first."""
    if C.UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=C.PRECISION)


@triton.jit
def group_barrier(sync, index, C: tl.constexpr):
    """Programs of a group wait for each other; `index` counts the barriers of this launch from 0.

    The counter only rises, so that no reset can race: everybody has arrived when it reaches
    P * (index + 1). A release atomic orders only its own thread's stores before Triton 3.8, hence
    the barriers of the program around it. The variants exist to be compared on a card; "none" is
    for launches of single steps, one program after another, and "bounded" reports a hang to
    `failed`.
    """
    counter, failed = sync
    target = C.P * (index + 1)
    if C.BARRIER != "none":
        tl.debug_barrier()
        tl.atomic_add(counter, 1, sem="release", scope="gpu")
        if C.BARRIER == "load":
            seen = _acquire(counter)
            while seen < target:
                seen = _acquire(counter)
        else:
            seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
            if C.BARRIER == "atomic":
                while seen < target:
                    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
            else:
                tries = 0
                while (seen < target) & (tries < C.TRIES):
                    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
                    tries += 1
                if seen < target:
                    tl.atomic_add(failed, 1, sem="relaxed", scope="gpu")
        tl.debug_barrier()


@triton.jit
def _acquire(counter):
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.u32 $0, [$1];",
        "=r,l",
        [counter.to(tl.uint64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def forward_weights(w, slice_, FIRST: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr):
    """This slice's rows of gates FIRST .. FIRST + COUNT, as a tuple of tiles [GP * U, K]."""
    tiles = ()
    if C.RESIDENT:
        CHUNKS: tl.constexpr = C.CHUNKS
        for chunk in tl.static_range(CHUNKS):
            tiles = tiles + (forward_weight(w, slice_, chunk, FIRST, COUNT, C),)
    return tiles


@triton.jit
def forward_weight(w, slice_, chunk, FIRST: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr):
    """One tile [GP * U, K]; row u * GP + g is gate FIRST + g of unit u, or zero."""
    GP: tl.constexpr = 4 if COUNT > 2 else COUNT
    row = tl.arange(0, GP * C.U)
    k = tl.arange(0, C.K) + chunk * C.K
    unit, gate = slice_ * C.U + row // GP, row % GP
    mask = ((unit < C.H) & (gate < COUNT))[:, None] & (k < C.H)[None, :]
    offsets = ((gate + FIRST) * C.H + unit)[:, None] * C.H + k[None, :]
    return tl.load(w + offsets, mask=mask, other=0.0)


@triton.jit
def recur(link, h, PHASE: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr):
    """The recurrent part W h + b of gates FIRST .. FIRST + COUNT, a tuple of tiles [U, R].

    Args:
        link: the step's weights, bias, dropout mask, exchange buffers and barrier.
        h: this slice of the vector to multiply, [U, R].
        PHASE: which of the step's products this is; it is also the index of its barrier.
        FIRST: first gate.
        COUNT: number of gates.
        C: the configuration.
    """
    place, weights, w, bias, keep, buffers, sync, step = link
    slice_, group, groups = place
    GP: tl.constexpr = 4 if COUNT > 2 else COUNT
    acc = tl.zeros([GP * C.U, C.R], tl.float32)
    if len(keep) > 0:
        h = h * keep[0]
    h = h.to(w.dtype.element_ty)
    if C.P == 1:
        acc = dot(weights[PHASE][0], h, acc, C)
    else:
        PITCH: tl.constexpr = C.P * C.U
        slot = (PHASE * 2 + step % 2) * groups + group
        base = buffers[0] + slot.to(tl.int64) * (C.R * PITCH)
        rows = tl.arange(0, C.R)[None, :] * PITCH
        tl.store(base + rows + (tl.arange(0, C.U) + slice_ * C.U)[:, None], h)
        group_barrier(sync, step * C.EXCHANGES + PHASE, C)
        k = tl.arange(0, C.K)[:, None]
        if C.RESIDENT:
            CHUNKS: tl.constexpr = C.CHUNKS
            for i in tl.static_range(CHUNKS):
                peers = _peers(base + rows, k + i * C.K, C)
                acc = dot(weights[PHASE][i], peers, acc, C)
        else:
            for i in range(0, C.CHUNKS):
                tile = forward_weight(w, slice_, i, FIRST, COUNT, C)
                acc = dot(tile, _peers(base + rows, k + i * C.K, C), acc, C)
    gates = split_gates(acc, COUNT, C)
    if len(bias) > 0:
        shifted = ()
        for i in tl.static_range(COUNT):
            shifted = shifted + (gates[i] + bias[FIRST + i],)
        return shifted
    else:
        return gates


@triton.jit
def _peers(base, k, C: tl.constexpr):
    """What the group's programs have written, past the L1 cache, which is not coherent."""
    if C.CHUNKS * C.K == C.P * C.U:
        return tl.load(base + k, cache_modifier=".cg")
    else:
        return tl.load(base + k, mask=k < C.P * C.U, other=0.0, cache_modifier=".cg")


@triton.jit
def backward_weights(w, slice_, C: tl.constexpr):
    """This slice's columns of every gate, transposed: a tuple of G * CHUNKS tiles [U, K]."""
    tiles = ()
    if C.RESIDENT:
        G: tl.constexpr = C.G
        CHUNKS: tl.constexpr = C.CHUNKS
        for gate in tl.static_range(G):
            for chunk in tl.static_range(CHUNKS):
                tiles = tiles + (backward_weight(w, slice_, gate, chunk, C),)
    return tiles


@triton.jit
def backward_weight(w, slice_, gate, chunk, C: tl.constexpr):
    """One tile [U, K] of the transposed recurrent matrix: unit u of row k of `gate`."""
    unit = (tl.arange(0, C.U) + slice_ * C.U)[:, None]
    k = (tl.arange(0, C.K) + chunk * C.K)[None, :]
    return tl.load(w + (k + gate * C.H) * C.H + unit, mask=(unit < C.H) & (k < C.H), other=0.0)


@triton.jit
def recur_grad(link, grads, EXCHANGE: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr):
    """Store the gradients of `recur`'s output, gates FIRST .., and return that of its argument.

    The gradients go to a buffer indexed by time, where the weight gradient needs them anyway; the
    programs of the group read each other's from there.
    """
    place, weights, w, keep, base, offsets, mask, rows, _, sync, step = link
    slice_ = place[0]
    COUNT: tl.constexpr = len(grads)
    acc = tl.zeros([C.U, C.R], tl.float32)
    store_blocks(base + FIRST * C.H, offsets, grads, mask, C)
    if C.P == 1:
        for i in tl.static_range(COUNT):
            acc = dot(weights[FIRST + i], grads[i].to(w.dtype.element_ty), acc, C)
    else:
        group_barrier(sync, step * C.EXCHANGES + EXCHANGE, C)
        if C.RESIDENT:
            CHUNKS: tl.constexpr = C.CHUNKS
            for gate in tl.static_range(COUNT):
                for chunk in tl.static_range(CHUNKS):
                    others = _grads(base + (FIRST + gate) * C.H, rows, chunk, C)
                    acc = dot(weights[(FIRST + gate) * CHUNKS + chunk], others, acc, C)
        else:
            for gate in range(FIRST, FIRST + COUNT):
                for chunk in range(0, C.CHUNKS):
                    others = _grads(base + gate * C.H, rows, chunk, C)
                    acc = dot(backward_weight(w, slice_, gate, chunk, C), others, acc, C)
    if len(keep) > 0:
        acc = acc * keep[0]
    return acc


@triton.jit
def _grads(base, rows, chunk, C: tl.constexpr):
    """A tile [K, R] of one gate's gradients, of all slices."""
    offsets, real = rows
    k = tl.arange(0, C.K)[:, None] + chunk * C.K
    mask = real & (k < C.H)
    return tl.load(base + offsets + k, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def share(place, buffers, sync, step, pair, EXCHANGE: tl.constexpr, C: tl.constexpr):
    """Give every program of a group the pairs of vectors [R] of all of them: two [PP, R]."""
    slice_, group, groups = place
    p, r = tl.arange(0, C.PP)[:, None], tl.arange(0, C.R)
    slot = (EXCHANGE * 2 + step % 2) * groups + group
    base = buffers[1] + slot.to(tl.int64) * (C.P * 2 * C.R)
    tl.store(base + slice_ * 2 * C.R + r, pair[0])
    tl.store(base + slice_ * 2 * C.R + C.R + r, pair[1])
    group_barrier(sync, step * C.EXCHANGES + EXCHANGE, C)
    source = base + p * (2 * C.R) + r[None, :]
    first = tl.load(source, mask=p < C.P, other=0.0, cache_modifier=".cg")
    second = tl.load(source + C.R, mask=p < C.P, other=0.0, cache_modifier=".cg")
    return first, second


@triton.jit
def moments(place, buffers, sync, step, tiles, EXCHANGE: tl.constexpr, C: tl.constexpr):
    """Mean and reciprocal standard deviation [1, R] over all units and all `tiles`.

    Each program's mean and sum of squared deviations are combined as in Chan et al. 1979: a plain
    sum of squares would cancel.
    """
    COUNT: tl.constexpr = len(tiles)
    valid = (place[0] * C.U + tl.arange(0, C.U))[:, None] < C.H
    n = COUNT * tl.minimum(-(place[0] * C.U) + C.H, C.U).to(tl.float32)
    total = tl.zeros([C.R], tl.float32)
    for i in tl.static_range(COUNT):
        total += tl.sum(tl.where(valid, tiles[i], 0.0), 0)
    mean = total / n
    spread = tl.zeros([C.R], tl.float32)
    for i in tl.static_range(COUNT):
        deviation = tl.where(valid, tiles[i] - mean[None, :], 0.0)
        spread += tl.sum(deviation * deviation, 0)
    if C.P > 1:
        means, spreads = share(place, buffers, sync, step, (mean, spread), EXCHANGE, C)
        p = tl.arange(0, C.PP)[:, None]
        counts = COUNT * tl.maximum(tl.minimum(-(p * C.U) + C.H, C.U), 0).to(tl.float32)
        mean = tl.sum(counts * means, 0) / (COUNT * C.H)
        shift = means - mean[None, :]
        spread = tl.sum(spreads, 0) + tl.sum(counts * shift * shift, 0)
    return mean[None, :], tl.rsqrt(spread / (COUNT * C.H) + C.EPS)[None, :]


@triton.jit
def normalised_grad(
    place, buffers, sync, step, grads, normed, rstd, EXCHANGE: tl.constexpr, C: tl.constexpr
):
    """Gradient of the inputs of a normalisation, from those of its outputs: tuples of tiles [U, R].

    d = rstd * (g - mean(g) - normed * mean(g * normed)), means over all units and all tiles.
    """
    COUNT: tl.constexpr = len(grads)
    plain = tl.zeros([C.R], tl.float32)
    along = tl.zeros([C.R], tl.float32)
    for i in tl.static_range(COUNT):
        plain += tl.sum(grads[i], 0)
        along += tl.sum(grads[i] * normed[i], 0)
    if C.P > 1:
        plains, alongs = share(place, buffers, sync, step, (plain, along), EXCHANGE, C)
        plain, along = tl.sum(plains, 0), tl.sum(alongs, 0)
    plain, along = plain[None, :] / (COUNT * C.H), along[None, :] / (COUNT * C.H)
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (rstd * (grads[i] - plain - normed[i] * along),)
    return out


@triton.jit
def kept(seed, counter, row, unit, stream, threshold):
    """Philox masks of kernels/philox.py: two tiles, True where the bits reach `threshold`."""
    first, second, _, _ = tl.philox(seed, counter, row, unit, stream)
    return first.to(tl.int64) >= threshold, second.to(tl.int64) >= threshold
