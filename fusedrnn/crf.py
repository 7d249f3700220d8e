"""Linear-chain conditional random field (Lafferty et al. 2001) with tag-scheme constraints."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels import crf
from kernels.crf import PADDING
from kernels.crf.api import check_backend

__all__ = ["CRF", "PADDING", "PREFIXES", "allowed_transitions", "split_tag"]

PREFIXES = {"BIO": "BI", "IOB1": "BI", "BIOES": "BIES"}
"""The prefixes of each tag scheme beside `O`."""


def split_tag(tag: str, scheme: str) -> tuple[str, str]:
    """Split a tag such as `B-PER` into its prefix and its entity type.

    Args:
        tag: the tag; everything after the first hyphen is the type.
        scheme: "BIO", "IOB1" or "BIOES".

    Returns:
        (prefix, type); ("O", "") for `O`.

    Raises:
        ValueError: the tag does not belong to the scheme.
    """
    if tag == "O":
        return "O", ""
    prefix, _, kind = tag.partition("-")
    if kind and len(prefix) == 1 and prefix in PREFIXES[scheme]:
        return prefix, kind
    expected = ", ".join(f"{letter}-TYPE" for letter in PREFIXES[scheme])
    raise ValueError(f"tag {tag!r} is outside the scheme {scheme}: expected O, {expected}")


def _follows(before: tuple[str, str], after: tuple[str, str], scheme: str) -> bool:
    """Whether `after` may follow `before`; ("O", "") stands for both ends of a sentence."""
    (left, left_type), (right, right_type) = before, after
    same = left_type == right_type
    if scheme == "BIO":
        return right != "I" or (left in "BI" and same)
    if scheme == "IOB1":
        return right != "B" or (left in "BI" and same)
    if left in "BI":
        return right in "IE" and same
    return right in "OBS"


def allowed_transitions(tags: Sequence[str], scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """Say which tags may open a sentence, follow one another, and close a sentence.

    Args:
        tags: the K tag names.
        scheme: "BIO", "IOB1" or "BIOES".

    Returns:
        start [K], transitions [K, K] (from, to) and end [K], all bool.
    """
    pairs = [split_tag(tag, scheme) for tag in tags]
    outside = ("O", "")
    start = torch.tensor([_follows(outside, pair, scheme) for pair in pairs])
    end = torch.tensor([_follows(pair, outside, scheme) for pair in pairs])
    between = torch.tensor([[_follows(a, b, scheme) for b in pairs] for a in pairs])
    return start, between, end


def _continued(tags: Sequence[str], scheme: str | None, num_tags: int) -> Tensor:
    """For each tag the one by which an entity that could end there goes on, -1 for none."""
    found = torch.full((num_tags,), -1)
    if scheme in ("BIO", "IOB1"):  # of BIOES the last tag says that it is the last
        for place, tag in enumerate(tags):
            onward = f"I-{split_tag(tag, scheme)[1]}"
            if onward in tags:
                found[place] = tags.index(onward)
    return found


class CRF(nn.Module):
    """Linear-chain CRF over tag emissions, with start, end and pairwise transition scores.

    log p(y | x) = start[y_0] + sum_t emissions[t, y_t] + sum_t transitions[y_{t-1}, y_t] + end[y_n]
    - log Z(x). With a scheme, the paths it forbids have probability zero: they are left out of Z as
    well as of decoding. All work is in float32 on a GPU and in float64 on a CPU, whatever the dtype
    of the emissions, under autocast too. Where the scheme allows no path at all (for one word, if
    neither `O` nor an `S-` of BIOES is among `tags`), log Z is -inf, the best path -1 throughout,
    and probabilities mean nothing.

    Attributes:
        start, end: [K] parameters.
        transitions: [K, K] parameter, from row to column.

    Args:
        num_tags: the number of tags K.
        tags: the K tag names; needed with a scheme.
        scheme: "BIO", "IOB1", "BIOES", or None for no constraint.
        backend: "auto" (triton on a GPU for up to 64 tags, else torch), "triton" or "torch". An
            explicit choice never falls back.

    Raises:
        ValueError: `num_tags` < 1, `tags` of another length, a tag outside the scheme, or an
            unknown backend.
    """

    continued: Tensor
    start_forbidden: Tensor
    transitions_forbidden: Tensor
    end_forbidden: Tensor

    def __init__(
        self,
        num_tags: int,
        tags: Sequence[str] | None = None,
        scheme: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_backend(backend)
        if num_tags < 1:
            raise ValueError(f"num_tags must be at least 1, got {num_tags}")
        if tags is not None and len(tags) != num_tags:
            raise ValueError(f"tags must hold num_tags = {num_tags} names, got {len(tags)}")
        if scheme is not None and scheme not in PREFIXES:
            raise ValueError(f"scheme must be None or one of {', '.join(PREFIXES)}, got {scheme!r}")
        if scheme is not None and tags is None:
            raise ValueError(f"scheme {scheme!r} needs the tag names: pass tags")
        self.num_tags = num_tags
        self.scheme = scheme
        self.backend = backend
        self.tags = None if tags is None else list(tags)
        self.start = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        self.end = nn.Parameter(torch.empty(num_tags))
        if scheme is not None:
            start, transitions, end = allowed_transitions(tags or (), scheme)
            self.register_buffer("start_forbidden", ~start, persistent=False)
            self.register_buffer("transitions_forbidden", ~transitions, persistent=False)
            self.register_buffer("end_forbidden", ~end, persistent=False)
        self.register_buffer("continued", _continued(tags or (), scheme, num_tags), False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all scores from U(-0.1, 0.1)."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def extra_repr(self) -> str:
        """Show the sizes in `print(module)`."""
        return f"num_tags={self.num_tags}, scheme={self.scheme!r}"

    def forward(self, emissions: Tensor, tags: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return `log_likelihood(emissions, tags, lengths)`."""
        return self.log_likelihood(emissions, tags, lengths)

    def log_likelihood(
        self, emissions: Tensor, tags: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """Compute log p(tags | emissions) of each row.

        Args:
            emissions: [B, T, K], unnormalised scores of each tag; batch first, as everywhere here.
            tags: [B, T] int64; whatever it holds past the end of a row is not looked at.
            lengths: [B] int64 on the device of `emissions`, 1 <= length <= T; None: all T.
                An accelerator checks the values by itself, without a stop.

        Returns:
            [B] float; -inf where `tags` break the scheme, NaN where all tags would.

        Raises:
            TypeError: `lengths` is not an int64 tensor.
            ValueError: shapes, devices, lengths or (on a CPU) tags that are not as said.
        """
        return crf.log_likelihood(emissions, tags, *self._scores(), lengths, backend=self.backend)

    def log_partition(self, emissions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute log Z: logsumexp of the scores of all paths the scheme allows.

        Differentiable once, by the forward-backward algorithm: the gradient with respect to the
        emissions is the marginals.

        Args:
            emissions: [B, T, K].
            lengths: [B] int64, as in `log_likelihood`.

        Returns:
            [B] float.

        Raises:
            TypeError, ValueError: as `log_likelihood`.
        """
        return crf.log_partition(emissions, *self._scores(), lengths, backend=self.backend)

    def marginals(self, emissions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute p(y_t = k | emissions), the confidence in each tag. Not differentiable.

        Args:
            emissions: [B, T, K].
            lengths: [B] int64, as in `log_likelihood`.

        Returns:
            [B, T, K] float, summing to 1 over tags, zero past the end.

        Raises:
            TypeError, ValueError: as `log_likelihood`.
        """
        return crf.marginals(emissions, *self._scores(), lengths, backend=self.backend)

    def span_marginals(
        self, emissions: Tensor, tags: Tensor, spans: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """Compute the probability of entities: of their tags, and of being no longer than those.

        Culotta and McCallum 2004. With the scheme BIO `B-X` may be one word of `B-X I-X`; the
        probability of the longer entity is not counted. Not differentiable.

        Args:
            emissions: [B, T, K].
            tags: [B, T] int64, such as `decode` finds; only those in spans are looked at.
            spans: [N, 3] int64 on the device of `emissions`: row, first word, the one after the
                last; within the lengths, and not empty.
            lengths: [B] int64, as in `log_likelihood`.

        Returns:
            [N] float.

        Raises:
            TypeError, ValueError: as `log_likelihood`.
        """
        scores = self._scores()
        return crf.span_marginals(
            emissions, *scores, self.continued, tags, spans, lengths, backend=self.backend
        )

    def decode(self, emissions: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the best path of each row (Viterbi 1967) among those the scheme allows.

        Args:
            emissions: [B, T, K].
            lengths: [B] int64, as in `log_likelihood`.

        Returns:
            paths [B, T] int64, -1 past the end, and their scores [B]; a score minus log Z is the
            log-probability of its path.

        Raises:
            TypeError, ValueError: as `log_likelihood`.
        """
        paths, scores = self.n_best(emissions, 1, lengths)
        return paths[:, 0], scores[:, 0]

    def n_best(
        self, emissions: Tensor, n: int, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the n best paths of each row among those the scheme allows, exactly.

        Args:
            emissions: [B, T, K].
            n: how many, at least 1.
            lengths: [B] int64, as in `log_likelihood`.

        Returns:
            paths [B, n, T] int64, best first, -1 past the end, and their scores [B, n]. Where the
            scheme allows fewer than n paths, the others are -1 and their scores -inf.

        Raises:
            TypeError, ValueError: as `log_likelihood`; `n` < 1.
        """
        return crf.n_best(emissions, *self._scores(), lengths, n=n, backend=self.backend)

    def _scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Start, transition and end scores, -inf where the scheme forbids."""
        if self.scheme is None:
            return self.start, self.transitions, self.end
        return (
            self.start.masked_fill(self.start_forbidden, -math.inf),
            self.transitions.masked_fill(self.transitions_forbidden, -math.inf),
            self.end.masked_fill(self.end_forbidden, -math.inf),
        )
