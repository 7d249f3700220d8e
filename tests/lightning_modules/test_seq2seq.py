"""Sequence-to-sequence as a whole: learns, scores, is stored, and translates raw text."""

import csv
import json
import random
from pathlib import Path

import lightning as L
import pytest
import sacrebleu
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy, one_hot
from torchmetrics.functional.text import char_error_rate, word_error_rate

from fusedrnn.train import main
from lightning_modules.base import CheckpointError, Task
from lightning_modules.data.pairs import PairCodec, PairData, Symbols
from lightning_modules.search import SearchOptions
from lightning_modules.seq2seq import Seq2Seq, alignment_figure, histogram
from lightning_modules.text_metrics import edit_distance

SMALL = {"embedding_size": 12, "encoder_sizes": [16], "decoder_sizes": [32]}


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Words of made-up letters, and as their sounds the letters doubled in upper case."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdef", k=draw.randint(1, 5))) for _ in range(count)]
    return [(word, " ".join(2 * letter.upper() for letter in word)) for word in words]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pairs")
    places = {}
    for seed, split in enumerate(("train", "val", "test")):
        rows = pairs(400 if split == "train" else 60, seed)
        lines = ["source\ttarget", *("\t".join(row) for row in rows)]
        places[split] = str(folder / f"{split}.tsv")
        Path(places[split]).write_text("\n".join(lines), encoding="utf-8")
    return places


def make_data(files: dict[str, str], **arguments) -> PairData:
    return PairData(**files, source_symbols="characters", **{"batch_size": 16, **arguments})


def make_model(codec: PairCodec, seed: int = 0, **arguments) -> Seq2Seq:
    torch.manual_seed(seed)
    return Seq2Seq(codec, **{**SMALL, "score": "per", **arguments})


def make_trainer(folder: Path, **options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"num_sanity_val_steps": 0, "log_every_n_steps": 1, **options},
    )


@pytest.fixture(scope="module")
def fitted(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = make_data(files)
    model = make_model(data.codec, optimizer=lambda p: torch.optim.Adam(p, 0.01))
    options = {"check_val_every_n_epoch": 4, "num_sanity_val_steps": 1}
    trainer = make_trainer(folder, max_epochs=12, **options)
    trainer.fit(model, data)
    trainer.save_checkpoint(folder / "model.ckpt")
    return model, data, trainer, folder


def test_it_learns_and_logs(fitted):
    _, _, trainer, folder = fitted
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["val/per"] < 0.05
    assert logged["val/accuracy"] > 0.95
    with open(folder / "metrics.csv") as file:
        columns = next(csv.reader(file))
    assert fitted[0].score_names == {"val/loss", "val/accuracy", "val/per", "val/wer"}
    assert {"train/loss", *fitted[0].score_names} <= set(columns)


@pytest.mark.parametrize("beam", [1, 3], ids=["greedy", "beam"])
def test_scores_are_those_of_the_rows_one_by_one(fitted, tmp_path, beam):
    model, data, _, _ = fitted
    rough = make_model(data.codec, seed=3, test_beam_size=beam)
    rough.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in rough.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    (scores,) = make_trainer(tmp_path).test(rough, data, verbose=False)
    rough.eval()
    total = symbols = right = edits = length = wrong = 0
    with torch.no_grad():
        for word, sounds in data.pairs("test"):
            source = torch.tensor([data.codec.encode_source(word)])
            target = torch.tensor([data.codec.encode_target(sounds)])
            logits, _ = rough(source, torch.tensor([source.shape[1]]), target[:, :-1])
            total += float(cross_entropy(logits[0], target[0, 1:], reduction="sum"))
            right += int((logits[0].argmax(-1) == target[0, 1:]).sum())
            symbols += target.shape[1] - 1
            found = rough.translate([word], beam_size=beam)[0]
            distance = edit_distance(found.split(), sounds.split())
            edits, length, wrong = edits + distance, length + len(word), wrong + (distance > 0)
    assert 0 < edits < 2 * length
    assert scores["test/loss"] == pytest.approx(total / symbols, rel=1e-5)
    assert scores["test/accuracy"] == pytest.approx(right / symbols, abs=1e-6)
    assert scores["test/per"] == pytest.approx(edits / length)
    assert scores["test/wer"] == pytest.approx(wrong / len(data.pairs("test")))
    with open(*(tmp_path / "media" / "test").glob("samples_*.csv")) as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        source = torch.tensor([data.codec.encode_source(row["source"])])
        target = torch.tensor([data.codec.encode_target(row["prediction"])])
        with torch.no_grad():
            logits, _ = rough(source, torch.tensor([source.shape[1]]), target[:, :-1])
        chosen = logits[0].log_softmax(-1).gather(1, target[0, 1:, None])
        assert float(row["mean_log_probability"]) == pytest.approx(float(chosen.mean()), abs=1e-4)


def test_two_processes_score_as_one(fitted, tmp_path):
    model, data, _, _ = fitted
    rough = make_model(data.codec, seed=4, encoder_sizes=[8], score="bleu")
    one = make_trainer(tmp_path / "one", devices=1)
    two = make_trainer(tmp_path / "two", devices=2, strategy="ddp_fork")
    for trained in (model, rough):
        alone = one.test(trained, data, verbose=False)
        assert two.test(trained, data, verbose=False) == alone


def test_samples_and_alignments_are_reported(fitted):
    _, data, trainer, folder = fitted
    tables = sorted((folder / "media" / "val").glob("samples_*.csv"))
    assert len(tables) == 3, "one for each validation, none for the sanity check"
    with open(tables[-1]) as file:
        rows = list(csv.DictReader(file))
    assert 15 <= len(rows) <= 20
    known = dict(data.pairs("val"))
    assert all(row["references"] == known[row["source"]] for row in rows)
    assert all(float(row["mean_log_probability"]) <= 0 for row in rows)
    media, step = folder / "media" / "val", trainer.global_step
    assert len(list(media.glob(f"alignment_*_{step}.png"))) == 4
    for name in ("lengths", "mean_log_probabilities"):
        assert (media / f"{name}_{step}.png").stat().st_size > 1000


@settings(max_examples=15, deadline=None)
@example(values=[1, 5], others=[0])  # whose sevenths end past low + 30 * (high - low) / 30
@given(
    values=st.lists(st.integers(0, 400), min_size=1), others=st.lists(st.integers(0, 9), min_size=1)
)
def test_histograms_count_every_value(values, others):
    (axes,) = histogram("symbols", {"a": values, "b": others}, whole=True).axes
    edges = sorted({bar.get_x() for bar in axes.patches})
    assert len(edges) <= 30
    counts = [round(bar.get_height()) for bar in axes.patches]
    assert sum(counts[: len(edges)]) == len(values) and sum(counts[len(edges) :]) == len(others)
    assert all(edge % 1 == 0.5 for edge in edges)
    (axes,) = histogram("score", {"a": [v / 7 for v in values]}).axes
    assert sum(round(bar.get_height()) for bar in axes.patches) == len(values)


def test_alignment_figure_names_the_symbols():
    figure = alignment_figure(torch.rand(3, 2), ["c", "h"], ["CH", "x", "<eos>"])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["c", "h"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["CH", "x", "<eos>"]
    assert axes.get_images()[0].get_array().shape == (3, 2)
    (axes,) = alignment_figure(torch.rand(1, 200), list(map(str, range(200))), ["x"]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == list(
        map(str, range(0, 200, 3))
    )
    figure = alignment_figure(torch.rand(3000, 2), ["c", "h"], list(map(str, range(3000))))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(
        map(str, range(0, 3000, 38))
    )
    assert 150 * figure.get_size_inches().max() < 2**16  # more dots cannot be stored


def test_checkpoint_needs_nothing_else(fitted):
    model, _, _, folder = fitted
    words = ["abc", "fed", "a"]
    for cls in (Seq2Seq, Task):
        again = cls.load_from_checkpoint(folder / "model.ckpt")
        assert isinstance(again, Seq2Seq) and not again.training
        assert again.translate(words) == model.translate(words) == ["AA BB CC", "FF EE DD", "AA"]
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of fusedrnn"):
        Seq2Seq.load_from_checkpoint(folder / "foreign.ckpt")


def test_checkpoints_from_before_the_decoder_was_one_module_load(fitted, tmp_path):
    """Their weights have other names, and their arguments and codec lack what came later."""
    model, data, _, folder = fitted
    checkpoint = torch.load(folder / "model.ckpt", weights_only=True)
    for new, old in (("decoder.stack.", "decoder."), ("decoder.a", "a"), ("decoder.c", "c")):
        for name in [n for n in checkpoint["state_dict"] if n.startswith(f"model.{new}")]:
            weight = checkpoint["state_dict"].pop(name)
            checkpoint["state_dict"][name.replace(f"model.{new}", f"model.{old}")] = weight
    assert any(name.startswith("model.attention.") for name in checkpoint["state_dict"])
    for name in ("source_stride", "feedback", "coverage"):
        del checkpoint["fusedrnn"]["arguments"][name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    words = [word for word, _ in data.pairs("test")]
    assert Seq2Seq.load_from_checkpoint(tmp_path / "old.ckpt").translate(words) == model.translate(
        words
    )


def test_arguments_round_trip(fitted):
    model, data, _, _ = fitted
    again = Seq2Seq(PairCodec.from_dict(data.codec.to_dict()), **model.arguments)
    again.load_state_dict(model.state_dict())
    assert again.arguments == model.arguments


WORDS = st.text(alphabet="abcdefgz", min_size=0, max_size=7)


@settings(max_examples=20, deadline=None)
@given(
    words=st.lists(WORDS, min_size=1, max_size=7), size=st.integers(1, 8), beam=st.integers(1, 3)
)
def test_company_changes_no_translation(fitted, words, size, beam):
    model = fitted[0]
    together = model.translate(words, beam_size=beam, batch_size=size)
    assert together == [model.translate([word], beam_size=beam)[0] for word in words]
    assert all(result == "" for word, result in zip(words, together, strict=True) if not word)
    assert list(model.predict_lines(words, beam_size=beam, batch_size=size)) == together


VARIANTS = [
    {"attention": attention, "cell": cell, **more}
    for attention, cell, more in (
        ("none", "gru", {}),
        ("none", "lstm", {"encoder_sizes": [8, 8], "bidirectional": False}),
        ("dot", "lstm", {"encoder_sizes": [16, 16]}),
        ("dot", "gru", {"input_feeding": True}),
        ("general", "lstm", {"input_feeding": True, "decoder_sizes": [8, 8]}),
        ("general", "gru", {"tied_embeddings": True}),
        ("additive", "lstm", {"input_feeding": True, "tied_embeddings": True}),
        ("additive", "gru", {"bidirectional": False}),
        ("additive", "lstm", {"copy": True, "feedback": "context", "coverage": True}),
        ("dot", "gru", {"copy": True, "encoder_sizes": [16, 16]}),
    )
]


@pytest.mark.parametrize(
    "arguments", VARIANTS, ids=lambda a: "-".join(map(str, [*a.values()])).replace(" ", "")
)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_padding_order_and_batch_size_change_no_output(fitted, arguments, data):
    """Untrained models, whose outputs are long and far from certain."""
    pairs, copies = fitted[1], arguments.get("copy", False)
    arguments = {name: value for name, value in arguments.items() if name != "copy"}
    codec = PairCodec.from_pairs(pairs.pairs("train"), *pairs.symbols, copy=copies)
    model = make_model(codec, seed=data.draw(st.integers(0, 50)), **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
        if model.model.decoder.covers:
            model.model.attention.coverage.normal_()  # which starts at zero, without an effect
    words = data.draw(st.lists(WORDS.filter(bool), min_size=2, max_size=4))
    order = data.draw(st.permutations(range(len(words))))
    for options in (
        {},
        {"beam_size": 3, "n_best": 2, "no_repeat_ngram_size": 2},
        {"sampling": True, "top_p": 0.8, "min_length": 2},
    ):
        search = SearchOptions(**options)
        size = data.draw(st.integers(1, 6))
        together = model.hypotheses(words, search, batch_size=size)
        for i, word in enumerate(words):
            alone = model.hypotheses([word], search, first=i)[0]
            assert [h.text for h in alone] == [h.text for h in together[i]]
            scores = [h.score for h in together[i]]
            assert [h.score for h in alone] == pytest.approx(scores, rel=1e-3, abs=1e-3)
    rows = [codec.encode_source(words[i]) for i in order]
    source, sizes = codec.collate_sources(rows)
    longer = (0, 0) * (source.dim() - 2) + (0, data.draw(st.integers(1, 5)))
    padded = torch.nn.functional.pad(source, longer)
    found = model.decode(padded, sizes).sequences(codec.target.eos)
    singles = [model.decode(*codec.collate_sources([row])) for row in rows]
    assert found == [single.sequences(codec.target.eos)[0] for single in singles]


def test_what_training_never_saw_is_translated(fitted):
    """Sources ten times as long, white space, unknown characters, and letters of other scripts."""
    model = fitted[0]
    lines = ["abcdef" * 10, "   ", "\t", "zyx 👍é", "\u3042", "a\u0000b"]
    for beam in (1, 3):
        results = list(model.predict_lines(lines, beam_size=beam))
        assert len(results) == len(lines) and results[1:3] == ["", ""]
        limit = model.max_length_ratio * 60 + model.max_length_extra
        assert 10 < len(results[0].split()) <= limit
        assert not any("<" in result for result in results)


def test_targets_beyond_the_longest_output_are_scored(files, tmp_path):
    """They cannot be decoded in full; they still count in the loss and as errors."""
    long = tmp_path / "long.tsv"
    long.write_text("source\ttarget\na\t" + " ".join(["AA"] * 90) + "\nb\tBB\n")
    data = make_data({**files, "test": str(long)})
    (scores,) = make_trainer(tmp_path).test(make_model(data.codec), data, verbose=False)
    assert scores["test/wer"] >= 0.5 and scores["test/per"] > 0.5
    assert scores["test/loss"] > 0


def test_n_best_come_with_their_scores(fitted):
    model, data, _, _ = fitted
    ((*results,),) = model.translate(["abz"], beam_size=4, n_best=3, length_penalty=0.7)
    assert len({text for text, _ in results}) == 3
    assert [s for _, s in results] == sorted((s for _, s in results), reverse=True)
    for text, score in results:
        target = torch.tensor([data.codec.encode_target(text)])
        source = torch.tensor([data.codec.encode_source("abz")])
        with torch.no_grad():
            logits, _ = model.eval()(source, torch.tensor([3]), target[:, :-1])
        total = -cross_entropy(logits[0], target[0, 1:], reduction="sum")
        length = target.shape[1] - 1
        assert score == pytest.approx(float(total) / ((5 + length) / 6) ** 0.7, rel=1e-4)
    (line,) = model.predict_lines(["abz"], beam_size=4, n_best=3, length_penalty=0.7)
    cells = line.split("\t")
    assert cells[::2] == [text for text, _ in results]
    assert [float(cell) for cell in cells[1::2]] == pytest.approx([s for _, s in results], abs=1e-4)
    single = model.predict_lines([""], beam_size=4, n_best=3, alignments=True)
    assert list(single) == ["\t0.0000\t"], "as many cells for each result, few as they may be"


def test_samples_depend_on_the_seed_and_the_line_alone(fitted):
    model = fitted[0]
    words = ["abcf", "", "zzz", "bzd", "zzz"] * 3
    options = {"sampling": True, "temperature": 3.0, "top_k": 6}
    together = list(model.predict_lines(words, **options, batch_size=15))
    assert list(model.predict_lines(words, **options, batch_size=2)) == together
    assert model.translate(words, **options, batch_size=4) == together
    assert list(model.predict_lines(words, **options, seed=1)) != together
    assert len(set(together[2::5] + together[4::5])) > 1, "the same word, other lines"
    assert together[1::5] == [""] * 3
    several = model.translate(words, **options, n_best=3)
    assert [len(row) for row in several] == [1 if word == "" else 3 for word in words]


def test_lengths_and_repetition_can_be_bounded(fitted):
    model = fitted[0]
    for options in ({}, {"beam_size": 3}, {"sampling": True, "temperature": 2.0}):
        long = model.translate(["abc", "f"], **options, min_length=5, max_length=7)
        assert all(5 <= len(text.split()) <= 7 for text in long)
        short = model.translate(["abcdef"], **options, max_length=2)
        assert len(short[0].split()) <= 2
        once = model.translate(["aaaa", "abab"], **options, no_repeat_ngram_size=1)
        assert all(len(set(text.split())) == len(text.split()) for text in once)


def test_results_are_written_as_objects(fitted):
    model = fitted[0]
    options = {"beam_size": 3, "n_best": 2}
    lines = list(model.predict_lines(["ab", "", "z"], **options, format="json", alignments=True))
    plain = model.translate(["ab", "", "z"], **options)
    for text, line, expected in zip(["ab", "", "z"], lines, plain, strict=True):
        found = json.loads(line)
        assert found["source"] == text
        assert [h["text"] for h in found["hypotheses"]] == [t for t, _ in expected]
        for hypothesis, (output, score) in zip(found["hypotheses"], expected, strict=True):
            assert hypothesis["score"] == pytest.approx(score, abs=1e-5)
            assert hypothesis["symbols"] == output.split()
            if text:
                (weights,) = model.alignments([text], [output])
                shown = torch.tensor(hypothesis["alignment"])
                torch.testing.assert_close(shown, weights, atol=1e-4, rtol=0)


def test_alignments_are_written_and_drawn(fitted, tmp_path):
    model = fitted[0]
    lines = model.predict_lines(
        ["abc", "", "fd"], alignments=True, drawings=str(tmp_path / "maps"), batch_size=2
    )
    assert list(lines) == ["AA BB CC\t0-0 1-1 2-2", "\t", "FF DD\t0-0 1-1"]
    assert sorted(file.name for file in (tmp_path / "maps").iterdir()) == ["1.png", "3.png"]
    blind = make_model(model.codec, attention="none")
    with pytest.raises(ValueError, match="this model has no attention to show"):
        next(blind.predict_lines(["a"], alignments=True))


@pytest.mark.parametrize("beam", [1, 3], ids=["greedy", "beam"])
def test_an_ensemble_decodes_with_the_mean_probability(fitted, beam):
    data = fitted[1]
    three = [make_model(data.codec, seed=seed, encoder_sizes=[8 + seed]) for seed in range(3)]
    first, *others = three
    alone = [m.translate(["abcz"])[0] for m in three]
    assert len(set(alone)) == 3
    first.join(others)
    options = {"beam_size": beam, "n_best": beam, "length_penalty": 0.0}
    found = first.hypotheses(["abcz", "f"], SearchOptions(**options), align=True)
    for text, row in zip(["abcz", "f"], found, strict=True):
        source = torch.tensor([data.codec.encode_source(text)])
        for hypothesis in row:
            numbers = data.codec.target.encode(hypothesis.symbols)
            ends = len(numbers) < 2 * len(text) + 10
            inputs = torch.tensor([[data.codec.target.bos, *numbers]])
            outputs = [*numbers, data.codec.target.eos] if ends else numbers
            with torch.no_grad():
                batch = (source, torch.tensor([len(text)]), inputs)
                results = [m.model(*batch) for m in three]
            mean = torch.stack([logits[0].softmax(-1) for logits, _ in results]).mean(0)
            chosen = mean.log()[range(len(outputs)), outputs]
            assert hypothesis.score == pytest.approx(float(chosen.sum()), rel=1e-4)
            weights = torch.stack([weights[0] for _, weights in results]).mean(0)
            torch.testing.assert_close(hypothesis.weights, weights)
    strangers = PairCodec.from_pairs([("a", "b")], *data.symbols)
    with pytest.raises(CheckpointError, match="model 2 of the ensemble: expected the symbols"):
        make_model(data.codec).join([make_model(strangers)])


def test_translate_leaves_the_mode_as_it_was(fitted):
    model = fitted[0]
    for mode in (True, False):
        model.train(mode)
        model.translate(["abc"])
        assert model.training is mode
    model.eval()


def test_special_symbols_are_never_written(fitted):
    _, data, _, _ = fitted
    eager = make_model(data.codec)
    target = data.codec.target
    with torch.no_grad():
        eager.model.output.bias[[target.pad, target.unk, target.bos]] = 50.0
    for beam in (1, 3):
        for result in eager.translate(["abc", "f"], beam_size=beam):
            assert not {"<pad>", "<unk>", "<bos>", "<eos>"} & set(result.split())


def test_output_length_is_bounded(fitted):
    _, data, _, _ = fitted
    endless = make_model(data.codec, max_length_ratio=1.5, max_length_extra=2)
    with torch.no_grad():
        endless.model.output.bias[data.codec.target.eos] = -50.0
    for beam in (1, 2):
        found = endless.translate(["abcd", "a"], beam_size=beam)
        assert [len(text.split()) for text in found] == [8, 3]


def test_alignments_have_a_row_per_symbol(fitted):
    model = fitted[0]
    long, short = model.alignments(["abcde", "fa"], ["AA BB CC DD EE", "FF AA"])
    assert long.shape == (6, 5) and short.shape == (3, 2)
    torch.testing.assert_close(short.sum(-1), torch.ones(3))
    assert long.argmax(-1).tolist()[:5] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="no empty text"):
        model.alignments([""], ["AA"])
    blind = make_model(model.codec, attention="none")
    with pytest.raises(ValueError, match="has no attention"):
        blind.alignments(["a"], ["AA"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention": "none", "cell": "gru"},
        {"attention": "additive", "input_feeding": True, "decoder_sizes": [8, 8]},
        {"sampling_probability": 0.5, "sampling_steps": 4, "tied_embeddings": True},
        {"attention": "additive", "coverage": True, "feedback": "context"},
        {"decoder_cell": "gru", "decoder_sizes": [8, 8], "feedback": "features"},
    ],
    ids=["plain", "input-feeding", "sampling", "coverage", "lstm-to-gru"],
)
def test_every_variant_trains_and_translates(files, tmp_path, arguments):
    data = make_data(files)
    model = make_model(data.codec, **arguments)
    trainer = make_trainer(tmp_path, max_epochs=1, limit_train_batches=5, limit_val_batches=2)
    trainer.fit(model, data)
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    assert len(model.translate(["abc", "d"], beam_size=2)) == 2


def test_sampling_probability_grows(files, tmp_path, monkeypatch):
    data = make_data(files)
    model = make_model(data.codec, sampling_probability=0.8, sampling_steps=4)
    forward, used = model.model.forward, []

    def record(source, lengths, target, probability=0.0):
        if model.training:
            used.append(probability)
        return forward(source, lengths, target, probability)

    monkeypatch.setattr(model.model, "forward", record)
    options = {"limit_train_batches": 3, "limit_val_batches": 1}
    make_trainer(tmp_path, max_epochs=2, **options).fit(model, data)
    assert used == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])


def test_label_smoothing_is_its_formula(fitted):
    model, data, _, _ = fitted
    size = len(data.codec.target)
    logits = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[2, 5, 3, 0], [2, 4, 6, 3]])
    gold = 0.9 * one_hot(target[:, 1:], size) + 0.1 / size
    losses = -(gold * logits.log_softmax(-1)).sum(-1)
    expected = losses[target[:, 1:] != 0].mean()
    torch.testing.assert_close(model._loss(logits, target, 0.1), expected)


@pytest.mark.parametrize("lowercase", [False, True], ids=["cased", "lowercased"])
def test_text_is_scored_by_sacrebleu(tmp_path, lowercase):
    draw = random.Random(0)
    nouns = ["the cat", "A dog", "my house", "Paris", "it's me"]
    sources = [" ".join(draw.choices(nouns, k=draw.randint(2, 4))) + " ." for _ in range(80)]
    for name in ("en", "de"):
        (tmp_path / name).write_text("\n".join(sources))
    places = [str(tmp_path / "en"), str(tmp_path / "de")]
    cased = {"source_lowercase": lowercase, "target_lowercase": lowercase}
    data = PairData(train=places, val=places, test=places, **cased, batch_size=10)
    model = make_model(data.codec, score="bleu", optimizer=lambda p: torch.optim.Adam(p, 0.01))
    trainer = make_trainer(tmp_path, max_epochs=4, check_val_every_n_epoch=4)
    trainer.fit(model, data)
    (scores,) = trainer.test(model, data, verbose=False)
    with open(*(tmp_path / "media" / "test").glob("bleu_*.csv")) as file:
        rows = {row["score"]: row for row in csv.DictReader(file)}
    protocols = {"bleu": lowercase} | ({} if lowercase else {"bleu_lowercase": True})
    assert rows.keys() == protocols.keys()
    for name, ignored in protocols.items():
        metric = sacrebleu.BLEU(lowercase=ignored)
        expected = metric.corpus_score(model.translate(sources), [sources]).score
        assert 1 < expected < 100
        assert scores[f"test/{name}"] == pytest.approx(expected, rel=1e-6)
        assert float(rows[name]["bleu"]) == pytest.approx(expected)
        assert rows[name]["signature"] == str(metric.get_signature())
        assert ("case:lc" in rows[name]["signature"]) == ignored


def test_utterances_are_scored_by_words_and_characters(fitted, tmp_path):
    model, data, _, _ = fitted
    rough = make_model(data.codec, score="wer")
    rough.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in rough.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.manual_seed(0)))
    assert rough.monitor == "val/wer"
    (scores,) = make_trainer(tmp_path).test(rough, data, verbose=False)
    words, sounds = zip(*data.pairs("test"), strict=True)
    found = rough.translate(words)
    assert found != list(sounds)
    assert scores["test/wer"] == pytest.approx(float(word_error_rate(found, sounds)))
    assert scores["test/cer"] == pytest.approx(float(char_error_rate(found, sounds)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing: expected 0 <= label_smoothing < 1, got 1.0"),
        ({"sampling_probability": -0.1}, "sampling_probability: expected 0 <="),
        ({"score": "rouge"}, "score: expected per, wer or bleu, got 'rouge'"),
        ({"max_length_extra": 0}, "max_length_ratio, max_length_extra: expected at least 0 and 1"),
        ({"test_beam_size": 0}, "test_beam_size: expected at least 1, got 0"),
        ({"encoder_sizes": [0]}, "encoder_sizes must be one or more positive sizes"),
    ],
    ids=["smoothing", "sampling", "score", "length", "beam", "sizes"],
)
def test_wrong_arguments_are_named(arguments, message):
    codec = PairCodec.from_pairs([("a", "b")], Symbols(), Symbols())
    with pytest.raises(ValueError, match=message):
        Seq2Seq(codec, **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.translate("abc"), "expected a list of texts, got a single string"),
        (lambda m: m.translate(["a"], beam_size=2, n_best=3), "n_best=3, beam_size=2"),
        (lambda m: m.translate(["a"], beam_size=0), "n_best=1, beam_size=0"),
        (lambda m: m.translate(["a"], batch_size=0), "batch_size: expected at least 1, got 0"),
        (lambda m: m.translate([], length_penalty=-1.0), "length_penalty: expected at least 0"),
        (lambda m: m.translate([], no_repeat_ngram_size=-1), "no_repeat_ngram_size: expected at"),
        (lambda m: m.translate([], sampling=True, top_p=2.0), "expected 0 < top_p <= 1, got 2.0"),
        (lambda m: [*m.predict_lines(["a"], batch_size=0)], "batch_size: expected at least 1"),
        (lambda m: m.translate(["a"], max_length=0), "max_length: expected at least 1, got 0"),
        (lambda m: m.translate(["a"], min_length=3, max_length=2), "the min_length of 3, got 2"),
        (lambda m: m.translate(["a"], sampling=True, beam_size=2), "expected 1 when sampling"),
        (lambda m: m.translate(["a"], top_k=2), "top_p: expected only with sampling"),
        (lambda m: m.translate(["a"], sampling=True, n_best=0), "got n_best=0, beam_size=1"),
    ],
    ids=[
        "string",
        "n-best",
        "beam",
        "batch",
        "penalty",
        "n-grams",
        "nucleus",
        "batch of lines",
        "length",
        "lengths that cross",
        "beam of samples",
        "k without sampling",
        "no samples",
    ],
)
def test_wrong_requests_are_named(fitted, call, message):
    with pytest.raises(ValueError, match=message):
        call(fitted[0])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["g2p", "g2p_full", "translation"])
def test_packaged_configs_run(here, files, name):
    """Every setting as shipped, except that files stand in for the hub and the CPU for the GPU."""
    data = []
    if name == "translation":
        rows = [{"translation": {"en": s, "fr": t}} for s, t in pairs(40, 0)]
        (here / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        data = ["--data.dataset=null", "--data.config=null", "--data.max_tokens=40"]
        data += [f"--data.{split}={here / 't.jsonl'}" for split in ("train", "val")]
    cli = main(
        [
            *("fit", "--config", name, *data),
            *("--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"),
            *("--trainer.precision", "32-true", "--data.batch_size", "4"),
        ]
    )
    assert isinstance(cli.model, Seq2Seq) and isinstance(cli.datamodule, PairData)
    assert torch.isfinite(cli.trainer.callback_metrics["val/loss"])
    assert f"val/{cli.model.score}" in cli.trainer.callback_metrics


def test_a_score_that_is_not_computed_cannot_be_waited_for(here, files, capsys):
    """The configuration waits for val/per; a run would find out after its first epoch."""
    options = ["--data.dataset=null", "--trainer.accelerator=cpu", "--model.score=bleu"]
    options += [f"--data.{split}={place}" for split, place in files.items()]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "g2p", *options])
    known = "val/accuracy, val/bleu, val/bleu_lowercase, val/loss"
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"error: monitor of EarlyStopping: expected one of {known}, got 'val/per'"
    assert not Path("runs").exists()


def test_command_line_from_training_to_use(here, files, capsys):
    """Trains from a table, tests the best checkpoint, resumes, and reads raw text."""
    common = ["--config", "g2p", "--data.dataset=null", "--trainer.accelerator=cpu"]
    common += [f"--data.{split}={place}" for split, place in files.items()]
    common += ["--model.encoder_sizes=[16]", "--model.decoder_sizes=[32]"]
    short = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=10"]
    main(["fit", *common, *short, "--data.batch_size=16"])
    best = "runs/g2p/latest/checkpoints/best.ckpt"
    assert Path(best).is_file()
    cli = main(["test", *common, "--ckpt_path", best])
    scores = {k: float(v) for k, v in cli.trainer.callback_metrics.items()}
    assert {"test/loss", "test/accuracy", "test/per", "test/wer"} <= set(scores)
    Path("words.txt").write_text("abc\n\nzz\n")
    main(["predict", "--ckpt_path", best, "--input", "words.txt", "--output", "out.txt"])
    lines = Path("out.txt").read_text().split("\n")
    expected = Seq2Seq.load_from_checkpoint(best).translate(["abc", "", "zz"])
    assert lines == [*expected, ""] and lines[1] == ""
    last = "runs/g2p/latest/checkpoints/last.ckpt"
    several = ["--ckpt_path", best, last, "--input", "words.txt", "--output", "several.txt"]
    main(["predict", *several, "--beam_size=2", "--n_best=2", "--format=json"])
    ensemble = Seq2Seq.load_from_checkpoint(best)
    ensemble.join([Seq2Seq.load_from_checkpoint(last)])
    expected = ensemble.translate(["abc", "", "zz"], beam_size=2, n_best=2)
    for line, row in zip(Path("several.txt").read_text().splitlines(), expected, strict=True):
        assert [h["text"] for h in json.loads(line)["hypotheses"]] == [text for text, _ in row]
    main(["average", "--ckpt_path", best, last, "--output", "mean.ckpt"])
    main(["test", *common, "--ckpt_path", "mean.ckpt"])
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "--ckpt_path", best, "--input", "words.txt", "--n_best", "3"])
    assert "error: expected 1 <= n_best <= beam_size, got n_best=3" in capsys.readouterr().err
