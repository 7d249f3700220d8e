"""A linear-chain CRF as functions of tensors: sums over all paths, and the best of them.

Dimensions: B sentences, T words, K tags. Emissions are [B, T, K]; scores start [K], transitions
[K, K] (from row to column) and end [K], -inf where a tag or a step is forbidden.

Needs torch; the Triton backend, imported when first used, needs triton.
"""

from .api import PADDING, log_likelihood, log_partition, marginals, n_best, span_marginals

__all__ = [
    "PADDING",
    "log_likelihood",
    "log_partition",
    "marginals",
    "n_best",
    "span_marginals",
]
