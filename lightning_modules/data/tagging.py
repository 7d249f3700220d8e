"""Tagged sentences: their codec, their batches, and where they come from."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_modules.data.batching import lengths, pad
from lightning_modules.data.encoded import EncodedRows
from lightning_modules.data.module import DataModule
from lightning_modules.data.readers import Sentence, check_tag, read_columns, read_conllu
from lightning_modules.data.schemes import convert
from lightning_modules.data.sources import builtin_files, column, load_rows
from lightning_modules.data.vectors import Vectors, load_vectors
from lightning_modules.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    import datasets
    import pyarrow

IGNORED = -100
"""The tag number at padding and of a tag that is not in the training split."""

BUILTIN = "turkish-treebanks"

Array = np.ndarray[Any, Any]
Scheme = Literal["BIO", "IOB1", "IO", "BIOES"]

CASINGS = ("other", "lower", "upper", "title", "mixed", "numeric", "with digit")
"""How a word is written, as far as letters and digits tell (Collobert et al. 2011)."""

REMEMBERED = 1 << 16
"""About how many words are kept whose spelling need not be looked up again."""

_TABLES = (".json", ".jsonl", ".parquet")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


class TaggingBatch(NamedTuple):
    """Sentences as tensors. The spelling of a word that occurs twice is held once.

    Attributes:
        words: [B, T] int64, numbers of the words.
        lengths: [B] int64.
        characters: [U, L] int64, the characters of the U distinct spellings of the batch.
        character_lengths: [U] int64.
        spellings: [B, T] int64, the row of `characters` of each word.
        casings: [U] int64, the casing of each spelling, a place in `CASINGS`.
        tags: [B, T] int64, -100 at padding and at tags that are not in the training split.
        num_tokens: the sum of `lengths`.
        tokens: the words themselves, for evaluation; None in training.
        tag_names: their gold tags as they were read, for evaluation; None where there are none.
        other_tags: `tags` of each further task.
        other_names: `tag_names` of each further task; empty where there are none.
    """

    words: Tensor
    lengths: Tensor
    characters: Tensor
    character_lengths: Tensor
    spellings: Tensor
    casings: Tensor
    tags: Tensor
    num_tokens: int
    tokens: list[list[str]] | None = None
    tag_names: list[list[str]] | None = None
    other_tags: tuple[Tensor, ...] = ()
    other_names: tuple[list[list[str]], ...] = ()


class TagSet(NamedTuple):
    """The tags of one task.

    Attributes:
        name: of the task; the column its tags come from.
        tags: the tags that are learnt, without special ones.
        scheme: the scheme that tags are read and written in: None, "BIO" or "BIOES".
        encoding: the scheme of `tags`.
    """

    name: str
    tags: Vocabulary
    scheme: str | None = None
    encoding: str | None = None

    @classmethod
    def from_names(
        cls,
        name: str,
        sentences: Iterable[Sequence[str]],
        scheme: str | None = None,
        encoding: str | None = None,
    ) -> TagSet:
        """Collect the tags of the training split, with a scheme also `O`; arguments as above.

        Without `O` tags of BIOES may leave a sentence no legal tags at all, for its length.
        """
        found: set[str] = set() if encoding is None else {"O"}
        for names in sentences:
            found.update(names if encoding is None else convert(names, encoding))
        return cls(name, Vocabulary(sorted(found, key=_tag_order), ()), scheme, encoding)

    @property
    def labels(self) -> list[str]:
        """The entity types of the tags, in order; empty without a scheme."""
        kinds = (tag.partition("-")[2] for tag in self.tags.symbols)
        return [] if self.scheme is None else list(dict.fromkeys(filter(None, kinds)))

    def encode(self, names: Sequence[str]) -> list[int]:
        """Return the numbers of the tags of a sentence, -100 for one that is not learnt."""
        names = names if self.encoding is None else convert(names, self.encoding)
        return [self.tags.index(name, IGNORED) for name in names]

    def decode(self, numbers: Sequence[int]) -> list[str]:
        """Return the tags of a sentence, in `scheme` and well-formed."""
        names = self.tags.decode(numbers)
        return names if self.scheme is None else convert(names, self.scheme)


class TaggingCodec:
    """Turns sentences into numbers and numbers into tags.

    Words are numbered in this order: special ones, words of the training split from frequent to
    rare, words that only the pretrained vectors know. A word that is none of them is looked up
    unnormalised and in lower case before it counts as unknown. Characters are those of the word as
    it is written.

    Args:
        words: the words.
        characters: the characters.
        tags: the tags that are learnt in the first task, without special ones.
        known_words: how many of `words` are special or in the training split.
        frequent_words: how many of those are special or occur there more than once.
        scheme: the scheme that those tags are read and written in: None, "BIO" or "BIOES".
        encoding: the scheme of `tags`.
        lowercase: whether words are looked up in lower case.
        digits: whether words are looked up with all digits as 0.
        max_characters: of a longer word only the head and the tail count, this many together.
        others: the tags of further tasks by their names.

    Attributes:
        tasks: the tags of each task, the first being that of `tags`.
        vectors: [words, width] float32, pretrained vectors, NaN where a word has none; None
            without, and after `from_dict`: weights travel with the model.
    """

    def __init__(
        self,
        words: Vocabulary,
        characters: Vocabulary,
        tags: Vocabulary,
        known_words: int,
        frequent_words: int,
        scheme: str | None = None,
        encoding: str | None = None,
        lowercase: bool = False,
        digits: bool = False,
        max_characters: int = 32,
        others: Mapping[str, Vocabulary] | None = None,
    ) -> None:
        self.words, self.characters, self.tags = words, characters, tags
        self.known_words, self.frequent_words = known_words, frequent_words
        self.scheme, self.encoding = scheme, encoding
        self.lowercase, self.digits = lowercase, digits
        self.max_characters = max_characters
        self.tasks = [
            TagSet("", tags, scheme, encoding),
            *(TagSet(name, symbols) for name, symbols in (others or {}).items()),
        ]
        self.vectors: Tensor | None = None
        self._spellings = _Spellings(self.spelling)

    @classmethod
    def from_sentences(
        cls,
        sentences: Iterable[Sentence],
        scheme: str | None = None,
        encoding: str | None = None,
        min_count: int = 1,
        vectors: Vectors | None = None,
        lowercase: bool = False,
        digits: bool = False,
        max_characters: int = 32,
        others: Sequence[str] = (),
    ) -> TaggingCodec:
        """Build a codec from the training split.

        Args:
            sentences: the tagged sentences of the training split.
            scheme: the scheme of their tags: None, "BIO", "IOB1" or "IO" (both written as BIO), or
                "BIOES".
            encoding: the scheme to learn; None: the same.
            min_count: words seen less often are unknown words.
            vectors: pretrained vectors, if any.
            lowercase: as in the constructor.
            digits: as in the constructor.
            max_characters: as in the constructor.
            others: the names of the further tasks, whose tags the sentences hold in this order.
        """
        sentences = list(sentences)
        scheme = "BIO" if scheme in ("IOB1", "IO") else scheme
        encoding = scheme if encoding is None else encoding
        counts: Counter[str] = Counter()
        characters: Counter[str] = Counter()
        for sentence in sentences:
            tokens = sentence.tokens
            counts.update(_normalise(token, lowercase, digits) for token in tokens)
            characters.update(character for token in tokens for character in token)
        further = {
            name: TagSet.from_names(name, (s.others[place] for s in sentences)).tags
            for place, name in enumerate(others)
        }
        words = Vocabulary.from_counts(counts, min_count)
        known = len(words)
        frequent = sum(word not in counts or counts[word] > 1 for word in words.symbols)
        if vectors is not None:
            new = [word for word in vectors.words if word and word not in words]
            words = Vocabulary([*words.to_list(), *(w for w in new if w not in ("<pad>", "<unk>"))])
        codec = cls(
            words,
            Vocabulary.from_counts(characters, min_count=2),  # the others train the unknown one
            TagSet.from_names("", (s.tags for s in sentences), scheme, encoding).tags,
            known,
            frequent,
            scheme,
            encoding,
            lowercase,
            digits,
            max_characters,
            further,
        )
        if vectors is not None:
            codec.vectors = codec._match(vectors)
        return codec

    def _match(self, vectors: Vectors) -> Tensor:
        """Give each word its vector, or that of its lower case, or NaN."""
        rows = {word: row for row, word in enumerate(vectors.words)}
        found = [rows.get(word, rows.get(word.lower(), -1)) for word in self.words.symbols]
        matched = vectors.table[torch.tensor(found).clamp(min=0)]
        matched[torch.tensor(found) < 0] = float("nan")
        return matched

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for a checkpoint."""
        data = {
            "words": self.words.to_list(),
            "characters": self.characters.to_list(),
            "tags": self.tags.to_list(),
            "known_words": self.known_words,
            "frequent_words": self.frequent_words,
            "scheme": self.scheme,
            "encoding": self.encoding,
            "lowercase": self.lowercase,
            "digits": self.digits,
            "max_characters": self.max_characters,
        }
        others = {task.name: task.tags.to_list() for task in self.tasks[1:]}
        return data | {"others": others} if others else data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TaggingCodec:
        """Restore a codec from what `to_dict` returned."""
        names = ("words", "characters", "tags")
        vocabularies = {name: Vocabulary(data[name], ()) for name in names}
        others = {name: Vocabulary(tags, ()) for name, tags in data.get("others", {}).items()}
        return cls(**{**data, **vocabularies, "others": others})

    @property
    def labels(self) -> list[str]:
        """The entity types of the first task's tags, in order; empty without a scheme."""
        return self.tasks[0].labels

    def word(self, token: str) -> int:
        """Return the number of a word."""
        for form in (_normalise(token, self.lowercase, self.digits), token, token.lower()):
            if form in self.words:
                return self.words.index(form)
        return self.words.unk or 0

    def spelling(self, token: str) -> list[int]:
        """Return the numbers of the characters of a word, the middle of a long one left out."""
        if len(token) > self.max_characters:
            head = self.max_characters // 2
            token = token[:head] + token[head - self.max_characters :]
        return self.characters.encode(token) or [self.characters.index("")]

    def encode(self, sentence: Sentence, training: bool = False) -> Row:
        """Encode a tagged sentence.

        Args:
            sentence: tokens and tags.
            training: whether to leave out the tags' names, which only evaluation looks at.
        """
        words = [self.word(token) for token in sentence.tokens]
        names = [sentence.tags, *sentence.others]
        tags = [task.encode(row) for task, row in zip(self.tasks, names, strict=True)]
        return Row(
            words,
            sentence.tokens,
            tags[0],
            None if training else sentence.tags,
            tuple(tags[1:]),
            () if training else sentence.others,
        )

    def untagged(self, tokens: list[str]) -> Row:
        """Encode a sentence whose tags are to be found."""
        ignored = [IGNORED] * len(tokens)
        words = [self.word(token) for token in tokens]
        return Row(words, tokens, ignored, None, (ignored,) * (len(self.tasks) - 1))

    def batch(self, rows: Sequence[Row]) -> TaggingBatch:
        """Make a batch of encoded sentences, each of at least one word."""
        distinct: dict[str, int] = {}
        spellings = [
            [distinct.setdefault(token, len(distinct)) for token in row.tokens] for row in rows
        ]
        if len(self._spellings) > REMEMBERED:
            self._spellings = _Spellings(self.spelling)
        places = self._spellings.places(distinct)
        characters, character_lengths, casings = self._spellings.tensors(places)
        evaluated = rows[0].tag_names is not None
        sizes = lengths([row.words for row in rows])
        return TaggingBatch(
            words=pad([row.words for row in rows]),
            lengths=sizes,
            characters=characters,
            character_lengths=character_lengths,
            spellings=pad(spellings),
            casings=casings,
            tags=pad([row.tags for row in rows], IGNORED),
            num_tokens=int(sizes.sum()),
            tokens=[row.tokens for row in rows] if evaluated else None,
            tag_names=[row.tag_names or [] for row in rows] if evaluated else None,
            other_tags=tuple(
                pad(list(tags), IGNORED)
                for tags in zip(*(row.other_tags for row in rows), strict=True)
            ),
            other_names=tuple(
                list(names) for names in zip(*(row.other_names for row in rows), strict=True)
            ),
        )


class _Spellings:
    """The characters of words, in flat arrays, and tensors of those of some words.

    Args:
        spell: from a word to the numbers of its characters, at least one.
    """

    def __init__(self, spell: Callable[[str], list[int]]) -> None:
        self.spell = spell
        self.known: dict[str, int] = {}
        self.numbers, self.starts, self.sizes, self.casings = (array("q") for _ in range(4))

    def __len__(self) -> int:
        return len(self.known)

    def places(self, tokens: Iterable[str]) -> list[int]:
        """Return where words stand, in the order in which they were first asked for."""
        known = self.known
        return [known[token] if token in known else self._learn(token) for token in tokens]

    def tensors(self, places: Sequence[int] | Array) -> tuple[Tensor, Tensor, Tensor]:
        """Return characters [U, L], zeros past a word's end, their numbers [U] and casings [U]."""
        starts, sizes, casings = (
            np.frombuffer(a, np.int64)[places] for a in (self.starts, self.sizes, self.casings)
        )
        steps = np.arange(sizes.max())
        inside = steps < sizes[:, None]
        found = np.frombuffer(self.numbers, np.int64)[(starts[:, None] + steps) * inside]
        return torch.from_numpy(found * inside), torch.from_numpy(sizes), torch.from_numpy(casings)

    def _learn(self, token: str) -> int:
        numbers = self.spell(token)
        place = self.known[token] = len(self.known)
        self.starts.append(len(self.numbers))
        self.sizes.append(len(numbers))
        self.casings.append(casing(token))
        self.numbers.extend(numbers)
        return place


class _TrainingRows(Sequence[int]):
    """The training split as flat arrays, from which a batch is cut without a loop over its words.

    A row is its number. Lists of Python's numbers and words, and a loop over them, took most of the
    time that training waited for a batch.

    Args:
        codec: what encoded the rows.
        rows: the rows.
    """

    def __init__(self, codec: TaggingCodec, rows: EncodedRows[Row]) -> None:
        import pyarrow.compute as compute  # here, because a trained model is used without

        self.sizes = np.array(rows.lengths("words"))
        self._starts = self.sizes.cumsum() - self.sizes
        self._words = _flat(rows.column("words"))
        others = (
            _flat(compute.list_element(rows.column("other_tags"), task))
            for task in range(len(codec.tasks) - 1)
        )
        self._tags = [_flat(rows.column("tags")), *others]
        tokens = compute.list_flatten(rows.column("tokens")).combine_chunks().dictionary_encode()
        self._tokens = tokens.indices.to_numpy()
        self._spellings = _Spellings(codec.spelling)
        self._spellings.places(tokens.dictionary.to_pylist())

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, place: Any) -> Any:
        return range(len(self))[place]

    def batch(self, rows: Sequence[int]) -> TaggingBatch:
        """Make the batch that `TaggingCodec.batch` makes of these rows."""
        sizes = self.sizes[rows]
        ends = sizes.cumsum()
        places = np.arange(ends[-1]) + (self._starts[rows] - ends + sizes).repeat(sizes)
        inside = np.arange(sizes.max()) < sizes[:, None]

        def grid(flat: Array, value: int = 0) -> Tensor:
            filled = np.full(inside.shape, value)
            filled[inside] = flat
            return torch.from_numpy(filled)

        tokens = self._tokens[places]
        numbers = np.arange(len(tokens))
        first = np.empty(len(self._spellings), np.int64)
        first[tokens[::-1]] = numbers[::-1]  # of places that are equal the last one counts
        is_first = first[tokens] == numbers
        characters, character_lengths, casings = self._spellings.tensors(tokens[is_first])
        tags, *others = (grid(column[places], IGNORED) for column in self._tags)
        return TaggingBatch(
            words=grid(self._words[places]),
            lengths=torch.from_numpy(sizes),
            characters=characters,
            character_lengths=character_lengths,
            spellings=grid((is_first.cumsum() - 1)[first[tokens]]),
            casings=casings,
            tags=tags,
            num_tokens=len(tokens),
            other_tags=tuple(others),
        )


def _flat(column: pyarrow.ChunkedArray) -> Array:
    """Return the numbers of all lists, one after the other."""
    import pyarrow.compute as compute

    return compute.list_flatten(column).to_numpy().astype(np.int32)


class Row(NamedTuple):
    """An encoded sentence; `other_tags` and `other_names` are those of further tasks."""

    words: list[int]
    tokens: list[str]
    tags: list[int]
    tag_names: list[str] | None
    other_tags: tuple[list[int], ...] = ()
    other_names: tuple[list[str], ...] = ()


class TaggingData(DataModule):
    r"""Tagged sentences to learn from, from files, the hub, or the built-in treebank.

    Give either files, or a `dataset`:

    * CoNLL-U files (`.conllu`): `train="train.conllu"`, `tag_column="upos"`;
    * tables with a list of tokens and a list of tags in each row (`.json`, `.jsonl`, `.parquet`):
      `token_column="tokens"`, `tag_column="ner_tags"`;
    * any other file is CoNLL columns: `token_column=0`, `tag_column=-1`;
    * a dataset of the Hugging Face hub, where `train`, `val` and `test` are its splits:
      `dataset="lhoestq/conll2003"`, `tag_column="ner_tags"`; tags may be strings or class labels;
    * `dataset="turkish-treebanks"`: the Turkish web and Wikipedia treebanks that the extra
      `fusedrnn[data]` installs, in their own split: of ten sentences of a section the first eight
      are for training, the ninth for validation, the tenth for testing. Its tags are not those of
      Universal Dependencies, and its tokens are inflectional groups.

    The vocabulary comes from the training split alone, and from the pretrained vectors.

    Args:
        train: file, or split of the dataset (default `train`).
        val: the same, for validation (default `validation`).
        test: the same, for testing (default `test`).
        dataset: `turkish-treebanks` or the name of a dataset on the hub.
        config: configuration of a dataset on the hub.
        token_column: name, or in CoNLL columns the index, of the column of tokens (default
            `tokens`, 0). CoNLL-U has but one.
        tag_column: name or index of the column of tags (default `tags`, -1, or for CoNLL-U `upos`;
            there also `feats:KEY`). Of a list each column is a task that is learnt with the
            others, such as [upos, xpos, feats]; the first is the main one.
        delimiter: of CoNLL columns: "\t", or " " for runs of spaces and tabs; None: a tab if the
            first line has one.
        scheme: the scheme of tags that mark entities: BIO; IOB1 (also of files with I- alone); IO,
            whose tags may be bare types; or BIOES. None: tags are single labels, as parts of speech
            are. It is the first task's; the tags of further ones are single labels.
        encoding: the scheme to learn, BIO or BIOES; None: `scheme`. Results are in `scheme` again.
        vectors: pretrained word vectors, a text file in the format of GloVe or fastText, or a
            `.bin` model of fastText. They are kept in a cache (see `load_vectors`).
        max_vectors: how many of them to read; None: all.
        lowercase: whether words are looked up in lower case (characters keep theirs).
        digits: whether words are looked up with all digits as 0.
        min_count: rarer words become unknown words.
        max_characters: of a longer word only the head and the tail count.
        max_length: training sentences of more words than this are left out.
        batch_size: most sentences in a batch.
        max_tokens: most words in a batch, padding counted.
        seed: of the order of the batches.
        num_workers: processes that collate batches.

    Raises:
        FileNotFoundError: a file or the dataset does not exist.
        ValueError: arguments that exclude each other, a wrong column, a ragged line, a tag outside
            the scheme, an empty split; the message names the file and line.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        dataset: str | None = None,
        config: str | None = None,
        token_column: int | str | None = None,
        tag_column: int | str | Sequence[int | str] | None = None,
        delimiter: str | None = None,
        scheme: Scheme | None = None,
        encoding: Literal["BIO", "BIOES"] | None = None,
        vectors: str | None = None,
        max_vectors: int | None = None,
        lowercase: bool = False,
        digits: bool = False,
        min_count: int = 1,
        max_characters: int = 32,
        max_length: int | None = None,
        batch_size: int | None = 16,
        max_tokens: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, max_tokens, seed, num_workers)
        if train is None and dataset is None:
            raise ValueError("train, dataset: expected one of them")
        if dataset == BUILTIN and any(part is not None for part in (train, val, test)):
            raise ValueError(
                f"dataset: {BUILTIN} has its own splits; leave out train, val and test"
            )
        schemes = get_args(Scheme)
        if scheme is not None and scheme not in schemes:
            raise ValueError(f"scheme: expected one of {', '.join(schemes)} or None, got {scheme}")
        if encoding is not None and (scheme is None or encoding not in ("BIO", "BIOES")):
            raise ValueError(f"encoding: expected BIO or BIOES and a scheme, got {encoding}")
        for name, value in (("min_count", min_count), ("max_characters", max_characters)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.dataset, self.config = dataset, config
        self.token_column, self.delimiter = token_column, delimiter
        listed = tag_column is not None and not isinstance(tag_column, int | str)
        self.tag_columns = list(cast(Any, tag_column)) if listed else [cast(Any, tag_column)]
        if len(set(self.tag_columns)) != len(self.tag_columns) or not self.tag_columns:
            raise ValueError(f"tag_column: expected distinct columns, got {self.tag_columns}")
        self.scheme = scheme
        self.vectors, self.max_vectors = vectors, max_vectors
        self.max_length = max_length
        self._codec_options: dict[str, Any] = {
            "encoding": encoding,
            "min_count": min_count,
            "lowercase": lowercase,
            "digits": digits,
            "max_characters": max_characters,
        }
        self._places = {"train": train, "val": val, "test": test}
        if dataset is not None and dataset != BUILTIN:
            names = {"train": "train", "val": "validation", "test": "test"}
            self._places = {split: self._places[split] or name for split, name in names.items()}
        self._sentences: dict[str, list[Sentence]] = {}

    @cached_property
    def codec(self) -> TaggingCodec:
        """The codec, built from the training split when first asked for."""
        vectors = None
        if self.vectors is not None:
            vectors = load_vectors(self.vectors, self.max_vectors)
        codec = TaggingCodec.from_sentences(
            self.sentences("train"),
            self.scheme,
            vectors=vectors,
            others=[str(name) for name in self.tag_columns[1:]],
            **self._codec_options,
        )
        if self._has("val"):
            self.sentences("val")  # so that its faults show before anything is started
        if codec.vectors is not None:
            given = (part for part in ("train", "val") if self._has(part))
            for line in coverage(codec, {part: self.sentences(part) for part in given}):
                rank_zero_info(f"{self.vectors}: {line}")
        return codec

    def _has(self, split: str) -> bool:
        return self.dataset == BUILTIN or self._places[split] is not None

    def sentences(self, split: str) -> list[Sentence]:
        """Return the sentences of a split as they were read.

        Args:
            split: `train`, `val` or `test`.

        Raises:
            ValueError: there is no such split, or it is empty.
        """
        if split not in self._sentences:
            if self.dataset == BUILTIN:
                parts = [read_builtin(_named(tag, "upos")) for tag in self.tag_columns]
                for part in parts[0]:
                    self._sentences[part] = _together([columns[part] for columns in parts], part)
            elif self._places[split] is None:
                raise ValueError(f"{split}: no such split was given")
            else:
                place = str(self._places[split])
                columns = [
                    self._read(place, tag, None if task else self.scheme)
                    for task, tag in enumerate(self.tag_columns)
                ]
                self._sentences[split] = _together(columns, place)
        return self._sentences[split]

    def _read(self, place: str, tag: int | str | None, scheme: str | None) -> list[Sentence]:
        suffix = Path(place).suffix.lower()
        if self.dataset is not None or suffix in _TABLES:
            source = place if self.dataset is None else self.dataset
            split = "train" if self.dataset is None else place
            columns = _named(self.token_column, "tokens"), _named(tag, "tags")
            return read_table(source, split, self.config, columns, scheme)
        if suffix in _COMPRESSED:
            raise ValueError(f"{place}: expected plain text, got a compressed file: unpack it")
        if suffix == ".conllu":
            if self.token_column not in (None, "form"):
                raise ValueError(f"token_column: CoNLL-U has form, got {self.token_column!r}")
            return read_conllu(place, _named(tag, "upos"), scheme)
        indices = _index(self.token_column, 0, place), _index(tag, -1, place)
        return read_columns(place, *indices, self.delimiter, scheme)

    def setup(self, stage: str | None = None) -> None:
        """Read and encode what a stage needs; for `fit` also read a file for testing.

        Its faults would show only after the training.
        """
        if stage == "fit" and self.dataset is None and self._places["test"] is not None:
            self.sentences("test")
        super().setup(stage)

    def _encode(self, split: str) -> EncodedRows[Row] | _TrainingRows:
        codec, sentences, training = self.codec, self.sentences(split), split == "train"
        if training:
            sentences = self._short(sentences)
        key = [codec.to_dict(), sentences, training]
        rows = EncodedRows(Row, lambda: (codec.encode(s, training) for s in sentences), key)
        return _TrainingRows(codec, rows) if training else rows

    def _sizes(self, rows: EncodedRows[Row] | _TrainingRows) -> Sequence[int]:
        return rows.sizes.tolist() if isinstance(rows, _TrainingRows) else rows.lengths("words")

    def _collate(self, split: str) -> Callable[[list[Any]], TaggingBatch]:
        rows = self._rows[split]
        return rows.batch if isinstance(rows, _TrainingRows) else self.codec.batch

    def describe(self) -> dict[str, Any]:
        """Say in a few words what the data are, for a model card."""
        places = {split: place for split, place in self._places.items() if place is not None}
        counts = {
            f"words of {split}": f"{sum(len(s.tokens) for s in sentences):,}"
            for split, sentences in self._sentences.items()
        }
        columns = (
            ", ".join(str(column) for column in self.tag_columns if column is not None) or None
        )
        asked = {"tags": columns, "scheme": self.scheme, "vectors": self.vectors}
        named = {"dataset": self.dataset, "configuration": self.config, **places, **asked}
        return {name: value for name, value in named.items() if value is not None} | counts

    def _short(self, sentences: list[Sentence]) -> list[Sentence]:
        if self.max_length is None:
            return sentences
        kept = [s for s in sentences if len(s.tokens) <= self.max_length]
        rank_zero_info(
            f"{len(sentences) - len(kept)} sentences longer than {self.max_length} words left out"
        )
        if not kept:
            raise ValueError(f"max_length: no training sentence is as short as {self.max_length}")
        return kept


def read_builtin(tag_column: str = "upos") -> dict[str, list[Sentence]]:
    """Read the installed Turkish treebanks, without importing their package, in their own split.

    Args:
        tag_column: the column of the tags, as for `read_conllu`.

    Returns:
        The sentences of `train`, `val` and `test`.

    Raises:
        FileNotFoundError: the treebanks are not installed.
    """
    parts: dict[str, list[Sentence]] = {"train": [], "val": [], "test": []}
    for path in builtin_files(BUILTIN, ".conllu"):
        for number, sentence in enumerate(read_conllu(path, tag_column)):
            split = {8: "val", 9: "test"}.get(number % 10, "train")
            parts[split].append(sentence)
    return parts


def read_table(
    source: str,
    split: str,
    config: str | None,
    columns: tuple[str, str],
    scheme: str | None = None,
) -> list[Sentence]:
    """Read rows that hold a list of tokens and a list of tags, from a file or the hub.

    Args:
        source: file or name, as for `load_rows`.
        split: split of a dataset on the hub.
        config: configuration of a dataset on the hub.
        columns: names of the columns of tokens and of tags; dotted for nested ones. Tags are
            strings, class labels, or numbers, which become strings.
        scheme: the tag scheme to check against, if any.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: a wrong column, a row that does not hold two lists of the same length, a token
            that is not text, or a tag outside the scheme, with its row; no sentence.
    """
    rows = load_rows(source, split, config)
    all_tokens, all_tags = (column(rows, name, source) for name in columns)
    names = _class_names(rows, columns[1])
    sentences = []
    for number, (tokens, tags) in enumerate(zip(all_tokens, all_tags, strict=True), start=1):
        place = f"{source}: row {number}"
        for name, cells in zip(columns, (tokens, tags), strict=True):
            if not isinstance(cells, list):
                raise ValueError(f"{place}: expected a list in column {name!r}, got {cells!r}")
        if len(tokens) != len(tags):
            raise ValueError(
                f"{place}: expected as many tags as tokens, {len(tokens)}, got {len(tags)}"
            )
        for token in tokens:
            if not isinstance(token, str) or not token:
                raise ValueError(f"{place}: expected text in column {columns[0]!r}, got {token!r}")
        labels = [check_tag(_label(tag, names, place), scheme, place) for tag in tags]
        if tokens:
            sentences.append(Sentence(tokens, labels))
    if not sentences:
        raise ValueError(f"{source}: expected at least one sentence in split {split!r}, got none")
    return sentences


def _together(columns: Sequence[list[Sentence]], place: str) -> list[Sentence]:
    """Join what was read with each column of tags: the first's tags, the others' as `others`."""
    first = columns[0]
    if len(columns) == 1:
        return first
    if any([s.tokens for s in other] != [s.tokens for s in first] for other in columns[1:]):
        raise ValueError(
            f"{place}: the columns of tags disagree on which lines are words: is a line that "
            "starts with # a comment or a token?"
        )
    others = zip(*([s.tags for s in other] for other in columns[1:]), strict=True)
    return [s._replace(others=o) for s, o in zip(first, others, strict=True)]


def coverage(codec: TaggingCodec, splits: Mapping[str, Sequence[Sentence]]) -> Iterator[str]:
    """Say how much of each split has a pretrained vector, and what has none most often.

    Args:
        codec: one with vectors.
        splits: sentences by the name of their split.
    """
    assert codec.vectors is not None
    has = (~codec.vectors.isnan().any(1)).tolist()
    has[codec.word("")] = False  # the unknown word
    for split, sentences in splits.items():
        counts = Counter(token for sentence in sentences for token in sentence.tokens)
        without = Counter({t: n for t, n in counts.items() if not has[codec.word(t)]})
        shares = []
        for unit, missed, all_of in (
            ("words", without.total(), counts.total()),
            ("distinct words", len(without), len(counts)),
        ):
            shares.append(f"{missed} of {all_of} {unit} ({100 * missed / all_of:.1f} %)")
        often = ", ".join(token for token, _ in without.most_common(10))
        yield f"{split}: no vector for {' and '.join(shares)}{often and ', such as ' + often}"
    yield f"{len(codec.words) - codec.known_words} words beyond the training split have vectors"


def _class_names(rows: datasets.Dataset, name: str) -> list[str] | None:
    """Return the names of class labels in a column of lists, if that is what it holds."""
    import datasets

    feature: Any = rows.features
    for part in [name] if name in rows.features else name.split("."):
        feature = feature[part]
    feature = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def _label(tag: object, names: list[str] | None, place: str) -> str:
    if names is None and isinstance(tag, str | int):
        return str(tag)
    if names is not None and isinstance(tag, int) and 0 <= tag < len(names):
        return names[tag]
    raise ValueError(f"{place}: expected a tag, got {tag!r}")


def _normalise(token: str, lowercase: bool, digits: bool) -> str:
    token = token.lower() if lowercase else token
    return re.sub(r"\d", "0", token) if digits else token


@lru_cache(maxsize=1 << 16)
def casing(token: str) -> int:
    """Return the place in `CASINGS` of how a word is written."""
    letters = [character for character in token if character.isalpha()]
    if any(character.isdigit() for character in token):
        return CASINGS.index("with digit" if letters else "numeric")
    written = "".join(letters)
    for name, holds in (
        ("lower", written.islower()),
        ("upper", written.isupper() and len(letters) > 1),
        ("title", written[:1].isupper() and not any(c.isupper() for c in written[1:])),
        ("mixed", any(c.isupper() for c in written)),
    ):
        if holds:
            return CASINGS.index(name)
    return CASINGS.index("other")


def _tag_order(tag: str) -> tuple[bool, str, str]:
    """O first, then by entity type; tags without types by name."""
    prefix, _, kind = tag.partition("-")
    return tag != "O", kind, prefix


def _named(value: int | str | None, default: str) -> str:
    return default if value is None else str(value)


def _index(value: int | str | None, default: int, place: str) -> int:
    try:
        return default if value is None else int(value)
    except ValueError:
        raise ValueError(f"{place}: CoNLL columns go by index, got column {value!r}") from None
