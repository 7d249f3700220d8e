"""The comparison of encoder-decoders: ours runs without the peers; findings say the speed."""

import pytest
import torch

from benchmarks import seq2seq_speed as bench


@pytest.mark.parametrize("peer", bench.PAIRS)
def test_ours_trains_and_decodes_as_many_symbols_as_the_peers(peer):
    torch.manual_seed(0)
    ours = bench.PAIRS[peer].ours()
    before = [p.clone() for p in ours.model.parameters()]
    ours.train(1)
    changed = [bool((p != b).any()) for p, b in zip(ours.model.parameters(), before, strict=True)]
    assert sum(changed) > len(changed) // 2
    for beam in (1, 2):
        found = ours.search(beam)
        assert found.shape == (bench.BATCH, bench.LENGTH)
        assert not (found == bench.END).any()


def test_batches_are_pairs_of_the_dictionary():
    codec, batches = bench.corpus()
    assert len(batches) == bench.BATCHES
    for batch in batches:
        assert len(batch.source) == bench.BATCH
        assert (batch.lengths.diff() <= 0).all()
        assert torch.equal((batch.source != bench.PAD).sum(1), batch.lengths)
        assert (batch.target[:, 0] == bench.BEGIN).all()
        assert ((batch.target == bench.END).sum(1) == 1).all()
    word = "".join(codec.source.decode(batches[0].source[0].tolist()))
    assert word.isascii() and word.replace("'", "").isalpha()


def test_findings_say_how_many_times_faster():
    rows = [
        {"task": "train", "peer": "A", "name": "A", "baseline": "A", "ratio": "1.0"},
        {"task": "train", "peer": "A", "name": "fusedrnn", "baseline": "A", "ratio": "0.4"},
        {"task": "train", "peer": "B", "name": "fusedrnn", "baseline": "fusedrnn", "ratio": "1"},
    ]
    said = ["train: 2.50 times the speed of A", "train: B is not installed"]
    assert list(bench.findings(rows)) == said


def test_a_peer_that_is_not_installed_leaves_ours_alone(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    bench.built.cache_clear()
    monkeypatch.setattr(bench, "ROUNDS", 2)
    rows = list(bench._measure("JoeyNMT", 1))
    bench.built.cache_clear()
    assert [row["name"] for row in rows] == ["fusedrnn"] and rows[0]["per_second"] > 0


def test_each_peer_is_compared_in_training_and_both_searches():
    keys = [key for key, _ in bench.seq2seq_speed()]
    assert {key["peer"] for key in keys} == {"yoyodyne", "JoeyNMT", "OpenNMT-py"}
    assert [key["task"] for key in keys][:3] == ["train", "greedy", "beam 5"]
