"""Pairs: symbols, codecs, readers, splits and batches."""

import gzip
import hashlib
import json
import sys

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.data import pairs as module
from lightning_modules.data import subwords
from lightning_modules.data.pairs import PairCodec, PairData, Symbols, read_cmudict

PAIRS = [("ab a", "x y"), ("b", "y"), ("ca", "x z"), ("NA", "NULL")]


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def table(path, pairs=PAIRS, header="source\ttarget"):
    return write(path, [header, *("\t".join(pair) for pair in pairs)])


@pytest.mark.parametrize(
    ("symbols", "text", "cut", "joined"),
    [
        (Symbols("characters"), " cat\n", ["c", "a", "t"], "cat"),
        (Symbols("words"), " two \t words ", ["two", "words"], "two words"),
        (Symbols("separated", "-"), "one-two words", ["one", "two words"], "one-two words"),
        (Symbols("separated", " | "), "a | b c", ["a", "b c"], "a | b c"),
        (Symbols("words", lowercase=True), "A Bc", ["a", "bc"], "a bc"),
        (Symbols("words"), "  ", [], ""),
        (Symbols("characters"), "", [], ""),
    ],
)
def test_symbols(symbols, text, cut, joined):
    assert symbols.split(text) == cut
    assert symbols.join(cut) == joined


@given(text=st.text(), kind=st.sampled_from(["characters", "words", "separated"]))
def test_joined_symbols_are_cut_the_same_way_again(text, kind):
    symbols = Symbols(kind, "-")
    cut = symbols.split(text)
    assert symbols.split(symbols.join(cut)) == cut
    assert "" not in cut


def codec(pairs=PAIRS, **arguments):
    return PairCodec.from_pairs(pairs, Symbols("characters"), Symbols("words"), **arguments)


def test_codec_encodes_and_marks_unknown_symbols():
    c = codec()
    numbers = c.encode_source("abq")
    assert c.source.decode(numbers) == ["a", "b", "<unk>"]
    target = c.encode_target("x q y")
    assert c.target.decode(target) == ["<bos>", "x", "<unk>", "y", "<eos>"]
    assert c.source.pad == c.target.pad == 0


def test_codec_counts_symbols():
    c = codec(min_count=2)
    assert c.target.symbols == ["<pad>", "<unk>", "<bos>", "<eos>", "x", "y"]


def test_codec_survives_json():
    c = PairCodec.from_pairs(PAIRS, Symbols("separated", "|", True), Symbols("words"))
    again = PairCodec.from_dict(json.loads(json.dumps(c.to_dict())))
    assert again.to_dict() == c.to_dict()
    assert again.encode_source("A|b") == c.encode_source("A|b")
    assert again.target_symbols == c.target_symbols


WORDS = "the cat sat on the mat, the cats sat on the mats. thé"


@given(text=st.text().filter(lambda text: subwords.SPACE not in text))
def test_subwords_lose_nothing(text):
    symbols = Symbols("subwords", model=subwords.learn([WORDS], 40))
    cut = symbols.split(text)
    assert "" not in cut
    assert symbols.join(cut) == " ".join(text.split())
    assert symbols.split(symbols.join(cut)) == cut


def test_subwords_are_the_most_frequent_pieces():
    symbols = Symbols("subwords").learn([WORDS] * 3, 40)
    assert symbols.split("the cats, sat") == ["▁the", "▁cats", ",", "▁sat"]
    assert symbols.split("tac") == ["▁", "t", "a", "c"]
    assert symbols.learn(["other"], 10) is symbols
    assert Symbols("words").learn([WORDS], 40) == Symbols("words")


def test_subwords_travel_with_the_codec():
    pairs = [("The cat", "sat on"), ("the mat", "the cat")]
    sides = Symbols("subwords", lowercase=True), Symbols("subwords", lowercase=True)
    own = PairCodec.from_pairs(pairs, *sides, subword_count=30)
    shared = PairCodec.from_pairs(pairs, *sides, subword_count=30, shared_subwords=True)
    assert own.source_symbols.model != own.target_symbols.model
    assert shared.source_symbols.model == shared.target_symbols.model
    again = PairCodec.from_dict(json.loads(json.dumps(own.to_dict())))
    assert again.to_dict() == own.to_dict()
    assert again.encode_target("The CAT zat") == own.encode_target("the cat zat")
    assert own.target.unk in own.encode_target("zat")


def test_codec_of_an_earlier_version_reads_and_writes_the_same():
    plain = {"kind": "words", "separator": " ", "lowercase": False}
    stored = {
        "source": ["<pad>", "<unk>", "a"],
        "target": ["<pad>", "<unk>", "<bos>", "<eos>", "b"],
        "source_symbols": plain,
        "target_symbols": plain,
    }
    assert PairCodec.from_dict(stored).to_dict() == stored


def test_subwords_without_the_library_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'fusedrnn\[subwords\]'"):
        Symbols("subwords").learn([WORDS], 40)


def jsonl(path, pairs):
    return write(path, [json.dumps({"source": s, "target": t}) for s, t in pairs])


def parquet(path, pairs):
    columns = {"source": [s for s, _ in pairs], "target": [t for _, t in pairs]}
    datasets.Dataset.from_dict(columns).to_parquet(str(path))
    return str(path)


@pytest.mark.parametrize(
    ("suffix", "make"),
    [("tsv", table), ("jsonl", jsonl), ("parquet", parquet)],
)
def test_tables(tmp_path, suffix, make):
    train = make(tmp_path / f"train.{suffix}", PAIRS)
    val = make(tmp_path / f"val.{suffix}", PAIRS[:2])
    data = PairData(train=train, val=val)
    assert data.pairs("train") == PAIRS
    assert data.pairs("val") == PAIRS[:2]
    with pytest.raises(ValueError, match="test: no such split was given"):
        data.pairs("test")


def test_table_with_other_columns_and_without_a_header(tmp_path):
    path = write(tmp_path / "t.tsv", ["1\tab\tx", "2\tb\ty"])
    data = PairData(
        train=path,
        val=path,
        column_names=["id", "word", "sound"],
        source_column="word",
        target_column="sound",
    )
    assert data.pairs("train") == [("ab", "x"), ("b", "y")]


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_parallel_files(tmp_path, zipped):
    places = []
    for side, name in enumerate(("t.en", "t.de")):
        text = "".join(f"{pair[side]}\r\n" for pair in PAIRS)
        path = tmp_path / (name + ".gz" * zipped)
        path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
        places.append(str(path))
    assert PairData(train=places, val=places).pairs("train") == PAIRS


def test_nested_columns_of_a_hub_dataset(monkeypatch):
    rows = [{"id": "0", "translation": {"en": s, "fr": t}} for s, t in PAIRS]
    asked = []

    def load_rows(source, split, config, column_names):
        asked.append((source, split, config))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(module, "load_rows", load_rows)
    data = PairData(
        dataset="Helsinki-NLP/opus_books",
        config="en-fr",
        val="validation",
        source_column="translation.en",
        target_column="translation.fr",
    )
    assert data.pairs("train") == PAIRS == data.pairs("val")
    name = "Helsinki-NLP/opus_books"
    assert asked == [(name, "train", "en-fr"), (name, "validation", "en-fr")]


def test_cmudict_has_the_documented_split():
    data = PairData(dataset="cmudict", source_symbols="characters", group_references=True)
    sizes = {split: len(data.pairs(split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 120_524, "val": 6_604, "test": 6_845}
    sources = {split: {s for s, _ in data.pairs(split)} for split in sizes}
    assert not sources["train"] & sources["val"]
    assert not sources["train"] & sources["test"]
    for split, first, last in (("train", 0, 89), ("val", 90, 94), ("test", 95, 99)):
        word = min(sources[split])
        assert first <= int(hashlib.sha1(word.encode()).hexdigest(), 16) % 100 <= last
    assert len(data.codec.source) == 2 + 27 and len(data.codec.target) == 4 + 39
    dictionary = {}
    for word, phonemes in read_cmudict():
        dictionary.setdefault(word, []).append(phonemes)
    assert dictionary["na"] and dictionary["null"] == ["N AH L"]
    assert dictionary["aalborg"] == ["AO L B AO R G", "AA L B AO R G"]
    assert dict(read_cmudict(stress=True))["null"] == "N AH1 L"
    data.setup("test")
    rows = {row.text: row for row in data._rows["test"]}
    assert len(rows) == len(sources["test"])
    several = {word: row for word, row in rows.items() if len(row.references) > 1}
    for word, row in list(several.items())[:20]:
        assert [" ".join(r) for r in row.references] == list(dict.fromkeys(dictionary[word]))


def test_held_out_splits_keep_a_source_together(tmp_path):
    pairs = [(f"w{i}", f"t{j}") for i in range(300) for j in range(2)]
    path = table(tmp_path / "t.tsv", pairs)
    data = PairData(train=path)
    parts = {split: data.pairs(split) for split in ("train", "val", "test")}
    assert sorted(p for part in parts.values() for p in part) == sorted(pairs)
    assert all(len(part) == 2 * len({s for s, _ in part}) for part in parts.values())
    tested = PairData(train=path, test=path)
    assert len(tested.pairs("test")) == 600
    assert tested.pairs("val") == parts["val"]
    assert len(tested.pairs("train")) == 600 - len(parts["val"])


def test_less_can_be_held_out(tmp_path):
    pairs = [(f"w{number}", "x") for number in range(4000)]
    path = table(tmp_path / "t.tsv", pairs)
    val = {p: PairData(train=path, held_out=p).pairs("val") for p in (5, 2.5)}
    assert len(val[5]) == pytest.approx(200, abs=40)
    assert len(val[2.5]) == pytest.approx(100, abs=30)
    assert set(val[2.5]) < set(val[5])


def test_vocabulary_comes_from_training_alone(tmp_path):
    data = PairData(
        train=table(tmp_path / "train.tsv"),
        val=table(tmp_path / "val.tsv", [("ab new", "x new")]),
    )
    assert "new" not in data.codec.source and "new" not in data.codec.target
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert batch.references == [[["x", "new"]]]
    assert batch.source.tolist() == [[data.codec.source.index("ab"), data.codec.source.unk]]


def test_batches(tmp_path):
    data = PairData(train=table(tmp_path / "t.tsv"), val=table(tmp_path / "v.tsv"), batch_size=2)
    data.setup("fit")
    seen = []
    for batch in data.train_dataloader():
        assert batch.texts is None and batch.references is None
        assert batch.num_tokens == int(batch.source_lengths.sum() + batch.target_lengths.sum())
        for row in range(len(batch.source)):
            s, t = int(batch.source_lengths[row]), int(batch.target_lengths[row])
            assert (batch.source[row, s:] == 0).all() and (batch.target[row, t:] == 0).all()
            symbols = data.codec.target.decode(batch.target[row, :t].tolist())
            assert (symbols[0], symbols[-1]) == ("<bos>", "<eos>")
            source = data.codec.source.decode(batch.source[row, :s].tolist())
            seen.append((" ".join(source), " ".join(symbols[1:-1])))
    assert sorted(seen) == sorted(PAIRS)


def test_references_are_grouped_and_unique(tmp_path):
    pairs = [("a", "x"), ("b", "y"), ("a", "z"), ("a", "x")]
    path = table(tmp_path / "t.tsv", pairs)
    data = PairData(train=path, val=path, group_references=True)
    data.setup("validate")
    rows = {t: r for b in data.val_dataloader() for t, r in zip(b.texts, b.references, strict=True)}
    assert rows == {"a": [["x"], ["z"]], "b": [["y"]]}
    apart = PairData(train=path, val=path)
    apart.setup("validate")
    assert sum(len(batch.texts) for batch in apart.val_dataloader()) == 4


def test_long_pairs_are_left_out_of_training_only(tmp_path):
    path = table(tmp_path / "t.tsv", [("a", "x"), ("a b c", "x"), ("a", "x y z")])
    data = PairData(train=path, val=path, max_length=2)
    data.setup("fit")
    assert sum(len(batch.source) for batch in data.train_dataloader()) == 1
    assert sum(len(batch.source) for batch in data.val_dataloader()) == 3
    with pytest.raises(ValueError, match="max_length: no training pair is as short as 0"):
        PairData(train=path, val=path, max_length=0).setup("fit")


def test_a_given_codec_is_used(tmp_path):
    path = table(tmp_path / "t.tsv")
    data = PairData(train=path, val=path)
    data.codec = given_codec = codec([("q", "r")])
    data.setup("fit")
    assert data.codec is given_codec
    assert all((batch.source == given_codec.source.unk).any() for batch in data.train_dataloader())


def parallel(tmp_path, sources, targets):
    return [write(tmp_path / "a.en", sources), write(tmp_path / "a.de", targets)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: PairData(), "train, dataset: expected one of them"),
        (lambda d: PairData(dataset="cmudict", val="x"), "cmudict has its own splits"),
        (lambda d: PairData(train="x", batch_size=None), "batch_size, max_tokens: expected"),
        (lambda d: PairData(train="x", max_tokens=-1), "max_tokens: expected a positive number"),
        (lambda d: PairData(train="x", num_workers=-1), "num_workers: expected 0 or more, got -1"),
        (lambda d: PairData(train="x", min_count=0), "min_count: expected at least 1, got 0"),
        (
            lambda d: PairData(train="x", source_symbols="bytes"),
            "expected one of characters, words",
        ),
        (lambda d: PairData(train="x", subword_count=0), "subword_count: expected at least 1"),
        (lambda d: PairData(train="x", held_out=6), "held_out: expected more than 0"),
        (lambda d: PairData(train="x", shared_subwords=True), "to be subwords, got words and"),
        (
            lambda d: PairData(
                train="x",
                source_symbols="subwords",
                target_symbols="subwords",
                source_lowercase=True,
                shared_subwords=True,
            ),
            "both sides lower-cased, or neither",
        ),
        (
            lambda d: PairData(train="x", target_symbols="separated", target_separator=""),
            "separated symbols need one",
        ),
        (
            lambda d: PairData(train=table(d / "t.tsv"), source_column="src").codec,
            r"t\.tsv: no column 'src'; its columns are source, target",
        ),
        (
            lambda d: PairData(train=write(d / "t.tsv", ["source\ttarget", "a\tx", "b"])).codec,
            r"t\.tsv:3: expected 2 columns",
        ),
        (
            lambda d: PairData(train=table(d / "t.tsv", [("a", "x"), ("b", " ")])).codec,
            r"t\.tsv: row 2: expected text in column 'target', got ' '",
        ),
        (
            lambda d: PairData(train=write(d / "t.tsv", ["source\ttarget"])).codec,
            r"t\.tsv: expected at least one row",
        ),
        (
            lambda d: PairData(train=parallel(d, ["a", "b"], ["x"])).codec,
            r"a\.en has 2 lines and .*a\.de has 1: expected as many",
        ),
        (
            lambda d: PairData(train=parallel(d, ["a", "b"], ["x", " "])).codec,
            r"a\.de:2: expected text, got an empty line",
        ),
        (lambda d: PairData(train=["one.en"]).codec, "expected a source file and a target file"),
        (
            lambda d: PairData(train=table(d / "t.tsv", PAIRS[:1])).pairs("test"),
            "test: expected at least one pair, got none",
        ),
    ],
    ids=[
        "nothing",
        "cmudict-val",
        "no-batch-size",
        "max-tokens",
        "num-workers",
        "min-count",
        "symbols",
        "subword-count",
        "held-out",
        "shared-kinds",
        "shared-case",
        "separator",
        "column",
        "ragged",
        "blank-cell",
        "empty-table",
        "parallel-lengths",
        "parallel-empty-line",
        "parallel-one-file",
        "empty-split",
    ],
)
def test_wrong_input_is_named(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.en: no such file"):
        PairData(train=[str(tmp_path / "no.en"), str(tmp_path / "no.de")]).pairs("train")
    with pytest.raises(FileNotFoundError, match=r"no\.tsv: no such file"):
        PairData(train=str(tmp_path / "no.tsv")).pairs("train")
    broken = tmp_path / "b.gz"
    broken.write_bytes(gzip.compress(b"text\n" * 99)[:-9])
    with pytest.raises(ValueError, match=r"b\.gz: "):
        PairData(train=[str(broken), str(broken)]).pairs("train")


def test_codec_is_the_same_every_time(tmp_path):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 50, (200, 2), generator=generator).tolist()
    path = table(tmp_path / "t.tsv", [(f"s{a}", f"t{b}") for a, b in numbers])
    assert PairData(train=path).codec.to_dict() == PairData(train=path).codec.to_dict()
