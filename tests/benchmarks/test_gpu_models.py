"""Packaged configurations with two backends, tiny and on a CPU, where Triton's interpreter runs."""

import datasets
import pytest
import torch
import yaml

from benchmarks import gpu_models
from benchmarks.gpu_models import SIZES, Size, build, draw, main, prepare, stored, train, use
from benchmarks.registry import BENCHMARKS, read, write
from fusedrnn.base import RecurrentBase
from fusedrnn.dropout import Dropout
from kernels.persistent.plan import product_precision
from lightning_modules.data import PairData, TaggingData

SENTENCES = "ab\tX\nba\tY\n\nb\tY\n\na\tX\nab\tX\n\nba\tY\n"
PAIRS = "".join(f"{word}\t{' '.join(word.upper())}\n" for word in ("ab", "b", "aab", "ba"))
TAGGER = Size(
    "pos",
    "tiny",
    {"word_size": 4, "character_size": 3, "character_hidden_size": 3, "hidden_sizes": [4, 3]},
    {"batch_size": 2},
)
SEQ2SEQ = Size(
    "g2p_full",
    "tiny",
    {"embedding_size": 4, "encoder_sizes": [4, 3], "decoder_sizes": [4, 5]},
    {"batch_size": 2},
)
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The packaged configurations for other data, and what they are prepared as."""
    folder = tmp_path_factory.mktemp("gpu_models")
    (folder / "a.conll").write_text(SENTENCES)
    (folder / "a.tsv").write_text("source\ttarget\n" + PAIRS)
    for config, file in (("pos", "a.conll"), ("pos_deep", "a.conll"), ("g2p_full", "a.tsv")):
        settings = yaml.safe_load((gpu_models.CONFIGS / f"{config}.yaml").read_text())
        del settings["data"]["init_args"]["dataset"]
        settings["data"]["init_args"] |= dict.fromkeys(("train", "val"), str(folder / file))
        (folder / f"{config}.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(gpu_models, "CONFIGS", folder)
        prepare(folder / "batches.pt", (TAGGER, SEQ2SEQ), STEPS)
    return folder


@pytest.fixture
def products():
    """Leave the precision of products as it was."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture
def tiny(folder, products, monkeypatch):
    """The benchmarks at tiny sizes."""
    for name, value in (
        ("CONFIGS", folder),
        ("FILE", folder / "batches.pt"),
        ("SIZES", (TAGGER, SEQ2SEQ)),
        ("SEARCHED", SEQ2SEQ),
        ("ROUNDS", 2),
        ("BLOCK", 1),
        ("WARM", 0),
        ("EARLY", 2),
    ):
        monkeypatch.setattr(gpu_models, name, value)
    gpu_models._trained.cache_clear()
    yield folder
    gpu_models._trained.cache_clear()


def measure(name):
    """The rows of all cases of a benchmark, as a file would have them."""
    rows = (key | row for key, run in BENCHMARKS[name].cases() for row in run())
    return [{name: str(value) for name, value in row.items()} for row in rows]


@pytest.mark.parametrize(("size", "kind"), [(TAGGER, TaggingData), (SEQ2SEQ, PairData)])
def test_batches_are_those_of_the_data(size, kind, tiny):
    found = stored(size, tiny / "batches.pt")
    data = kind(**size.settings["data"]["init_args"])
    data.setup("fit")
    assert found.codec == data.codec.to_dict()
    loader = data.train_dataloader()
    expected = list(loader)
    assert len(expected) < STEPS
    loader.batch_sampler.set_epoch(1)
    expected += list(loader)
    assert len(found.train) == STEPS
    for ours, theirs in zip(found.train, expected, strict=False):
        assert type(ours) is type(theirs)
        for one, other in zip(ours, theirs, strict=True):
            if isinstance(other, torch.Tensor):
                assert one.dtype == other.dtype and torch.equal(one, other)
            else:
                assert one == other
    val = list(data.val_dataloader()) if kind is PairData else []
    assert [b.source.tolist() for b in found.val] == [b.source.tolist() for b in val]


@pytest.mark.parametrize(
    ("ends", "dtype"),
    [((-128, 127), torch.int8), ((0, 128), torch.int16), ((-32769, 0), torch.int32)],
)
def test_tensors_are_stored_small(ends, dtype):
    values = torch.tensor(ends)
    stored = gpu_models._narrow(values)
    assert stored.dtype == dtype and torch.equal(stored.long(), values)


def test_data_that_configurations_share_are_stored_once(tiny, tmp_path):
    prepare(tmp_path / "x" / "both.pt", [Size("pos"), Size("pos_deep")], 1)
    assert len(torch.load(tmp_path / "x" / "both.pt", weights_only=True)) == 1


def test_a_file_that_is_absent_or_of_other_data(tiny, monkeypatch):
    with pytest.raises(ValueError, match=r"batches\.pt: made for other data than those of pos, x;"):
        stored(Size("pos", "x", {}, {"batch_size": 3}), tiny / "batches.pt")
    monkeypatch.setattr(gpu_models, "FILE", tiny / "absent.pt")
    for name in ("gpu_models", "gpu_decoding"):
        with pytest.raises(FileNotFoundError, match=r"absent.*python -m benchmarks.gpu_models pre"):
            next(iter(BENCHMARKS[name].cases()))


def test_the_model_is_the_configuration_s(tiny):
    for config in ("pos", "pos_deep", "g2p_full"):
        size = Size(config)
        part = {"pos_deep": TAGGER, "pos": TAGGER, "g2p_full": SEQ2SEQ}[config]
        model = build(size, stored(part, tiny / "batches.pt").codec)
        given = size.settings["model"]["init_args"]
        optimizer = given.pop("optimizer")
        del given["scheduler"]
        assert given.items() <= model.arguments.items()
        built = model.configure_optimizers()
        assert f"torch.optim.{type(built).__name__}" == optimizer["class_path"]
        assert optimizer["init_args"].items() <= built.param_groups[0].items()


def test_packaged_sizes_have_their_batches_and_precisions():
    found = {(s.config, s.name): s.settings["data"]["init_args"]["batch_size"] for s in SIZES}
    assert found == {
        ("pos", "packaged"): 16,
        ("pos", "large"): 128,
        ("pos_deep", "packaged"): 16,
        ("pos_deep", "large"): 128,
        ("g2p_full", "packaged"): 256,
        ("g2p_full", "large"): 256,
    }
    assert {s.config: s.precisions for s in SIZES} == {
        "pos": ("fp32", "tf32"),
        "pos_deep": ("bf16-mixed",),
        "g2p_full": ("bf16-mixed",),
    }


def test_every_part_computes_with_the_backend(tiny):
    for size, parts in ((TAGGER, 4), (SEQ2SEQ, 5)):
        model = build(size, stored(size, tiny / "batches.pt").codec)
        use(model, "torch")
        backends = [m.backend for m in model.modules() if hasattr(m, "backend")]
        assert backends == ["torch"] * parts
        assert sum(isinstance(m, RecurrentBase) for m in model.modules()) == parts - 1


def test_dropout_sees_one_layout(tiny, monkeypatch):
    seen = []
    forward = Dropout.forward
    monkeypatch.setattr(
        Dropout, "forward", lambda self, x: seen.append(x.is_contiguous()) or forward(self, x)
    )
    for size, least in ((TAGGER, 4), (SEQ2SEQ, 3)):
        found = stored(size, tiny / "batches.pt")
        model = build(size, found.codec)
        use(model, "reference" if size is SEQ2SEQ else "torch")
        seen.clear()
        batch = found.train[0]
        if size is TAGGER:
            model.model.encode(*batch[:6])
        else:
            model(batch.source, batch.source_lengths, batch.target[:, :-1])
        assert len(seen) >= least and all(seen)


def test_products_are_chosen_for_both_so_that_lightning_can_read_it(products):
    for precision, expected in (("tf32", "high"), ("fp32", "highest"), ("bf16-mixed", "highest")):
        for switch in (torch.backends.cuda.matmul, torch.backends.cudnn.rnn):
            switch.fp32_precision = "tf32"  # as another benchmark may leave it
        gpu_models._products(precision)
        assert torch.get_float32_matmul_precision() == expected
        fast = precision == "tf32"
        assert (product_precision(torch.zeros(())) == "tf32") is fast
        assert (torch.backends.cudnn.rnn.fp32_precision == "tf32") is fast


def test_both_backends_learn_alike(tiny, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(gpu_models, "use", lambda m, name: (used.append(name), use(m, name)))
    rows = measure("gpu_models")
    assert used == [row["backend"] for row in rows] == ["triton", "torch"] * 3
    assert [(r["config"], r["precision"]) for r in rows[::2]] == [
        ("pos", "fp32"),
        ("pos", "tf32"),
        ("g2p_full", "bf16-mixed"),
    ]
    for both in gpu_models.pairs(rows).values():
        assert len(set(gpu_models.curve(both["torch"]))) == STEPS
        assert gpu_models.apart(both) < 0.01
    lines = list(BENCHMARKS["gpu_models"].findings(rows))
    assert [line.partition(":")[0] for line in lines] == [
        "pos, tiny, fp32",
        "pos, tiny, tf32",
        "g2p_full, tiny, bf16-mixed",
    ]
    write(tmp_path / "gpu_models.csv", rows)
    assert read(tmp_path / "gpu_models.csv") == rows
    main(["draw", str(tmp_path / "gpu_models.csv")])
    assert (tmp_path / "gpu_models.png").read_bytes().startswith(b"\x89PNG")


def row(backend, rate, losses):
    named = {"config": "pos", "size": "large", "precision": "tf32", "backend": backend}
    return named | {
        "tokens_per_second": rate, "peak_mib": "512", "steps": "60", "losses": losses
    }  # fmt: skip


def test_findings_say_how_far_apart_the_losses_are():
    ours = row("triton", "3000", "2.02 1.9 1.8 1.7 1.6 0.95")
    theirs = row("torch", "2000", "2 1.9 1.8 1.7 1.6 1")
    assert list(BENCHMARKS["gpu_models"].findings([ours, theirs])) == [
        "pos, large, tf32: 3000 tokens/s, 1.50 times torch's, with 512 MiB (torch 512); losses "
        "(2 to 1) at most 1 % apart in the first 50 steps, 5 % in 60"
    ]
    assert list(BENCHMARKS["gpu_models"].findings([ours])) == []


def test_nothing_to_draw(tmp_path):
    write(tmp_path / "a.csv", [{"status": "no GPU has run this"}])
    with pytest.raises(ValueError, match=r"a\.csv: expected rows of both backends"):
        draw(tmp_path / "a.csv")


def test_both_backends_write_the_same(tiny, monkeypatch):
    monkeypatch.setattr(gpu_models, "train", lambda *given: train(*given[:2], "torch", given[3]))
    eos = build(SEQ2SEQ, stored(SEQ2SEQ, tiny / "batches.pt").codec).codec.target.eos
    gpu_models._trained()["model.output.bias"][eos] = -1e4  # or else it writes nothing
    rows = measure("gpu_decoding")
    assert [(r["beam"], r["name"]) for r in rows] == [
        (beam, name) for beam in "15" for name in ("torch", "triton")
    ]
    for found in rows:
        assert found["sentences"] == "4"
        assert found["same_percent"] == "100.0"
        assert float(found["symbols"]) == 14  # twice the source and ten, of 1, 2, 2 and 3
    lines = list(BENCHMARKS["gpu_decoding"].findings(rows))
    assert len(lines) == 4 and "100.0 % the same" in lines[0]
