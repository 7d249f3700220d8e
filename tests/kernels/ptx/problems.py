"""What the machine runs: the recurrences, the attention decoder and the CRF, and faults in them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import CELLS, ops
from kernels.attention import FEEDBACKS
from kernels.attention import ops as attention
from tests.kernels import attention_cases
from tests.kernels.cases import random_layer
from tests.kernels.crf import crf_cases
from tests.kernels.triton_cases import assert_accurate, force, poison, to_device

from .card import Card

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}
MASKS = {"recurrent_dropout": 0.3, "zoneout": 0.2, "training": True, "seed": 2**40 + 1}
ARRIVAL = "atom.global.gpu.release"
POLL = "ld.global.gpu.acquire"

Problem = Callable[[Card, pytest.MonkeyPatch], None]


class TensorFloat(TorchDispatchMode):
    """Torch's products of float32 as a card does them in tf32: 10 bits of fraction are read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            args = (*args[:-2], *map(self.rounded, args[-2:]))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@contextlib.contextmanager
def products_in_tf32() -> Iterator[None]:
    """Those of the kernels and of torch."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        with TensorFloat():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def recurrence(
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
    *,
    cell: str,
    dtype: str,
    units: int | None = None,
    masks: bool = False,
    directions: int = 1,
    hidden: int = 21,
    steps: int = 3,
) -> None:
    """Forward and backward; `units` of a program, 0: all of them, None: by the table, several."""
    poison(monkeypatch)
    if units is not None:
        force(monkeypatch, units=units)
    shape = {"batch": 3, "inputs": 4, "hidden": hidden, "directions": directions}
    layer = to_device(random_layer(cell, steps, **shape), "cpu", DTYPES[dtype])
    options = MASKS if masks else {}
    with products_in_tf32() if dtype == "tf32" else contextlib.nullcontext():
        assert_accurate(ops.recurrence, layer, lengths=torch.tensor([steps, 0, 2]), **options)
    meet = hidden > units if units else units is None
    assert {launch.cooperative for launch in card.launches} == {meet}


def orders(card: Card, monkeypatch: pytest.MonkeyPatch, *, cell: str) -> None:
    """The same programs in other random orders."""
    for seed in range(2, 6):
        card.seed = seed
        recurrence(card, monkeypatch, cell=cell, dtype="bf16", units=16)


def decoder(
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
    *,
    cell: str,
    feedback: str,
    kind: str,
    dtype: str,
    symbols: int = 0,
) -> None:
    """Forward and backward, two programs; with `symbols`, under scheduled sampling."""
    case = attention_cases.random_case(
        cell, feedback, kind, coverage=True, dropout=0.2, steps=2, source=5, inputs=6,
        batch=18, lengths=[1 + i % 5 for i in range(18)], keys=12, features=10,
        hidden=(20,) if kind == "additive" else (12, 20),
    )  # fmt: skip
    if symbols:
        case = attention_cases.sampled(case, symbols, dropout=0.2, gain=0.2)
    attention_cases.assert_accurate(attention.decode, case.to(DTYPES[dtype]))
    assert {launch.grid for launch in card.launches} == {(2, 1, 1)}


def crf_sums(card: Card, monkeypatch: pytest.MonkeyPatch, *, num_tags: int, dtype: str) -> None:
    problem = crf_cases.random_problem(3, 4, num_tags, forbid=num_tags > 3, dtype=DTYPES[dtype])
    crf_cases.assert_sums_agree(problem)


def crf_paths(card: Card, monkeypatch: pytest.MonkeyPatch, *, num_tags: int, n: int) -> None:
    crf_cases.assert_paths_agree(crf_cases.random_problem(3, 4, num_tags, forbid=num_tags > 3), n)


def no_release(ptx: str) -> str:
    """Programs arrive without publishing what they wrote."""
    return ptx.replace("gpu.release", "gpu.relaxed")


def early_arrival(ptx: str) -> str:
    """A program arrives when one of its warps has come, not all."""
    lone = re.compile(r"bar\.sync\s+0;((?:(?!bar\.sync).)*?" + re.escape(ARRIVAL) + ")", re.S)
    return lone.sub(r"\1", ptx)


def early_reading(ptx: str) -> str:
    """Warps read without waiting for the one that polls."""
    lone = re.compile("(" + re.escape(POLL) + r"(?:(?!bar\.sync).)*?)bar\.sync\s+0;", re.S)
    return lone.sub(r"\1", ptx)


def stale_reading(ptx: str) -> str:
    """Exchanged values are read through the L1 cache, which nobody empties."""
    return ptx.replace("ld.global.cg", "ld.global").replace(POLL, "ld.global.gpu.relaxed")


def constant_reading(ptx: str) -> str:
    """Exchanged values are read as if nobody ever wrote them."""
    return ptx.replace("ld.global.cg", "ld.global.nc")


def out_of_bounds(ptx: str) -> str:
    """Stores hit what lies 64 KiB further on."""
    return re.sub(r"(st\.global\.b32 \[ %rd\d+ \+) 0 \]", r"\1 65536 ]", ptx)


def no_arrival(ptx: str) -> str:
    """Programs wait for others, and do not say that they have come."""
    return re.sub(r"(@%p\d+ )?(atom\.global\.gpu\.release\.add\.u32 .*), [^,]*;", r"\1\2, 0;", ptx)


WRONG = "AssertionError: .*: error .*, budget"
FAULTS = {
    no_release: WRONG,
    early_arrival: WRONG,
    early_reading: "RuntimeError: barrier after some warps have ended",
    stale_reading: WRONG,
    constant_reading: WRONG,
    out_of_bounds: "RuntimeError: access outside of the tensors",
    no_arrival: "RuntimeError: warps wait for each other in vain",
}
"""What may be wrong with PTX, and what is said of it."""


def fault(card: Card, monkeypatch: pytest.MonkeyPatch, *, change: Callable[[str], str]) -> None:
    """The forward and backward pass of an LSTM whose PTX has a fault."""

    def mutate(ptx: str) -> str:
        changed = change(ptx)
        if changed == ptx:
            raise LookupError(f"{change.__name__} changes nothing")
        return changed

    card.mutate = mutate
    recurrence(card, monkeypatch, cell="lstm", dtype="fp32", units=16, steps=4)


def _named(problem: Callable[..., None], **options: object) -> tuple[str, Problem]:
    """A problem under a name of all that is not false, none or nought."""
    words = [
        v if isinstance(v, str) else k if v is True else f"{k}{v}" for k, v in options.items() if v
    ]
    return "-".join([problem.__name__, *words]), partial(problem, **options)


CELL_BY_CELL = dict(
    [
        *(_named(recurrence, cell=c, dtype="bf16", units=0) for c in CELLS),
        _named(recurrence, cell="lstm", dtype="fp32", units=16, directions=2),
        _named(recurrence, cell="lstm", dtype="bf16", units=16, masks=True),
        _named(recurrence, cell="lstm", dtype="tf32", units=0),
        _named(recurrence, cell="gru_reset_before", dtype="fp32", units=0, masks=True),
        _named(recurrence, cell="gru_reset_before", dtype="bf16", units=16),
        _named(recurrence, cell="lstm", dtype="bf16", hidden=200),
        _named(recurrence, cell="gru_reset_before", dtype="bf16", hidden=200),
        _named(orders, cell="lstm"),
        _named(orders, cell="gru_reset_before"),
    ]
)
DECODERS = dict(
    [
        _named(decoder, cell="lstm", feedback="features", kind="additive", dtype="bf16"),
        _named(decoder, cell="gru", feedback="context", kind="product", dtype="fp32", symbols=40),
    ]
)
CRF = dict(
    [
        _named(crf_sums, num_tags=5, dtype="fp32"),
        _named(crf_paths, num_tags=5, n=1),
        _named(crf_paths, num_tags=5, n=3),
    ]
)
MUTATED = {change.__name__: partial(fault, change=change) for change in FAULTS}
SLOW = dict(
    [
        *(
            _named(recurrence, cell=c, dtype=d, units=u, masks=m, directions=2)
            for c, d, u, m in product(CELLS, DTYPES, (0, 16), (False, True))
        ),
        *(
            _named(recurrence, cell=c, dtype="bf16", units=None, hidden=200)
            for c in ("rnn_tanh", "lstm_peephole", "lstm_layernorm", "gru")
        ),
        *(
            _named(decoder, cell=c, feedback=f, kind=k, dtype="bf16", symbols=s)
            for c, f, k, s in product(("lstm", "gru"), FEEDBACKS, ("product", "additive"), (0, 40))
        ),
        *(
            _named(crf_sums, num_tags=n, dtype=d)
            for n, d in product((1, 17, 40), ("fp32", "bf16", "fp16"))
        ),
        *(_named(crf_paths, num_tags=n, n=p) for n, p in product((1, 17, 40), (1, 5))),
    ]
)
PROBLEMS: dict[str, Problem] = CELL_BY_CELL | DECODERS | CRF | MUTATED | SLOW
