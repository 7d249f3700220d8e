"""The tagger as a whole: learns, scores, is stored, and tags raw text."""

import functools
import json
import random
from pathlib import Path

import lightning as L
import pytest
import seqeval.metrics
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_modules.base import CheckpointError, Task
from lightning_modules.data.readers import Sentence
from lightning_modules.data.schemes import convert
from lightning_modules.data.tagging import TaggingCodec, TaggingData
from lightning_modules.tagger import Scores, Tagger, confusion_figure, confusion_table

SMALL = {
    "word_size": 12,
    "character_size": 8,
    "character_hidden_size": 12,
    "hidden_sizes": [16],
    "dropout": 0.1,
}


def names(count: int, seed: int) -> str:
    """Sentences in which `Mr` opens a name of one or two capitalised made-up words."""
    draw = random.Random(seed)
    blocks = []
    for _ in range(count):
        rows = []
        for _ in range(draw.randint(1, 4)):
            rows.append(draw.choice(["we", "saw", "the", "cat", "Now", ","]) + "\tO")
            if draw.random() < 0.5:
                rows.append("Mr\tO")
                for position in range(draw.randint(1, 2)):
                    word = "".join(draw.choices("abcdefgh", k=4)).capitalize()
                    rows.append(f"{word}\t{'I' if position else 'B'}-PER")
        blocks.append("\n".join(rows) + "\n")
    return "\n".join(blocks)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaggingData:
    folder = tmp_path_factory.mktemp("names")
    for seed, split in enumerate(("train", "val", "test")):
        (folder / split).write_text(names(300 if split == "train" else 60, seed))
    places = {split: str(folder / split) for split in ("train", "val", "test")}
    return TaggingData(**places, scheme="BIO", encoding="BIOES", batch_size=16)


def trainer(folder: Path, **options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version=""),
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        **options,
    )


@pytest.fixture(scope="module")
def trained(data: TaggingData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tagger, Path]:
    L.seed_everything(0)
    tagger = Tagger(data.codec, **SMALL, optimizer=lambda p: torch.optim.Adam(p, lr=0.02))
    folder = tmp_path_factory.mktemp("run")
    run = trainer(folder, max_epochs=4)
    run.fit(tagger, data)
    run.save_checkpoint(folder / "names.ckpt")
    return tagger.eval(), folder


def test_learns_and_logs(
    trained: tuple[Tagger, Path], data: TaggingData, capsys: pytest.CaptureFixture
) -> None:
    tagger, folder = trained
    (scores,) = trainer(folder / "test").test(tagger, data, verbose=False)
    assert set(scores) == {f"test/{n}" for n in ("loss", "accuracy", "precision", "recall", "f1")}
    assert tagger.score_names == {name.replace("test/", "val/") for name in scores}
    assert scores["test/f1"] > 0.95
    assert scores["test/accuracy"] > 0.97
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    for name in ("train/loss", "val/loss", "val/accuracy", "val/f1"):
        assert name in header
    logged = {
        path.parent.name + "/" + path.name.rpartition("_")[0] for path in folder.rglob("media/*/*")
    }
    assert {"val/samples", "val/labels", "val/confusion_matrix"} <= logged
    assert {"test/samples", "test/labels", "test/confusion_matrix"} <= logged
    (labels,) = folder.rglob("media/test/labels_*.csv")
    rows = [line.split(",") for line in labels.read_text().splitlines()]
    assert rows[0] == ["label", "precision", "recall", "f1", "correct", "predicted", "gold"]
    assert rows[1][0] == "PER"
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed[printed.index(["test:", "labels"]) + 1] == rows[0]
    assert [cell for line in printed if line[:1] == ["PER"] for cell in line][-3:] == rows[1][-3:]
    (counts,) = folder.rglob("media/test/confusion_counts_*.csv")
    matrix = [line.split(",") for line in counts.read_text().splitlines()]
    assert all(row in printed for row in matrix[1:])
    words = sum(len(sentence.tokens) for sentence in data.sentences("test"))
    assert sum(int(cell) for row in matrix[1:] for cell in row[1:]) == words
    assert float(rows[1][3]) == pytest.approx(scores["test/f1"], abs=1e-6)


def test_logged_scores_are_those_of_its_own_tags(
    trained: tuple[Tagger, Path], data: TaggingData
) -> None:
    tagger, folder = trained
    (scores,) = trainer(folder / "validate").validate(tagger, data, verbose=False)
    gold = data.sentences("val")
    tagged = [[tag for _, tag in row] for row in tagger.tag([s.tokens for s in gold])]
    expected = seqeval.metrics.f1_score([s.tags for s in gold], tagged)
    assert scores["val/f1"] == pytest.approx(expected, abs=1e-6)
    pairs = [
        pair for s, row in zip(gold, tagged, strict=True) for pair in zip(s.tags, row, strict=True)
    ]
    assert {tag[0] for _, tag in pairs} <= set("BIO")


def test_batch_size_does_not_change_tags_or_scores(
    trained: tuple[Tagger, Path], data: TaggingData
) -> None:
    tagger, folder = trained
    sentences = [s.tokens for s in data.sentences("val")]
    tagged = tagger.tag(sentences, batch_size=7)
    assert tagger.tag(sentences, batch_size=1) == tagged
    assert tagger.tag(sentences[::-1], batch_size=64)[::-1] == tagged
    places = {"train": data._places["train"], "val": data._places["val"]}
    runs = []
    for size in (1, 64):
        other = TaggingData(**places, scheme="BIO", batch_size=size)
        other.codec = data.codec
        runs.append(trainer(folder / "validate").validate(tagger, other, verbose=False)[0])
    assert runs[0]["val/f1"] == runs[1]["val/f1"]
    assert runs[0]["val/accuracy"] == runs[1]["val/accuracy"]
    assert runs[0]["val/loss"] == pytest.approx(runs[1]["val/loss"], abs=1e-6)


def test_two_processes_score_like_one(trained: tuple[Tagger, Path], data: TaggingData) -> None:
    tagger, folder = trained
    single = trainer(folder / "validate").validate(tagger, data, verbose=False)
    run = trainer(folder / "ddp", devices=2, strategy="ddp_fork")
    assert run.validate(tagger, data, verbose=False) == single


def test_checkpoint_holds_all_that_tagging_needs(trained: tuple[Tagger, Path]) -> None:
    tagger, folder = trained
    loaded = Tagger.load_from_checkpoint(folder / "names.ckpt")
    assert not loaded.training
    text = ["we saw Mr Abba Gaga", "", "the cat Mr Zyx"]
    tagged = loaded.tag(text)
    assert tagged == tagger.tag(text)
    assert tagged[0] == [
        ("we", "O"), ("saw", "O"), ("Mr", "O"), ("Abba", "B-PER"), ("Gaga", "I-PER"),
    ]  # fmt: skip
    assert tagged[1] == []
    assert type(Task.load_from_checkpoint(folder / "names.ckpt")) is Tagger


def test_predict_lines(trained: tuple[Tagger, Path]) -> None:
    tagger = Tagger.load_from_checkpoint(trained[1] / "names.ckpt")
    lines = ["we saw Mr Abba,", "   ", "Now"]
    assert list(tagger.predict_lines(lines, tokenizer="words")) == [
        "we/O saw/O Mr/O Abba/B-PER ,/O",
        "",
        "Now/O",
    ]
    assert (
        list(tagger.predict_lines(iter(lines[2:] * 5), batch_size=2, tags_only=True)) == ["O"] * 5
    )
    endless = tagger.predict_lines((line for _ in iter(int, 1) for line in lines), batch_size=4)
    assert next(endless).startswith("we/O")


def test_odd_sentences_are_tagged(trained: tuple[Tagger, Path]) -> None:
    tagger, _ = trained
    odd = [["x" * 5000], ["漢字", "🙂", "\u200d"], ["Mr"] * 3000, ["<pad>", "<unk>", ""]]
    assert [len(row) for row in tagger.tag(odd)] == [1, 3, 3000, 3]
    assert tagger.tag([]) == []
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        list(tagger.predict_lines(["we"], batch_size=0))
    with pytest.raises(ValueError, match="expected a list of sentences, got a single string"):
        tagger.tag("we live")


def test_tags_unseen_in_training_count_as_errors(
    trained: tuple[Tagger, Path], data: TaggingData, tmp_path: Path
) -> None:
    tagger, folder = trained
    (tmp_path / "val").write_text("we\tO\nRome\tB-LOC\n\nthe\tO\ncat\tO\n")
    other = TaggingData(train="absent", val=str(tmp_path / "val"), scheme="BIO")
    other.codec = data.codec
    (scores,) = trainer(folder / "validate").validate(tagger, other, verbose=False)
    assert scores["val/accuracy"] == 0.75
    assert scores["val/recall"] == 0
    assert 0 < scores["val/loss"] < 10


@pytest.mark.parametrize("stage", ["val", "test"])
def test_without_a_likelihood_there_is_no_loss(
    trained: tuple[Tagger, Path], data: TaggingData, tmp_path: Path, stage: str
) -> None:
    """It was NaN; it is left out, and a line says why."""
    tagger, folder = trained
    (tmp_path / "split").write_text("we\tO\nRome\tB-LOC\n\nLima\tB-LOC\n")
    other = TaggingData(train="absent", **{stage: str(tmp_path / "split")}, scheme="BIO")
    other.codec = data.codec
    run = trainer(folder / stage)
    evaluate = run.validate if stage == "val" else run.test
    with pytest.warns(UserWarning, match=f"^{stage}/loss is not logged: every sentence has a tag"):
        (scores,) = evaluate(tagger, other, verbose=False)
    assert f"{stage}/loss" not in scores
    assert scores[f"{stage}/recall"] == 0


def test_vectors_keep_unseen_words_apart_at_prediction(tmp_path: Path) -> None:
    """Words that only the vector file knows are tagged by their vectors, also after loading."""
    (tmp_path / "train").write_text("red\tCOLOUR\n\ntwo\tNUMBER\n\n" * 20)
    (tmp_path / "vectors").write_text("red 1 0\ntwo 0 1\nblue 1 0\nsix 0 1\n")
    place = str(tmp_path / "train")
    data = TaggingData(train=place, val=place, vectors=str(tmp_path / "vectors"))
    L.seed_everything(0)
    sizes = SMALL | {"word_size": 2, "character_hidden_size": 0}
    tagger = Tagger(
        data.codec,
        **sizes,
        freeze_vectors=True,
        head="softmax",
        unk_probability=0.0,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
    )
    run = trainer(tmp_path, max_epochs=15)
    run.fit(tagger, data)
    run.save_checkpoint(tmp_path / "vectors.ckpt")
    (tmp_path / "vectors").unlink()
    loaded = Tagger.load_from_checkpoint(tmp_path / "vectors.ckpt")
    assert [row[0][1] for row in loaded.tag(["blue", "six"])] == ["COLOUR", "NUMBER"]


def tasks(count: int) -> str:
    """CoNLL-U in which a word's first letter says its UPOS and XPOS, its last letter its number."""
    draw, blocks = random.Random(count), []
    for _ in range(count):
        words = ["".join(draw.choices("abcdef", k=3)) + draw.choice("sx") for _ in range(4)]
        blocks.append(
            "".join(
                f"{i}\t{w}\t_\t{'N' if w[0] in 'abc' else 'V'}\t{w[0].upper()}\t"
                f"Number={'Plur' if w[-1] == 's' else 'Sing'}\t_\t_\t_\t_\n"
                for i, w in enumerate(words, start=1)
            )
        )
    return "\n".join(blocks)


def test_tasks_learnt_together(tmp_path: Path) -> None:
    (tmp_path / "a.conllu").write_text(tasks(150))
    (tmp_path / "b.conllu").write_text(tasks(40))
    data = TaggingData(
        train=str(tmp_path / "a.conllu"),
        val=str(tmp_path / "b.conllu"),
        tag_column=["upos", "xpos", "feats"],
    )
    L.seed_everything(0)
    tagger = Tagger(
        data.codec,
        **SMALL,
        character_filters=8,
        casing_size=2,
        variational_dropout=True,
        head=["crf", "softmax", "softmax"],
        unk_probability=0.9,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    )
    run = trainer(tmp_path, max_epochs=6)
    run.fit(tagger, data)
    run.save_checkpoint(tmp_path / "tasks.ckpt")
    (scores,) = trainer(tmp_path / "validate").validate(tagger, data, verbose=False)
    for name in ("accuracy", "xpos/accuracy", "feats/accuracy"):
        assert scores[f"val/{name}"] > 0.9
    assert tagger.score_names == set(scores)
    assert tagger.monitor == "val/accuracy"
    logged = {path.relative_to(tmp_path / "media").parent for path in tmp_path.rglob("*.csv")
              if "media" in path.parts and "validate" not in path.parts}  # fmt: skip
    assert {Path("val"), Path("val/xpos"), Path("val/feats")} <= logged
    loaded = Tagger.load_from_checkpoint(tmp_path / "tasks.ckpt")
    (tagged,) = loaded.tag(["abcs fedx"])
    assert tagged == [("abcs", "N", "A", "Number=Plur"), ("fedx", "V", "F", "Number=Sing")]
    assert list(loaded.predict_lines(["abcs"])) == ["abcs/N/A/Number=Plur"]
    assert list(loaded.predict_lines(["abcs"], tags_only=True)) == ["N/A/Number=Plur"]
    columns = list(
        loaded.predict_lines(["1 abcs"], input_format="conll", token_column=1, format="conll")
    )
    assert columns == ["1 abcs N A Number=Plur\n"]
    (line,) = loaded.predict_lines(["abcs"], format="json", confidence=True)
    (token,) = json.loads(line)["tokens"]
    assert (token["tag"], token["other_tags"]) == ("N", ["A", "Number=Plur"])
    assert 0.5 < token["confidence"] <= 1
    other = TaggingCodec.from_sentences([s._replace(others=()) for s in data.sentences("train")])
    single = Tagger(other, **{**tagger.arguments, "head": "crf"})
    with pytest.raises(CheckpointError, match=r"model.others.0.* there and absent in this model"):
        single.check(torch.load(tmp_path / "tasks.ckpt", weights_only=True))


def test_checkpoints_of_before_character_filters_load(
    trained: tuple[Tagger, Path], tmp_path: Path
) -> None:
    checkpoint = torch.load(trained[1] / "names.ckpt", weights_only=True)
    arguments = checkpoint["fusedrnn"]["arguments"]
    for name in ("character_filters", "character_filter_width", "casing_size"):
        del arguments[name]
    del arguments["variational_dropout"]
    assert "others" not in checkpoint["fusedrnn"]["codec"]
    torch.save(checkpoint, tmp_path / "before.ckpt")
    loaded = Tagger.load_from_checkpoint(tmp_path / "before.ckpt")
    assert loaded.tag(["we saw Mr Abba"]) == trained[0].tag(["we saw Mr Abba"])


@pytest.mark.parametrize("encoding", ["BIO", "BIOES"])
@pytest.mark.parametrize("scheme", ["BIO", "IOB1", "BIOES"])
def test_the_crf_keeps_to_the_scheme_that_is_learnt(scheme: str, encoding: str) -> None:
    """Whatever the emissions; a path that breaks it is impossible."""
    tags = convert(["O", "B-A", "I-A", "I-A", "B-A", "B-B", "I-B"], scheme)
    sentence = Sentence([f"w{place}" for place in range(len(tags))], tags)
    codec = TaggingCodec.from_sentences([sentence], scheme, encoding)
    torch.manual_seed(0)
    tagger = Tagger(codec, **SMALL).eval()
    torch.nn.init.normal_(tagger.model.emission.weight, std=20)
    batch = codec.batch([codec.encode(sentence)] * 3)
    emissions = tagger(batch)
    emissions = emissions + 20 * torch.randn_like(emissions)
    for path in tagger.model.decode(emissions, batch.lengths):
        names = codec.tags.decode(path.tolist())
        assert convert(names, encoding) == names
    inside = codec.tags.index("I-A")
    broken = torch.full_like(batch.tags, inside)
    broken[:, 0] = codec.tags.index("O")
    assert tagger.model.loss(emissions, broken, batch.lengths)[0] == torch.inf


def test_words_that_occur_once_are_taken_for_unknown_ones_in_training() -> None:
    sentence = Sentence(["the", "The", "cat", "sat"], ["X"] * 4)
    codec = TaggingCodec.from_sentences([sentence], lowercase=True)
    tagger = Tagger(codec, **SMALL, unk_probability=0.999).train()
    torch.manual_seed(0)
    (forgotten,) = tagger.model._forget(codec.batch([codec.encode(sentence)]).words)
    unknown = codec.words.unk
    assert [number == unknown for number in forgotten.tolist()] == [False, False, True, True]


@pytest.mark.parametrize("casing_size", [0, 3])
def test_casing_tells_words_apart_that_are_looked_up_alike(casing_size: int) -> None:
    sentences = [Sentence([token], ["X"]) for token in ("ann", "Ann", "ANN")]
    codec = TaggingCodec.from_sentences(sentences, lowercase=True)
    sizes = SMALL | {"character_hidden_size": 0, "casing_size": casing_size}
    tagger = Tagger(codec, **sizes).eval()
    encoded = tagger.model.encode(*codec.batch([codec.encode(s) for s in sentences])[:6])
    assert len({tuple(row.flatten().tolist()) for row in encoded}) == (3 if casing_size else 1)


@pytest.mark.parametrize("head", ["crf", "softmax"])
@pytest.mark.parametrize(("algorithm", "order"), [(None, 2), ("value", float("inf"))])
def test_low_precision_clips_for_a_fused_optimizer_too(
    data: TaggingData, head: str, algorithm: str | None, order: float
) -> None:
    norms = []

    class Watch(L.Callback):
        def on_train_batch_end(self, _, module, *rest):
            gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
            norms.append(torch.linalg.vector_norm(torch.cat(gradients), order).item())

    run = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=1e-3,
        gradient_clip_algorithm=algorithm,
        max_steps=2,
        limit_val_batches=1,
        callbacks=Watch(),
        use_distributed_sampler=False,
        **dict.fromkeys(
            ["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"],
            False,
        ),
    )
    fused = functools.partial(torch.optim.AdamW, fused=True)
    run.fit(Tagger(data.codec, **SMALL, head=head, optimizer=fused), data)
    assert norms == pytest.approx([1e-3] * 2, rel=1e-2)


def test_training_never_decodes(data: TaggingData, monkeypatch) -> None:
    """AllenNLP's tagger runs Viterbi at every training step; its result is thrown away."""
    tagger = Tagger(data.codec, **SMALL).train()
    tagger.log = lambda *_, **__: None  # type: ignore[method-assign]

    def decode(*_: object) -> None:
        raise AssertionError("decoded in training")

    monkeypatch.setattr(tagger.model.crf, "decode", decode)
    rows = [data.codec.encode(s, training=True) for s in data.sentences("train")[:4]]
    assert tagger.training_step(data.codec.batch(rows), 0).requires_grad


def test_failing_to_save_is_an_error(data: TaggingData, tmp_path: Path) -> None:
    """Stanza goes on with a message when a model cannot be saved."""
    tagger = Tagger(data.codec, **SMALL)
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    run.fit(tagger, data)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        run.save_checkpoint(tmp_path / "file" / "last.ckpt")


def test_refuses_the_checkpoint_of_another_vocabulary(
    trained: tuple[Tagger, Path], data: TaggingData
) -> None:
    checkpoint = torch.load(trained[1] / "names.ckpt", weights_only=True)
    codec = TaggingCodec.from_sentences(data.sentences("train")[:5], "BIO", "BIOES")
    with pytest.raises(CheckpointError, match=r"is .* there and .* in this"):
        Tagger(codec, **SMALL).check(checkpoint)


def test_monitor_follows_the_kind_of_tags(data: TaggingData) -> None:
    assert Tagger(data.codec, **SMALL).monitor == "val/f1"
    codec = TaggingCodec.from_sentences([Sentence(["a"], ["X"])])
    assert Tagger(codec, **SMALL).monitor == "val/accuracy"


def test_scores_of_single_labels_by_hand() -> None:
    """Gold N V V and an unseen X; predicted N N V V."""
    codec = TaggingCodec.from_sentences([Sentence(["a", "b"], ["N", "V"])])
    scores = Scores(codec.tasks[0])
    batch = codec.batch([codec.encode(Sentence(list("abcd"), ["N", "V", "V", "X"]))])
    paths = torch.tensor([[0, 0, 1, 1]])
    scores.update(torch.tensor(6.0), torch.tensor(3), paths, batch.tags, [], [])
    values, table, confusion = scores.compute()
    assert {name: float(value) for name, value in values.items()} == {
        "loss": 2,
        "accuracy": 0.5,
    }
    assert table == [
        ["N", 1 / 2, 1.0, 2 / 3, 1, 2, 1],
        ["V", 1 / 2, 1 / 2, 1 / 2, 1, 2, 2],
        ["<unseen>", 0.0, 0.0, 0.0, 0, 0, 1],
    ]
    assert confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]


def test_confusion_table() -> None:
    confusion: Tensor = torch.tensor([[3, 1, 0, 0], [5, 2, 0, 2], [0, 0, 0, 0], [0, 0, 0, 1]])
    names = ["A", "B", "C", "D"]
    columns, rows = confusion_table(confusion, names)
    assert columns == ["gold \\ predicted", "A", "B", "D"]
    assert rows == [["A", 3, 1, 0], ["B", 5, 2, 2], ["D", 0, 0, 1]]
    columns, rows = confusion_table(confusion, names, most=2)
    assert columns == ["gold", "predicted", "count"]
    assert rows == [["B", "A", 5], ["B", "D", 2], ["A", "B", 1]]


def test_confusion_figure_leaves_out_what_never_occurs() -> None:
    confusion: Tensor = torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    (axes,) = confusion_figure(confusion, ["A", "B", "<unseen>"]).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["A", "B"]
    assert sorted(text.get_text() for text in axes.texts) == ["1", "2", "3"]
