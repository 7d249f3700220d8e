"""Recordings: wav files, log-mel features, groups, archives, and wrong files."""

import io
import math
import struct
import tarfile
import wave

import numpy as np
import pytest
import scipy.signal
import torch

from lightning_modules.data.speech import (
    SpeechCodec,
    SpeechData,
    log_mel,
    mel_filters,
    read_wav,
)

PATTERN = r"(?P<text>\d)_(?P<group>\w+)_\d+\.(wav|npy)$"


def write_wav(path, samples, rate=8000, width=2, channels=1):
    top = 2 ** (8 * width - 1)
    numbers = [min(top - 1, max(-top, round(x * top))) for x in samples]
    if width == 1:
        data = bytes(n + 128 for n in numbers)
    else:
        data = b"".join(struct.pack("<i", n << (8 * (4 - width)))[4 - width :] for n in numbers)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


def tone(frequency, seconds=0.2, rate=8000):
    return [
        0.5 * math.sin(2 * math.pi * frequency * n / rate) for n in range(round(seconds * rate))
    ]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_of_every_width(tmp_path, width):
    samples = [0.0, 0.5, -0.5, 0.25, -1.0]
    read, rate = read_wav(write_wav(tmp_path / "a.wav", samples, 16000, width))
    assert rate == 16000
    torch.testing.assert_close(read, torch.tensor(samples))


def test_channels_are_averaged(tmp_path):
    path = write_wav(tmp_path / "a.wav", [0.5, -0.25, 0.25, 0.75], channels=2)
    torch.testing.assert_close(read_wav(path)[0], torch.tensor([0.125, 0.5]))


def test_mel_filters_have_their_peaks_where_the_formula_says():
    """mel(1000 Hz) is 1000 (999.99 by the formula); neighbouring filters add up to 1."""
    filters = mel_filters(40, 4001, 8000)
    top = 2595 * math.log10(1 + 4000 / 700)
    centres = [700 * (10 ** (top * m / 41 / 2595) - 1) for m in range(1, 41)]
    assert all(abs(p - c) < 1 for p, c in zip(filters.argmax(0).tolist(), centres, strict=True))
    inner = filters[math.ceil(centres[0]) : math.floor(centres[-1])]
    torch.testing.assert_close(inner.sum(1), torch.ones(len(inner)).double())
    assert 2595 * math.log10(1 + 1000 / 700) == pytest.approx(1000, abs=0.1)


def test_log_mel_is_scipys_spectrum_through_the_filters():
    samples = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    features = log_mel(samples, 8000, mels=20)
    window = np.zeros(256)
    window[28:228] = scipy.signal.get_window("hann", 200)
    padded = np.pad(samples.double().numpy(), 128)
    frames = np.stack([padded[80 * n : 80 * n + 256] * window for n in range(1 + 1000 // 80)])
    energy = np.abs(np.fft.rfft(frames)) ** 2 @ mel_filters(20, 129, 8000).numpy()
    torch.testing.assert_close(features, torch.from_numpy(np.log(energy)).float())


def test_a_tone_is_loudest_in_its_band():
    features = log_mel(torch.tensor(tone(1000)), 8000)
    expected = mel_filters(40, 4001, 8000)[1000].argmax()
    assert (features[2:-2].argmax(1) == expected).all()
    silent = log_mel(torch.zeros(400), 8000)
    torch.testing.assert_close(silent, torch.full((6, 40), math.log(1e-10)))


@pytest.fixture
def folder(tmp_path):
    """Two digits as two tones, by three voices."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for digit in (0, 1):
        for voice, name in enumerate(("anna", "ben", "cleo")):
            for take in range(2):
                samples = tone(500 + 1000 * digit + 50 * voice, 0.1 + 0.02 * take)
                write_wav(folder / f"{digit}_{name}_{take}.wav", samples)
    (folder / "README.md").write_text("not a recording")
    return folder


def make(folder, **arguments):
    options = {"pattern": PATTERN, "val": ["ben"], "test": ["cleo"], "mels": 10, **arguments}
    return SpeechData(str(folder), **options)


def test_texts_are_cut_into_as_many_subwords_as_asked_for(folder):
    for take, words in enumerate(("low lower lowest", "new newer newest")):
        (folder / f"0_anna_{take}.wav").rename(folder / f"{words}_anna_{take}.wav")
    pattern = r"(?P<text>[\w ]+)_(?P<group>[a-z]+)_\d\.wav"
    options = {"pattern": pattern, "target_symbols": "subwords"}
    symbols = [make(folder, **options, subword_count=n).codec.target_symbols for n in (12, 40)]
    few, many = (len(s.split("lowest newest")) for s in symbols)
    assert few > many == 2


def test_groups_are_kept_apart(folder):
    data = make(folder)
    names = {split: [name for _, _, name in rows] for split, rows in data.splits.items()}
    assert [len(rows) for rows in names.values()] == [4, 4, 4]
    for split, voice in (("train", "anna"), ("val", "ben"), ("test", "cleo")):
        assert all(f"_{voice}_" in name for name in names[split])


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_archives_are_read_as_folders(folder, tmp_path, suffix):
    path = tmp_path / f"all{suffix}"
    with tarfile.open(path, "w:gz" if suffix.endswith("gz") else "w") as archive:
        archive.add(folder, "recordings")
    packed, plain = make(path), make(folder)
    assert packed.codec.to_dict() == plain.codec.to_dict()
    for (a, *_), (b, *_) in zip(packed.splits["val"], plain.splits["val"], strict=True):
        assert torch.equal(a, b)


CAPTIONS = """file\ttext\tgroup
0_anna_0.wav\ta low tone\ttrain
0_anna_0.wav\ta tone, low\ttrain
1_anna_0.wav\ta high tone\ttrain
0_ben_0.wav\ta low tone\tval
1_ben_0.wav\ta high tone\tval
0_ben_0.wav\tlow, a tone\tval
1_cleo_1.wav\thigh\ttest
"""


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
def test_texts_of_a_table(folder, tmp_path, packed):
    """As captions are: several for a file, each of them learnt, and all of them right."""
    (tmp_path / "t.tsv").write_text(CAPTIONS)
    if packed:
        with tarfile.open(tmp_path / "all.tar", "w") as archive:
            for file in folder.glob("*.wav"):
                archive.add(file, file.name)
    options = {"pattern": None, "texts": str(tmp_path / "t.tsv"), "val": ["val"], "test": ["test"]}
    data = make(tmp_path / "all.tar" if packed else folder, **options, batch_size=9)
    data.setup("fit")
    (train,) = data.train_dataloader()
    assert sorted(
        " ".join(data.codec.decode_target(row[1 : n - 1].tolist()))
        for row, n in zip(train.target, train.target_lengths, strict=True)
    ) == ["a high tone", "a low tone", "a tone, low"]
    rows = [
        (text, (answers, data.codec.target.decode(target.tolist()), source))
        for batch in data.val_dataloader()
        for text, answers, target, source in zip(
            batch.texts, batch.references, batch.target, batch.source, strict=True
        )
    ]
    assert sorted(text for text, _ in rows) == ["0_ben_0.wav", "1_ben_0.wav"]
    answers, target, source = dict(rows)["0_ben_0.wav"]
    assert answers == [["a", "low", "tone"], ["low,", "a", "tone"]]
    assert target == ["<bos>", "a", "low", "tone", "<eos>"]
    expected = data.codec.scale(log_mel(*read_wav(folder / "0_ben_0.wav"), 10))
    torch.testing.assert_close(source[: len(expected)], expected)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2_ben_0.wav\thigh\tval", r"t\.tsv: row 8: no file '2_ben_0.wav' in "),
        ("0_ben_1.wav\t \tval", r"t\.tsv: row 8: expected a text, got ' '"),
        ("0_ben_0.wav\tlow\ttest", "0_ben_0.wav: expected one group, got 'val' and 'test'"),
        ("0_ben_0.wav\tlow", r"t\.tsv:9: expected 3 columns \(file, text, group\), got 2"),
    ],
    ids=["file", "text", "group", "ragged"],
)
def test_wrong_rows_of_texts_are_named(folder, tmp_path, row, message):
    (tmp_path / "t.tsv").write_text(CAPTIONS + row + "\n")
    options = {"pattern": None, "texts": str(tmp_path / "t.tsv"), "val": ["val"], "test": ["test"]}
    with pytest.raises(ValueError, match=message):
        make(folder, **options).setup("fit")
    with pytest.raises(ValueError, match="pattern, texts: expected one of them"):
        make(folder, texts="t.tsv")


def test_batches(folder):
    data = make(folder, batch_size=2)
    data.setup("fit")
    train = list(data.train_dataloader())
    assert sum(len(batch.source) for batch in train) == 4
    assert train[0].texts is None
    (batch, *_) = data.val_dataloader()
    assert batch.source.shape[2] == 10
    assert batch.source.shape[1] == batch.source_lengths.max()
    assert all(
        (row[n:] == 0).all() for row, n in zip(batch.source, batch.source_lengths, strict=True)
    )
    decoded = [data.codec.target.decode(row.tolist()) for row in batch.target]
    for row, references in zip(decoded, batch.references, strict=True):
        assert row == ["<bos>", *references[0], "<eos>"]


def test_features_are_scaled_by_the_training_voices(folder):
    data = make(folder)
    data.setup("fit")
    frames = torch.cat([row.source for row in data._rows["train"]])
    torch.testing.assert_close(frames.mean(0), torch.zeros(10), atol=1e-4, rtol=0)
    torch.testing.assert_close(frames.std(0, correction=0), torch.ones(10), atol=1e-4, rtol=0)
    louder = data.codec.scale(data.splits["val"][0][0] + 3)
    torch.testing.assert_close(louder, data.codec.scale(data.splits["val"][0][0]))
    kept = make(folder, center=False).codec
    assert not torch.allclose(torch.tensor(kept.mean), torch.zeros(10), atol=0.1)


def test_codec_travels(folder):
    codec = make(folder).codec
    again = SpeechCodec.from_dict(codec.to_dict())
    assert again.to_dict() == codec.to_dict()
    path = str(folder / "1_ben_0.wav")
    assert torch.equal(again.encode_source(f" {path}\n"), codec.encode_source(path))
    assert len(codec.encode_source(" ")) == 0
    assert codec.source_labels("", torch.zeros(2, 10)) == ["0.00 s", "0.01 s"]


def test_features_of_any_kind(tmp_path):
    for name in ("anna", "ben", "cleo"):
        for digit in (0, 1):
            np.save(tmp_path / f"{digit}_{name}_0.npy", np.full((4, 3), digit, dtype=np.float64))
    data = make(tmp_path, center=False)
    assert data.codec.sizes["source_features"] == 3
    assert data.codec.rate is None
    scaled = data.codec.encode_source(str(tmp_path / "1_cleo_0.npy"))
    torch.testing.assert_close(scaled, torch.ones(4, 3))
    write_wav(tmp_path / "x.wav", tone(300))
    with pytest.raises(ValueError, match=r"x\.wav: expected 3 features, got a recording at 8000"):
        data.codec.encode_source(str(tmp_path / "x.wav"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "("}, "pattern: not a regular expression"),
        ({"pattern": r"(?P<text>\d)"}, r"pattern: expected groups \(\?P<text>"),
        ({"val": ["cleo"]}, "val, test: expected different groups for each"),
        ({"val": ["dora"]}, "val: no group 'dora'; .* has anna, ben, cleo"),
        ({"val": ["ben", "anna"]}, "they leave no group for training"),
        ({"mels": 0}, "mels: expected at least 1"),
        ({"subword_count": 0}, "subword_count: expected at least 1"),
        ({"batch_size": None}, "batch_size, max_tokens: expected at least one"),
    ],
    ids=["regex", "groups", "same", "unknown", "none-left", "mels", "subwords", "batch-size"],
)
def test_wrong_arguments_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(folder, **arguments).setup("fit")


def test_broken_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder or archive"):
        make(tmp_path / "nowhere").setup("fit")
    (tmp_path / "a.tar").write_text("no archive")
    with pytest.raises(ValueError, match=r"a\.tar: not a folder, and not a whole archive"):
        make(tmp_path / "a.tar").setup("fit")
    with pytest.raises(FileNotFoundError, match=r"no\.wav: no such file"):
        read_wav("no.wav")
    with pytest.raises(ValueError, match="noise: not a PCM recording"):
        read_wav(io.BytesIO(b"RIFF"), "noise")
    whole = (folder / "0_anna_0.wav").read_bytes()
    (folder / "0_anna_0.wav").write_bytes(whole[:500])
    with pytest.raises(ValueError, match=r"0_anna_0\.wav: .*cut off"):
        make(folder).setup("fit")
    write_wav(folder / "0_anna_0.wav", tone(500), rate=16000)
    with pytest.raises(ValueError, match=r"0_anna_1\.wav: expected a recording at 16000 Hz as"):
        make(folder).setup("fit")
    (folder / "0_anna_0.wav").unlink()
    (folder / "0_anna_9.npy").write_bytes(b"zeros")
    with pytest.raises(ValueError, match=r"0_anna_9\.npy: not an array of numbers"):
        make(folder).setup("fit")
