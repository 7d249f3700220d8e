"""What users' files hold: each oddity is handled, or refused by one line that names the place."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch

from fusedrnn.train import main
from lightning_modules.data.schemes import chunks, convert
from lightning_modules.data.tagging import IGNORED, TaggingData
from lightning_modules.tagger import Tagger

SMALL = {"word_size": 8, "character_size": 6, "character_hidden_size": 6, "hidden_sizes": [8]}
PLAIN = "Ann\tB-PER\nLee\tI-PER\nsaw\tO\n\nRome\tB-LOC\n\nit\tO\nis\tO\nParis\tB-LOC\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes, name: str = "a.conll", **options) -> TaggingData:
        data = content if isinstance(content, bytes) else content.encode()
        Path(name).write_bytes(data)
        options = {"scheme": "BIO"} | options
        return TaggingData(train=name, val=name, **options)

    return write


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("robust")
    (folder / "a.conll").write_text(PLAIN)
    place = str(folder / "a.conll")
    data = TaggingData(train=place, val=place, scheme="BIO", encoding="BIOES")
    run = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    L.seed_everything(0)
    run.fit(Tagger(data.codec, **SMALL), data)
    run.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def predict(capsys, checkpoint, text: bytes, *options) -> str:
    Path("in.txt").write_bytes(text)
    main(["predict", "--ckpt_path", str(checkpoint), "--input", "in.txt", *options])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "odd",
    [
        "\n\n \n\t\n" + PLAIN,
        PLAIN.replace("\n\n", "\n\n\n \n\t\n"),
        PLAIN + "\n\n\n",
        PLAIN.rstrip("\n"),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.replace("O\n", "O\r\n").replace("PER\n", "PER\r"),
        "\ufeff" + PLAIN,
        "\ufeff" + PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\t", "  "),
        "-DOCSTART-\tO\n\n" + PLAIN,
    ],
    ids=[
        "blank lines first",
        "blank lines between",
        "blank lines last",
        "no last line end",
        "crlf",
        "cr",
        "mixed line ends",
        "bom",
        "bom and crlf",
        "runs of blanks",
        "document mark",
    ],
)
def test_the_same_sentences_whatever_surrounds_them(write, odd):
    expected = write(PLAIN, "plain.conll").sentences("train")
    assert write(odd).sentences("train") == expected


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_conllu_with_mixed_line_ends(write, line_end):
    rows = ["# text = Ann saw", "1\tAnn\t_\tPROPN" + "\t_" * 6, "2\tsaw\t_\tVERB" + "\t_" * 6]
    text = "\ufeff" + line_end.join(rows) + "\n\n \t\r\n"
    data = write(text, "a.conllu", scheme=None)
    assert data.sentences("train")[0][:2] == (["Ann", "saw"], ["PROPN", "VERB"])


def test_rows_without_words_are_left_out(write):
    rows = [{"tokens": [], "tags": []}, {"tokens": ["a"], "tags": ["O"]}]
    data = write("\n".join(map(json.dumps, rows)), "a.jsonl")
    assert [s.tokens for s in data.sentences("train")] == [["a"]]


@pytest.mark.parametrize("head", ["crf", "softmax"])
def test_a_sentence_of_ten_thousand_words_is_learnt_from_and_tagged(write, head):
    words = "".join(f"w{n % 50}\t{'B-X' if n % 7 == 0 else 'O'}\n" for n in range(10_000))
    data = write(f"{words}\na\tO\n", max_tokens=1000, batch_size=None)
    data.setup("fit")
    sizes = sorted(batch.num_tokens for batch in data.train_dataloader())
    assert sizes == [1, 10_000]
    tagger = Tagger(data.codec, **SMALL, head=head)
    batch = next(batch for batch in data.train_dataloader() if batch.num_tokens > 1)
    loss = tagger.training_step(batch, 0)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in tagger.parameters() if p.grad is not None)
    ((tags, shares, _),) = tagger._find([["w1"] * 10_000], 1, confidence=True)
    assert len(tags[0]) == len(shares) == 10_000
    assert 0 <= min(shares) <= max(shares) <= 1 + 1e-5


def test_max_length_leaves_them_out(write):
    data = write("\n".join(f"w{n}\tO" for n in range(300)) + "\n\na\tO\n", max_length=200)
    data.setup("fit")
    assert [batch.num_tokens for batch in data.train_dataloader()] == [1]
    assert [batch.num_tokens for batch in data.val_dataloader()] == [1, 300][::-1]


@pytest.mark.parametrize(
    ("text", "tokenizer", "count"),
    [
        ("ȺⱦꙀ 🙂👩\u200d👧 \U0001f468", "whitespace", 3),
        ("我爱北京天安门。", "characters", 8),
        ("我爱北京天安门。", "whitespace", 1),
        ("ภาษาไทย", "characters", 7),
        ("日本語 テスト", "characters", 6),
        ("\x00\x07 a", "whitespace", 2),
        ("e\u0301te\u0301", "characters", 3),
    ],
)
def test_unseen_characters_and_scripts_without_spaces(
    write, checkpoint, capsys, text, tokenizer, count
):
    write(PLAIN)
    options = [f"--tokenizer={tokenizer}", "--format=json", "--confidence=true"]
    result = json.loads(predict(capsys, checkpoint, text.encode(), *options))
    assert len(result["tokens"]) == count
    assert "".join(token["text"] for token in result["tokens"]) == "".join(text.split())
    for item in result["tokens"] + result["entities"]:
        assert text[item["start"] : item["end"]] == item["text"]


def test_predict_keeps_empty_lines_and_every_line_end(write, checkpoint, capsys):
    write(PLAIN)
    out = predict(capsys, checkpoint, b"\xef\xbb\xbfAnn\r\n\r\n\n \t\nLee", "--tags_only=true")
    assert [len(line.split()) for line in out.split("\n")] == [1, 0, 0, 0, 1, 0]
    words = predict(capsys, checkpoint, "\ufeffAnn saw".encode())
    assert words.startswith("Ann/")


@pytest.mark.parametrize("options", [[], ["--input_format=conll"]], ids=["text", "conll"])
def test_predict_takes_line_ends_as_training_does(write, checkpoint, capsys, options):
    write(PLAIN)
    plain = predict(capsys, checkpoint, b"Ann\nLee\n\nsaw\n\n\nRome\n", *options)
    assert plain.count("\n") == (3 if options else 7)
    for odd in (
        b"Ann\rLee\r\rsaw\r\r\rRome\r",
        b"Ann\r\nLee\r\n\r\nsaw\r\n\r\n\r\nRome",
        b"\xef\xbb\xbfAnn\rLee\n\nsaw\r\n\n\rRome\r\n",
    ):
        assert predict(capsys, checkpoint, odd, *options) == plain


@pytest.mark.parametrize("encoding", ["BIO", "BIOES"])
def test_training_without_a_word_outside_entities(write, encoding):
    """Of these tags of BIOES alone none would be legal for one word or for three."""
    data = write("Ann\tB-PER\nLee\tI-PER\n\nBo\tB-PER\nHo\tI-PER\n", encoding=encoding)
    tagger = Tagger(data.codec, **SMALL)
    for found in tagger._find([["Ann"] * size for size in (1, 2, 3)], 2, confidence=True):
        assert all(0 <= share <= 1 + 1e-5 for share in found.confidences)
        assert convert(found.tags[0], "BIO") == found.tags[0]


def test_tags_that_training_lacks_are_errors_and_not_crashes(write, checkpoint, capsys):
    write(PLAIN)
    Path("test.conll").write_text("Ann\tB-PER\nNoon\tB-TIME\n\nsaw\tO\nLee\tB-LOC\n")
    fit = ["--model=Tagger", "--data=TaggingData", "--data.scheme=BIO", "--data.encoding=BIOES"]
    fit += [f"--data.{split}=a.conll" for split in ("train", "val")]
    sizes = [f"--model.{name}={value}" for name, value in SMALL.items()]
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false"]
    command = ["test", *fit, *sizes, *quiet, "--data.test=test.conll"]
    cli = main([*command, "--ckpt_path", str(checkpoint)])
    scores = cli.trainer.callback_metrics
    assert 0 <= scores["test/f1"] < 1
    assert torch.isfinite(scores["test/loss"])
    tags = [tag for batch in cli.datamodule.test_dataloader() for tag in batch.tags.flatten()]
    assert IGNORED in tags
    assert "<unseen>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        (PLAIN, "BIO"),
        (PLAIN, "IOB1"),
        (PLAIN.replace("B-", "I-"), "IOB1"),
        (PLAIN.replace("B-", "I-"), "BIO"),
        (PLAIN.replace("B-", "I-"), "IO"),
        (PLAIN.replace("B-", "").replace("I-", ""), "IO"),
        (PLAIN.replace("B-LOC", "S-LOC").replace("I-PER", "E-PER"), "BIOES"),
    ],
    ids=["BIO", "BIO as IOB1", "IOB1", "I- as BIO", "I- as IO", "bare types", "BIOES"],
)
@pytest.mark.parametrize("encoding", ["BIO", "BIOES"])
def test_every_scheme_of_the_same_entities_is_learnt_alike(write, text, scheme, encoding):
    plain = write(PLAIN, "plain.conll", encoding=encoding)
    other = write(text, scheme=scheme, encoding=encoding)
    assert other.codec.tags == plain.codec.tags
    rows = zip(other.sentences("train"), plain.sentences("train"), strict=True)
    for ours, theirs in rows:
        assert chunks(ours.tags) == chunks(theirs.tags)
        assert other.codec.encode(ours).tags == plain.codec.encode(theirs).tags
    assert other.codec.scheme == ("BIOES" if scheme == "BIOES" else "BIO")


def test_touching_entities_of_iob1_stay_two(write):
    data = write("Ann\tI-PER\nLee\tB-PER\nsaw\tO\n", scheme="IOB1")
    (row,) = [data.codec.encode(sentence) for sentence in data.sentences("train")]
    assert data.codec.tasks[0].decode(row.tags) == ["B-PER", "B-PER", "O"]


def test_levels_of_nested_entities_are_columns_to_choose_from(write):
    text = "University\tB-ORG\tO\nof\tI-ORG\tO\nRome\tI-ORG\tB-LOC\n"
    outer = write(text, tag_column=1).sentences("train")[0]
    inner = write(text, tag_column=-1).sentences("train")[0]
    assert outer.tags == ["B-ORG", "I-ORG", "I-ORG"]
    assert inner.tags == ["O", "O", "B-LOC"]
    row = {"data": {"words": ["a", "b"], "ner": {"tags": ["O", "B-X"]}}}
    columns = {"token_column": "data.words", "tag_column": "data.ner.tags"}
    assert write(json.dumps(row), "a.jsonl", **columns).sentences("train")[0][:2] == (
        ["a", "b"],
        ["O", "B-X"],
    )


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("a\tO\nb\tB-X\tB-Y\n", {}, "a.conll:2: expected 2 columns, got 3"),
        ("a\tO\n\nb\tB-X|B-Y\n", {}, "a.conll:3: expected one tag, got 'B-X|B-Y': entities cannot"),
        ("a\tB-X(B-Y)\n", {}, "a.conll:1: expected one tag, got 'B-X(B-Y)': entities cannot"),
        ("a\tB-X#O\n", {}, "a.conll:1: expected one tag, got 'B-X#O': entities cannot"),
        ("a\tO\nb\tB-X\n", {"scheme": "IO"}, "a.conll:2: tag 'B-X' is outside the scheme IO"),
        ("a\tO\nb\tPER\n", {}, "a.conll:2: tag 'PER' is outside the scheme BIO"),
        ("a\tO\nb\tU-X\n", {}, "a.conll:2: tag 'U-X' is outside the scheme BIO"),
        ("a\tO\n\tO\n", {}, "a.conll:2: expected a token, got an empty one"),
        ("a\tO\nb\t\n", {}, "a.conll:2: expected a tag, got an empty one"),
        (b"a\tO\n" * 9999 + b"\xff\xfe\tO\n", {}, "a.conll:10000: expected UTF-8 text, got the"),
        ("a\nb\n", {"scheme": None}, "a.conll:1: expected a token and a tag in different columns"),
        ("\n \n\t\n", {}, "a.conll: expected at least one sentence, got none"),
        ("", {}, "a.conll: expected at least one sentence, got none"),
        ("a\tO\n", {"tag_column": 2}, "a.conll:1: no column tag_column = 2; the line has 2"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_cannot_be_read_is_one_line_with_its_place(write, text, options, expected):
    with pytest.raises(ValueError) as caught:
        write(text, **options).sentences("train")
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)
