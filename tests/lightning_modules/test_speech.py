"""Speech to text as a whole, on tones that stand for words."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedrnn.train import main
from lightning_modules import SpeechToText, Task
from lightning_modules.data.speech import SpeechData
from lightning_modules.search import SearchOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Words of one to three levels, each held for some frames; their names spell the levels."""
    folder = tmp_path_factory.mktemp("features")
    draw = np.random.default_rng(0)
    for voice in ("anna", "ben", "cleo", "dora"):
        for number in range(60):
            word = draw.integers(0, 4, draw.integers(1, 4))
            frames = np.repeat(np.eye(4)[word], draw.integers(3, 6, len(word)), axis=0)
            noise = 0.1 * draw.standard_normal(frames.shape)
            text = "".join("abcd"[level] for level in word)
            np.save(folder / f"{text}_{voice}_{number}.npy", frames + noise)
    return folder


OPTIONS = [
    "--data.pattern=(?P<text>[a-d]+)_(?P<group>[a-z]+)_",
    "--data.val=[ben]",
    "--data.test=[cleo]",
    "--data.target_symbols=characters",
    "--data.center=false",
]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        cli = main(
            [
                *("fit", "--config", "speech", f"--data.path={folder}", *OPTIONS),
                *("--trainer.max_epochs=12", "--trainer.accelerator=cpu"),
                *("--data.batch_size=16", "--model.dropout=0.0", "--model.optimizer.lr=0.01"),
                *("--trainer.enable_progress_bar=false", "--trainer.check_val_every_n_epoch=4"),
            ]
        )
    return cli, place


def test_it_learns_to_read_voices_it_never_heard(trained):
    cli, place = trained
    assert isinstance(cli.model, SpeechToText) and isinstance(cli.datamodule, SpeechData)
    assert float(cli.trainer.callback_metrics["val/cer"]) < 0.1
    media = place / "runs/speech/latest/media/val"
    assert list(media.glob("alignment_0_*.png")) and list(media.glob("samples_*.csv"))


def test_files_are_read_from_a_checkpoint_alone(trained, folder):
    _, place = trained
    best = place / "runs/speech/latest/checkpoints/best.ckpt"
    model = Task.load_from_checkpoint(best)
    files = sorted(str(file) for file in folder.glob("*_cleo_*.npy"))[:20]
    spelt = [file.rsplit("/", 1)[1].split("_")[0] for file in files]
    results = list(model.predict_lines([files[0], "", *files[1:]], batch_size=6))
    assert results[1] == ""
    right = sum(a == b for a, b in zip([results[0], *results[2:]], spelt, strict=True))
    assert right >= 15
    steps = [math.ceil(len(np.load(file)) / 3) for file in files]
    assert len(set(steps)) > 1
    for weights, text, count in zip(model.alignments(files, spelt), spelt, steps, strict=True):
        assert weights.shape == (len(text) + 1, count)
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention": "none", "cell": "gru", "source_stride": 2},
        {"attention": "general", "feedback": "features", "source_stride": 3},
        {"attention": "additive", "feedback": "context", "coverage": True},
    ],
    ids=lambda arguments: arguments["attention"],
)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_padding_order_and_batch_size_change_no_output(trained, folder, arguments, data):
    """Untrained models, whose outputs are long and far from certain."""
    codec = trained[0].datamodule.codec
    torch.manual_seed(data.draw(st.integers(0, 50)))
    sizes = {"embedding_size": 8, "encoder_sizes": [6], "decoder_sizes": [10]}
    model = SpeechToText(codec, **sizes, **arguments).eval()
    for parameter in model.parameters():
        parameter.mul_(3.0)
    if arguments.get("coverage"):
        model.model.attention.coverage.normal_()
    known = sorted(map(str, folder.glob("*_anna_*.npy")))
    files = data.draw(st.lists(st.sampled_from(known), min_size=2, max_size=4))
    for options in ({}, {"beam_size": 3, "n_best": 2}):
        search, size = SearchOptions(**options), data.draw(st.integers(1, 4))
        together = model.hypotheses(files, search, batch_size=size)
        for file, row in zip(files, together, strict=True):
            (alone,) = model.hypotheses([file], search)
            assert [h.text for h in alone] == [h.text for h in row]
            scores = [h.score for h in row]
            assert [h.score for h in alone] == pytest.approx(scores, rel=1e-3, abs=1e-3)
    frames, lengths = codec.collate_sources([codec.encode_source(file) for file in files])
    longer = torch.nn.functional.pad(frames, (0, 0, 0, data.draw(st.integers(1, 5))), value=9.0)
    found, padded = model.decode(frames, lengths), model.decode(longer, lengths)
    assert padded.sequences(codec.target.eos) == found.sequences(codec.target.eos)
    torch.testing.assert_close(padded.scores, found.scores, rtol=1e-3, atol=1e-3)


def test_a_missing_file_is_one_line(trained, tmp_path, capsys):
    _, place = trained
    (tmp_path / "list.txt").write_text("absent.wav\n")
    best = place / "runs/speech/latest/checkpoints/best.ckpt"
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "--ckpt_path", str(best), "--input", str(tmp_path / "list.txt")])
    assert capsys.readouterr().err.endswith("error: absent.wav: no such file\n")
