"""From tagged sentences to batches, and from files and tables to tagged sentences."""

import json
import random
from pathlib import Path

import datasets
import pytest
import torch

import lightning_modules.data.tagging as tagging
from lightning_modules.data.readers import Sentence
from lightning_modules.data.schemes import chunks, convert
from lightning_modules.data.tagging import (
    CASINGS,
    IGNORED,
    TaggingCodec,
    TaggingData,
    TagSet,
    casing,
)
from lightning_modules.data.vectors import Vectors
from lightning_modules.data.vocabulary import Vocabulary

TRAIN = [
    Sentence(["Ann", "saw", "Bo", "2"], ["B-PER", "O", "B-PER", "O"]),
    Sentence(["Ann", "Lee", "left"], ["B-PER", "I-PER", "O"]),
]
COLUMNS = "Ann\tB-PER\nsaw\tO\n\nIn\tO\nRome\tB-LOC\nCity\tI-LOC\n"


def ner(**options) -> TaggingCodec:
    return TaggingCodec.from_sentences(TRAIN, "BIO", **options)


def test_words_are_numbered_by_frequency_and_rare_ones_are_known() -> None:
    codec = ner()
    assert codec.words.symbols[:3] == ["<pad>", "<unk>", "Ann"]
    assert (codec.frequent_words, codec.known_words) == (3, len(codec.words))
    assert codec.tags.symbols == ["O", "B-PER", "I-PER"]
    assert codec.labels == ["PER"]
    assert ner(min_count=2).words.symbols == ["<pad>", "<unk>", "Ann"]
    assert ner(min_count=2).frequent_words == 3


def test_unknown_words_fall_back_to_lower_case() -> None:
    codec = ner()
    assert codec.word("Saw") == codec.word("saw") != codec.words.unk
    assert codec.word("ann") == codec.words.unk
    assert ner(lowercase=True).word("ANN") == ner(lowercase=True).word("ann") != 1
    assert ner(digits=True).word("7") == ner(digits=True).word("2") != 1


def test_special_words_in_text_are_words_like_others() -> None:
    codec = TaggingCodec.from_sentences([Sentence(["<pad>", "<unk>", "x"], ["A", "A", "A"])])
    assert codec.word("<pad>") == codec.words.unk
    assert codec.known_words == len(codec.words) == 3


def test_batch_holds_each_spelling_once() -> None:
    codec = ner()
    batch = codec.batch([codec.encode(sentence) for sentence in TRAIN])
    assert batch.words.shape == batch.tags.shape == batch.spellings.shape == (2, 4)
    assert len(batch.characters) == 6
    assert batch.spellings[0, 0] == batch.spellings[1, 0]
    for row, sentence in enumerate(TRAIN):
        for column, token in enumerate(sentence.tokens):
            spelling = int(batch.spellings[row, column])
            size = int(batch.character_lengths[spelling])
            assert batch.characters[spelling, :size].tolist() == codec.spelling(token)
    assert batch.tags.tolist() == [[1, 0, 1, 0], [1, 2, 0, -100]]
    assert batch.lengths.tolist() == [4, 3]
    assert batch.num_tokens == 7
    assert batch.tokens == [s.tokens for s in TRAIN]
    assert batch.tag_names == [s.tags for s in TRAIN]
    training = codec.batch([codec.encode(sentence, training=True) for sentence in TRAIN])
    assert training.tokens is None
    assert training.tag_names is None


def test_spellings_are_the_same_when_they_come_again(monkeypatch) -> None:
    monkeypatch.setattr(tagging, "REMEMBERED", 3)
    words = ["a", "Ab", "abc", "a" * 50, "B2", "?", "ÆØ"]
    codec = TaggingCodec.from_sentences([Sentence(words, ["O"] * len(words))])
    draw = random.Random(0)
    for _ in range(20):
        tokens = draw.choices([*words, "new", "Newer"], k=draw.randint(1, 9))
        batch = codec.batch([codec.untagged(tokens)])
        for token, row in zip(tokens, batch.spellings[0].tolist(), strict=True):
            spelt = batch.characters[row].tolist()
            own = codec.spelling(token)
            assert batch.character_lengths[row] == len(own)
            assert spelt == own + [0] * (len(spelt) - len(own))
            assert batch.casings[row] == casing(token)


def test_tags_unseen_in_training_are_ignored_numbers() -> None:
    codec = ner()
    row = codec.encode(Sentence(["x", "y"], ["B-NEW", "O"]))
    assert row.tags == [-100, 0]
    assert row.tag_names == ["B-NEW", "O"]


def test_characters_seen_once_train_the_unknown_one() -> None:
    codec = ner()
    assert set(codec.characters.symbols[2:]) == set("Ane")
    assert codec.spelling("Lee2") == [1, *codec.spelling("ee"), 1]
    assert codec.spelling("") == [1]


def test_long_words_keep_head_and_tail() -> None:
    codec = ner(max_characters=5)
    assert codec.spelling("AnnsawLee") == codec.spelling("AnLee")
    assert len(codec.spelling("x" * 10_000)) == 5


@pytest.mark.parametrize(
    ("scheme", "encoding", "learnt", "written"),
    [
        ("IOB1", None, ["B-A", "I-A", "B-A"], ["B-A", "I-A", "B-A"]),
        ("BIO", "BIOES", ["B-A", "E-A", "S-A"], ["B-A", "I-A", "B-A"]),
        ("BIOES", "BIO", ["B-A", "I-A", "B-A"], ["B-A", "E-A", "S-A"]),
    ],
)
def test_schemes_there_and_back(
    scheme: str, encoding: str | None, learnt: list[str], written: list[str]
) -> None:
    gold = {
        "IOB1": ["I-A", "I-A", "B-A"],
        "BIO": ["B-A", "I-A", "B-A"],
        "BIOES": ["B-A", "E-A", "S-A"],
    }[scheme]
    sentence = Sentence(["x", "y", "z"], gold)
    codec = TaggingCodec.from_sentences([sentence], scheme, encoding)
    row = codec.encode(sentence)
    assert codec.tags.decode(row.tags) == learnt
    assert codec.tasks[0].decode(row.tags) == written
    assert row.tag_names == gold


@pytest.mark.parametrize("scheme", ["BIO", "BIOES"])
def test_tags_are_written_well_formed_whatever_was_found(scheme: str) -> None:
    """A softmax may find any: they mark the entities that the score counts."""
    names = ["O", "B-A", "I-A", "B-B", "I-B"]
    tags = TagSet("", Vocabulary(names, ()), scheme, "BIO")
    found = ["O", "I-A", "I-B", "I-B", "B-B", "I-A"]
    written = tags.decode([names.index(name) for name in found])
    assert chunks(written) == chunks(found)
    assert written == convert(found, scheme) != found


def test_vectors_add_words_and_survive_without_their_file() -> None:
    table = torch.tensor([[1.0, 0], [0, 1], [2, 2], [3, 3]])
    codec = ner(vectors=Vectors(["ann", "Paris", "saw", "<unk>"], table))
    assert codec.words.symbols[codec.known_words :] == ["ann", "Paris"]
    assert codec.vectors is not None
    assert codec.vectors[codec.word("Paris")].tolist() == [0, 1]
    assert codec.vectors[codec.word("Ann")].tolist() == [1, 0]  # by its lower case
    assert codec.vectors[codec.word("Lee")].isnan().all()
    restored = TaggingCodec.from_dict(json.loads(json.dumps(codec.to_dict())))
    assert restored.to_dict() == codec.to_dict()
    assert restored.vectors is None
    assert restored.word("Paris") == codec.word("Paris") >= codec.known_words


def test_words_without_a_vector_are_reported(tmp_path: Path, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(tagging, "rank_zero_info", said.append)
    (tmp_path / "a.conll").write_text("red A\ntwo B\n")
    (tmp_path / "b.conll").write_text("blue A\nsix B\n")
    (tmp_path / "v.txt").write_text("red 1 0\nblue 0 1\n")
    train, val, vectors = (str(tmp_path / name) for name in ("a.conll", "b.conll", "v.txt"))
    assert TaggingData(train=train, val=val, vectors=vectors).codec.vectors is not None
    share = "no vector for 1 of 2 words (50.0 %) and 1 of 2 distinct words (50.0 %), such as"
    assert said == [
        f"{vectors}: train: {share} two",
        f"{vectors}: val: {share} six",
        f"{vectors}: 1 words beyond the training split have vectors",
    ]


def test_codec_survives_plain_data() -> None:
    codec = ner(encoding="BIOES", lowercase=True, digits=True, max_characters=9)
    restored = TaggingCodec.from_dict(codec.to_dict())
    for first, second in zip(codec.encode(TRAIN[0]), restored.encode(TRAIN[0]), strict=True):
        assert first == second
    assert restored.frequent_words == codec.frequent_words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ankara ß don't e-mail", "lower"),
        ("NATO U.S. ΑΒ", "upper"),
        ("Ankara I O'brien Éa", "title"),
        ("iPhone McDonald O'Brien", "mixed"),
        ("42 3,5 ٣", "numeric"),
        ("B2 2nd", "with digit"),
        ("- ... 漢字 🙂 ក", "other"),
    ],
)
def test_casing(words: str, expected: str) -> None:
    assert {CASINGS[casing(word)] for word in words.split()} == {expected}
    assert CASINGS[casing("")] == "other"


CONLLU = """\
1\tWe\twe\tPRON\tPRP\tCase=Nom|Number=Plur\t0\t_\t_\t_
2\truns\trun\tVERB\tVBZ\tNumber=Sing\t1\t_\t_\t_

1\tIt\tit\tPRON\tPRP\tCase=Nom\t0\t_\t_\t_
"""


def test_columns_of_several_tasks(tmp_path: Path) -> None:
    (tmp_path / "a.conllu").write_text(CONLLU)
    columns = ["upos", "xpos", "feats", "feats:Case"]
    place = str(tmp_path / "a.conllu")
    data = TaggingData(train=place, val=place, tag_column=columns)
    codec = data.codec
    assert [task.name for task in codec.tasks] == ["", "xpos", "feats", "feats:Case"]
    assert codec.tags.symbols == ["PRON", "VERB"]
    assert codec.tasks[3].tags.symbols == ["Nom", "_"]
    batch = codec.batch([codec.encode(sentence) for sentence in data.sentences("val")])
    assert batch.other_tags[0].tolist() == [[0, 1], [0, IGNORED]]
    assert batch.other_names[1] == [["Case=Nom|Number=Plur", "Number=Sing"], ["Case=Nom"]]
    restored = TaggingCodec.from_dict(json.loads(json.dumps(codec.to_dict())))
    assert restored.tasks == codec.tasks
    assert "others" not in ner().to_dict()
    assert codec.batch([codec.untagged(["We"])]).other_tags[2].tolist() == [[IGNORED]]
    data.setup("fit")
    assert all(len(batch.other_tags) == 3 for batch in data.train_dataloader())


def test_columns_of_several_tasks_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("a O N\n\n# B-X N\nb O N\n")
    data = TaggingData(train=str(tmp_path / "a.conll"), tag_column=[1, 2], scheme="BIO")
    with pytest.raises(ValueError, match=r"a.conll: the columns of tags disagree"):
        data.sentences("train")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The same training and validation sentences in each format."""
    tokens, tags = (
        [["Ann", "saw"], ["In", "Rome", "City"]],
        [["B-PER", "O"], ["O", "B-LOC", "I-LOC"]],
    )
    (tmp_path / "a.conll").write_text(COLUMNS)
    labels = datasets.ClassLabel(names=["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
    features = datasets.Features(
        {
            "words": datasets.List(datasets.Value("string")),
            "ner": datasets.List(labels),
            "names": datasets.List(datasets.Value("string")),
        }
    )
    numbers = [[labels.str2int(tag) for tag in row] for row in tags]
    table = datasets.Dataset.from_dict({"words": tokens, "ner": numbers, "names": tags}, features)
    table.to_parquet(tmp_path / "a.parquet")
    with open(tmp_path / "a.jsonl", "w") as file:
        for row in zip(tokens, tags, strict=True):
            file.write(
                json.dumps({"nested": dict(zip(("words", "names"), row, strict=True))}) + "\n"
            )
    return {suffix: str(tmp_path / f"a.{suffix}") for suffix in ("conll", "parquet", "jsonl")}


@pytest.mark.parametrize(
    ("suffix", "columns"),
    [
        ("conll", {}),
        ("parquet", {"token_column": "words", "tag_column": "ner"}),
        ("parquet", {"token_column": "words", "tag_column": "names"}),
        ("jsonl", {"token_column": "nested.words", "tag_column": "nested.names"}),
    ],
    ids=["columns", "class-labels", "strings", "nested"],
)
def test_sources(files: dict[str, str], suffix: str, columns: dict) -> None:
    data = TaggingData(train=files[suffix], val=files[suffix], scheme="BIO", **columns)
    assert data.sentences("train") == [
        Sentence(["Ann", "saw"], ["B-PER", "O"]),
        Sentence(["In", "Rome", "City"], ["O", "B-LOC", "I-LOC"]),
    ]


def test_hub_splits_have_usual_names(files: dict[str, str], monkeypatch) -> None:
    asked = []

    def load(source: str, split: str, config: str | None) -> datasets.Dataset:
        asked.append((source, split, config))
        return datasets.load_dataset("parquet", data_files=files["parquet"], split="train")

    monkeypatch.setattr(tagging, "load_rows", load)
    data = TaggingData(
        dataset="owner/name", config="en", test="train[:5%]",
        token_column="words", tag_column="ner", scheme="BIO",
    )  # fmt: skip
    for split in ("train", "val", "test"):
        assert len(data.sentences(split)) == 2
    assert asked == [("owner/name", split, "en") for split in ("train", "validation", "train[:5%]")]


def test_builtin_treebank_has_its_official_split() -> None:
    data = TaggingData(dataset="turkish-treebanks")
    sizes = {split: len(data.sentences(split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 3881, "val": 485, "test": 485}
    assert len(data.codec.tags) == 14
    both = TaggingData(dataset="turkish-treebanks", tag_column=["upos", "feats:Case"])
    assert [s.tags for s in both.sentences("val")] == [s.tags for s in data.sentences("val")]
    assert all(len(s.others[0]) == len(s.tokens) for s in both.sentences("test"))
    assert {"Nom", "_"} <= set(both.codec.tasks[1].tags.symbols)


def test_builtin_treebank_absent(monkeypatch) -> None:
    monkeypatch.setattr(tagging, "BUILTIN", "no-such-distribution")
    with pytest.raises(FileNotFoundError, match=r"pip install 'fusedrnn\[data\]'"):
        TaggingData(dataset="no-such-distribution").sentences("train")


def test_vocabulary_comes_from_training_alone(tmp_path: Path) -> None:
    for name, word, tag in (("train", "cat", "N"), ("val", "dog", "V"), ("test", "emu", "X")):
        (tmp_path / name).write_text(f"{word}\t{tag}\n" * 2)
    data = TaggingData(*(str(tmp_path / name) for name in ("train", "val", "test")))
    for stage in ("fit", "validate", "test"):
        data.setup(stage)
    assert data.codec.words.symbols[2:] == ["cat"]
    assert set(data.codec.characters.symbols[2:]) == set("cat")
    assert data.codec.tags.symbols == ["N"]


def test_evaluation_needs_no_training_split_once_it_has_a_codec(files: dict[str, str]) -> None:
    codec = TaggingData(train=files["conll"], scheme="BIO").codec
    data = TaggingData(train="absent.conll", test=files["conll"], scheme="BIO")
    data.codec = codec
    data.setup("test")
    assert sum(batch.num_tokens for batch in data.test_dataloader()) == 5


def test_sentences_left_out_for_their_length_are_counted(tmp_path: Path, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(tagging, "rank_zero_info", said.append)
    (tmp_path / "a").write_text("a O\nb O\nc O\n\na O\n\nb O\nc O\nd O\n")
    TaggingData(train=str(tmp_path / "a"), val=str(tmp_path / "a"), max_length=2).setup("fit")
    assert said == ["2 sentences longer than 2 words left out"]


def test_every_training_sentence_once_an_epoch(tmp_path: Path) -> None:
    blocks = ["".join(f"w{i}\tN\n" for i in range(1 + n % 7)) for n in range(50)]
    (tmp_path / "train").write_text("\n".join(blocks))
    data = TaggingData(str(tmp_path / "train"), str(tmp_path / "train"), batch_size=8, max_length=6)
    data.setup("fit")
    seen = [int(size) for batch in data.train_dataloader() for size in batch.lengths]
    assert sorted(seen) == sorted(1 + n % 7 for n in range(50) if n % 7 != 6)


@pytest.mark.parametrize("tasks", [1, 3])
def test_training_batches_are_those_of_the_codec(tmp_path: Path, tasks: int) -> None:
    draw = random.Random(tasks)
    words = ["a", "A", "ab", "Æß", "b" * 50, "B2", "7", "東京", "?"]
    lines = ("\t".join([draw.choice(words), *draw.choices("XYZ", k=tasks)]) for _ in range(400))
    text = "".join(line + "\n" * draw.choice((1, 1, 1, 2)) for line in lines)
    (tmp_path / "train").write_text(text)
    place, columns = str(tmp_path / "train"), list(range(1, tasks + 1))
    data = TaggingData(place, place, tag_column=columns, batch_size=7, min_count=2)
    data.setup("fit")
    rows = [data.codec.encode(s, training=True) for s in data.sentences("train")]
    loader = data.train_dataloader()
    for places, batch in zip(loader.batch_sampler, loader, strict=True):
        expected = data.codec.batch([rows[place] for place in places])
        torch.testing.assert_close(batch, expected, rtol=0, atol=0)
        assert len(batch.other_tags) == tasks - 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"train": None}, "train, dataset: expected one of them"),
        ({"dataset": "turkish-treebanks"}, "turkish-treebanks has its own splits"),
        ({"tag_column": ["upos", "upos"]}, "tag_column: expected distinct columns"),
        ({"tag_column": []}, "tag_column: expected distinct columns"),
        ({"scheme": "IOB2"}, "scheme: expected one of BIO, IOB1, IO, BIOES or None, got IOB2"),
        ({"encoding": "BIOES"}, "encoding: expected BIO or BIOES and a scheme"),
        ({"min_count": 0}, "min_count: expected at least 1, got 0"),
        ({"max_characters": 0}, "max_characters: expected at least 1"),
        ({"batch_size": None}, "batch_size, max_tokens: expected at least one"),
        ({"batch_size": 0}, "batch_size: expected a positive number, got 0"),
        ({"num_workers": -1}, "num_workers: expected 0 or more, got -1"),
    ],
)
def test_bad_arguments(options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        TaggingData(**{"train": "x.conll", **options})


@pytest.mark.parametrize(
    ("suffix", "options", "expected"),
    [
        ("conll", {"tag_column": "ner"}, r"a.conll: CoNLL columns go by index, got column 'ner'"),
        ("conll", {"tag_column": 5}, r"a.conll:1: no column tag_column = 5"),
        ("parquet", {}, r"a.parquet: no column 'tokens'; its columns are words, ner, names"),
        ("parquet", {"token_column": "words"}, r"no column 'tags'"),
        ("jsonl", {"token_column": "nested", "tag_column": "nested"}, r"row 1: expected a list in"),
        (
            "parquet",
            {"token_column": "words", "tag_column": "words", "scheme": "BIO"},
            r"a.parquet: row 1: tag 'Ann' is outside the scheme BIO",
        ),
    ],
)
def test_bad_sources(files: dict[str, str], suffix: str, options: dict, expected: str) -> None:
    data = TaggingData(train=files[suffix], **options)
    with pytest.raises(ValueError, match=expected):
        data.sentences("train")


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.conllu.gz").write_bytes(b"")
    data = TaggingData(train=str(tmp_path / "a.conllu.gz"), tag_column="upos")
    with pytest.raises(ValueError, match=r"a\.conllu\.gz: expected plain text, got a compressed"):
        data.sentences("train")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"tokens": ["a", "b"], "tags": ["X"]},
            r"row 2: expected as many tags as tokens, 2, got 1",
        ),
        ({"tokens": ["a", ""], "tags": ["X", "X"]}, r"row 2: expected text in column 'tokens'"),
        ({"tokens": ["a"], "tags": [None]}, r"row 2: expected a tag, got None"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"tokens": ["a"], "tags": ["X"]}, row]
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    with pytest.raises(ValueError, match=expected):
        TaggingData(train=str(path)).sentences("train")


def test_missing_splits_say_so(files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="test: no such split was given"):
        TaggingData(train=files["conll"]).setup("test")
    with pytest.raises(ValueError, match="max_length: no training sentence is as short as 1"):
        TaggingData(train=files["conll"], val=files["conll"], max_length=1).setup("fit")
