import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.data import batching
from lightning_modules.data.batching import BucketBatchSampler, ResumableLoader, lengths, pad

sizes = st.lists(st.integers(0, 60), min_size=1, max_size=80)
limits = st.sampled_from([(4, None), (None, 50), (3, 40), (1, None), (100, 1)])


def dealt(ranks, make):
    """What each of `ranks` processes would iterate over."""
    batches = []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(ranks):
            patch.setattr(batching, "_world", lambda rank=rank: (rank, ranks))
            sampler = make()
            batches.append(list(sampler))
            assert len(batches[-1]) == len(sampler)
    return batches


@given(sizes, limits, st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_evaluation_sees_each_index_once_in_the_same_batches(tokens, limit, ranks):
    def make():
        return BucketBatchSampler(tokens, *limit)

    ranks = min(ranks, len(tokens))
    shares = dealt(ranks, make)
    together = [batch for share in shares for batch in share]
    assert sorted(index for batch in together for index in batch) == list(range(len(tokens)))
    assert sorted(together) == sorted(dealt(1, make)[0])
    assert all(shares)


@given(sizes, limits, st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_training_sees_everything_in_as_many_batches_each_epoch(tokens, limit, ranks, epoch):
    def make(epoch=epoch):
        sampler = BucketBatchSampler(tokens, *limit, shuffle=True, seed=5)
        sampler.sampler.set_epoch(epoch)
        return sampler

    shares = dealt(ranks, make)
    together = {tuple(batch) for share in shares for batch in share}
    assert sorted(index for batch in together for index in batch) == list(range(len(tokens)))
    assert len({len(share) for share in shares}) == 1
    assert together == {tuple(batch) for batch in dealt(1, make)[0]}
    assert len(make(0)) == len(make(epoch))


@given(sizes, limits)
@settings(max_examples=60, deadline=None)
def test_batches_keep_to_the_limits(tokens, limit):
    batch_size, max_tokens = limit
    for shuffle in (False, True):
        for batch in BucketBatchSampler(tokens, batch_size, max_tokens, shuffle=shuffle):
            assert batch_size is None or len(batch) <= batch_size
            padded = len(batch) * max(tokens[i] for i in batch)
            assert max_tokens is None or padded <= max_tokens or len(batch) == 1


def test_epochs_differ_and_repeat():
    sampler = BucketBatchSampler([3] * 40, batch_size=4, shuffle=True)
    first = list(sampler)
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)
    assert first != list(BucketBatchSampler([3] * 40, batch_size=4, shuffle=True, seed=1))


def test_batches_hold_like_lengths():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 100, (2000,), generator=generator).tolist()
    batches = list(BucketBatchSampler(tokens, batch_size=20, shuffle=True))
    padded = sum(len(batch) * max(tokens[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(tokens)


def rows_of(batches):
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("workers", [0, 2])
@given(st.integers(0, 9), st.integers(0, 3))
@settings(max_examples=8, deadline=None)
def test_a_loader_goes_on_where_another_stopped(workers, taken, epoch):
    def make():
        sampler = BucketBatchSampler([3] * 40, batch_size=4, shuffle=True)
        return ResumableLoader(
            range(40), batch_sampler=sampler, num_workers=workers, collate_fn=list
        )

    stopped, resumed = make(), make()
    stopped.batch_sampler.set_epoch(epoch)
    whole = list(stopped)
    batches = iter(stopped)
    seen = [next(batches) for _ in range(taken)]
    state = stopped.state_dict() if taken else make().state_dict() | {"epoch": epoch}
    resumed.load_state_dict(state)
    waiting = iter(resumed)  # Lightning asks for the iterator before it sets the epoch
    resumed.batch_sampler.set_epoch(epoch)
    assert seen + list(waiting) == whole
    assert resumed.state_dict()["batches"] == len(whole)
    assert list(resumed) == whole  # the next time all of them
    resumed.load_state_dict(state)
    resumed.batch_sampler.set_epoch(epoch + 1)
    assert sorted(rows_of(resumed)) == list(range(40))


def test_a_state_of_other_batches_is_refused():
    def sampler(size=4, seed=0):
        return BucketBatchSampler([3] * 40, batch_size=size, shuffle=True, seed=seed)

    state = sampler().state_dict(3)
    with pytest.raises(ValueError, match="with steps = 10, this run has 8"):
        sampler(5).load_state_dict(state)
    with pytest.raises(ValueError, match="with seed = 0, this run has 1"):
        sampler(seed=1).load_state_dict(state)
    for batches in (0, 10):  # at the end of an epoch anything may change
        sampler(5).load_state_dict(sampler().state_dict(batches))


def test_drop_last_leaves_out_the_batch_that_is_not_full():
    dropped = BucketBatchSampler([3] * 10, batch_size=4, shuffle=True, drop_last=True)
    assert [len(batch) for batch in dropped] == [4, 4]
    whole = BucketBatchSampler([3] * 8, batch_size=4, shuffle=True, drop_last=True)
    assert [len(batch) for batch in whole] == [4, 4]


def test_more_processes_than_sequences_is_an_error():
    with pytest.raises(ValueError, match="2 batches are too few for 3 processes"):
        dealt(3, lambda: BucketBatchSampler([1, 2], batch_size=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [], "batch_size": 1}, "lengths: expected at least one"),
        ({"lengths": [1]}, "batch_size, max_tokens: expected at least one of them"),
        ({"lengths": [1], "batch_size": 0}, "batch_size: expected a positive number, got 0"),
        ({"lengths": [1], "max_tokens": -2}, "max_tokens: expected a positive number, got -2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BucketBatchSampler(**arguments)


def test_pad_and_lengths():
    rows = [[4, 5, 6], [], [7]]
    assert pad(rows, -1).tolist() == [[4, 5, 6], [-1, -1, -1], [7, -1, -1]]
    assert lengths(rows).tolist() == [3, 0, 1]
    assert pad([[], []]).shape == (2, 0)
    assert pad(rows).dtype == lengths(rows).dtype == torch.int64
