"""The attention decoder in plain torch operations, the backward through time written out: CPU path.

Every cell is four blocks of H, so that one product a step gives them all from what the layer sees,
[fed; h_{t-1}]: i f g o of the LSTM; r z n of the GRU, n without its recurrent part, which is the
fourth. Outside the loop is what needs no order in time: the input's product, the gradients of all
weights as one product over T, those of keys and projected keys as one batched product. Factors of
the gradient that do not depend on what comes back are computed for several steps at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_loop import product_grad, tanh_, tanh_grad
from ..untraced import untraced
from .spec import Decoded, DecoderWeights, LayerWeights, Masks, Problem, Sampling, State

CHUNK = 1 << 18
"""Numbers of one kind of factor that are computed at once: they should still be in the cache when a
step uses them."""


def pack(cell: str, layer: LayerWeights) -> tuple[Tensor, Tensor]:
    """One matrix [4H, N + H] of a layer, for its input and h, and its bias [4H]."""
    w_ih, w_hh, b_ih, b_hh = layer
    zero = w_hh.new_zeros(w_hh.shape[0])
    b_ih, b_hh = zero if b_ih is None else b_ih, zero if b_hh is None else b_hh
    if cell == "lstm":
        return torch.cat([w_ih, w_hh], 1), b_ih + b_hh
    two, size = 2 * w_hh.shape[1], w_hh.shape[1]
    blocks = [
        torch.cat([w_ih[:two], w_hh[:two]], 1),
        F.pad(w_ih[two:], (0, size)),
        F.pad(w_hh[two:], (w_ih.shape[1], 0)),
    ]
    return torch.cat(blocks), torch.cat([b_ih[:two] + b_hh[:two], b_ih[two:], b_hh[two:]])


@dataclass(frozen=True)
class Sources:
    """What is attended to, and how.

    Attributes:
        keys: [B, S, K], zero at padding.
        projected: [B, S, A], zero at padding.
        bias: [B, S], 0 or -inf at padding.
        query, energy, coverage: as in `DecoderWeights`.
    """

    keys: Tensor
    projected: Tensor
    bias: Tensor
    query: Tensor | None
    energy: Tensor | None
    coverage: Tensor | None

    def hidden(self, query: Tensor, seen: Tensor | None) -> Tensor:
        """Tanh of the additive score [..., B, S, A], from W_q q [..., B, A] and the coverage."""
        hidden = self.projected + query[..., None, :]
        if self.coverage is not None:
            assert seen is not None
            hidden.addcmul_(seen[..., None], self.coverage)
        return tanh_(hidden)

    def slope(self, run: Run, now: slice) -> tuple[Tensor, Tensor]:
        """Tanh of the additive score at some steps, and its gradient by what is inside."""
        seen = run.coverage[now] if len(run.coverage) else None
        hidden = self.hidden(run.query[now], seen)
        assert self.energy is not None
        return hidden, tanh_grad(self.energy.expand_as(hidden), hidden)

    def attend(
        self, state: Tensor, query: Tensor, seen: Tensor, weights: Tensor, context: Tensor
    ) -> None:
        """Fill `query` (additive only), `weights` and `context` of one step from the state."""
        if self.energy is None:
            score = torch.baddbmm(
                self.bias[:, None], state[:, None], self.projected.transpose(1, 2)
            ).squeeze(1)
            if self.coverage is not None:
                score.addcmul_(seen, (state @ self.coverage)[:, None])
        else:
            assert self.query is not None
            torch.mm(state, self.query.t(), out=query)
            score = torch.add(self.bias, self.hidden(query, seen) @ self.energy)
        torch.softmax(score, -1, out=weights)
        context.copy_(torch.bmm(weights[:, None], self.keys).squeeze(1))


@dataclass(frozen=True)
class Run:
    """Everything that one pass over time leaves, T + 1 slots where a step reads the one before.

    Attributes:
        gates: activated blocks of each layer [T, B, 4H].
        seen: what each layer sees, [T + 1, B, N + H]: slot t is fed to step t, h from step t - 1.
        cells: of each LSTM layer (c [T + 1, B, H], tanh(c) [T, B, H]), else empty.
        joined: [T, B, K + Q], context and output.
        weights: [T, B, S].
        coverage: [T + 1, B, S], or no slots without coverage.
        query: [T, B, A], W_q q of the additive score, or A = 0.
        features: [T, B, F] before dropout with feedback "features", or F = 0.
    """

    gates: list[Tensor]
    seen: list[Tensor]
    cells: list[tuple[Tensor, Tensor]]
    joined: Tensor
    weights: Tensor
    coverage: Tensor
    query: Tensor
    features: Tensor

    @property
    def size(self) -> int:
        """Q, hidden units of the top layer."""
        return self.gates[-1].shape[-1] // 4

    def queries(self, problem: Problem) -> Tensor:
        """The states [T, B, Q] that asked."""
        if problem.feedback == "context":
            return self.seen[-1][:-1, :, -self.size :]
        return self.joined[..., -self.size :]


def _lstm(z: Tensor, h: Tensor, c: tuple[Tensor, Tensor, Tensor], out: Tensor) -> None:
    before, after, squashed = c
    i, f, g, o = z.chunk(4, 1)
    g.mul_(2)
    z.sigmoid_()
    g.mul_(2).sub_(1)
    torch.mul(f, before, out=after).addcmul_(i, g)
    torch.mul(o, tanh_(squashed.copy_(after)), out=out)


def _gru(z: Tensor, h: Tensor, c: tuple[Tensor, ...], out: Tensor) -> None:
    r, update, n, recurrent = z.chunk(4, 1)
    z[:, : 2 * h.shape[1]].sigmoid_()
    torch.lerp(tanh_(n.addcmul_(r, recurrent)), h, update, out=out)


def _lstm_factors(z: Tensor, h: Tensor, c: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of di, df, dg (times dc) and do (times dh); o (1 - tanh(c)^2); f."""
    before, squashed = c
    i, f, g, o = z.unbind(2)
    factors = torch.addcmul(z, z, z, value=-1)
    factors[:, :, 0].mul_(g)
    factors[:, :, 1].mul_(before)
    tanh_grad(i, g, out=factors[:, :, 2])
    factors[:, :, 3].mul_(squashed)
    return factors, tanh_grad(o, squashed), f


def _gru_factors(z: Tensor, h: Tensor, c: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of all blocks (times dh); nothing; the update gate."""
    r, update, n, recurrent = z.unbind(2)
    factors = torch.addcmul(z, z, z, value=-1)
    new = tanh_grad(1 - update, n, out=factors[:, :, 2])
    torch.mul(new, r, out=factors[:, :, 3])
    factors[:, :, 0].mul_(new).mul_(recurrent)
    factors[:, :, 1].mul_(h - n)
    return factors, update, update


def _lstm_grad(dz: Tensor, dh: Tensor, dc: Tensor, factors: Sequence[Tensor]) -> None:
    """Fill dz [B, 4, H]; dc of this step becomes that of the one before."""
    block, through, forget = factors
    dc.addcmul_(dh, through)
    torch.mul(block[:, :3], dc[:, None], out=dz[:, :3])
    torch.mul(block[:, 3], dh, out=dz[:, 3])
    dc.mul_(forget)


def _gru_grad(dz: Tensor, dh: Tensor, dc: Tensor, factors: Sequence[Tensor]) -> None:
    """Fill dz [B, 4, H]; dc becomes what h_{t-1} gets directly."""
    torch.mul(factors[0], dh[:, None], out=dz)
    torch.mul(dh, factors[2], out=dc)


STEPS: dict[str, tuple[Callable[..., None], Callable[..., Any], Callable[..., None]]] = {
    "lstm": (_lstm, _lstm_factors, _lstm_grad),
    "gru": (_gru, _gru_factors, _gru_grad),
}


@torch.no_grad()
def unroll(
    problem: Problem,
    gates: Tensor,
    sources: Sources,
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor],
    combine: Tensor,
    states: Sequence[State],
    feed: Tensor | None,
    coverage: Tensor | None,
    masks: Masks,
    resample: Callable[[int, Tensor], None] | None = None,
) -> Run:
    """The forward time loop; overwrites `gates` [T, B, 4H], the lowest layer's input part.

    Args:
        problem: which decoder.
        gates: input part of the lowest layer, its bias included.
        sources: what is attended to.
        matrices: of each layer [4H, N + H], that of the lowest without the input's columns.
        biases: of the layers above the lowest, [4H].
        combine: as in `DecoderWeights`.
        states: as in `reference.decode`.
        feed: likewise.
        coverage: likewise.
        masks: likewise.
        resample: called before each step with its number and the features of the step before; may
            change the gates of the step.
    """
    steps, batch, _ = gates.shape
    new, step = gates.new_empty, STEPS[problem.cell][0]
    sizes = [m.shape[0] // 4 for m in matrices]
    run = Run(
        [gates, *(b.expand(steps, batch, -1).contiguous() for b in biases)],
        [new(steps + 1, batch, m.shape[1]) for m in matrices],
        [(new(steps + 1, batch, n), new(steps, batch, n)) for n in sizes if len(states[0]) == 2],
        new(steps, batch, combine.shape[1]),
        new(steps, batch, sources.keys.shape[1]),
        new(steps + 1 if sources.coverage is not None else 0, batch, sources.keys.shape[1]),
        new(steps, batch, 0 if sources.query is None else sources.query.shape[0]),
        new(steps, batch, combine.shape[0] if problem.feedback == "features" else 0),
    )
    fed = [m.shape[1] - n for m, n in zip(matrices, sizes, strict=True)]
    for index, state in enumerate(states):
        run.seen[index][0, :, fed[index] :] = state[0]
        for cell, c in zip(run.cells[index : index + 1], state[1:], strict=True):
            cell[0][0] = c
    if problem.feedback == "features":
        run.seen[0][0, :, : fed[0]] = 0 if feed is None else feed
    if len(run.coverage):
        run.coverage[0] = 0 if coverage is None else coverage
    width = sources.keys.shape[2]
    transposed, combined = [m.t() for m in matrices], combine.t()
    last = gates.new_zeros(batch, combine.shape[0])
    for t in range(steps):
        if resample is not None:
            resample(t, last)
        context, output = run.joined[t].split((width, sizes[-1]), 1)
        seen = run.coverage[t] if len(run.coverage) else run.coverage
        if problem.feedback == "context":
            asks = run.seen[-1][t, :, fed[-1] :]
            sources.attend(asks, run.query[t], seen, run.weights[t], context)
            run.seen[0][t, :, :width] = context
        for index, z in enumerate(run.gates):
            sees, h = run.seen[index][t], run.seen[index][t + 1, :, fed[index] :]
            z = z[t].addmm_(sees, transposed[index])
            cells: tuple[Tensor, ...] = ()
            if run.cells:
                c, squashed = run.cells[index]
                cells = (c[t], c[t + 1], squashed[t])
            step(z, sees[:, fed[index] :], cells, h)
            if index + 1 < len(matrices):
                above = run.seen[index + 1][t, :, : fed[index + 1]]
                if masks.between:
                    torch.mul(h, masks.between[index][t], out=above)
                else:
                    above.copy_(h)
        output.copy_(h)
        if problem.feedback != "context":
            sources.attend(output, run.query[t], seen, run.weights[t], context)
        if len(run.coverage):
            torch.add(seen, run.weights[t], out=run.coverage[t + 1])
        if problem.feedback == "features" or resample is not None:
            last = torch.tanh(run.joined[t] @ combined)
            if problem.feedback == "features":
                run.features[t] = last
            if masks.features is not None:
                last.mul_(masks.features[t])
            if problem.feedback == "features":
                run.seen[0][t + 1, :, : fed[0]] = last
    return run


def chunks(run: Run) -> Sequence[tuple[int, int]]:
    """Steps [first, last) whose factors are computed together, the last ones first."""
    steps, batch, source = run.weights.shape
    numbers = batch * max(*(z.shape[2] for z in run.gates), source * run.query.shape[2])
    size = max(1, CHUNK // max(1, numbers))
    return [(max(0, last - size), last) for last in range(steps, 0, -size)]


class AdditiveGrads:
    """Gradients of an additive score's projected keys, v and w_c, summed up chunk by chunk."""

    def __init__(self, sources: Sources) -> None:
        self.projected = torch.zeros_like(sources.projected)
        self.energy, self.coverage = (
            None if w is None else torch.zeros_like(w) for w in (sources.energy, sources.coverage)
        )

    def add(self, hidden: Tensor, slope: Tensor, score: Tensor, seen: Tensor) -> None:
        """Add some steps; overwrites `slope`.

        Args:
            hidden: tanh of the scores [n, B, S, A].
            slope: gradient of the scores by what is inside the tanh.
            score: gradient of the scores [n, B, S].
            seen: the coverage [n, B, S], with coverage.
        """
        assert self.energy is not None
        self.energy.addmv_(hidden.flatten(0, 2).t(), score.flatten())
        scaled = slope.mul_(score[..., None])
        self.projected.add_(scaled.sum(0))
        if self.coverage is not None:
            self.coverage.addmv_(scaled.flatten(0, 2).t(), seen.flatten())


class _Backward:
    """The reverse time loop over a `Run`, and the products around it.

    Attributes:
        joined: gradients of context and output [T, B, K + Q], of context in the end in full.
        gates: of the blocks before activation, of each layer [T, B, 4, H].
        features: of the features before tanh [T, B, F].
        score: of the attention's scores [T, B, S].
        query: of W_q q [T, B, A].
    """

    def __init__(
        self,
        problem: Problem,
        run: Run,
        sources: Sources,
        matrices: Sequence[Tensor],
        combine: Tensor,
        masks: Masks,
        grads: Sequence[Tensor | None],
        final: Sequence[Tensor | None],
    ) -> None:
        self.problem, self.run, self.sources, self.masks = problem, run, sources, masks
        self.matrices, self.combine = matrices, combine
        self.sizes = [m.shape[0] // 4 for m in matrices]
        self.fed = [m.shape[1] - n for m, n in zip(matrices, self.sizes, strict=True)]
        d_features, d_context, d_outputs, self.weights = grads
        self.joined = torch.empty_like(run.joined)
        self.width = sources.keys.shape[2]
        parts = self.joined.split((self.width, run.size), -1)
        for part, given in zip(parts, (d_context, d_outputs), strict=True):
            part.zero_() if given is None else part.copy_(given)
        self.external = d_features
        self.gates = [z.new_empty(*z.shape[:2], 4, z.shape[2] // 4) for z in run.gates]
        self.features = torch.empty_like(run.features)
        self.score = torch.empty_like(run.weights)
        self.query = torch.empty_like(run.query)
        self.feed = run.features.new_zeros(run.features.shape[1:])
        self.coverage = torch.zeros_like(run.weights[0])
        self.additive = AdditiveGrads(sources)
        count = len(matrices)
        self.dh, self.dc = (
            [
                run.gates[i].new_zeros(run.gates[i].shape[1], n) if d is None else d.clone()
                for i, (n, d) in enumerate(zip(self.sizes, part, strict=True))
            ]
            for part in (final[:count], final[count:] or [None] * count)
        )

    def loop(self) -> None:
        """All steps, from the last to the first."""
        run, factors_of = self.run, STEPS[self.problem.cell][1]
        queries = run.queries(self.problem)
        for first, last in chunks(run):
            now = slice(first, last)
            cells = []
            for index, z in enumerate(run.gates):
                c: tuple[Tensor, ...] = ()
                if run.cells:
                    c = (run.cells[index][0][now], run.cells[index][1][now])
                h = run.seen[index][now, :, self.fed[index] :]
                factors = factors_of(z[now].unflatten(2, (4, -1)), h, c)
                cells.append(list(zip(*(f.unbind(0) for f in factors), strict=True)))
            slope = hidden = None
            if self.sources.energy is not None:
                hidden, slope = self.sources.slope(run, now)
            scale = self._scale(now)
            for t in reversed(range(first, last)):
                self._step(t, queries[t], cells, scale, slope, t - first)
            if hidden is not None and slope is not None:
                self.additive.add(hidden, slope, self.score[now], run.coverage[now])

    def _scale(self, now: slice) -> Tensor:
        """Factor of the features' gradient: of tanh, and of dropout."""
        features = self.run.features[now]
        scale = 1 - features * features
        if self.masks.features is not None and features.numel():
            scale.mul_(self.masks.features[now])
        return scale

    def _step(
        self,
        t: int,
        query: Tensor,
        cells: list[list[Any]],
        scale: Tensor,
        slope: Tensor | None,
        place: int,
    ) -> None:
        joined, context = self.joined[t], self.problem.feedback == "context"
        if self.problem.feedback == "features":
            if self.external is not None:
                self.feed.add_(self.external[t])
            torch.mul(self.feed, scale[place], out=self.features[t])
            joined.addmm_(self.features[t], self.combine)
        self.dh[-1].add_(joined[:, self.width :])
        part = None if slope is None else slope[place]
        if not context:
            self._attention(t, query, joined[:, : self.width], part)
        for index in reversed(range(len(cells))):
            dz = self.gates[index][t]
            factors = cells[index][place]
            dh, dc = self.dh[index], self.dc[index]
            STEPS[self.problem.cell][2](dz, dh, dc, factors)
            seen = dz.flatten(1) @ self.matrices[index]
            fed, dh = seen.split((self.fed[index], self.sizes[index]), 1)
            self.dh[index] = dh.add_(dc) if self.problem.cell == "gru" else dh
            if index > 0:
                if self.masks.between:
                    fed = fed * self.masks.between[index - 1][t]
                self.dh[index - 1].add_(fed)
            elif self.problem.feedback == "features":
                self.feed = fed
            elif context:
                joined[:, : self.width] += fed
                self._attention(t, query, joined[:, : self.width], part)

    def _attention(self, t: int, query: Tensor, d_context: Tensor, slope: Tensor | None) -> None:
        """Add to the gradient of the state that asked, from that of the context."""
        sources, run = self.sources, self.run
        d_weights = torch.bmm(sources.keys, d_context[..., None]).squeeze(-1)
        if self.weights is not None:
            d_weights.add_(self.weights[t])
        if sources.coverage is not None:
            d_weights.add_(self.coverage)
        d_weights.mul_(run.weights[t])
        total = d_weights.sum(-1, keepdim=True)
        score = torch.addcmul(d_weights, run.weights[t], total, value=-1, out=self.score[t])
        dh = self.dh[-1]
        if slope is None:
            dh.add_(torch.bmm(score[:, None], sources.projected).squeeze(1))
            if sources.coverage is not None:
                seen = (score * run.coverage[t]).sum(-1, keepdim=True)
                dh.addcmul_(seen, sources.coverage)
                self.coverage.addcmul_(score, (query @ sources.coverage)[:, None])
        else:
            assert sources.query is not None
            self.query[t] = torch.bmm(score[:, None], slope).squeeze(1)
            dh.addmm_(self.query[t], sources.query)
            if sources.coverage is not None:
                self.coverage.addcmul_(score, slope @ sources.coverage)


def source_grads(
    problem: Problem,
    run: Run,
    sources: Sources,
    context: Tensor,
    score: Tensor,
    query: Tensor,
    additive: AdditiveGrads,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of keys, projected keys, W_q, v and w_c: products over all steps.

    Args:
        problem: which decoder.
        run: the forward pass.
        sources: what was attended to.
        context: gradient of the contexts [T, B, K].
        score: of the scores [T, B, S].
        query: of W_q q [T, B, A].
        additive: of what an additive score alone has.
    """
    queries = run.queries(problem)
    keys = torch.bmm(run.weights.permute(1, 2, 0), context.transpose(0, 1))
    if sources.energy is not None:
        d_query = product_grad(query, queries)
        return keys, additive.projected, d_query, additive.energy, additive.coverage
    projected = torch.bmm(score.permute(1, 2, 0), queries.transpose(0, 1))
    coverage = None
    if sources.coverage is not None:
        seen = (score * run.coverage[:-1]).sum(-1)
        coverage = queries.flatten(0, 1).t() @ seen.flatten().to(queries.dtype)
    return keys, projected, None, None, coverage


class _Decoder(torch.autograd.Function):
    """Attaches the gradient to a `Run`; the forward pass has been made."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        run: Run,
        sources: Sources,
        masks: Masks,
        layers: int,
        count: int,
        gates: Tensor,
        keys: Tensor,
        projected: Tensor,
        query: Tensor | None,
        energy: Tensor | None,
        coverage_weight: Tensor | None,
        combine: Tensor,
        feed: Tensor | None,
        coverage: Tensor | None,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        """`rest` holds `layers` matrices, the biases above the lowest, and the states."""
        matrices = rest[:layers]
        ctx.problem, ctx.masks, ctx.layers, ctx.count = problem, masks, layers, count
        ctx.cells, ctx.states = len(run.cells), len(rest) - 2 * layers + 1
        flat = [*run.gates, *run.seen, *(c for cell in run.cells for c in cell)]
        ctx.save_for_backward(
            sources.keys, sources.projected, sources.bias, query, energy, coverage_weight, combine,
            run.joined, run.weights, run.coverage, run.query, run.features, *matrices, *flat,
        )  # fmt: skip
        ctx.given = (feed is not None, coverage is not None)
        ctx.set_materialize_grads(False)
        size = run.size
        features = run.features
        if masks.features is not None and features.numel():
            features = features * masks.features
        hidden = [s[-1, :, -(z.shape[2] // 4) :] for s, z in zip(run.seen, run.gates, strict=True)]
        final = [*hidden, *(c[0][-1] for c in run.cells)]
        context, outputs = run.joined.split((keys.shape[2], size), -1)
        return features, context.contiguous(), outputs.contiguous(), run.weights, *final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the backward of the attention decoder with backend='torch' is not differentiable: "
                "use backend='reference' for gradients of gradients (create_graph=True)"
            )
        keys, projected, bias, query, energy, weight, combine, *rest = ctx.saved_tensors
        joined, weights, coverage, queries, features, *rest = rest
        n = ctx.layers
        matrices, gates, seen, flat = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
        cells = list(zip(flat[::2], flat[1::2], strict=True))
        run = Run(gates, seen, cells, joined, weights, coverage, queries, features)
        sources = Sources(keys, projected, bias, query, energy, weight)
        back = _Backward(
            ctx.problem, run, sources, matrices, combine, ctx.masks, grads[:4], grads[4:]
        )
        back.loop()
        d_gates = [g.flatten(2) for g in back.gates]
        d_combine = None
        if ctx.problem.feedback == "features":
            d_combine = product_grad(back.features, joined)
        states = [*back.dh, *back.dc][: ctx.states]
        return (
            *(None,) * 6,
            d_gates[0],
            *source_grads(
                ctx.problem,
                run,
                sources,
                back.joined[..., : back.width],
                back.score,
                back.query,
                back.additive,
            ),
            d_combine,
            back.feed if ctx.given[0] else None,
            back.coverage if ctx.given[1] else None,
            *(product_grad(d, s[:-1]) for d, s in zip(d_gates, seen, strict=True)),
            *(d.sum((0, 1)) for d in d_gates[1:]),
            *states,
        )


@untraced
def decode(
    problem: Problem,
    x: Tensor,
    keys: Tensor,
    projected: Tensor,
    lengths: Tensor | None,
    weights: DecoderWeights,
    states: Sequence[State],
    feed: Tensor | None = None,
    coverage: Tensor | None = None,
    masks: Masks | None = None,
    sampling: Sampling | None = None,
) -> Decoded:
    """A whole decoding; arguments and results are those of `reference.decode`."""
    masks = Masks() if masks is None else masks
    bias = keys.new_zeros(keys.shape[:2])
    if lengths is not None:
        padding = torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None]
        bias.masked_fill_(padding, -torch.inf)
        keys, projected = (v.masked_fill(padding[..., None], 0.0) for v in (keys, projected))
    packed = [pack(problem.cell, layer) for layer in weights.layers]
    lowest, below = packed[0][0].split((x.shape[2], packed[0][0].shape[1] - x.shape[2]), 1)
    matrices = [below.contiguous(), *(matrix for matrix, _ in packed[1:])]
    biases = [b for _, b in packed[1:]]
    attention = (weights.query, weights.energy, weights.coverage)
    sources = Sources(*_detached((keys, projected, bias, *attention)))
    symbols = resample = None
    if sampling is None:
        gates = F.linear(x, lowest, packed[0][1])
        loop_gates = gates.detach()
    else:
        symbols, x = sampling.symbols.clone(), sampling.inputs(sampling.symbols)
        loop_gates = F.linear(x, lowest, packed[0][1]).detach()
        resample = _resampler(sampling, symbols, loop_gates, lowest, packed[0][1])
    run = unroll(
        problem, loop_gates, sources, _detached(matrices), _detached(biases),
        weights.combine.detach(), states, feed, coverage, masks, resample,
    )  # fmt: skip
    if sampling is not None:
        assert symbols is not None
        gates = F.linear(sampling.inputs(symbols), lowest, packed[0][1])
    count = len(states[0])
    flat = [state[i] for i in range(count) for state in states]
    features, context, outputs, alpha, *final = _Decoder.apply(
        problem, run, sources, masks, len(matrices), count, gates, keys, projected, *attention,
        weights.combine, feed, coverage, *matrices, *biases, *flat,
    )  # fmt: skip
    if problem.feedback != "features":
        features = torch.tanh(F.linear(torch.cat([context, outputs], -1), weights.combine))
        features = features if masks.features is None else features * masks.features
    after = [tuple(final[i :: len(states)]) for i in range(len(states))]
    return Decoded(features, outputs, context, alpha, after, symbols)


def _detached(tensors: Sequence[Any]) -> list[Any]:
    return [None if t is None else t.detach() for t in tensors]


def _resampler(
    sampling: Sampling, symbols: Tensor, gates: Tensor, matrix: Tensor, bias: Tensor
) -> Callable[[int, Tensor], None]:
    """Replaces symbols, and the gates of those steps, as the loop goes on."""
    times = sampling.replaced.any(1).tolist()

    def resample(t: int, features: Tensor) -> None:
        if t == 0 or not times[t]:
            return
        symbols[t] = sampling.draw(t, features)
        x = sampling.embed(symbols[t])
        x = x if sampling.mask is None else x * sampling.mask[t]
        torch.addmm(bias, x, matrix.t(), out=gates[t])

    return resample
