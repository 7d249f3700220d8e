"""What files may hold, and what is said of those that hold something else."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.data.readers import Sentence, read_columns, read_conllu


def conllu(*rows: str) -> str:
    """Rows `id form upos xpos feats`, the cells separated by `|`."""
    lines = []
    for row in rows:
        if not row or row.startswith("#"):
            lines.append(row)
            continue
        number, form, upos, xpos, feats = row.split(";")
        lines.append("\t".join([number, form, "_", upos, xpos, feats, "0", "_", "_", "_"]))
    return "\n".join(lines) + "\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes, name: str = "file.conll") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


TREE = conllu(
    "# text = New York du",
    "1;New York;PROPN;NNP;Case=Nom|Number=Sing",
    "2-3;du;_;_;_",
    "2;de;ADP;IN;_",
    "3;le;DET;DT;Number=Plur",
    "3.1;ghost;X;X;_",
    "",
    "1;#hash;X;ADD;_",
)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("upos", [["PROPN", "ADP", "DET"], ["X"]]),
        ("xpos", [["NNP", "IN", "DT"], ["ADD"]]),
        ("feats:Number", [["Sing", "_", "Plur"], ["_"]]),
        ("head", [["0", "0", "0"], ["0"]]),
    ],
)
def test_conllu(write, column: str, expected: list[list[str]]) -> None:
    sentences = read_conllu(write(TREE), column)
    assert [s.tokens for s in sentences] == [["New York", "de", "le"], ["#hash"]]
    assert [s.tags for s in sentences] == expected


@pytest.mark.parametrize(
    "encode",
    [
        lambda t: t.replace("\n", "\r\n").encode(),
        lambda t: b"\xef\xbb\xbf" + t.encode(),
        lambda t: t.rstrip("\n").encode(),
        lambda t: t.replace("\n\n", "\n \t\n\n").encode(),
    ],
    ids=["crlf", "bom", "no-last-newline", "separators-with-blanks"],
)
def test_line_ends(write, encode) -> None:
    assert read_conllu(write(encode(TREE))) == read_conllu(write(TREE, "plain"))
    columns = "a\tO\nb\tB-X\n\nc\tO\n"
    assert read_columns(write(encode(columns))) == [
        Sentence(["a", "b"], ["O", "B-X"]),
        Sentence(["c"], ["O"]),
    ]


def test_columns_keep_hashtags_and_drop_comments(write) -> None:
    text = "# id = 1\n#tag\tO\n#\tO\n# x\tO\nnew york\tB-LOC\n\n#\n# id\nx\tO\n"
    assert read_columns(write(text), scheme="BIO") == [
        Sentence(["#tag", "#", "# x", "new york"], ["O", "O", "O", "B-LOC"]),
        Sentence(["x"], ["O"]),
    ]


def test_a_lone_hash_between_spaces(write) -> None:
    text = "# id 1 of 9\n#1 O\n# O\nx  B-X \n\n# O\ny O\n\n# header\nz O\n"
    tokens = [s.tokens for s in read_columns(write(text), scheme="BIO")]
    assert tokens == [["#1", "#", "x"], ["#", "y"], ["z"]]
    assert [s.tokens for s in read_columns(write(text))] == [["#1", "#", "x"], ["y"], ["z"]]


def test_columns_by_index(write) -> None:
    text = (
        "-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n-DOCSTART- -X- O O\nx y z O\n"
    )
    assert read_columns(write(text), scheme="BIO") == [
        Sentence(["EU", "rejects"], ["B-ORG", "O"]),
        Sentence(["x"], ["O"]),
    ]
    assert read_columns(write(text), tag_column=1)[0].tags == ["NNP", "VBZ"]


def test_document_mark_may_stand_alone(write) -> None:
    text = "#\n-DOCSTART-\n\na\tO\n-DOCSTART-\nb\tO\n"
    assert [s.tokens for s in read_columns(write(text))] == [["a"], ["b"]]


def test_numbered_columns_skip_what_is_no_word(write) -> None:
    text = (
        "# sent_id = 1\n1-2\tdu\tO\tO#O\ts\n1\tde\tO\tO\ts\n2\tle\tB-PER\tO\ts\n2.1\tx\tO\tO\ts\n"
    )
    sentences = read_columns(write(text), token_column=1, tag_column=2, scheme="BIO")
    assert sentences == [Sentence(["de", "le"], ["O", "B-PER"])]


def test_scores_and_decimals_are_tokens_where_nothing_is_numbered(write) -> None:
    text = "won O\n3-2 O\n8.1 B-NUM\n"
    assert read_columns(write(text)) == [Sentence(["won", "3-2", "8.1"], ["O", "O", "B-NUM"])]


def test_only_spaces_and_tabs_separate(write) -> None:
    text = "a\u00a0b O\nc\u2028d\tO\n"
    assert read_columns(write(text), delimiter=" ")[0].tokens == ["a\u00a0b", "c\u2028d"]


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("a\tO\n\nb\n", {}, r"file.conll:3: expected 2 columns, got 1"),
        ("a\tO\nb\tO\tO\n", {}, r":2: expected 2 columns, got 3"),
        (
            "a\tO\nb\tB\n",
            {"scheme": "BIO"},
            r":2: tag 'B' is outside the scheme BIO: expected O, B",
        ),
        ("a\tX-PER\n", {"scheme": "BIOES"}, r":1: tag 'X-PER' .* E-TYPE, S-TYPE"),
        ("a\tE-PER\n", {"scheme": "IOB1"}, r":1: tag 'E-PER' is outside the scheme IOB1"),
        ("a\tO\n", {"tag_column": 2}, r":1: no column tag_column = 2; the line has 2"),
        ("a\tO\n", {"token_column": -3}, r":1: no column token_column = -3"),
        ("a\tO\n\tO\n", {}, r":2: expected a token, got an empty one"),
        ("a\t\n", {"delimiter": "\t"}, r":1: expected a tag, got an empty one"),
        ("a\tO\n", {"delimiter": ","}, r"delimiter: expected a tab, a space or None, got ','"),
        ("", {}, r"file.conll: expected at least one sentence, got none"),
        ("\n \n# c\n", {}, r"file.conll: expected at least one sentence, got none"),
        (b"a\tO\rb\tO\r\nc\xe9\tO\n", {}, r"file.conll:3: expected UTF-8 text, .* byte 0xE9"),
        ("a\tO\n", {"token_column": 1}, r":1: .* different columns, got both from column 1 of 2"),
    ],
)
def test_bad_columns(write, text: str | bytes, options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        read_columns(write(text), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "column", "expected"),
    [
        (TREE, "pos", r"file.conll: no column 'pos'; CoNLL-U has id, form, lemma, upos"),
        (TREE, "upos:Key", r"no column 'upos:Key'"),
        (
            TREE.replace("ADP\t", "ADP "),
            "upos",
            r":4: expected 10 columns separated by tabs, got 9",
        ),
        (TREE.replace("2\tde", "two\tde"), "upos", r":4: expected the number of a word, got 'two'"),
        ("# only = comments\n", "upos", r"expected at least one sentence, got none"),
    ],
)
def test_bad_conllu(write, text: str, column: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        read_conllu(write(text), column)


def test_missing_file(tmp_path: Path) -> None:
    for read in (read_conllu, read_columns):
        with pytest.raises(FileNotFoundError, match=r"absent: no such file"):
            read(tmp_path / "absent")


WORDS = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1).filter(
    lambda word: word.strip() and word != "-DOCSTART-" and word[0] != "\ufeff"
)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.tuples(WORDS, st.sampled_from(["O", "B-A", "I-A"])), min_size=1), min_size=1
    )
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    path = tmp_path_factory.mktemp("columns") / "file"
    blocks = ["".join(f"{token}\t{tag}\n" for token, tag in row) for row in rows]
    path.write_text("\n".join(blocks), encoding="utf-8", newline="\n")
    expected = [Sentence(*map(list, zip(*row, strict=True))) for row in rows]
    assert read_columns(path, delimiter="\t", scheme="BIO") == expected
