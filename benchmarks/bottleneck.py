"""What a source of any length loses in one state: an encoder-decoder with and without attention.

Both models learn to write strings of digits backwards from the same strings of up to `LONGEST`
digits, with the same sizes and steps. `python -m benchmarks bottleneck` trains and scores them, in
minutes on one core, and `python -m benchmarks.bottleneck` draws results/bottleneck.png: the share
of digits that are right against the length of the source, lengths never trained on included.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_modules.search import greedy_search
from lightning_modules.seq2seq_model import Seq2SeqModel

from .long_dependencies import RESULTS
from .registry import Case, Row, benchmark, read

ATTENTIONS = ("none", "additive")
DIGITS, BEGIN, END = 10, 1, 2  # 0 is padding, and digits come after the end symbol
LONGEST, LENGTHS = 20, (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28)
HIDDEN, EMBEDDING, BATCH, STEPS, ROWS, LEARNING_RATE, SEEDS = 64, 32, 64, 1500, 200, 3e-3, (0, 1)


def reversal(lengths: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw strings of digits, and write each backwards.

    Args:
        lengths: int64 [B].
        draw: where the digits come from.

    Returns:
        The sources, int64 [B, S], 0 past the lengths, and the targets [B, S + 2], between the begin
        and the end symbol.
    """
    longest = int(lengths.max())
    source = torch.randint(END + 1, END + 1 + DIGITS, (len(lengths), longest), generator=draw)
    places = torch.arange(longest)
    source = source.masked_fill(places >= lengths[:, None], 0)
    target = torch.zeros(len(lengths), longest + 2, dtype=torch.int64)
    backwards = source.gather(1, (lengths[:, None] - 1 - places).clamp(min=0))
    target[:, 1:-1] = backwards.masked_fill(places >= lengths[:, None], 0)
    target[:, 0] = BEGIN
    target[torch.arange(len(lengths)), lengths + 1] = END
    return source, target


def train(attention: str, seed: int, steps: int = STEPS, longest: int = LONGEST) -> Seq2SeqModel:
    """Train one model.

    Args:
        attention: of `ATTENTIONS`.
        seed: of its weights and of the strings it sees.
        steps: optimizer steps.
        longest: digits of the longest source.
    """
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    size = END + 1 + DIGITS
    sizes: dict[str, Any] = {"encoder_sizes": [HIDDEN], "decoder_sizes": [2 * HIDDEN]}
    model = Seq2SeqModel(size, size, EMBEDDING, attention=attention, **sizes)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        lengths = torch.randint(1, longest + 1, (BATCH,), generator=draw)
        source, target = reversal(lengths, draw)
        logits, _ = model(source, lengths, target[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def score(model: Seq2SeqModel, length: int, rows: int = ROWS) -> Row:
    """Let a model write strings of one length backwards, freely.

    Args:
        model: see `train`.
        length: digits in each source.
        rows: how many, the same for every model.

    Returns:
        `digits`, the share of right digits in their right places, and `strings`, of strings that
        are right as a whole, the end included.
    """
    lengths = torch.full((rows,), length)
    source, target = reversal(lengths, torch.Generator().manual_seed(length))
    state = model.encode(source, lengths)
    found = greedy_search(model.step, state, lengths + 1, BEGIN, END)
    written = torch.zeros(rows, length + 1, dtype=torch.int64)
    written[:, : found.symbols.shape[2]] = found.symbols[:, 0]
    right = written == target[:, 1:]
    digits, strings = right[:, :-1].double().mean(), right.all(1).double().mean()
    return {"length": length, "digits": round(float(digits), 4), "strings": float(strings)}


def _measure(attention: str, seed: int) -> Iterator[Row]:
    model = train(attention, seed)
    for length in LENGTHS:
        yield score(model, length)


def _curves(rows: Sequence[Mapping[str, str]], attention: str) -> dict[int, float]:
    """The mean share of right digits over the seeds, for each length."""
    own = [row for row in rows if row["attention"] == attention]
    return {
        length: sum(values) / len(values)
        for length in LENGTHS
        if (values := [float(r["digits"]) for r in own if int(r["length"]) == length])
    }


def _shares(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for attention in ATTENTIONS:
        shares = [f"{n}: {share:.3f}" for n, share in _curves(rows, attention).items()]
        yield f"attention {attention}: right digits by source length {', '.join(shares)}"


@benchmark(_shares)
def bottleneck() -> Iterator[Case]:
    """Train each model from each seed, and score it on each length."""
    for seed in SEEDS:
        for attention in ATTENTIONS:
            yield {"attention": attention, "seed": seed}, partial(_measure, attention, seed)


def draw(path: Path) -> Path:
    """Draw the curves of a result file beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    rows = read(path)
    for number, attention in enumerate(ATTENTIONS):
        curve = _curves(rows, attention)
        label = "one state (no attention)" if attention == "none" else f"{attention} attention"
        axis.plot([*curve], [*curve.values()], color=f"C{number}", label=label)
        own = [row for row in rows if row["attention"] == attention]
        lengths, digits = ([float(row[name]) for row in own] for name in ("length", "digits"))
        axis.plot(lengths, digits, ".", color=f"C{number}")
    axis.axvline(LONGEST, color="grey", linestyle="--", label="longest in training")
    axis.axhline(1 / DIGITS, color="grey", linestyle=":", label="chance")
    axis.set(
        title="Writing digits backwards (dots: seeds, lines: means)",
        xlabel="digits of the source",
        ylim=(0, 1.02),
    )
    axis.set_ylabel("right digits in their places")
    axis.legend(fontsize="small")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    return picture


if __name__ == "__main__":
    print(draw(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "bottleneck.csv"))
