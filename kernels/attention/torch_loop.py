"""The attention decoder in plain torch operations, the backward through time written out: CPU path.

Every cell is four blocks of H, in an order in which h_{t-1} and what is fed each reach neighbours,
by one product: i f g o of the LSTM, both reach all; a r z n of the GRU, where a is the recurrent
part of n. Outside the loop is what needs no order in time: the input's product, the gradients of
all weights as products over T, those of keys and projected keys as batched products. Factors of the
gradient that do not depend on what comes back are computed for several steps at once, and views are
made once for all of them, because on small tensors they cost as much as sums.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..torch_loop import Saved, gate_factors, tanh_, tanh_grad, times_tanh
from ..untraced import untraced
from .sources import AdditiveGrads, AdditiveScore, Asked, chunks, hide_padding, source_grads
from .spec import Decoded, DecoderWeights, LayerWeights, Masks, Problem, Sampling, State


def by_step(memory: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Views of the first rows of each step of [T or T + 1, B, *]."""
    steps = zip(memory.unbind(0), counts, strict=False)
    return [step if len(step) == count else step[:count] for step, count in steps]


class Rows:
    """Which rows of [T, B] there are: the first ones of each step.

    Args:
        counts: how many at each step, not growing.
        batch: B.
        device: of the tensors.
    """

    def __init__(self, counts: Sequence[int], batch: int, device: torch.device) -> None:
        self.counts, self.shape, self.places = [*counts], (len(counts), batch), None
        self.firsts = [0, *itertools.accumulate(counts)]
        if counts[-1] < batch:
            number = torch.arange(batch, device=device)
            inside = number < torch.tensor(counts, device=device)[:, None]
            self.places = inside.flatten().nonzero().squeeze(1)
            self.ends = inside.sum(0), number

    def pack(self, values: Tensor) -> Tensor:
        """Those of [T, B, *], one after the other, as [N, *]."""
        flat = values.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def unpack(self, values: Tensor) -> Tensor:
        """Back from [N, *], with zeros where there is no row."""
        if self.places is None:
            return values.unflatten(0, self.shape)
        steps, batch = self.shape
        flat = values.new_zeros(steps * batch, values.shape[1])
        return flat.index_copy_(0, self.places, values).unflatten(0, self.shape)

    def chunks(self, numbers: int) -> Iterator[tuple[int, int]]:
        """Steps [first, last) with as many rows each, as `sources.chunks` has them."""
        last = len(self.counts)
        for _, same in itertools.groupby(reversed(self.counts)):
            start = last - len(list(same))
            yield from ((start + a, start + b) for a, b in chunks(last - start, numbers))
            last = start

    def last(self, values: Tensor) -> Tensor:
        """Of [T + 1, B, *] what stands after the last step of each row."""
        return values[-1] if self.places is None else values[self.ends]

    def new(self, like: Tensor, steps: int, width: int) -> Tensor:
        """Memory [steps, B, width], zeros unless all will be filled in."""
        make = like.new_empty if self.places is None else like.new_zeros
        return make(steps, self.shape[1], width)


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

    def blocks(self, tensor: Tensor, counts: list[int]) -> list[Blocks]:
        """Views of the blocks [N, 4H] of each step."""
        apart = tensor.unflatten(1, (4, -1))
        parts = zip(*(p.split(counts) for p in apart.unbind(1)), strict=True)
        joint = apart[:, slice(*self.joint)].split(counts)
        fed, recurrent = (part.split(counts) for part in self.split(tensor))
        return [*map(Blocks, apart.split(counts), parts, joint, fed, recurrent)]

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

    def first(self, count: int) -> Sources:
        """Those of the first rows."""
        if count == len(self.keys):
            return self
        found = copy.copy(self)
        for name in ("keys", "projected", "keys_across", "across", "bias", "hidden"):
            if hasattr(self, name):
                setattr(found, name, getattr(self, name)[:count])
        if self.additive is not None:
            found.additive = self.additive.first(count)
        return found

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
        gates: activated blocks of each layer [N, 4H], N the rows of all steps.
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
    rows: Rows,
) -> Run:
    """Memory for a pass, what stands before the first step filled in; `sizes` are A and F."""
    steps, batch = rows.shape
    source, width = sources.keys.shape[1:]
    asked, size = sizes

    def slots(count: int, *initial: Tensor | None, width: int) -> Tensor:
        memory = rows.new(gates[0], count, width)
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
    rows: Rows,
    resample: Callable[[int, Tensor], None] | None = None,
) -> Run:
    """The forward time loop.

    Args:
        problem: which decoder.
        gates: of each layer [N, 4H], overwritten: the biases and, of the lowest, the input part.
        sources: what is attended to.
        layers: the weights.
        combine: as in `DecoderWeights`.
        states: as in `reference.decode`.
        feed: likewise.
        coverage: likewise.
        masks: likewise.
        rows: which rows each step has.
        resample: called before each step with its number and the features of the step before; may
            change the gates of the step.
    """
    counts = rows.counts
    cell, width = CELLS[problem.cell], sources.keys.shape[2]
    asked = 0 if sources.query is None else sources.query.shape[0]
    sizes = (asked, combine.shape[0])
    run = _run(problem, gates, sources, sizes, states, feed, coverage, masks, rows)
    of_context, of_output = (
        part.t() for part in combine.split((width, layers[-1].recurrent.shape[1]), 1)
    )

    def views(memory: Tensor) -> list[Tensor]:
        return by_step(memory, counts)

    blocks = [cell.blocks(z, counts) for z in gates]
    before, after = ([views(h[first:]) for h in run.hidden] for first in (0, 1))
    fed = [views(f) for f in run.fed]
    cells = [list(zip(*map(views, (c, c[1:], s)), strict=True)) for c, s in run.cells]
    transposed = [(layer.fed.t(), layer.recurrent.t()) for layer in layers]
    queries, between = views(run.query), [views(mask) for mask in masks.between]
    seen: Sequence[Any] = views(run.coverage) if len(run.coverage) else [None] * len(counts)
    covered = views(run.coverage[1:])
    weights, contexts = views(run.weights.unsqueeze(2)), views(run.context.unsqueeze(2))
    context, features = views(run.context), views(run.features)
    dropped = None if masks.features is None else views(masks.features)
    feeds, looks_first = problem.feedback == "features", problem.feedback == "context"
    next_fed = views(run.fed[0][1:]) if feeds else []
    last = features[0]
    for t, count in enumerate(counts):
        if count < len(sources.keys):
            sources = sources.first(count)
        if resample is not None:
            resample(t, last)
        if looks_first:
            sources.attend(before[-1][t], queries[t], seen[t], weights[t], contexts[t])
        for index, (into, recur) in enumerate(transposed):
            z, h, new = blocks[index][t], before[index][t], after[index][t]
            if len(into):
                z.fed.addmm_(fed[index][t], into)
            z.recurrent.addmm_(h, recur)
            cell.step(z, h, cells[index][t] if cells else (), new)
            if between and index + 1 < len(layers):
                torch.mul(new, between[index][t], out=fed[index + 1][t])
        if not looks_first:
            sources.attend(new, queries[t], seen[t], weights[t], contexts[t])
        if covered:
            torch.add(seen[t], weights[t].squeeze(1), out=covered[t])
        if feeds or resample is not None:
            last = tanh_(torch.mm(context[t], of_context, out=features[t]).addmm_(new, of_output))
            if dropped is not None:
                last = last * dropped[t]
                if feeds:
                    next_fed[t].copy_(last)
    if not feeds and resample is None:
        into = run.features.flatten(0, 1)
        torch.mm(run.context.flatten(0, 1), of_context, out=into)
        tanh_(into.addmm_(run.hidden[-1][1:].flatten(0, 1), of_output))
    return run


class _Backward:
    """The reverse time loop over a `Run`.

    Attributes:
        gates: gradients of the blocks before activation, of each layer [N, 4H].
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
        rows: Rows,
    ) -> None:
        self.run, self.sources, self.layers, self.masks = run, sources, layers, masks
        self.rows, self.counts, self.now_count = rows, rows.counts, 0
        self.cell, self.asked = CELLS[problem.cell], run.asked(problem)
        self.feeds, self.before = (problem.feedback == f for f in ("features", "context"))
        external, context, outputs, weights = grads
        width, count = run.context.shape[2], len(layers)
        self.of_context, self.of_output = combine.split((width, combine.shape[1] - width), 1)
        self.gates = [torch.empty_like(z) for z in run.gates]
        self.score = rows.new(run.weights, *run.weights.shape[::2])
        self.query = torch.empty_like(run.query)
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
        elif external is not None:
            self.features = self._scale((slice(None), slice(None))).mul_(external)
            features = self.features.flatten(0, 1)
            self.context.flatten(0, 1).addmm_(features, self.of_context)
            outputs = _start(outputs, run.hidden[-1][1:])
            outputs.flatten(0, 1).addmm_(features, self.of_output)
        self.external, self.outputs, self.weights = map(self._views, (external, outputs, weights))

    def _views(self, memory: Tensor | None) -> list[Tensor] | None:
        return None if memory is None else by_step(memory, self.counts)

    def _scale(self, now: tuple[slice, slice]) -> Tensor:
        """Factor of the features' gradient at some steps: of tanh, and of dropout."""
        features = self.run.features[now]
        scale = 1 - features * features
        return scale if self.masks.features is None else scale.mul_(self.masks.features[now])

    def loop(self) -> None:
        """All steps, from the last to the first."""
        run, counts = self.run, self.counts
        self.d_blocks = [self.cell.blocks(d, counts) for d in self.gates]
        self.d_context = by_step(self.context, counts)
        self.contexts, self.scores, self.given = (
            by_step(memory.unsqueeze(2), counts)
            for memory in (self.context, self.score, run.weights)
        )
        self.queries, self.d_query = (
            by_step(self.asked.queries, counts),
            by_step(self.query, counts),
        )
        self.covered = self._views(self.asked.coverage)
        self.d_features = self._views(self.features)
        self.between = [by_step(mask, counts) for mask in self.masks.between]
        sizes = (run.weights.shape[2] * run.query.shape[2], *(z.shape[1] for z in run.gates))
        parts = [*self.rows.chunks(run.weights.shape[1] * max(sizes))]
        most = max((last - first) * counts[first] for first, last in parts)
        memory = run.query.new_empty(2, most * self.sources.projected[0].numel())
        for first, last in parts:
            now = slice(first, last), slice(counts[first])
            factors = [self._factors(index, now) for index in range(len(run.gates))]
            scale = self._scale(now).unbind(0) if self.feeds else ()
            seen = None if self.asked.coverage is None else self.asked.coverage[now]
            additive, slope = self.sources.first(counts[first]).additive, None
            if additive is not None:
                size = (last - first, *additive.projected.shape)
                sigma, slope = (m[: math.prod(size)].view(size) for m in memory)
                additive.sigma(run.query[now], seen, out=sigma)
                torch.addcmul(sigma, sigma, sigma, value=-1, out=slope)
            for t in reversed(range(first, last)):
                self._step(t, t - first, factors, scale, slope)
            if self.additive is not None and slope is not None:
                self.additive.add(sigma, slope, self.score[now], seen)

    def _step(
        self,
        t: int,
        place: int,
        factors: Sequence[Sequence[tuple[Tensor, ...]]],
        scale: Sequence[Tensor],
        slope: Tensor | None,
    ) -> None:
        """One step, whose factors are those at a place."""
        self._narrow(self.counts[t])
        if self.feeds:
            self._features(t, scale[place])
        if self.outputs is not None:
            self.now_h[-1].add_(self.outputs[t])
        its = None if slope is None else slope[place]
        if not self.before:
            self._attention(t, its)
        for index in reversed(range(len(factors))):
            self._layer(t, index, factors[index][place])
        if self.before:
            self._attention(t, its)

    def _narrow(self, count: int) -> None:
        """Look at the first rows of what goes from step to step."""
        if self.now_count == count:
            return
        self.now_count, self.now_sources = count, self.sources.first(count)
        self.now_h, self.now_c = ([d[:count] for d in part] for part in (self.dh, self.dc))
        self.now_feed, self.now_coverage = self.feed[:count], self.coverage[:count]

    def _factors(self, index: int, now: tuple[slice, slice]) -> list[tuple[Tensor, ...]]:
        """Those of a layer's gradients, for each of some steps."""
        cells = self.run.cells[index] if self.run.cells else ()
        h, (steps, rows) = self.run.hidden[index], now
        gates = self.run.gates[index][self.rows.firsts[steps.start] : self.rows.firsts[steps.stop]]
        gates = gates.unflatten(0, (steps.stop - steps.start, rows.stop))
        found = self.cell.factors(gates, h[now], [c[now] for c in cells])
        return list(zip(*(f.unbind(0) for f in found), strict=True))

    def _features(self, t: int, scale: Tensor) -> None:
        """From what was fed back, and the result, to context and output."""
        assert self.d_features is not None
        if self.external is not None:
            self.now_feed.add_(self.external[t])
        grad = torch.mul(self.now_feed, scale, out=self.d_features[t])
        self.d_context[t].addmm_(grad, self.of_context)
        self.now_h[-1].addmm_(grad, self.of_output)

    def _layer(self, t: int, index: int, factors: tuple[Tensor, ...]) -> None:
        """Through one layer's cell to its h, c and what it was fed."""
        d, dh, layer = self.d_blocks[index][t], self.now_h[index], self.layers[index]
        self.cell.grad(d, dh, self.now_c[index], factors)
        dh.addmm_(d.recurrent, layer.recurrent, beta=int(self.cell.direct))
        if index > 0 and self.between:
            self.now_h[index - 1].addcmul_(d.fed @ layer.fed, self.between[index - 1][t])
        elif index > 0:
            self.now_h[index - 1].addmm_(d.fed, layer.fed)
        elif self.feeds:
            torch.mm(d.fed, layer.fed, out=self.now_feed)
        elif self.before:
            self.d_context[t].addmm_(d.fed, layer.fed)

    def _attention(self, t: int, slope: Tensor | None) -> None:
        """Add to the gradient of the state that asked, from that of the context."""
        sources, dh, score = self.now_sources, self.now_h[-1], self.scores[t].squeeze(1)
        d_weights = torch.bmm(self.contexts[t], sources.keys_across)
        if self.weights is not None:
            d_weights.add_(self.weights[t][:, None])
        if sources.coverage is not None:
            d_weights.add_(self.now_coverage[:, None])
        torch.ops.aten._softmax_backward_data.out(
            d_weights, self.given[t], -1, score.dtype, grad_input=self.scores[t]
        )
        if sources.additive is None:
            dh[:, None].baddbmm_(self.scores[t], sources.projected)
            if sources.coverage is not None and self.covered is not None:
                seen = (score * self.covered[t]).sum(-1, keepdim=True)
                dh.addcmul_(seen, sources.coverage)
                asks = self.queries[t] @ sources.coverage
                self.now_coverage.addcmul_(score, asks[:, None])
        else:
            assert sources.query is not None and slope is not None
            dh.addmm_(
                sources.additive.query_grad(score, slope, out=self.d_query[t]),
                sources.query,
            )
            if sources.coverage is not None:
                self.now_coverage.add_(sources.additive.coverage_grad(score, slope))


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
        rows: Rows,
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
        ctx.rows = rows
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
        final = [rows.last(v) for v in (*run.hidden, *(c for c, _ in run.cells))]
        return features, run.context, run.hidden[-1][1:], run.weights, *final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the backward of the attention decoder with backend='torch' is not differentiable: "
                "use backend='reference' for gradients of gradients (create_graph=True)"
            )
        n, cell, rows = ctx.count, CELLS[ctx.problem.cell], ctx.rows
        x, combine, keys, projected, *rest = ctx.saved_tensors
        sources, rest = Sources(keys, projected, None, *rest[:3]), rest[3:]
        weights = [LayerWeights(*rest[4 * i : 4 * i + 4]) for i in range(n)]
        context, alpha, coverage, query, features, *rest = rest[4 * n :]
        gates, hidden, fed, flat = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
        cells = list(zip(flat[::2], flat[1::2], strict=True))
        run = Run(gates, hidden, cells, fed, context, alpha, coverage, query, features)
        layers = split_layers(cell, weights, x.shape[2])
        back = _Backward(
            ctx.problem, run, sources, layers, combine, ctx.masks, grads[:4], grads[4:], rows
        )
        back.loop()
        d_combine = None
        if back.features is not None:
            joined, d_features = (context, hidden[-1][1:]), rows.pack(back.features)
            d_combine = torch.cat([d_features.t() @ rows.pack(v) for v in joined], 1)
        d_layers = [
            d
            for i, dz in enumerate(back.gates)
            for d in _layer_grads(
                cell,
                weights[i],
                dz,
                [rows.pack(v) for v in (*([x] if i == 0 else []), fed[i][: len(x)])],
                rows.pack(hidden[i][:-1]),
            )
        ]
        dx = None
        if ctx.needs_input_grad[6]:
            dx = rows.unpack(cell.split(back.gates[0])[0] @ layers[0].given)
        asked, d_query = back.asked, back.query
        if back.additive is not None:
            asked = asked._replace(queries=rows.pack(asked.queries)[None])
            d_query = rows.pack(d_query)[None]
        return (
            *(None,) * 6,
            dx,
            *source_grads(asked, back.context, back.score, d_query, back.additive),
            d_combine,
            back.feed if ctx.given[0] else None,
            back.coverage if ctx.given[1] else None,
            *d_layers,
            *[*back.dh, *back.dc][: ctx.states],
        )


def _layer_grads(
    cell: Cell, layer: LayerWeights, dz: Tensor, inputs: list[Tensor], seen: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of a layer's weights, from those of its blocks and what its W_ih and W_hh saw."""
    fed, recurrent = cell.split(dz)
    if cell.fed == cell.recurrent:  # one product is faster than several
        size = layer.w_ih.shape[1], layer.w_hh.shape[1]
        d_input, d_recurrent = (fed.t() @ torch.cat([*inputs, seen], 1)).split(size, 1)
    else:
        d_input = fed.t() @ torch.cat(inputs, 1)
        d_recurrent = cell.turn(recurrent.t() @ seen, back=True)
    total = cell.split(dz.sum(0))
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
    counts: Sequence[int] | None = None,
) -> Decoded:
    """A whole decoding; arguments and results are those of `reference.decode`.

    `counts`, not growing, says how many of the first rows each step has; None: all. Where a step
    lacks a row its results are zero, and the final states are those of each row's last step.
    """
    rows = Rows([x.shape[1]] * len(x) if counts is None else counts, x.shape[1], x.device)
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
        given, seen = layers[0].given, rows.pack(x)
        if cell.fed == (0, 4):
            lowest = torch.addmm(biases[0], seen, given.t())
        else:
            lowest = biases[0].repeat(len(seen), 1)
            cell.split(lowest)[0].addmm_(seen, given.t())
        gates = [lowest, *(b.repeat(len(seen), 1) for b in biases[1:])]
        if sampling is not None and symbols is not None:
            steps = cell.split(lowest)[0].split(rows.counts)
            resample = _resampler(sampling, symbols, steps, given, cell.split(biases[0])[0])
        run = unroll(
            problem, gates, sources, layers, weights.combine.detach(), states, feed, coverage,
            masks, rows, resample,
        )  # fmt: skip
    if sampling is not None and symbols is not None:
        x = sampling.inputs(symbols)
    flat = [state[i] for i in range(len(states[0])) for state in states]
    features, context, outputs, alpha, *final = _Decoder.apply(
        problem, run, sources, masks, rows, len(layers), x, keys, projected, *weights[2:],
        weights.combine, feed, coverage, *(w for layer in weights.layers for w in layer), *flat,
    )  # fmt: skip
    after = [tuple(final[i :: len(states)]) for i in range(len(states))]
    return Decoded(features, outputs, context, alpha, after, symbols)


def _detached(tensors: Sequence[Any]) -> list[Any]:
    return [None if t is None else t.detach() for t in tensors]


def _resampler(
    sampling: Sampling, symbols: Tensor, gates: Sequence[Tensor], matrix: Tensor, bias: Tensor
) -> Callable[[int, Tensor], None]:
    """Replaces symbols, and the gates that their inputs reach, as the loop goes on."""
    times = sampling.replaced.any(1).tolist()

    def resample(t: int, features: Tensor) -> None:
        if t == 0 or not times[t]:
            return
        symbols[t] = sampling.draw(t, features)
        torch.addmm(bias, sampling.inputs(symbols[t], t), matrix.t(), out=gates[t])

    return resample
