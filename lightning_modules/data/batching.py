"""Batches of sequences of like length, the same whatever the number of processes."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

EVALUATION_BATCHES = 8
"""A split for evaluation is cut into at least this many batches, so that its batches, and with them
the metrics to the last digit, are the same on one process and on any number up to this."""

BUCKET_GROWTH = 1.1
"""Sequences whose lengths differ by less than about this factor share a bucket."""


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of indices to sequences of like length, dealt out to the processes of a run.

    Sequences are put in buckets by length; a batch is cut from neighbours. With `shuffle`, members
    of a bucket and the order of the batches are drawn anew each epoch from `seed` and the epoch
    alone, so a resumed run sees the same batches; their number is the same every epoch. Every
    process gets the same number of batches (a few are seen twice when they do not divide). Without
    `shuffle` each index is seen exactly once over all processes, longest first.

    Pass it as `DataLoader(batch_sampler=...)` to a `Trainer(use_distributed_sampler=False)`, which
    then sets the epoch.

    Args:
        lengths: the length of every sequence, in tokens.
        batch_size: most sequences in a batch, per process.
        max_tokens: most tokens in a batch, padding included, per process. A longer sequence is a
            batch of its own.
        shuffle: True for training, False for evaluation.
        seed: of the shuffling.
        drop_last: with `shuffle`, leave out the last batch, of the shortest sequences, when it is
            not full.

    Attributes:
        num_batches: batches of one epoch over all processes.
        skip: batches that the next iteration leaves out, because a resumed run has trained on them.

    Raises:
        ValueError: no sequences, or neither or a non-positive one of `batch_size` and `max_tokens`
            given.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int | None = None,
        max_tokens: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if len(lengths) == 0:
            raise ValueError("lengths: expected at least one sequence, got none")
        check_limits(batch_size, max_tokens)
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.skip = 0
        self.sampler = self  # where Lightning looks for set_epoch

        self._lengths = torch.as_tensor(lengths, dtype=torch.int64)
        self._buckets = (self._lengths.clamp(min=1).log() / math.log(BUCKET_GROWTH)).floor()
        order = self._order(None)
        if not shuffle:
            widths = self._lengths[order].tolist()
            size = max(1, len(lengths) // max(EVALUATION_BATCHES, _world()[1]))
            batch_size = size if batch_size is None else min(size, batch_size)
        else:
            widest = self._lengths.new_zeros(int(self._buckets.max()) + 1)
            buckets = self._buckets.long()
            widest.scatter_reduce_(0, buckets, self._lengths, "amax")
            widths = widest[buckets[order]].tolist()
        self._cuts = _cuts(widths, batch_size, max_tokens, drop_last and shuffle)
        self.num_batches = len(self._cuts)

    def _order(self, generator: torch.Generator | None) -> Tensor:
        """Indices by falling length; with a generator, by falling bucket, at random inside one."""
        if generator is None:
            keys = self._buckets if self.shuffle else self._lengths
            return torch.argsort(keys, descending=True, stable=True)
        drawn = torch.randperm(len(self._lengths), generator=generator)
        return drawn[torch.argsort(self._buckets[drawn], descending=True, stable=True)]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        if epoch != self.epoch:
            self.skip = 0
        self.epoch = epoch

    def state_dict(self, batches: int) -> dict[str, int]:
        """Return where a run stands, as plain data.

        Args:
            batches: batches of this epoch that each process has had.
        """
        return {"epoch": self.epoch, "batches": batches, "steps": len(self), "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iteration give the batches that the stopped run had not had.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: that run was in the middle of an epoch of other batches.
        """
        ours = self.state_dict(state["batches"])
        if 0 < state["batches"] < state["steps"]:
            for name in ("steps", "seed"):
                if state[name] != ours[name]:
                    raise ValueError(
                        f"the checkpoint was written after batch {state['batches']} of an epoch "
                        f"with {name} = {state[name]}, this run has {ours[name]}: give the same "
                        "data, limits, seed and number of processes"
                    )
        self.epoch, self.skip = state["epoch"], state["batches"]

    def __len__(self) -> int:
        rank, world = _world()
        if self.shuffle:
            return math.ceil(self.num_batches / world)
        return len(range(rank, self.num_batches, world))

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = _world()
        if not self.shuffle:
            if world > self.num_batches:
                raise ValueError(
                    f"{self.num_batches} batches are too few for {world} processes: "
                    "evaluate with fewer of them"
                )
            order = self._order(None).tolist()
            for start, end in self._cuts[rank::world]:
                yield order[start:end]
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = self._order(generator).tolist()
        steps = [self._cuts[i : i + world] for i in range(0, self.num_batches, world)]
        steps[-1] = (steps[-1] + self._cuts * world)[:world]
        skip, self.skip = self.skip, 0
        for step in torch.randperm(len(steps), generator=generator).tolist()[skip:]:
            start, end = steps[step][rank]
            yield order[start:end]


class ResumableLoader(DataLoader):
    """A `DataLoader` over a `BucketBatchSampler` that goes on where a stopped run was.

    Lightning stores its state in every checkpoint. The order is chosen when the first batch is
    asked for, so that `set_epoch` is in time for worker processes too.

    Attributes:
        asked: when the last batch was asked for, as `time.perf_counter` tells it.
    """

    _batches = 0
    asked = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.asked = time.perf_counter()
        self._batches = self._buckets.skip
        for batch in super().__iter__():
            self._batches += 1
            yield batch
            self.asked = time.perf_counter()

    @property
    def _buckets(self) -> BucketBatchSampler:
        return cast(BucketBatchSampler, self.batch_sampler)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches have been taken, as plain data."""
        return self._buckets.state_dict(self._batches)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from what `state_dict` returned."""
        self._buckets.load_state_dict(state)


def check_limits(batch_size: int | None, max_tokens: int | None, num_workers: int = 0) -> None:
    """Check how batches are to be made; data modules do so before a run starts.

    Args:
        batch_size: most sequences in a batch, at least 1; None: no limit.
        max_tokens: most tokens in a batch, at least 1; None: no limit.
        num_workers: processes that collate batches, at least 0.

    Raises:
        ValueError: one is out of its range, or there is no limit.
    """
    if batch_size is None and max_tokens is None:
        raise ValueError("batch_size, max_tokens: expected at least one of them")
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if num_workers < 0:
        raise ValueError(f"num_workers: expected 0 or more, got {num_workers}")


def _cuts(
    widths: Sequence[int], batch_size: int | None, max_tokens: int | None, drop_last: bool
) -> list[tuple[int, int]]:
    """Cut sequences of falling widths into batches [start, end) within both limits."""
    cuts: list[tuple[int, int]] = []
    start = 0
    while start < len(widths):
        size = len(widths) if batch_size is None else batch_size
        if max_tokens is not None:
            size = min(size, max(1, max_tokens // max(1, widths[start])))
        if drop_last and cuts and start + size > len(widths):
            break
        cuts.append((start, min(start + size, len(widths))))
        start += size
    return cuts


def _world() -> tuple[int, int]:
    """Return the rank of this process and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def pad(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Stack sequences of numbers into one int64 tensor [B, T], filled up with `value`.

    Args:
        rows: B sequences; T is the length of the longest one.
        value: what stands past the end of a shorter one.
    """
    width = max(map(len, rows), default=0)
    filled: list[int] = []
    for row in rows:
        filled += row
        filled += [value] * (width - len(row))
    # torch.tensor takes twice as long for a list.
    return torch.from_numpy(np.array(filled, dtype=np.int64)).view(len(rows), width)


def lengths(rows: Sequence[Sequence[object]]) -> Tensor:
    """Return the lengths of B sequences, int64 [B]."""
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)
