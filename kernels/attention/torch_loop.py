"""The attention decoder in plain torch operations, the backward through time written out: CPU path.

Every cell is four blocks of H, in an order in which h_{t-1} and what is fed each reach neighbours,
by one product: i f g o of the LSTM, both reach all; a r z n of the GRU, where a is the recurrent
part of n. Outside the loop is what needs no order in time: the input's product, the gradients of
all weights as products over T, those of keys and projected keys as batched products. Factors of the
gradient that do not depend on what comes back are computed for several steps at once, and views are
made once for all of them, because on small tensors they cost as much as sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..torch_loop import Saved, gate_factors, product_grad, tanh_, tanh_grad, times_tanh
from ..untraced import untraced
from .sources import AdditiveGrads, AdditiveScore, Asked, chunks, hide_padding, source_grads
from .spec import Decoded, DecoderWeights, LayerWeights, Masks, Problem, Sampling, State


class Blocks(NamedTuple):
    """The blocks of one step, before or after activation, or their gradients, and views of them.

    Attributes:
        whole: [B, 4, H].
        parts: each block [B, H].
        joint: those that the cell treats alike [B, n, H].
        fed: those that what is fed reaches [B, n*H].
        recurrent: those that h_{t-1} reaches [B, n*H].
    """

    whole: Tensor
    parts: Sequence[Tensor]
    joint: Tensor
    fed: Tensor
    recurrent: Tensor


def _lstm(z: Blocks, h: Tensor, c: Sequence[Tensor], out: Tensor) -> None:
    (i, f, g, o), (before, after, complement) = z.parts, c
    g.mul_(-2)
    z.whole.sigmoid_()
    torch.addcmul(i, f, before, out=after).addcmul_(i, g, value=-2)
    times_tanh(o, torch.mul(after, -2, out=complement).sigmoid_(), out=out)


def _gru(z: Blocks, h: Tensor, c: Sequence[Tensor], out: Tensor) -> None:
    recurrent, r, update, n = z.parts
    z.joint.sigmoid_()
    torch.lerp(tanh_(n.addcmul_(r, recurrent)), h, update, out=out)


def _lstm_factors(z: Tensor, h: Tensor, c: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of di, df, dg (times dc), of do (times dh); o (1 - tanh(c)^2); f."""
    before, complement = c
    return *gate_factors(Saved(z, complement, h, (h, before)), complement)[:3], z.chunk(4, -1)[1]


def _gru_factors(z: Tensor, h: Tensor, c: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of all blocks (times dh), and the update gate."""
    z = z.unflatten(-1, (4, -1))
    recurrent, r, update, n = z.unbind(-2)
    factors, joint = torch.empty_like(z), z[..., 1:3, :]
    new = tanh_grad(1 - update, n, out=factors[..., 3, :])
    torch.mul(new, r, out=factors[..., 0, :])
    torch.addcmul(joint, joint, joint, value=-1, out=factors[..., 1:3, :])
    factors[..., 1, :].mul_(new).mul_(recurrent)
    factors[..., 2, :].mul_(h - n)
    return factors, update


def _lstm_grad(d: Blocks, dh: Tensor, dc: Tensor, factors: Sequence[Tensor]) -> None:
    """Fill d; dc of this step becomes that of the one before."""
    joint, output, through, forget = factors
    dc.addcmul_(dh, through)
    torch.mul(joint, dc[:, None], out=d.joint)
    torch.mul(output, dh, out=d.parts[3])
    dc.mul_(forget)


def _gru_grad(d: Blocks, dh: Tensor, dc: Tensor, factors: Sequence[Tensor]) -> None:
    """Fill d; dh becomes what h_{t-1} gets directly."""
    torch.mul(factors[0], dh[:, None], out=d.whole)
    dh.mul_(factors[1])


@dataclass(frozen=True)
class Cell:
    """A cell's step and gradient, and its blocks.

    Attributes:
        step: (blocks, h, c, out): activates the blocks; fills `out` with the new h and, of an LSTM,
            c_t and tanh(c_t), which follow c_{t-1} in c.
        factors: of several steps at once, what `grad` reads.
        grad: (d, dh, dc, factors): fills d.
        fed: blocks [first, last) that what is fed reaches.
        recurrent: those that h_{t-1} reaches.
        joint: those that the cell treats alike.
        turned: by how many blocks those of W_hh come later than in torch's order.
        direct: whether `grad` leaves in dh what h_{t-1} gets without the product.
    """

    step: Callable[..., None]
    factors: Callable[..., tuple[Tensor, ...]]
    grad: Callable[..., None]
    fed: tuple[int, int]
    recurrent: tuple[int, int]
    joint: tuple[int, int]
    turned: int
    direct: bool

    def blocks(self, tensor: Tensor) -> list[Blocks]:
        """Views of the blocks [T, B, 4H], for each step."""
        apart = tensor.unflatten(2, (4, -1))
        parts = zip(*(p.unbind(0) for p in apart.unbind(2)), strict=True)
        joint = apart[:, :, slice(*self.joint)].unbind(0)
        fed, recurrent = (part.unbind(0) for part in self.split(tensor))
        return [*map(Blocks, apart.unbind(0), parts, joint, fed, recurrent)]

    def split(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Of [..., 4H] the blocks that what is fed reaches, and those that h_{t-1} reaches."""
        apart = tensor.unflatten(-1, (4, -1))
        fed, recurrent = (apart[..., slice(*b), :] for b in (self.fed, self.recurrent))
        return fed.flatten(-2), recurrent.flatten(-2)

    def turn(self, tensor: Tensor, back: bool = False) -> Tensor:
        """W_hh or b_hh with its blocks in the order here, or a gradient in torch's order."""
        if not self.turned:
            return tensor
        rows = self.turned * (tensor.shape[0] // 3)
        return tensor.roll(-rows if back else rows, 0)


CELLS = {
    "lstm": Cell(_lstm, _lstm_factors, _lstm_grad, (0, 4), (0, 4), (0, 3), 0, False),
    "gru": Cell(_gru, _gru_factors, _gru_grad, (1, 4), (0, 3), (1, 3), 1, True),
}


class Layer(NamedTuple):
    """One layer's weights as the loop uses them.

    Attributes:
        given: W_ih's columns of x [n*H, E], at the lowest layer; E = 0 above.
        fed: the others [n*H, N], for what is fed or the layer below.
        recurrent: W_hh with its blocks in order.
    """

    given: Tensor
    fed: Tensor
    recurrent: Tensor


def split_layers(cell: Cell, weights: Sequence[LayerWeights], inputs: int) -> list[Layer]:
    """The layers of weights whose lowest one reads x of so many elements."""
    parts = []
    for index, layer in enumerate(weights):
        own = inputs if index == 0 else 0
        given, fed = layer.w_ih.split((own, layer.w_ih.shape[1] - own), 1)
        parts.append(Layer(given, fed, cell.turn(layer.w_hh)))
    return parts


def input_bias(cell: Cell, layer: LayerWeights) -> Tensor:
    """Both biases, in the blocks where they belong [4H]."""
    total = layer.w_hh.new_zeros(4 * layer.w_hh.shape[1])
    fed, recurrent = cell.split(total)
    for part, bias in ((fed, layer.b_ih), (recurrent, layer.b_hh)):
        if bias is not None:
            part.add_(bias if part is fed else cell.turn(bias))
    return total


class Sources:
    """What is attended to, and how.

    Args:
        keys: [B, S, K].
        projected: [B, S, A].
        lengths: int64 [B] or None.
        query: as in `DecoderWeights`, as the two that follow.
        energy: likewise.
        coverage: likewise.
    """

    def __init__(
        self,
        keys: Tensor,
        projected: Tensor,
        lengths: Tensor | None,
        query: Tensor | None,
        energy: Tensor | None,
        coverage: Tensor | None,
    ) -> None:
        self.keys, self.projected, padding = hide_padding(keys, projected, lengths)
        self.keys_across, self.across = self.keys.transpose(1, 2), self.projected.transpose(1, 2)
        self.bias = keys.new_zeros(len(keys), 1, keys.shape[1])
        if padding is not None:
            self.bias.masked_fill_(padding[:, None], -torch.inf)
        self.query, self.coverage, self.additive = query, coverage, None
        if energy is not None:
            self.additive = AdditiveScore(self.projected, energy, coverage)
            self.hidden = torch.empty_like(self.projected)

    def attend(
        self, state: Tensor, query: Tensor, seen: Tensor | None, weights: Tensor, context: Tensor
    ) -> None:
        """Fill `query` (additive only), `weights` [B, 1, S] and `context` [B, 1, K] of one step."""
        if self.additive is None:
            score = torch.baddbmm(self.bias, state[:, None], self.across)
            if self.coverage is not None:
                assert seen is not None
                score.addcmul_(seen[:, None], (state @ self.coverage)[:, None, None])
        else:
            assert self.query is not None
            torch.mm(state, self.query.t(), out=query)
            sigma = self.additive.sigma(query, seen, out=self.hidden)
            score = self.bias + self.additive.score(sigma)[:, None]
        torch.softmax(score, -1, out=weights)
        torch.bmm(weights, self.keys, out=context)


@dataclass(frozen=True)
class Run:
    """Everything that one pass over time leaves, T + 1 slots where a step reads the one before.

    Attributes:
        gates: activated blocks of each layer [T, B, 4H].
        hidden: h of each layer [T + 1, B, H].
        cells: of each LSTM layer (c [T + 1, B, H], (1 - tanh(c)) / 2 [T, B, H]), else empty.
        fed: what each layer sees besides h and x, [T, B, N], or T + 1 slots; N may be 0.
        context: [T, B, K].
        weights: [T, B, S].
        coverage: [T + 1, B, S], or no slots without coverage.
        query: [T, B, A], W_q q of the additive score, or A = 0.
        features: [T, B, F] before dropout.
    """

    gates: list[Tensor]
    hidden: list[Tensor]
    cells: list[tuple[Tensor, Tensor]]
    fed: list[Tensor]
    context: Tensor
    weights: Tensor
    coverage: Tensor
    query: Tensor
    features: Tensor

    def asked(self, problem: Problem) -> Asked:
        """Who asked, and what came back."""
        top = self.hidden[-1]
        queries = top[:-1] if problem.feedback == "context" else top[1:]
        return Asked(queries, self.weights, self.coverage[:-1] if len(self.coverage) else None)


def _run(
    problem: Problem,
    gates: list[Tensor],
    sources: Sources,
    sizes: tuple[int, int],
    states: Sequence[State],
    feed: Tensor | None,
    coverage: Tensor | None,
    masks: Masks,
) -> Run:
    """Memory for a pass, what stands before the first step filled in; `sizes` are A and F."""
    steps, batch, _ = gates[0].shape
    source, width = sources.keys.shape[1:]
    asked, size = sizes

    def slots(count: int, *initial: Tensor | None, width: int) -> Tensor:
        memory = gates[0].new_empty(count, batch, width)
        for value in initial:
            memory[0] = 0 if value is None else value
        return memory

    def kept(values: Tensor) -> tuple[Tensor, Tensor]:
        width = values.shape[1]
        return slots(steps + 1, values, width=width), slots(steps, width=width)

    context = slots(steps, width=width)
    hidden = [slots(steps + 1, s[0], width=s[0].shape[1]) for s in states]
    fed = {"none": slots(steps, width=0), "context": context}.get(problem.feedback)
    if fed is None:
        fed = slots(steps + 1, feed, width=size)
    features = slots(steps, width=size)
    if problem.feedback == "features" and masks.features is None:
        features = fed[1:]
    above = [torch.empty_like(h[1:]) if masks.between else h[1:] for h in hidden[:-1]]
    return Run(
        gates,
        hidden,
        [kept(s[1]) for s in states if len(s) == 2],
        [fed, *above],
        context,
        slots(steps, width=source),
        slots(steps + 1, coverage, width=source) if sources.coverage is not None else
        gates[0].new_empty(0, batch, source),
        slots(steps, width=asked),
        features,
    )  # fmt: skip


@torch.no_grad()
def unroll(
    problem: Problem,
    gates: list[Tensor],
    sources: Sources,
    layers: Sequence[Layer],
    combine: Tensor,
    states: Sequence[State],
    feed: Tensor | None,
    coverage: Tensor | None,
    masks: Masks,
    resample: Callable[[int, Tensor], None] | None = None,
) -> Run:
    """The forward time loop.

    Args:
        problem: which decoder.
        gates: of each layer [T, B, 4H], overwritten: the biases and, of the lowest, the input part.
        sources: what is attended to.
        layers: the weights.
        combine: as in `DecoderWeights`.
        states: as in `reference.decode`.
        feed: likewise.
        coverage: likewise.
        masks: likewise.
        resample: called before each step with its number and the features of the step before; may
            change the gates of the step.
    """
    steps = len(gates[0])
    cell, width = CELLS[problem.cell], sources.keys.shape[2]
    asked = 0 if sources.query is None else sources.query.shape[0]
    sizes = (asked, combine.shape[0])
    run = _run(problem, gates, sources, sizes, states, feed, coverage, masks)
    of_context, of_output = (
        part.t() for part in combine.split((width, layers[-1].recurrent.shape[1]), 1)
    )
    blocks = [cell.blocks(z) for z in gates]
    hidden, fed = [h.unbind(0) for h in run.hidden], [f.unbind(0) for f in run.fed]
    cells = [
        list(zip(c[:-1].unbind(0), c[1:].unbind(0), s.unbind(0), strict=True)) for c, s in run.cells
    ]
    transposed = [(layer.fed.t(), layer.recurrent.t()) for layer in layers]
    queries = run.query.unbind(0)
    seen = run.coverage.unbind(0) if len(run.coverage) else [None] * steps
    weights, contexts = run.weights.unsqueeze(2).unbind(0), run.context.unsqueeze(2).unbind(0)
    context, features = run.context.unbind(0), run.features.unbind(0)
    feeds, before = problem.feedback == "features", problem.feedback == "context"
    last = features[0]
    for t in range(steps):
        if resample is not None:
            resample(t, last)
        if before:
            sources.attend(hidden[-1][t], queries[t], seen[t], weights[t], contexts[t])
        for index, (into, recur) in enumerate(transposed):
            z, h, new = blocks[index][t], hidden[index][t], hidden[index][t + 1]
            if len(into):
                z.fed.addmm_(fed[index][t], into)
            z.recurrent.addmm_(h, recur)
            cell.step(z, h, cells[index][t] if cells else (), new)
            if masks.between and index + 1 < len(layers):
                torch.mul(new, masks.between[index][t], out=fed[index + 1][t])
        if not before:
            sources.attend(new, queries[t], seen[t], weights[t], contexts[t])
        if len(run.coverage):
            torch.add(run.coverage[t], run.weights[t], out=run.coverage[t + 1])
        if feeds or resample is not None:
            last = tanh_(torch.mm(context[t], of_context, out=features[t]).addmm_(new, of_output))
            if masks.features is not None:
                last = last * masks.features[t]
                if feeds:
                    fed[0][t + 1].copy_(last)
    if not feeds and resample is None:
        rows = run.features.flatten(0, 1)
        torch.mm(run.context.flatten(0, 1), of_context, out=rows)
        tanh_(rows.addmm_(run.hidden[-1][1:].flatten(0, 1), of_output))
    return run


class _Backward:
    """The reverse time loop over a `Run`.

    Attributes:
        gates: gradients of the blocks before activation, of each layer [T, B, 4H].
        context: of the contexts in full [T, B, K].
        features: of the features before tanh [T, B, F]; None where they have none.
        score: of the attention's scores [T, B, S].
        query: of W_q q of an additive score [T, B, A].
        feed: of what is fed to the first step [B, F].
        coverage: of the first coverage [B, S].
        dh: of the first h of each layer.
        dc: of the first c of each layer.
    """

    def __init__(
        self,
        problem: Problem,
        run: Run,
        sources: Sources,
        layers: Sequence[Layer],
        combine: Tensor,
        masks: Masks,
        grads: Sequence[Tensor | None],
        final: Sequence[Tensor | None],
    ) -> None:
        self.run, self.sources, self.layers, self.masks = run, sources, layers, masks
        self.cell, self.asked = CELLS[problem.cell], run.asked(problem)
        self.feeds, self.before = (problem.feedback == f for f in ("features", "context"))
        self.external, context, outputs, self.weights = grads
        width, count = run.context.shape[2], len(layers)
        self.of_context, self.of_output = combine.split((width, combine.shape[1] - width), 1)
        self.gates = [torch.empty_like(z) for z in run.gates]
        self.score, self.query = torch.empty_like(run.weights), torch.empty_like(run.query)
        self.feed = torch.zeros_like(run.features[0])
        self.coverage = torch.zeros_like(run.weights[0])
        self.additive = None if sources.additive is None else AdditiveGrads(sources.additive)
        first, second = final[:count], final[count:] or [None] * count
        self.dh, self.dc = (
            [_start(d, h[0]) for d, h in zip(part, run.hidden, strict=True)]
            for part in (first, second)
        )
        self.context, self.features = _start(context, run.context), None
        if self.feeds:
            self.features = torch.empty_like(run.features)
        elif self.external is not None:
            self.features = self._scale(slice(None)).mul_(self.external)
            rows = self.features.flatten(0, 1)
            self.context.flatten(0, 1).addmm_(rows, self.of_context)
            outputs = _start(outputs, run.hidden[-1][1:])
            outputs.flatten(0, 1).addmm_(rows, self.of_output)
        self.outputs = None if outputs is None else outputs.unbind(0)

    def _scale(self, now: slice) -> Tensor:
        """Factor of the features' gradient at some steps: of tanh, and of dropout."""
        features = self.run.features[now]
        scale = 1 - features * features
        return scale if self.masks.features is None else scale.mul_(self.masks.features[now])

    def loop(self) -> None:
        """All steps, from the last to the first."""
        run, additive, steps = self.run, self.sources.additive, len(self.run.weights)
        self.d_blocks = [self.cell.blocks(d) for d in self.gates]
        self.d_context, self.contexts = self.context.unbind(0), self.context.unsqueeze(2).unbind(0)
        self.scores, self.given = (
            self.score.unsqueeze(2).unbind(0),
            run.weights.unsqueeze(2).unbind(0),
        )
        sizes = (run.weights.shape[2] * run.query.shape[2], *(z.shape[2] for z in run.gates))
        for first, last in chunks(steps, run.weights.shape[1] * max(sizes)):
            now, slope = slice(first, last), None
            factors = [self._factors(index, now) for index in range(len(run.gates))]
            scale = self._scale(now).unbind(0) if self.feeds else ()
            seen = None if self.asked.coverage is None else self.asked.coverage[now]
            if additive is not None:
                sigma = additive.sigma(run.query[now], seen)
                slope = torch.addcmul(sigma, sigma, sigma, value=-1)
            for t in reversed(range(first, last)):
                if self.feeds:
                    self._features(t, scale[t - first])
                if self.outputs is not None:
                    self.dh[-1].add_(self.outputs[t])
                its = None if slope is None else slope[t - first]
                if not self.before:
                    self._attention(t, its)
                for index in reversed(range(len(factors))):
                    self._layer(t, index, factors[index][t - first])
                if self.before:
                    self._attention(t, its)
            if self.additive is not None and slope is not None:
                self.additive.add(sigma, slope, self.score[now], seen)

    def _factors(self, index: int, now: slice) -> list[tuple[Tensor, ...]]:
        """Those of a layer's gradients, for each of some steps."""
        cells = self.run.cells[index] if self.run.cells else ()
        h = self.run.hidden[index][:-1]
        found = self.cell.factors(self.run.gates[index][now], h[now], [c[now] for c in cells])
        return list(zip(*(f.unbind(0) for f in found), strict=True))

    def _features(self, t: int, scale: Tensor) -> None:
        """From what was fed back, and the result, to context and output."""
        assert self.features is not None
        if self.external is not None:
            self.feed.add_(self.external[t])
        grad = torch.mul(self.feed, scale, out=self.features[t])
        self.d_context[t].addmm_(grad, self.of_context)
        self.dh[-1].addmm_(grad, self.of_output)

    def _layer(self, t: int, index: int, factors: tuple[Tensor, ...]) -> None:
        """Through one layer's cell to its h, c and what it was fed."""
        d, dh, layer = self.d_blocks[index][t], self.dh[index], self.layers[index]
        self.cell.grad(d, dh, self.dc[index], factors)
        dh.addmm_(d.recurrent, layer.recurrent, beta=int(self.cell.direct))
        if index > 0 and self.masks.between:
            self.dh[index - 1].addcmul_(d.fed @ layer.fed, self.masks.between[index - 1][t])
        elif index > 0:
            self.dh[index - 1].addmm_(d.fed, layer.fed)
        elif self.feeds:
            torch.mm(d.fed, layer.fed, out=self.feed)
        elif self.before:
            self.d_context[t].addmm_(d.fed, layer.fed)

    def _attention(self, t: int, slope: Tensor | None) -> None:
        """Add to the gradient of the state that asked, from that of the context."""
        sources, dh, score = self.sources, self.dh[-1], self.score[t]
        d_weights = torch.bmm(self.contexts[t], sources.keys_across)
        if self.weights is not None:
            d_weights.add_(self.weights[t][:, None])
        if sources.coverage is not None:
            d_weights.add_(self.coverage[:, None])
        torch.ops.aten._softmax_backward_data.out(
            d_weights, self.given[t], -1, score.dtype, grad_input=self.scores[t]
        )
        if sources.additive is None:
            dh[:, None].baddbmm_(self.scores[t], sources.projected)
            if sources.coverage is not None:
                seen = (score * self.run.coverage[t]).sum(-1, keepdim=True)
                dh.addcmul_(seen, sources.coverage)
                asks = self.asked.queries[t] @ sources.coverage
                self.coverage.addcmul_(score, asks[:, None])
        else:
            assert sources.query is not None and slope is not None
            dh.addmm_(
                sources.additive.query_grad(score, slope, out=self.query[t]),
                sources.query,
            )
            if sources.coverage is not None:
                self.coverage.add_(sources.additive.coverage_grad(score, slope))


def _start(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient to add to."""
    if grad is None:
        return torch.zeros_like(like)
    return grad.clone(memory_format=torch.contiguous_format)


class _Decoder(torch.autograd.Function):
    """Attaches the gradient to a `Run`; the forward pass has been made."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        run: Run,
        sources: Sources,
        masks: Masks,
        count: int,
        x: Tensor,
        keys: Tensor,
        projected: Tensor,
        query: Tensor | None,
        energy: Tensor | None,
        coverage_weight: Tensor | None,
        combine: Tensor,
        feed: Tensor | None,
        coverage: Tensor | None,
        *rest: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """`rest` holds the four weights of each of `count` layers, and the states."""
        weights, states = rest[: 4 * count], rest[4 * count :]
        ctx.problem, ctx.masks, ctx.count, ctx.states = problem, masks, count, len(states)
        ctx.given = (feed is not None, coverage is not None)
        ctx.save_for_backward(
            x, combine, sources.keys, sources.projected, query, energy, coverage_weight, *weights,
            run.context, run.weights, run.coverage, run.query, run.features, *run.gates,
            *run.hidden, *run.fed, *(c for pair in run.cells for c in pair),
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        features = run.features
        if masks.features is not None:
            features = features * masks.features
        final = [*(h[-1] for h in run.hidden), *(c[-1] for c, _ in run.cells)]
        return features, run.context, run.hidden[-1][1:], run.weights, *final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the backward of the attention decoder with backend='torch' is not differentiable: "
                "use backend='reference' for gradients of gradients (create_graph=True)"
            )
        n, cell = ctx.count, CELLS[ctx.problem.cell]
        x, combine, keys, projected, *rest = ctx.saved_tensors
        sources, rest = Sources(keys, projected, None, *rest[:3]), rest[3:]
        weights = [LayerWeights(*rest[4 * i : 4 * i + 4]) for i in range(n)]
        context, alpha, coverage, query, features, *rest = rest[4 * n :]
        gates, hidden, fed, flat = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
        cells = list(zip(flat[::2], flat[1::2], strict=True))
        run = Run(gates, hidden, cells, fed, context, alpha, coverage, query, features)
        layers = split_layers(cell, weights, x.shape[2])
        back = _Backward(
            ctx.problem, run, sources, layers, combine, ctx.masks, grads[:4], grads[4:]
        )
        back.loop()
        d_combine = None
        if back.features is not None:
            joined = (context, hidden[-1][1:])
            d_combine = torch.cat([product_grad(back.features, part) for part in joined], 1)
        d_layers = [
            d
            for i, dz in enumerate(back.gates)
            for d in _layer_grads(
                cell, weights[i], dz, ([x] if i == 0 else []) + [fed[i]], hidden[i]
            )
        ]
        dx = None
        if ctx.needs_input_grad[5]:
            dx = cell.split(back.gates[0])[0] @ layers[0].given
        return (
            *(None,) * 5,
            dx,
            *source_grads(back.asked, back.context, back.score, back.query, back.additive),
            d_combine,
            back.feed if ctx.given[0] else None,
            back.coverage if ctx.given[1] else None,
            *d_layers,
            *[*back.dh, *back.dc][: ctx.states],
        )


def _layer_grads(
    cell: Cell, layer: LayerWeights, dz: Tensor, inputs: Sequence[Tensor], hidden: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of a layer's weights, from those of its blocks and what its W_ih and W_hh saw."""
    fed, recurrent = cell.split(dz)
    d_input = torch.cat([product_grad(fed, part[: len(dz)]) for part in inputs], 1)
    d_recurrent = cell.turn(product_grad(recurrent, hidden[:-1]), back=True)
    total = cell.split(dz.sum((0, 1)))
    return (
        d_input,
        d_recurrent,
        None if layer.b_ih is None else total[0],
        None if layer.b_hh is None else cell.turn(total[1], back=True),
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
    feed = feed if problem.feedback == "features" else None
    symbols = resample = None
    if sampling is not None:
        symbols, x = sampling.symbols.clone(), sampling.inputs(sampling.symbols)
    with torch.no_grad():
        cell, attention = CELLS[problem.cell], _detached(weights[2:])
        sources = Sources(keys.detach(), projected.detach(), lengths, *attention)
        layers = split_layers(
            cell, [LayerWeights(*_detached(w)) for w in weights.layers], x.shape[2]
        )
        biases = [input_bias(cell, layer) for layer in weights.layers]
        gates = [b.expand(*x.shape[:2], -1).contiguous() for b in biases]
        lowest, given = cell.split(gates[0])[0], layers[0].given
        lowest.flatten(0, 1).addmm_(x.flatten(0, 1), given.t())
        if sampling is not None and symbols is not None:
            resample = _resampler(sampling, symbols, lowest, given, cell.split(biases[0])[0])
        run = unroll(
            problem, gates, sources, layers, weights.combine.detach(), states, feed, coverage,
            masks, resample,
        )  # fmt: skip
    if sampling is not None and symbols is not None:
        x = sampling.inputs(symbols)
    flat = [state[i] for i in range(len(states[0])) for state in states]
    features, context, outputs, alpha, *final = _Decoder.apply(
        problem, run, sources, masks, len(layers), x, keys, projected, *weights[2:],
        weights.combine, feed, coverage, *(w for layer in weights.layers for w in layer), *flat,
    )  # fmt: skip
    after = [tuple(final[i :: len(states)]) for i in range(len(states))]
    return Decoded(features, outputs, context, alpha, after, symbols)


def _detached(tensors: Sequence[Any]) -> list[Any]:
    return [None if t is None else t.detach() for t in tensors]


def _resampler(
    sampling: Sampling, symbols: Tensor, gates: Tensor, matrix: Tensor, bias: Tensor
) -> Callable[[int, Tensor], None]:
    """Replaces symbols, and the gates that their inputs reach, as the loop goes on."""
    times = sampling.replaced.any(1).tolist()

    def resample(t: int, features: Tensor) -> None:
        if t == 0 or not times[t]:
            return
        symbols[t] = sampling.draw(t, features)
        x = sampling.embed(symbols[t])
        x = x if sampling.mask is None else x * sampling.mask[t]
        torch.addmm(bias, x, matrix.t(), out=gates[t])

    return resample
