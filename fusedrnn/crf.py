"""Linear-chain conditional random field (Lafferty et al. 2001) with tag-scheme constraints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernels.checks import check_lengths

PREFIXES = {"BIO": "BI", "IOB1": "BI", "BIOES": "BIES"}
"""The prefixes of each tag scheme beside `O`."""

PADDING = -1
"""What `CRF.decode` writes past the end of a sequence."""

_FLOOR = math.log(1e-30)


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


def _propagate(
    emissions: Tensor, transitions: Tensor, boundary: Tensor, linear: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run R recursions side by side: state_t = emission_t + logsumexp(state_{t-1} + transitions).

    Args:
        emissions: [T, R, B, K].
        transitions: [R, K, K] (from, to).
        boundary: [R, K], the scores before the first emission.
        linear: sum by a matrix product of exponentials, which loses sums below 1e-38 of a row's
            largest term, rather than by logsumexp, which is exact and K times the work.

    Returns:
        states and messages (a state without its own emission), both [T, R, B, K], each step shifted
        so that the largest state is 0, and the shifts [T, R, B].
    """
    length, runs, batch, num_tags = emissions.shape
    largest = transitions.amax((1, 2), keepdim=True)
    weights = (transitions - largest).exp()
    states: list[Tensor] = []
    messages: list[Tensor] = []
    shifts: list[Tensor] = []
    message = boundary[:, None].expand(runs, batch, num_tags)
    for t in range(length):
        if t and linear:
            message = torch.bmm(states[-1].exp(), weights).log_().add_(largest)
        elif t:
            message = torch.logsumexp(states[-1][..., None] + transitions[:, None], dim=-2)
        state = message + emissions[t]
        shift = state.amax(-1, keepdim=True).clamp_(min=torch.finfo(state.dtype).min)
        states.append(state.sub_(shift))
        messages.append(message)
        shifts.append(shift[..., 0])
    return torch.stack(states), torch.stack(messages), torch.stack(shifts)


class _LogPartition(torch.autograd.Function):
    """log Z by the forward recursion; its gradient is the marginals, by the backward recursion."""

    @staticmethod
    def forward(
        ctx: Any,
        emissions: Tensor,
        transitions: Tensor,
        start: Tensor,
        end: Tensor,
        lengths: Tensor,
        with_marginals: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return log Z [B] and the marginals [T, B, K] (empty unless `with_marginals`)."""
        steps = torch.arange(len(emissions), device=emissions.device)[:, None]
        valid = steps < lengths
        flip = (lengths - 1 - steps).clamp(min=0)[..., None].expand_as(emissions)
        runs, matrices, boundaries = [emissions], [transitions], [start]
        if with_marginals:
            runs.append(emissions.gather(0, flip))
            matrices.append(transitions.T)
            boundaries.append(end)
        arguments = torch.stack(runs, 1), torch.stack(matrices), torch.stack(boundaries)

        linear = emissions.device.type == "cpu"  # the check below would stall an accelerator
        states, messages, shifts = _propagate(*arguments, linear=linear)
        if linear and not _precise(messages[1:], transitions, valid[1:]):
            linear = False
            states, messages, shifts = _propagate(*arguments, linear=linear)

        last = (lengths - 1)[None, :, None].expand(1, -1, emissions.shape[-1])
        final = states[:, 0].gather(0, last)[0] + end
        log_z = final.logsumexp(-1) + torch.where(valid, shifts[:, 0], 0).sum(0)
        if not with_marginals:
            return log_z, emissions.new_empty(0)

        alpha, gamma, beta = states[:, 0], states[:, 1].gather(0, flip), messages[:, 1]
        marginals = (alpha + beta.gather(0, flip)).softmax(-1)
        marginals = torch.where(valid[..., None], marginals, 0)
        ctx.save_for_backward(alpha, gamma, marginals, transitions, lengths)
        ctx.linear = linear
        ctx.mark_non_differentiable(marginals)
        return log_z, marginals

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Weight the marginals of tags, and of pairs of tags, by the gradient of each row."""
        if torch.is_grad_enabled():
            raise RuntimeError("the CRF is differentiable once: create_graph=True needs more")
        alpha, gamma, marginals, transitions, lengths = ctx.saved_tensors
        weighted = marginals * grad[:, None]
        last = (lengths - 1)[None, :, None].expand(1, -1, weighted.shape[-1])
        steps = torch.arange(1, len(alpha), device=alpha.device)[:, None]
        weights = torch.where(steps < lengths, grad, 0)
        with torch.autocast(alpha.device.type, enabled=False):
            pairs = _expected_pairs(alpha[:-1], gamma[1:], transitions, weights, ctx.linear)
        end = weighted.gather(0, last)[0].sum(0)
        return weighted, pairs, weighted[0].sum(0), end, None, None


def _precise(messages: Tensor, transitions: Tensor, valid: Tensor) -> bool:
    """Whether no sum came near the smallest float; a tag that nothing can reach counts as not."""
    floor = transitions.amax() + _FLOOR
    return bool(((messages > floor).all(-1).all(1) | ~valid).all())


def _expected_pairs(
    alpha: Tensor, gamma: Tensor, transitions: Tensor, weights: Tensor, linear: bool
) -> Tensor:
    """Sum the weighted pair marginals over time and rows.

    Args:
        alpha: [T - 1, B, K], forward states of the steps 0 to T - 2.
        gamma: [T - 1, B, K], backward states, own emission included, of the steps 1 to T - 1.
        transitions: [K, K].
        weights: [T - 1, B], zero at padding.
        linear: as in `_propagate`.

    Returns:
        [K, K] (from, to).
    """
    used = (weights != 0)[..., None]
    if linear:
        left, right = torch.where(used, alpha.exp(), 0), torch.where(used, gamma.exp(), 0)
        matrix = (transitions - transitions.amax()).exp()
        mass = ((left @ matrix) * right).sum(-1, keepdim=True)
        if bool(((mass > 1e-30) | ~used).all()):
            left = left * torch.where(used, weights[..., None] / mass, 0)
            return matrix * (left.flatten(0, 1).T @ right.flatten(0, 1))
    total = torch.zeros_like(transitions)
    for t in range(len(alpha)):
        scores = alpha[t][:, :, None] + transitions + gamma[t][:, None]
        pairs = scores.flatten(1).softmax(-1) * weights[t][:, None]
        total += torch.where(used[t], pairs, 0).sum(0).view_as(total)
    return total


class CRF(nn.Module):
    """Linear-chain CRF over tag emissions, with start, end and pairwise transition scores.

    log p(y | x) = start[y_0] + sum_t emissions[t, y_t] + sum_t transitions[y_{t-1}, y_t] + end[y_n]
    - log Z(x). With a scheme, the paths it forbids have probability zero: they are left out of Z as
    well as of decoding. All work is in float32 (float64 for float64 emissions), under autocast too.

    Attributes:
        start, end: [K] parameters.
        transitions: [K, K] parameter, from row to column.

    Args:
        num_tags: the number of tags K.
        tags: the K tag names; needed with a scheme.
        scheme: "BIO", "IOB1", "BIOES", or None for no constraint.

    Raises:
        ValueError: `num_tags` < 1, `tags` of another length, or a tag outside the scheme.
    """

    start_forbidden: Tensor
    transitions_forbidden: Tensor
    end_forbidden: Tensor

    def __init__(
        self, num_tags: int, tags: Sequence[str] | None = None, scheme: str | None = None
    ) -> None:
        super().__init__()
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
        self.tags = None if tags is None else list(tags)
        self.start = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        self.end = nn.Parameter(torch.empty(num_tags))
        if scheme is not None:
            start, transitions, end = allowed_transitions(tags or (), scheme)
            self.register_buffer("start_forbidden", ~start, persistent=False)
            self.register_buffer("transitions_forbidden", ~transitions, persistent=False)
            self.register_buffer("end_forbidden", ~end, persistent=False)
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
            [B] float; -inf where `tags` break the scheme.

        Raises:
            TypeError: `lengths` is not an int64 tensor.
            ValueError: shapes, devices, lengths or (on a CPU) tags that are not as said.
        """
        emissions, lengths = self._check(emissions, lengths)
        self._check_tags(emissions, tags, lengths)
        with torch.autocast(emissions.device.type, enabled=False):
            return (
                self._score(emissions, tags, lengths)
                - self._log_partition(emissions, lengths, False)[0]
            )

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
        emissions, lengths = self._check(emissions, lengths)
        with torch.autocast(emissions.device.type, enabled=False):
            return self._log_partition(emissions, lengths, False)[0]

    @torch.no_grad()
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
        emissions, lengths = self._check(emissions, lengths)
        with torch.autocast(emissions.device.type, enabled=False):
            return self._log_partition(emissions, lengths, True)[1].transpose(0, 1)

    @torch.no_grad()
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
        emissions, lengths = self._check(emissions, lengths)
        emissions = emissions.transpose(0, 1)
        start, transitions, end = self._scores(emissions.dtype)
        incoming = transitions.T.contiguous()
        stay = torch.arange(self.num_tags, device=emissions.device).expand(emissions.shape[1:])
        state, pointers = start + emissions[0], []
        for t in range(1, len(emissions)):
            best, pointer = (state[:, None] + incoming).max(-1)
            active = (t < lengths)[:, None]
            state = torch.where(active, best + emissions[t], state)
            pointers.append(torch.where(active, pointer, stay))
        score, tag = (state + end).max(-1, keepdim=True)
        path = [tag]
        for pointer in reversed(pointers):
            path.append(pointer.gather(-1, path[-1]))
        steps = torch.arange(len(emissions), device=emissions.device)
        paths = torch.cat(path[::-1], dim=-1).masked_fill(steps >= lengths[:, None], PADDING)
        return paths, score[:, 0]

    def _scores(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Start, transition and end scores, -inf where the scheme forbids."""
        scores = (self.start.to(dtype), self.transitions.to(dtype), self.end.to(dtype))
        if self.scheme is None:
            return scores
        start, transitions, end = scores
        return (
            start.masked_fill(self.start_forbidden, -math.inf),
            transitions.masked_fill(self.transitions_forbidden, -math.inf),
            end.masked_fill(self.end_forbidden, -math.inf),
        )

    def _log_partition(
        self, emissions: Tensor, lengths: Tensor, marginals: bool
    ) -> tuple[Tensor, Tensor]:
        start, transitions, end = self._scores(emissions.dtype)
        differentiable = emissions.requires_grad or transitions.requires_grad
        return _LogPartition.apply(
            emissions.transpose(0, 1),
            transitions,
            start,
            end,
            lengths,
            marginals or (differentiable and torch.is_grad_enabled()),
        )

    def _score(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """Sum the scores along the given paths, [B]."""
        start, transitions, end = self._scores(emissions.dtype)
        valid = torch.arange(tags.shape[1], device=tags.device) < lengths[:, None]
        tags = torch.where(valid, tags, 0)
        emitted = emissions.gather(-1, tags[..., None])[..., 0]
        moved = transitions[tags[:, :-1], tags[:, 1:]]
        last = tags.gather(1, lengths[:, None] - 1)[:, 0]
        path = torch.where(valid, emitted, 0).sum(1) + torch.where(valid[:, 1:], moved, 0).sum(1)
        return path + start[tags[:, 0]] + end[last]

    def _check(self, emissions: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Validate; return emissions in at least float32, and lengths."""
        if emissions.dim() != 3 or emissions.shape[-1] != self.num_tags or 0 in emissions.shape:
            raise ValueError(
                f"emissions must be [B, T, K = {self.num_tags}] with B, T >= 1, "
                f"got {list(emissions.shape)}"
            )
        if not emissions.is_floating_point():
            raise ValueError(f"emissions must be floating point, got {emissions.dtype}")
        batch, steps, _ = emissions.shape
        if lengths is None:
            lengths = torch.full((batch,), steps, device=emissions.device)
        check_lengths(lengths, steps, batch, emissions.device)
        return emissions.to(torch.promote_types(emissions.dtype, torch.float32)), lengths

    def _check_tags(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> None:
        if tags.shape != emissions.shape[:2] or tags.dtype != torch.int64:
            raise ValueError(
                f"tags must be int64 [B, T] = {list(emissions.shape[:2])}, "
                f"got {tags.dtype} {list(tags.shape)}"
            )
        if tags.device != emissions.device:
            raise ValueError(
                f"tags must be on the device of emissions, {emissions.device}, got {tags.device}"
            )
        if tags.device.type == "cpu":
            past = torch.arange(tags.shape[1]) >= lengths[:, None]
            if bool((((tags < 0) | (tags >= self.num_tags)) & ~past).any()):
                raise ValueError(f"tags must lie in 0..{self.num_tags - 1} within lengths")
