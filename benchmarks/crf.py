"""The CRF against pytorch-crf's and flair's: loss with its gradient, and decoding.

Each rival is the installed package itself. Of flair the two modules with its CRF are enough: where
the rest of it cannot be imported (`pip install --no-deps flair`) they are loaded alone.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedrnn
from kernels.crf import plan

from .gpu_kernels import microseconds
from .registry import Case, Row, benchmark, interleave

STEPS, BATCH, TAGS = 64, 32, 20
ROUNDS = 41
START, STOP = "<START>", "<STOP>"

Run = Callable[[], object]


class Problem:
    """A batch of sentences, the longest first as flair wants them, and the scores of one CRF."""

    def __init__(self, device: str, shortest: int, num_tags: int) -> None:
        torch.manual_seed(0)
        self.num_tags = num_tags
        lengths = torch.randint(shortest, STEPS + 1, (BATCH,)).sort(descending=True).values
        lengths[0] = STEPS
        self.crf = fusedrnn.CRF(num_tags).to(device)
        self.emissions = torch.randn(BATCH, STEPS, num_tags, device=device).requires_grad_()
        self.tags = torch.randint(num_tags, (BATCH, STEPS), device=device)
        self.lengths = lengths.to(device)
        self.mask = torch.arange(STEPS, device=device) < self.lengths[:, None]

    def ours(self) -> tuple[Run, Run]:
        """Loss with gradient, and paths as lists of numbers."""

        def loss() -> Tensor:
            total = -self.crf(self.emissions, self.tags, self.lengths).sum()
            total.backward()
            return total.detach()

        def decode() -> list[list[int]]:
            paths, _ = self.crf.decode(self.emissions, self.lengths)
            return [row[:n] for row, n in zip(paths.tolist(), self.lengths.tolist(), strict=True)]

        return loss, decode

    def pytorch_crf(self) -> tuple[Run, Run]:
        """The same by pytorch-crf."""
        from torchcrf import CRF

        module = CRF(self.num_tags, batch_first=True).to(self.emissions.device)
        with torch.no_grad():
            module.transitions.copy_(self.crf.transitions)
            module.start_transitions.copy_(self.crf.start)
            module.end_transitions.copy_(self.crf.end)

        def loss() -> Tensor:
            total = -module(self.emissions, self.tags, self.mask)
            total.backward()
            return total.detach()

        @torch.no_grad()
        def decode() -> list[list[int]]:
            return module.decode(self.emissions, self.mask)

        return loss, decode

    def flair(self) -> tuple[Run, Run]:
        """The same by flair's CRF, ViterbiLoss and ViterbiDecoder, with two more tags."""
        crf, viterbi = flair_modules()
        size = self.num_tags
        flair: Any = sys.modules["flair"]
        flair.device = self.emissions.device
        names = _Names([*map(str, range(size)), START, STOP])
        module = crf.CRF(names, len(names), init_from_state_dict=False)
        with torch.no_grad():
            module.transitions[:size, :size] = self.crf.transitions.T
            module.transitions[:size, size] = self.crf.start
            module.transitions[size + 1, :size] = self.crf.end
        criterion, decoder = viterbi.ViterbiLoss(names), viterbi.ViterbiDecoder(names)
        emissions = nn.functional.pad(self.emissions.detach(), (0, 2)).requires_grad_()
        lengths, gold = self.lengths.cpu(), self.tags[self.mask]

        def loss() -> Tensor:
            total = criterion((module(emissions), lengths, module.transitions), gold)
            total.backward()
            return total.detach()

        @torch.no_grad()
        def decode() -> list[list[int]]:
            scores = (module(emissions), lengths, module.transitions)
            rows, _ = decoder.decode(scores, False, [])
            return [[int(tag) for tag, _ in row] for row in rows]

        return loss, decode


class _Names:
    """What flair's CRF asks of its Dictionary."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.names)

    def get_idx_for_item(self, name: str) -> int:
        return self.names.index(name)

    def get_item_for_index(self, index: int) -> str:
        return self.names[index]


def flair_modules() -> tuple[Any, Any]:
    """Its modules crf and viterbi.

    Raises:
        ImportError: flair is not installed.
    """
    folder = "flair.models.sequence_tagger_utils"
    try:
        crf, viterbi = (importlib.import_module(f"{folder}.{name}") for name in ("crf", "viterbi"))
        return crf, viterbi
    except ImportError:
        found = importlib.util.find_spec("flair")
        if found is None or found.origin is None:
            raise
    return _alone(Path(found.origin).parent / "models" / "sequence_tagger_utils")


def _alone(folder: Path) -> tuple[Any, Any]:
    """Load the two files with nothing of flair around them but the names they import."""
    whole, data = types.ModuleType("flair"), types.ModuleType("flair.data")
    whole.device = torch.device("cpu")  # type: ignore[attr-defined]
    for name in ("Dictionary", "Label", "Sentence"):
        setattr(data, name, type(name, (), {}))
    sys.modules |= {"flair": whole, "flair.data": data}
    modules = []
    for name in ("crf", "viterbi"):
        loader = importlib.machinery.SourceFileLoader(f"flair_{name}", str(folder / f"{name}.py"))
        module = types.ModuleType(loader.name)
        loader.exec_module(module)
        modules.append(module)
    return modules[0], modules[1]


def _check(name: str, ours: tuple[Run, Run], theirs: tuple[Run, Run]) -> None:
    """Raise ValueError unless both compute the same loss and paths."""
    mine, other = (float(run[0]()) for run in (ours, theirs))  # type: ignore[arg-type]
    if abs(mine - other) > 1e-4 * abs(mine):
        raise ValueError(f"{name}: loss {other}, ours {mine}")
    if ours[1]() != theirs[1]():
        raise ValueError(f"{name}: other paths than ours")


def _compare(shortest: int) -> Iterator[Row]:
    problem = Problem("cpu", shortest, TAGS)
    runs = {"CRF": problem.ours()}
    for name, make in (("pytorch-crf", problem.pytorch_crf), ("flair", problem.flair)):
        try:
            runs[name] = make()
        except ImportError as error:
            yield {"what": "loss and decode", "name": name, "status": f"not installed: {error}"}
            continue
        _check(name, runs["CRF"], runs[name])
    for index, what in enumerate(("loss", "decode")):
        candidates = {name: run[index] for name, run in runs.items()}
        for row in interleave(candidates, ROUNDS):
            yield {"what": what} | row
    both = {name: partial(_both, *run) for name, run in runs.items()}
    for row in interleave(both, ROUNDS):
        yield {"what": "loss and decode"} | row


def _both(loss: Run, decode: Run) -> None:
    loss()
    decode()


def _times_slower(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for row in rows:
        case = f"{row['what']}, lengths from {row['shortest']}"
        if row.get("status"):
            yield f"{row['name']}, {case}: {row['status']}"
        elif row["name"] != row["baseline"]:
            yield (
                f"{row['name']} takes {row['ratio']} times as long as ours "
                f"({row['ratio_q1']} to {row['ratio_q3']}): {case}"
            )


@benchmark(_times_slower)
def crf() -> Iterator[Case]:
    """Compare loss (with gradient) and decoding, sentences of equal and of various lengths."""
    for shortest in (STEPS, STEPS // 4):
        yield {"shortest": shortest}, partial(_compare, shortest)


def _kernels(num_tags: int, warps: int) -> Iterator[Row]:
    size = plan.padded(num_tags)
    usual = plan.WARPS[size]
    plan.WARPS[size] = warps
    try:
        problem = Problem("cuda", STEPS // 4, num_tags)
        given = problem.emissions, problem.lengths
        row: Row = {}
        for backend in ("triton", "torch"):
            problem.crf.backend = backend
            runs = {
                "forward": lambda: problem.crf(given[0].detach(), problem.tags, given[1]),
                "training": problem.ours()[0],
                "decode": lambda: problem.crf.decode(*given),
            }
            for name, run in runs.items():
                row[f"{name}_{backend}_us"] = round(microseconds(run), 1)
        yield row
    finally:
        plan.WARPS[size] = usual


def _times(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    for row in rows:
        times = ", ".join(
            f"{name} {row[f'{name}_triton_us']} (torch {row[f'{name}_torch_us']})"
            for name in ("forward", "training", "decode")
        )
        yield f"microseconds at K {row['num_tags']} with {row['warps']} warps: {times}"


@benchmark(_times, gpu=True)
def gpu_crf() -> Iterator[Case]:
    """Microseconds of a batch by the kernels, with various numbers of warps, and by torch."""
    for num_tags in (9, 20, 64):
        for warps in (1, 2, 4, 8):
            if plan.padded(num_tags) ** 2 <= 1024 * warps:  # else the gradient spills
                yield {"num_tags": num_tags, "warps": warps}, partial(_kernels, num_tags, warps)
