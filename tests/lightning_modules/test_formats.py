"""What is read to be tagged, and how tagged sentences are written."""

import html
import json
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedrnn.train import main
from lightning_modules.data.readers import Sentence
from lightning_modules.data.schemes import chunks
from lightning_modules.data.tagging import TaggingCodec
from lightning_modules.formats import (
    WRITERS,
    BadLine,
    Source,
    Tagged,
    read_columns,
    read_text,
    token_spans,
    tokenize,
)
from lightning_modules.tagger import Tagger

TOKENIZERS = ("whitespace", "words", "characters")


@pytest.mark.parametrize(
    ("text", "tokenizer", "expected"),
    [
        ("Don't panic: it's well-known.", "words", "Don't panic : it's well-known ."),
        ("Ankara'da  9,5 TL!", "words", "Ankara'da 9 , 5 TL !"),
        ("हिन्दी में।", "words", "हिन्दी में ।"),
        ("cafe\u0301 (é)", "words", "cafe\u0301 ( é )"),
        ("می\u200cخواهم", "words", "می\u200cخواهم"),
        ("我爱 北京。", "characters", "我 爱 北 京 。"),
        ("ที่นี่", "characters", "ที่ นี่"),
        ("a b\u00a0c\u2028d", "whitespace", "a b c d"),
        ("", "words", ""),
        (" \t ", "characters", ""),
    ],
)
def test_tokenize(text, tokenizer, expected):
    assert " ".join(tokenize(text, tokenizer)) == expected


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match="expected whitespace, words or characters, got 'bpe'"):
        token_spans("a", "bpe")


@given(st.text(), st.sampled_from(TOKENIZERS))
@settings(deadline=None)
def test_tokens_are_all_of_the_text_but_white_space_in_order(text, tokenizer):
    spans = token_spans(text, tokenizer)
    assert all(before[1] <= after[0] for before, after in pairwise([(0, 0), *spans]))
    assert all(start < end for start, end in spans)
    assert "".join(text[start:end] for start, end in spans) == "".join(text.split())


@given(st.text(), st.text())
def test_whitespace_is_what_python_calls_it(a, b):
    assert tokenize(f"{a} {b}") == f"{a} {b}".split()


@given(st.lists(st.tuples(st.text(st.characters(exclude_characters="\r\n")), st.booleans())))
def test_offsets_point_into_the_input_whatever_its_line_ends(lines):
    whole = [text + ("\r\n" if windows else "\n") for text, windows in lines]
    for source in read_text(whole):
        at = source.offset
        assert "".join(whole)[at : at + len(source.text)] == source.text
    stripped = list(read_text([text for text, _ in lines]))
    joined = "\n".join(text for text, _ in lines)
    for source in stripped:
        assert joined[source.offset :].startswith(source.text)


COLUMNS = ["-DOCSTART- O\r\n", "\n", "# a comment\n", "we PRP O\r\n", "# NN O\n", " \n", "go VB O"]


def test_columns_keep_their_lines_and_know_their_tokens():
    sentences = list(read_columns(["# x\ty\n", "a\tb\r\n", "# only a comment", "\t\n", "c\td"]))
    assert [s.tokens for s in sentences] == [["# x", "a"], ["c"]]
    assert sentences[0].lines == ["# x\ty", "a\tb", "# only a comment"]
    document, *rest = read_columns(COLUMNS)
    assert (document.tokens, document.lines) == ([], ["-DOCSTART- O"])
    assert [s.tokens for s in rest] == [["we", "#"], ["go"]]
    assert [s.tokens for s in read_columns(COLUMNS[3:4], 1)] == [["PRP"]]
    assert [s.tokens for s in read_columns(COLUMNS[3:4], -1)] == [["O"]]


def test_a_token_may_hold_what_is_white_but_no_space():
    """As in training, where such a line has two columns."""
    (sentence,) = read_columns(["10\u00a0000 NUM"])
    assert sentence.tokens == ["10\u00a0000"]


def test_conllu_leaves_out_ranges_and_empty_nodes():
    lines = ["# text = Can't", "1-2\tCan't\t_", "1\tCa\t_", "2\tn't\t_", "2.1\tbe\t_"]
    (sentence,) = read_columns(lines, conllu=True)
    assert sentence.tokens == ["Ca", "n't"]
    (written,) = WRITERS["conll"]([Tagged(sentence, ["AUX", "PART"])], None)
    assert written == (
        "# text = Can't\n1-2\tCan't\t_\n1\tCa\t_\tAUX\n2\tn't\t_\tPART\n2.1\tbe\t_\n"
    )


@pytest.mark.parametrize(("line", "column"), [("a b", 2), ("\tb", 0), ("a", -2)])
def test_a_line_without_the_column_is_refused(line, column):
    with pytest.raises(BadLine, match=rf"^line 3: expected a token in column {column}, got"):
        list(read_columns(["a b c", "", line], column))


@pytest.mark.parametrize("line", ["a\tNOUN", "1 a b", "x\ta\t_"])
def test_columns_that_are_not_conllu_are_refused(line):
    with pytest.raises(BadLine, match=r"^line 2: expected the number of a word and a tab, got"):
        list(read_columns(["1\ta\t_", line], conllu=True))


TEXT = "Ann Lee  saw <Rome>\tand Lee"
TAGS = ["B-PER", "I-PER", "O", "B-LOC", "O", "B-PER"]
SHARES = [0.9, 0.75, 1.0, 0.5, 0.99, 0.25]
SURE = [0.7, 0.5, 0.25]


def tagged(confidences=None, text=TEXT, offset=0):
    sure = None if confidences is None else SURE
    return Tagged(Source(text, token_spans(text), offset), TAGS, confidences, sure)


def write(name, *sentences, scheme="BIO"):
    return list(WRITERS[name](sentences, scheme))


def test_text():
    assert write("text", tagged()) == [
        "Ann/B-PER Lee/I-PER saw/O <Rome>/B-LOC and/O Lee/B-PER",
    ]
    assert write("text", tagged(SHARES))[0].startswith("Ann/B-PER/0.9000 Lee/I-PER/0.7500 ")


def test_conll():
    (written,) = write("conll", tagged(SHARES))
    assert written.splitlines()[:2] == ["Ann\tB-PER\t0.9000", "Lee\tI-PER\t0.7500"]
    read = list(read_columns(f"{written}\n".splitlines(keepends=True)))
    assert [s.tokens for s in read] == [TEXT.split()]
    (blanks,) = read_columns(["a X", "b Y"])
    assert write("conll", Tagged(blanks, ["O", "O"])) == ["a X O\nb Y O\n"]
    assert write("conll", Tagged(Source("", []), [])) == [""]


def test_json():
    (line,) = write("json", tagged(SHARES))
    result = json.loads(line)
    assert result["text"] == TEXT
    assert [t["text"] for t in result["tokens"]] == TEXT.split()
    assert [t["confidence"] for t in result["tokens"]] == SHARES
    for item in [*result["tokens"], *result["entities"]]:
        assert TEXT[item["start"] : item["end"]] == item["text"]
    assert [(e["type"], e["text"], e["confidence"]) for e in result["entities"]] == [
        ("PER", "Ann Lee", 0.7),
        ("LOC", "<Rome>", 0.5),
        ("PER", "Lee", 0.25),
    ]
    plain = json.loads(write("json", tagged(), scheme=None)[0])
    assert set(plain) == {"text", "tokens"}
    assert "confidence" not in plain["tokens"][0]


def test_brat():
    lines = write("brat", tagged(), tagged(SHARES, offset=40))
    assert lines[:3] == ["T1\tPER 0 7\tAnn Lee", "T2\tLOC 13 19\t<Rome>", "T3\tPER 24 27\tLee"]
    assert lines[3:5] == [
        "T4\tPER 40 47\tAnn Lee",
        "#4\tAnnotatorNotes T4\tconfidence 0.7000",
    ]
    assert len(write("brat", tagged(), scheme=None)) == 6  # every token, by its tag
    (columns,) = read_columns(["Ann"])
    with pytest.raises(ValueError, match="brat points into raw text, and the input is columns"):
        write("brat", Tagged(columns, ["O"]))


def test_html_is_a_page_of_the_text():
    page = "\n".join(write("html", tagged(SHARES)))
    assert page.startswith("<!doctype html>")
    assert page.endswith("</html>")
    assert "<Rome>" not in page
    body = re.search("<p dir=.*</p>", page)[0]
    words = re.sub("<b>.*?</b>", "", body)
    assert html.unescape(re.sub("<[^>]*>", "", words)) == TEXT
    assert re.findall("<b>(.*?)</b>", body) == ["PER", "LOC", "PER"]
    assert 'title="confidence 0.7000"' in body
    assert "http" not in page


def test_ansi_colours_entities_and_keeps_the_text_from_steering_the_terminal():
    evil = Tagged(Source("a\x1b[2Jb", [(0, 6)]), ["B-PER"])
    (line,) = write("ansi", evil)
    assert re.sub(r"\x1b\[[0-9;]*m", "", line) == "a[2Jb PER"
    (line,) = write("ansi", tagged())
    assert line.count("\x1b[0m") == 6
    assert not [c for c in line if unicodedata.category(c) == "Cc" and c not in "\x1b\t"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained tagger, in a checkpoint."""
    torch.manual_seed(0)
    codec = TaggingCodec.from_sentences(
        [Sentence(["Ann", "Lee", "saw", "Rome"], ["B-PER", "I-PER", "O", "B-LOC"])], "BIO", "BIOES"
    )
    sizes = {"word_size": 6, "character_size": 4, "character_hidden_size": 4, "hidden_sizes": [5]}
    tagger = Tagger(codec, **sizes)
    path = tmp_path_factory.mktemp("tagger") / "x.ckpt"
    header = {"format": 1, "task": "Tagger", "version": "0.1.0", "seed": 0}
    header |= {"arguments": tagger.arguments, "codec": codec.to_dict()}
    torch.save({"fusedrnn": header, "state_dict": tagger.state_dict()}, path)
    return path


def predict(capsys, checkpoint, *options):
    main(["predict", "--ckpt_path", str(checkpoint), *options])
    return capsys.readouterr().out


def test_confidences_are_marginals(checkpoint):
    tagger = Tagger.load_from_checkpoint(checkpoint)
    sentences = [["Ann", "saw"], ["Rome"], [], ["x"] * 7]
    found = tagger._find(sentences, 2, confidence=True)
    for words, ((tags,), shares, sure) in zip(sentences, found, strict=True):
        assert len(tags) == len(shares) == len(words)
        assert len(sure) == len(chunks(tags))
        if not words:
            continue
        batch = tagger.codec.batch([tagger.codec.untagged(words)])
        emissions = tagger(batch)
        path, _ = tagger.model.crf.decode(emissions, batch.lengths)
        marginals = tagger.model.crf.marginals(emissions, batch.lengths)[0]
        expected = marginals[torch.arange(len(words)), path[0]].tolist()
        assert shares == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("head", ["crf", "softmax"])
def test_confidence_in_an_entity_is_its_probability(checkpoint, head):
    """The sum over all paths that have its tags; BIOES says in the tags where it ends."""
    loaded = Tagger.load_from_checkpoint(checkpoint)
    tagger = Tagger(loaded.codec, **{**loaded.arguments, "head": head}).eval()
    sentences = [["Ann", "Lee", "x"], ["Rome"], ["saw", "y", "z", "Lee"]]
    seen = 0
    for seed in range(8):
        torch.manual_seed(seed)
        torch.nn.init.normal_(tagger.model.emission.weight, std=5)
        for words, found in zip(
            sentences, tagger._find(sentences, 3, confidence=True), strict=True
        ):
            batch = tagger.codec.batch([tagger.codec.untagged(words)])
            emissions = tagger(batch).detach()
            path = tagger.model.decode(emissions, batch.lengths)[0]
            paths = torch.cartesian_prod(*[torch.arange(emissions.shape[-1])] * len(words))
            paths = paths.view(-1, len(words))
            if head == "crf":
                rows = emissions.expand(len(paths), -1, -1)
                shares = tagger.model.crf(rows, paths).exp()
            else:
                words_apart = emissions[0].softmax(-1)
                shares = words_apart[torch.arange(len(words)), paths].prod(1)
            for sure, (_, start, end) in zip(
                found.entity_confidences, chunks(found.tags[0]), strict=True
            ):
                same = (paths[:, start:end] == path[start:end]).all(1)
                assert sure == pytest.approx(shares[same].sum().item(), rel=1e-3)
                seen += end - start > 1
    assert seen


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("confidence", ["true", "false"])
def test_predict_writes_every_format(checkpoint, tmp_path, monkeypatch, capsys, name, confidence):
    monkeypatch.chdir(tmp_path)
    raw = "\ufeffAnn Lee saw Rome.\r\n\r\n\nÇa 漢字 🙂 x\nend"
    Path("in.txt").write_bytes(raw.encode())
    options = ["--input=in.txt", f"--format={name}", f"--confidence={confidence}"]
    written = predict(capsys, checkpoint, *options, "--tokenizer=words")
    if name in ("text", "json"):
        assert written.count("\n") == 5
    if name == "brat":
        found = [line.split("\t") for line in written.splitlines() if line[0] == "T"]
        assert found
        for _, place, text in found:
            _, start, end = place.split()
            assert raw[1:][int(start) : int(end)] == text
    if name == "json":
        texts = [json.loads(line)["text"] for line in written.splitlines()]
        assert texts == ["Ann Lee saw Rome.", "", "", "Ça 漢字 🙂 x", "end"]


def test_predict_on_columns(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("in.conll").write_bytes("\ufeff1\tAnn\tN\r\n2\tLee\tN\r\n\r\n1\tsaw\tV".encode())
    options = ["--input=in.conll", "--input_format=conll", "--token_column=1"]
    lines = predict(capsys, checkpoint, *options, "--format=conll").split("\n")
    assert [line.split("\t")[:3] for line in lines[:2]] == [["1", "Ann", "N"], ["2", "Lee", "N"]]
    assert [len(line.split("\t")) for line in lines] == [4, 4, 1, 4, 1, 1]
    words = predict(capsys, checkpoint, *options).split()
    assert [word.split("/")[0] for word in words] == ["Ann", "Lee", "saw"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token_column=7"], "error: in.conll:1: expected a token in column 7, got 'a b'"),
        (
            ["--tags_only=true", "--format=json"],
            "error: tags_only: expected the format text and no confidence, "
            "got format json, confidence False",
        ),
        (
            ["--input_format=conllu"],
            "error: in.conll:1: expected the number of a word and a tab, got 'a b'",
        ),
        (["--format=brat"], "error: format: brat points into raw text, and the input is columns"),
    ],
)
def test_predict_refuses_in_one_line(checkpoint, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    Path("in.conll").write_text("a b\n")
    with pytest.raises(SystemExit):
        predict(capsys, checkpoint, "--input=in.conll", "--input_format=conll", *options)
    assert capsys.readouterr().err == f"{message}\n"
