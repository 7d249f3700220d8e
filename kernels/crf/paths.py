"""The best paths of a CRF, a program for each sentence: Viterbi's recursion with n paths a tag."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import launch_options, padded
from .sums import finite_max, load_matrix, load_vector


@triton.jit
def extend(scores, matrix, tag, N: tl.constexpr, NP: tl.constexpr):
    """The N best ways to go on from N sorted paths of each tag.

    Args:
        scores: [KP, NP], descending along the paths.
        matrix: [KP, M], of going from a tag to each of M others.
        tag: 0 .. KP - 1.
        N: paths.
        NP: the power of two that they are padded to.

    Returns:
        Scores [M, NP], and where each comes from, tag * NP + path.
    """
    M: tl.constexpr = matrix.shape[1]
    column = tl.arange(0, NP)[None, :]
    best = tl.full([M, NP], float("-inf"), tl.float32)
    origin = tl.zeros([M, NP], tl.int32)
    taken = tl.zeros(matrix.shape, tl.int32)
    for n in range(N):
        head = scores
        if NP > 1:
            head = tl.gather(scores, tl.minimum(taken, NP - 1), 1)
        heads = tl.where(taken < N, head + matrix, float("-inf"))
        score, source = tl.max(heads, 0, return_indices=True)
        chosen = tag[:, None] == source[None, :]
        path = tl.sum(tl.where(chosen, taken, 0), 0)
        best = tl.where(column == n, score[:, None], best)
        origin = tl.where(column == n, (source * NP + path)[:, None], origin)
        taken += chosen.to(tl.int32)
    return best, origin


@triton.jit(do_not_specialize=("T",))
def crf_decode(
    emissions, start, transitions, end, lengths, origins, paths, values,
    T, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Paths [B, N, T], filled in as far as there are any, and their scores [B, N]."""
    row = tl.program_id(0).to(tl.int64)
    tag, path = tl.arange(0, KP), tl.arange(0, NP)
    place = tag[:, None] * NP + path[None, :]
    length = tl.minimum(tl.load(lengths + row), T).to(tl.int32)
    emissions += row * T * K
    origins += row * T * (KP * NP)
    matrix = load_matrix(transitions, tag[:, None], tag[None, :], K)
    scores = load_vector(start, tag, K) + load_vector(emissions, tag, K)
    scores = tl.where(path[None, :] == 0, scores[:, None], float("-inf"))
    total = tl.zeros([], tl.float64)
    for t in range(1, length):
        scores, origin = extend(scores, matrix, tag, N, NP)
        tl.store(origins + t * (KP * NP) + place, origin.to(tl.int16))
        scores += load_vector(emissions + t * K, tag, K)[:, None]
        best = finite_max(tl.max(scores, 1), 0)
        scores -= best
        total += best
    scores, origin = extend(scores, load_vector(end, tag, K)[:, None], tag, N, NP)
    value, at = tl.reshape(scores, [NP]), tl.reshape(origin, [NP])
    tl.store(values + row * N + path, (value + total).to(tl.float32), mask=path < N)
    tl.debug_barrier()  # other threads stored the origins
    real = (path < N) & (value > float("-inf"))
    paths += (row * N + path) * T
    for step in range(length):
        t = length - 1 - step
        tl.store(paths + t, (at // NP).to(tl.int64), mask=real)
        at = tl.load(origins + t * (KP * NP) + at, mask=real & (t > 0), other=0).to(tl.int32)


def decode(
    emissions: Tensor,
    start: Tensor,
    transitions: Tensor,
    end: Tensor,
    lengths: Tensor,
    n: int,
) -> tuple[Tensor, Tensor]:
    """Launch `crf_decode`.

    Args:
        emissions: as for `sums.forward`, and so all but the last.
        start: as there.
        transitions: as there.
        end: as there.
        lengths: as there.
        n: paths of each row.

    Returns:
        Paths [B, n, T] int64, best first, -1 past the end and where a row has fewer than n; their
        scores [B, n] float32, -inf there.
    """
    batch, steps, num_tags = emissions.shape
    size, count = padded(num_tags), padded(n, 1)
    origins = emissions.new_empty(batch * steps * size * count, dtype=torch.int16)
    paths = lengths.new_full((batch, n, steps), -1)
    values = emissions.new_empty(batch, n, dtype=torch.float32)
    with torch.cuda.device_of(emissions):
        crf_decode[(batch,)](
            emissions, start, transitions, end, lengths, origins, paths, values,
            steps, n, count, num_tags, size, **launch_options(size),
        )  # fmt: skip
    return paths, values
