"""Speech and other recordings: files of sound or features, and the texts that belong to them."""

from __future__ import annotations

import io
import re
import tarfile
import wave
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.data.batching import lengths
from lightning_modules.data.module import SPLITS, DataModule
from lightning_modules.data.pairs import Kind, PairBatch, PairCodec, PairRow, Symbols, collate
from lightning_modules.data.sources import column, load_rows
from lightning_modules.data.vocabulary import SPECIALS, Vocabulary

__all__ = ["SpeechCodec", "SpeechData", "log_mel", "read_wav"]

WINDOW, HOP = 0.025, 0.010
"""Seconds that a frame sees, and from one frame to the next."""


def read_wav(file: str | Path | io.BytesIO, name: str | None = None) -> tuple[Tensor, int]:
    """Read a recording in PCM.

    Args:
        file: a `.wav` file, its channels averaged.
        name: what to call it in a message; its path by default.

    Returns:
        Samples, float [N] in [-1, 1), and their number in a second.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a `.wav` file in PCM, is cut off, or holds no sample.
    """
    name = str(file) if name is None else name
    if isinstance(file, str | Path) and not Path(file).is_file():
        raise FileNotFoundError(f"{name}: no such file")
    try:
        with wave.open(str(file) if isinstance(file, Path) else file) as recording:
            width, channels = recording.getsampwidth(), recording.getnchannels()
            rate, count = recording.getframerate(), recording.getnframes()
            data = bytearray(recording.readframes(count))
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{name}: not a PCM recording: {error or 'it is cut off'}") from error
    if len(data) != count * channels * width or count == 0:
        raise ValueError(f"{name}: expected {count} samples, at least one; the file is cut off")
    if width == 1:  # the only unsigned width
        samples = (torch.frombuffer(data, dtype=torch.uint8).float() - 128) / 128
    else:
        little = torch.frombuffer(data, dtype=torch.uint8).view(-1, width).to(torch.int64)
        numbers = (little << torch.arange(0, 8 * width, 8)).sum(-1)
        samples = (numbers - (numbers >> (8 * width - 1) << 8 * width)).double()
        samples = (samples / 2 ** (8 * width - 1)).float()
    return samples.view(-1, channels).mean(-1), rate


def mel_filters(mels: int, size: int, rate: int) -> Tensor:
    """Make triangular filters, equally spaced and half overlapping on the mel scale.

    With mel(f) = 2595 log10(1 + f / 700), filter m rises from the centre of the one before it to 1
    at its own and falls to the centre of the one after it (Davis and Mermelstein, 1980).

    Args:
        mels: number of filters.
        size: number of frequencies, from 0 to half the rate.
        rate: samples in a second.

    Returns:
        float64 [size, mels].
    """
    top = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700, dtype=torch.float64))
    points = torch.linspace(0, 1, mels + 2, dtype=torch.float64) * top
    edges = 700 * (10 ** (points / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, size, dtype=torch.float64)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def log_mel(samples: Tensor, rate: int, mels: int = 40) -> Tensor:
    """Describe a recording by the logarithm of its energy in mel bands, every 10 ms.

    Each frame sees 25 ms through a Hann window; frames are centred, the first on the first sample.

    Args:
        samples: float [N], N at least 1.
        rate: samples in a second.
        mels: number of bands.

    Returns:
        float32 [1 + N // hop, mels], natural logarithm, floored at log 1e-10.
    """
    width, hop = round(WINDOW * rate), round(HOP * rate)
    size = 2 ** (width - 1).bit_length()
    # zeros around it, not a mirror image, which would need a long recording
    window = torch.hann_window(width, dtype=torch.float64)
    spectrum = torch.stft(
        samples.double(),
        size,
        hop,
        width,
        window,
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    energy = spectrum.abs().square().T @ mel_filters(mels, size // 2 + 1, rate)
    return energy.clamp(min=1e-10).log().float()


class SpeechCodec(PairCodec):
    """Everything between recordings and texts, and the numbers of a model.

    Args:
        target: vocabulary of the texts, with `<bos>` and `<eos>`.
        target_symbols: how a text is cut.
        features: numbers in a frame.
        rate: samples in a second of every recording; None where files hold features already.
        mean: of each feature, in the training split.
        std: its standard deviation there.
        center: whether each recording's own mean of each feature, which tells the voice and the
            microphone, is taken away first.
    """

    def __init__(
        self,
        target: Vocabulary,
        target_symbols: Symbols,
        features: int,
        rate: int | None,
        mean: Sequence[float],
        std: Sequence[float],
        center: bool = True,
    ) -> None:
        super().__init__(Vocabulary([]), target, Symbols("words"), target_symbols)
        self.features, self.rate, self.center = features, rate, center
        self.mean, self.std = list(mean), list(std)

    @property
    def sizes(self) -> dict[str, Any]:
        """Sizes of a model for these recordings; see `Seq2SeqModel`."""
        return {
            "source_size": 0,
            "target_size": len(self.target),
            "source_features": self.features,
        }

    def scale(self, features: Tensor) -> Tensor:
        """Return frames [S, features] with the training split's mean 0 and deviation 1."""
        if self.center:
            features = features - features.mean(0)
        return (features - features.new_tensor(self.mean)) / features.new_tensor(self.std)

    def encode_source(self, text: str) -> Any:
        """Read the file that a line names.

        Args:
            text: path of a `.wav` recording, or of features [S, features] in a `.npy` file.

        Returns:
            Scaled frames [S, features]; none for a blank line.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be read, or has another rate or number of features than those of
                the training split.
        """
        path = text.strip()
        if not path:
            return torch.zeros(0, self.features)
        features, rate = describe(path, self.features)
        if (rate, features.shape[1]) != (self.rate, self.features):
            raise ValueError(
                f"{path}: expected {_kind(self.rate, self.features)}, "
                f"got {_kind(rate, features.shape[1])}"
            )
        return self.scale(features)

    def source_labels(self, text: str, source: Sequence[Any]) -> list[str]:
        """Return what stands for each frame in a picture: its second, or its number."""
        return [f"{HOP * n:.2f} s" if self.rate else str(n) for n in range(len(source))]

    def collate_sources(self, sources: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Stack frames to float [B, S, features], and their lengths int64 [B]."""
        return torch.nn.utils.rnn.pad_sequence(list(sources), batch_first=True), lengths(sources)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data, for a checkpoint."""
        return {
            "target": self.target.to_list(),
            "target_symbols": self.target_symbols.to_dict(),
            "features": self.features,
            "rate": self.rate,
            "mean": self.mean,
            "std": self.std,
            "center": self.center,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SpeechCodec:
        """Restore what `to_dict` returned."""
        target = Vocabulary(data["target"], ())
        rest = {name: data[name] for name in ("features", "rate", "mean", "std", "center")}
        return cls(target, Symbols(**data["target_symbols"]), **rest)


def describe(
    file: str | Path | io.BytesIO, mels: int, name: str | None = None
) -> tuple[Tensor, int | None]:
    """Read the features of a file.

    Args:
        file: a `.wav` recording, or numbers [S, features] in a `.npy` file.
        mels: bands of a recording.
        name: what to call the file in a message, and what tells its kind; its path by default.

    Returns:
        float [S, features], and the samples in a second of a recording, None for features.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read.
    """
    name = str(file) if name is None else name
    if not name.endswith(".npy"):
        samples, rate = read_wav(file, name)
        return log_mel(samples, rate, mels), rate
    if not isinstance(file, io.BytesIO) and not Path(file).is_file():
        raise FileNotFoundError(f"{name}: no such file")
    try:
        numbers = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{name}: not an array of numbers: {error}") from error
    if numbers.ndim != 2 or numbers.size == 0 or not np.isfinite(numbers).all():
        raise ValueError(f"{name}: expected finite numbers [S, features], got {numbers.shape}")
    return torch.from_numpy(numbers.astype(np.float32)), None


def _kind(rate: int | None, features: int) -> str:
    return f"{features} features" if rate is None else f"a recording at {rate} Hz"


class SpeechData(DataModule):
    """Recordings, or files of features, and their texts: what is said, or what is to be seen.

    The names of the files tell the texts (`pattern`), or a table does (`texts`), as captions of
    videos need. Whole groups (speakers) are kept for validation and testing, so that the scores are
    of voices never heard in training.

    Args:
        path: a folder of `.wav` files (PCM) or `.npy` files (features [S, features], such as those
            of video or sensors), or an archive of one (`.tar`, `.tar.gz`).
        pattern: regular expression that is searched for in the path of a file below the folder. Its
            group `text` is the text and its group `group` the speaker; other files are left out.
            None: there are `texts`.
        val: groups for validation.
        test: groups for testing.
        target_symbols: how a text is cut: `characters`, `words`, `separated` or `subwords`.
        mels: bands that describe a recording.
        center: whether each recording's own mean of each feature is taken away.
        batch_size: most recordings in a batch.
        max_tokens: most frames in a batch, padding counted.
        seed: of the order of the batches.
        num_workers: processes that collate batches.
        subword_count: most subwords of the texts, single characters counted.
        texts: table (`.tsv`, `.csv`, `.json`, `.jsonl`, `.parquet`) with the columns `file` (below
            the folder), `text` and `group`, in place of a `pattern`; other files are left out. A
            file in several rows has several texts: all are learnt, and any of them is right.

    Raises:
        FileNotFoundError: there is no such folder, archive or table.
        ValueError: a wrong pattern, group or row, or a file that cannot be read; the message names
            it.
    """

    def __init__(
        self,
        path: str,
        pattern: str | None,
        val: list[str],
        test: list[str],
        target_symbols: Kind = "words",
        mels: int = 40,
        center: bool = True,
        batch_size: int | None = 32,
        max_tokens: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        subword_count: int = 1000,
        texts: str | None = None,
    ) -> None:
        super().__init__(batch_size, max_tokens, seed, num_workers)
        for name, count in (("mels", mels), ("subword_count", subword_count)):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        if (pattern is None) == (texts is None):
            raise ValueError("pattern, texts: expected one of them")
        self.pattern = None if pattern is None else _pattern(pattern)
        if set(val) & set(test) or not val or not test:
            raise ValueError(f"val, test: expected different groups for each, got {val} and {test}")
        self.path, self.texts, self.target_symbols = path, texts, Symbols(target_symbols)
        self.groups = {"val": val, "test": test}
        self.mels, self.center, self.subword_count = mels, center, subword_count
        self._rate: int | None = None

    @cached_property
    def splits(self) -> dict[str, list[tuple[Tensor, str, str]]]:
        """Features [S, features], text and file name of `train`, `val` and `test`."""
        splits: dict[str, list[tuple[Tensor, str, str]]] = {split: [] for split in SPLITS}
        read: dict[str, tuple[Tensor, str]] = {}
        first = None
        for name, file, text, group in self._texts():
            if name not in read:
                features, rate = describe(file, self.mels, name)
                first = (rate, features.shape[1]) if first is None else first
                if first != (rate, features.shape[1]):
                    got = _kind(rate, features.shape[1])
                    raise ValueError(f"{name}: expected {_kind(*first)} as before, got {got}")
                read[name] = features, group
            features, known = read[name]
            if group != known:
                raise ValueError(f"{name}: expected one group, got {known!r} and {group!r}")
            split = next((s for s, g in self.groups.items() if group in g), "train")
            splits[split].append((features, text, name))
        found = {group for _, group in read.values()}
        for split, groups in self.groups.items():
            absent = [group for group in groups if group not in found]
            if absent:
                known = ", ".join(sorted(found))
                raise ValueError(f"{split}: no group {absent[0]!r}; {self.path} has {known}")
        if not splits["train"]:
            raise ValueError("val, test: they leave no group for training")
        self._rate = first[0] if first else None
        return splits

    @cached_property
    def codec(self) -> SpeechCodec:
        """The codec, built from the training split when first asked for, unless it was given."""
        rows = self.splits["train"]
        texts = [text for _, text, _ in rows]
        symbols = self.target_symbols.learn(texts, self.subword_count)
        counts = Counter(symbol for text in texts for symbol in symbols.split(text))
        size = rows[0][0].shape[1]
        plain = SpeechCodec(
            Vocabulary.from_counts(counts, 1, SPECIALS),
            symbols,
            size,
            self._rate,
            [0.0] * size,
            [1.0] * size,
            self.center,
        )
        frames = torch.cat([plain.scale(features) for features, _, _ in rows]).double()
        std = frames.std(0, correction=0)
        plain.mean = frames.mean(0).tolist()
        plain.std = torch.where(std > 0, std, 1.0).tolist()
        return plain

    def _texts(self) -> Iterator[tuple[str, Path | io.BytesIO, str, str]]:
        """Yield name and content of a file, a text of it and its group."""
        files = _files(Path(self.path))
        if self.pattern is not None:
            for name, file in files:
                match = self.pattern.search(name)
                if match is not None:
                    yield name, file, match["text"], match["group"]
            return
        table, contents = str(self.texts), dict(files)
        rows = load_rows(table)
        cells = [column(rows, name, table) for name in ("file", "text", "group")]
        for number, (name, text, group) in enumerate(zip(*cells, strict=True), start=1):
            if name not in contents:
                raise ValueError(f"{table}: row {number}: no file {name!r} in {self.path}")
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{table}: row {number}: expected a text, got {text!r}")
            yield name, contents[name], text, str(group)

    def _encode(self, split: str) -> list[PairRow]:
        codec, split_text = self.codec, self.codec.target_symbols.split
        rows = [
            PairRow(codec.scale(features), codec.encode_target(text), name, None)
            for features, text, name in self.splits[split]
        ]
        if split == "train":
            return rows
        answers: dict[str, list[list[str]]] = {}
        for _, text, name in self.splits[split]:
            answers.setdefault(name, []).append(split_text(text))
        firsts = {row.text: row for row in reversed(rows)}
        return [firsts[name]._replace(references=found) for name, found in answers.items()]

    def _sizes(self, rows: list[PairRow]) -> list[int]:
        return [len(row.source) for row in rows]

    def _collate(self, split: str) -> Callable[[list[PairRow]], PairBatch]:
        return partial(collate, self.codec)


def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern: not a regular expression: {error}") from error
    if not {"text", "group"} <= compiled.groupindex.keys():
        raise ValueError(
            f"pattern: expected groups (?P<text>...) and (?P<group>...), got {pattern!r}"
        )
    return compiled


def _files(path: Path) -> Iterator[tuple[str, Path | io.BytesIO]]:
    """Yield name and content of every file below a folder or in an archive, in order of names."""
    if path.is_dir():
        for found in sorted(path.rglob("*")):
            if found.is_file():
                yield found.relative_to(path).as_posix(), found
        return
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such folder or archive")
    try:
        with tarfile.open(path) as archive:  # in its own order: going back means unpacking again
            contents = {}
            for member in archive:
                file = archive.extractfile(member)
                if file is not None:
                    contents[member.name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a folder, and not a whole archive: {error}") from error
    for name in sorted(contents):
        yield name, io.BytesIO(contents[name])
