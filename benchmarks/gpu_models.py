"""Packaged configurations on a GPU, with our kernels and with torch: speed, memory, losses.

    python -m benchmarks.gpu_models prepare      # where the data are installed: makes FILE
    python -m benchmarks gpu_models gpu_decoding # on the GPU, where FILE is all that it needs
    python -m benchmarks.gpu_models draw         # from results/gpu_models.csv, the losses

The machine of the GPU needs neither `datasets` nor the data: FILE holds the codecs and the first
batches of training, as small integers. Network, loss, optimizer, clipping and precision are those
of the configuration, run by Lightning's Trainer; the learning rate stays that of the first epoch,
and the making of batches does not count. Both backends start from the same weights, see the same
batches and draw the same dropout, so that their losses differ by rounding alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import count, islice
from pathlib import Path
from pydoc import locate
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_modules
from fusedrnn import CRF, AttentionDecoder
from fusedrnn.base import RecurrentBase

from .registry import RESULTS, ROOT, Case, Row, benchmark, interleave, read

CONFIGS = Path(lightning_modules.__file__).parent / "configs"
FILE = ROOT / "runs" / "gpu_models.pt"
COMMAND = "where the data are installed: python -m benchmarks.gpu_models prepare"
BACKENDS = ("triton", "torch")
STEPS, BLOCK, WARM, EARLY = 300, 10, 3, 5
"""Training steps; those of a block, whose losses and times are put together; blocks before times
count; blocks at the start, where roundings have not added up yet."""

BEAMS, ROUNDS = (1, 5), 5
BATCHES = {"TaggingData": "TaggingBatch", "PairData": "PairBatch"}


class Size(NamedTuple):
    """A configuration at one size.

    Attributes:
        config: its name.
        name: of the size.
        model: arguments of the model in place of the packaged ones.
        data: likewise of the data.
    """

    config: str
    name: str = "packaged"
    model: Mapping[str, Any] = {}
    data: Mapping[str, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration, with those arguments in their places."""
        text = (CONFIGS / f"{self.config}.yaml").read_text(encoding="utf-8")
        settings: dict[str, Any] = yaml.safe_load(text)
        settings["model"]["init_args"] |= self.model
        settings["data"]["init_args"] |= self.data
        return settings

    @property
    def precisions(self) -> tuple[str, ...]:
        """The configuration's own; of float32 both kinds of products."""
        given = self.settings["trainer"].get("precision", "32-true")
        return ("fp32", "tf32") if given == "32-true" else (given,)


WIDE = [1024, 1024, 1024]
SIZES = (
    Size("g2p_full"),
    Size("pos"),
    Size("pos_deep"),
    Size("g2p_full", "large", {"encoder_sizes": WIDE, "decoder_sizes": WIDE}),
    Size("pos", "large", {"hidden_sizes": [512]}, {"batch_size": 128}),
    Size("pos_deep", "large", {}, {"batch_size": 128}),
)
SEARCHED = SIZES[0]


class Stored(NamedTuple):
    """What FILE has of one configuration's data.

    Attributes:
        codec: as plain data.
        train: the first batches of training.
        val: those of validation, of pairs.
    """

    codec: dict[str, Any]
    train: list[Any]
    val: list[Any]


def prepare(path: Path, sizes: Sequence[Size] = SIZES, steps: int = STEPS) -> Path:
    """Write codecs and batches of the packaged data as small integers, for `torch.load`.

    Args:
        path: the file to write.
        sizes: what to write them for.
        steps: batches of training, of as many epochs as that takes.
    """
    sections = {json.dumps(section): section for section in (s.settings["data"] for s in sizes)}
    found = {key: _encode(section, steps) for key, section in sections.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    return path


def _encode(section: Mapping[str, Any], steps: int) -> dict[str, Any]:
    import lightning_modules.data as data_modules

    data = getattr(data_modules, section["class_path"])(**section["init_args"])
    data.setup("fit")
    loader = data.train_dataloader()

    def epochs() -> Iterator[Any]:
        for epoch in count():
            loader.batch_sampler.set_epoch(epoch)
            yield from loader

    val = data.val_dataloader() if section["class_path"] == "PairData" else ()
    return {
        "codec": data.codec.to_dict(),
        "train": [_plain(batch) for batch in islice(epochs(), steps)],
        "val": [_plain(batch) for batch in val],
    }


def _plain(batch: Any) -> dict[str, Any]:
    """The tensors and counts of a batch, in the smallest integers that hold them."""
    fields = {k: v for k, v in batch._asdict().items() if isinstance(v, Tensor | int)}
    return {k: _narrow(v) if isinstance(v, Tensor) else v for k, v in fields.items()}


def _narrow(values: Tensor) -> Tensor:
    low, high = (int(end) for end in values.aminmax())
    kinds = (torch.int8, torch.int16, torch.int32, torch.int64)
    kind = next(k for k in kinds if torch.iinfo(k).min <= low and high <= torch.iinfo(k).max)
    return values.to(kind)


@cache
def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; make it {COMMAND}")
    return torch.load(path, weights_only=True)


def stored(size: Size, path: Path) -> Stored:
    """Read what `prepare` wrote.

    Args:
        size: what to read it for.
        path: the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was made for other settings of the data.
    """
    import lightning_modules.data as data_modules

    section = size.settings["data"]
    found = _load(path).get(json.dumps(section))
    if found is None:
        place = f"{size.config}, {size.name}"
        raise ValueError(f"{path}: made for other data than those of {place}; make it {COMMAND}")
    kind = getattr(data_modules, BATCHES[section["class_path"]])
    train, val = (
        [kind(**{k: v.long() if isinstance(v, Tensor) else v for k, v in b.items()}) for b in part]
        for part in (found["train"], found["val"])
    )
    return Stored(found["codec"], train, val)


def build(size: Size, codec: dict[str, Any]) -> Any:
    """The configuration's model with its optimizer, from its own seed.

    Its dropout sees its input in one layout: a GPU draws otherwise for the layout of our kernels'
    results than for that of torch's.

    Args:
        size: which.
        codec: see `Stored`.
    """
    settings = size.settings
    kind = getattr(lightning_modules, settings["model"]["class_path"])
    given = {k: v for k, v in settings["model"]["init_args"].items() if k != "scheduler"}
    optimizer = given.pop("optimizer")
    make: Any = locate(optimizer["class_path"])
    torch.manual_seed(settings["seed_everything"])
    model = kind(
        kind.codec_class.from_dict(codec),
        optimizer=partial(make, **optimizer["init_args"]),
        **given,
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_pre_hook(_in_order)
    return model


def _in_order(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (given[0].contiguous(),)


def use(model: nn.Module, backend: str) -> None:
    """Let all that has a backend compute with one, the CRF and the attention decoder too."""
    for module in model.modules():
        if isinstance(module, RecurrentBase | AttentionDecoder | CRF):
            module.backend = backend
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # which cuDNN alone wants


class Record:
    """The loss of every step, and the tokens per second of every `BLOCK` of them."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.rates: list[float] = []
        self._tokens, self._since = 0, 0.0

    def start(self, *_: Any) -> None:
        """Start the clock."""
        self._since = _now()

    def step(self, trainer: Any, model: Any, outputs: Any, batch: Any, number: int) -> None:
        """Count a step, as a callback at its end."""
        self.losses.append(outputs["loss"].detach())
        self._tokens += batch.num_tokens
        if len(self.losses) % BLOCK == 0:
            now = _now()
            self.rates.append(self._tokens / (now - self._since))
            self._tokens, self._since = 0, now

    @property
    def means(self) -> list[float]:
        """Of the losses of each block."""
        losses = torch.stack(self.losses).double().cpu()
        return [float(block.mean()) for block in losses.split(BLOCK)]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _products(precision: str) -> None:
    """Choose how float32 is multiplied, alike in our kernels and in cuDNN.

    By torch's older switches: after `fp32_precision` they raise when Lightning reads them.
    """
    fast = precision == "tf32"
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = fast


def train(size: Size, precision: str, backend: str, path: Path) -> tuple[Any, Record]:
    """Train on the stored batches, once.

    Args:
        size: what to train.
        precision: of `size.precisions`.
        backend: of every part that has one.
        path: of what `prepare` wrote.

    Returns:
        The model, and what was seen of its training.
    """
    import lightning as L
    from lightning.pytorch.callbacks import LambdaCallback

    data = stored(size, path)
    model = build(size, data.codec)
    use(model, backend)
    _products(precision)
    record = Record()
    given = size.settings["trainer"]
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="auto",
        devices=1,
        precision="32-true" if precision in ("fp32", "tf32") else given["precision"],
        gradient_clip_val=given["gradient_clip_val"],
        callbacks=[LambdaCallback(on_train_start=record.start, on_train_batch_end=record.step)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = data.train  # a list is as good as a Dataset
    trainer.fit(model, DataLoader(batches, batch_size=None, collate_fn=_as_it_is))
    return model, record


def _as_it_is(batch: Any) -> Any:
    return batch


def _measure(size: Size, precision: str, backend: str) -> Iterator[Row]:
    gpu = torch.cuda.is_available()
    gc.collect()  # a trainer and its model refer to each other
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    _, record = train(size, precision, backend, FILE)
    yield {
        "tokens_per_second": round(statistics.median(record.rates[WARM:])),
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if gpu else "",
        "steps": len(record.losses),
        "losses": " ".join(f"{mean:.7g}" for mean in record.means),
    }


Rows = Sequence[Mapping[str, str]]
RUN = ("config", "size", "precision")


def pairs(rows: Rows) -> dict[str, dict[str, Mapping[str, str]]]:
    """The rows of each backend, by the name of what was run with both."""
    runs: dict[str, dict[str, Mapping[str, str]]] = {}
    for row in rows:
        if row.get("losses"):
            runs.setdefault(", ".join(row[name] for name in RUN), {})[row["backend"]] = row
    return {name: both for name, both in runs.items() if both.keys() >= set(BACKENDS)}


def curve(row: Mapping[str, str]) -> list[float]:
    """The mean loss of each block of steps."""
    return [float(value) for value in row["losses"].split()]


def apart(both: Mapping[str, Mapping[str, str]], blocks: int | None = None) -> float:
    """The largest distance of the curves in the first blocks, or in all, in percent of torch's."""
    ours, theirs = (curve(both[name])[:blocks] for name in BACKENDS)
    return max(100 * abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def _faster(rows: Rows) -> Iterator[str]:
    for name, both in pairs(rows).items():
        ours, theirs = (both[backend] for backend in BACKENDS)
        rates = [float(row["tokens_per_second"]) for row in (ours, theirs)]
        losses = curve(theirs)
        yield (
            f"{name}: {rates[0]:.0f} tokens/s, {rates[0] / rates[1]:.2f} times torch's, with "
            f"{ours['peak_mib']} MiB (torch {theirs['peak_mib']}); losses ({losses[0]:.4g} to "
            f"{losses[-1]:.4g}) at most {apart(both, EARLY):.2g} % apart in the first "
            f"{EARLY * BLOCK} steps, {apart(both):.2g} % in {theirs['steps']}"
        )


@benchmark(_faster, gpu=True)
def gpu_models() -> Iterator[Case]:
    """Train each configuration with each backend."""
    _load(FILE)
    for size in SIZES:
        for precision in size.precisions:
            for backend in BACKENDS:
                names = (size.config, size.name, precision)
                key: Row = dict(zip((*RUN, "backend"), (*names, backend), strict=True))
                yield key, partial(_measure, size, precision, backend)


@cache
def _trained() -> dict[str, Tensor]:
    """The weights of `SEARCHED` after a short training."""
    return train(SEARCHED, SEARCHED.precisions[0], BACKENDS[0], FILE)[0].state_dict()


def _decode(beam: int) -> Iterator[Row]:
    from lightning_modules.search import SearchOptions
    from lightning_modules.seq2seq import LENGTH_PENALTY

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = stored(SEARCHED, FILE)
    model = build(SEARCHED, data.codec)
    model.load_state_dict(_trained())
    model.eval().to(device)
    _products("fp32")
    batches = [(b.source.to(device), b.source_lengths.to(device)) for b in data.val]
    options = SearchOptions(beam, length_penalty=LENGTH_PENALTY if beam > 1 else 0.0)
    found: dict[str, list[list[int]]] = {}

    def search(backend: str) -> None:
        use(model, backend)
        results = [model.decode(*batch, options) for batch in batches]
        end = model.codec.target.eos
        found[backend] = [row[0] for result in results for row in result.sequences(end)]

    sentences = sum(len(lengths) for _, lengths in batches)
    for row in interleave({name: partial(search, name) for name in BACKENDS[::-1]}, ROUNDS):
        name, theirs = str(row["name"]), found[BACKENDS[-1]]
        same = sum(a == b for a, b in zip(found[name], theirs, strict=True))
        yield row | {
            "sentences_per_second": round(1e3 * sentences / float(str(row["milliseconds"]))),
            "sentences": sentences,
            "symbols": round(statistics.fmean(map(len, found[name])), 2),
            "same_percent": round(100 * same / sentences, 2),
        }


def _searches(rows: Rows) -> Iterator[str]:
    for row in rows:
        yield (
            f"beam {row['beam']}, {row['name']}: {row['sentences_per_second']} sentences/s of "
            f"{row['symbols']} symbols, {row['ratio']} of torch's time, "
            f"{row['same_percent']} % the same"
        )


@benchmark(_searches, gpu=True)
def gpu_decoding() -> Iterator[Case]:
    """Decode the validation part of `SEARCHED` in float32, after a short training."""
    _load(FILE)
    for beam in BEAMS:
        yield {"config": SEARCHED.config, "beam": beam}, partial(_decode, beam)


def draw(path: Path) -> Path:
    """Draw the losses of a result file beside it, those of both backends over each other.

    Raises:
        ValueError: nothing was run with both.
    """
    from matplotlib.figure import Figure

    runs = pairs(read(path))
    if not runs:
        raise ValueError(f"{path}: expected rows of both backends, got none")
    columns = min(4, len(runs))
    lines = -(-len(runs) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (name, both) in zip(axes, runs.items(), strict=False):
        for backend, style in (("torch", {"linewidth": 5, "alpha": 0.35}), ("triton", {})):
            losses = curve(both[backend])
            steps = [BLOCK * (place + 0.5) for place in range(len(losses))]
            axis.plot(steps, losses, label=backend, **style)
        axis.set_title(f"{name}\nat most {apart(both):.2g} % apart", fontsize="small")
        axis.set(xlabel="training step", ylabel="loss")
    for axis in axes[len(runs) :]:
        axis.set_axis_off()
    axes[0].legend(fontsize="small")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    return picture


def main(arguments: list[str] | None = None) -> None:
    """Make the file, or the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_models")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, place, text in (
        ("prepare", FILE, "write codecs and batches"),
        ("draw", RESULTS / "gpu_models.csv", "draw the losses of a result file"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("file", nargs="?", type=Path, default=place)
    options = parser.parse_args(arguments)
    print(prepare(options.file) if options.command == "prepare" else draw(options.file))


if __name__ == "__main__":
    main()
