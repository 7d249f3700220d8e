"""Series of numbers through the encoder-decoder: forecasts, and anomalies by reconstruction."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric
from torchmetrics.classification import BinaryAUROC

from lightning_modules.base import Task, evaluation
from lightning_modules.data.series import (
    SeriesBatch,
    SeriesCodec,
    calendar,
    parse_number,
    parse_time,
)
from lightning_modules.formats import BadLine
from lightning_modules.reporting import log_figure, spread
from lightning_modules.seq2seq_model import Seq2SeqModel

__all__ = ["AnomalyDetector", "Forecaster"]

PICTURES = 4
"""Windows drawn at each evaluation."""


class _SeriesTask(Task):
    """What forecasting and reconstruction share: the model, its loss, scores and pictures."""

    codec_class = SeriesCodec

    def __init__(
        self,
        codec: SeriesCodec,
        architecture: dict[str, Any],
        arguments: dict[str, Any],
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        **sizes: Any,
    ) -> None:
        super().__init__(codec, {**architecture, **arguments}, optimizer, scheduler)
        sizes = {**codec.sizes, **sizes}
        self.model = Seq2SeqModel(0, 0, **architecture, **self._model_options(), **sizes)
        self.scores = nn.ModuleDict({stage: self._new_scores() for stage in ("val", "test")})
        self._drawn: list[tuple[Tensor, ...]] = []

    def _model_options(self) -> dict[str, Any]:
        """What of the model a task does not leave open."""
        return {}

    def _new_scores(self) -> nn.ModuleDict:
        raise NotImplementedError

    def forward(self, batch: SeriesBatch) -> Tensor:
        """Predict the target of each window, float [B, T, targets], scaled."""
        raise NotImplementedError

    def _steps(self, calendar: Tensor) -> Tensor:
        """What the decoder is told of each step: its time, and how far it is, from 0 to 1."""
        place = torch.linspace(0, 1, calendar.shape[1], device=calendar.device)
        return torch.cat([calendar, place.expand(len(calendar), -1)[..., None]], -1)

    def training_step(self, batch: SeriesBatch, batch_idx: int) -> Tensor:
        """Mean squared error of the predictions."""
        loss = mse_loss(self(batch).float(), batch.target)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.target))
        return loss

    def _start(self, stage: str) -> None:
        super()._start(stage)
        self._drawn = []

    def _report(self, stage: str) -> None:
        for number, tensors in enumerate(spread(self._drawn, PICTURES)):
            log_figure(self, f"{stage}/window_{number}", self._figure(*tensors))

    def _figure(self, *tensors: Tensor) -> Figure:
        raise NotImplementedError

    def _windows(
        self, lines: Iterable[str], batch_size: int
    ) -> Iterator[tuple[int, Tensor, list[list[datetime]]]]:
        """Read rows of comma-separated values, some at a time, a header line allowed.

        Yields:
            How many of the rows end no window yet, the scaled windows [N, context, columns] of the
            others, and the times of their rows (empty lists where there are none).
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        waiting, number = iter(lines), 0
        rows: deque[Tensor] = deque(maxlen=self.codec.context)
        times: deque[datetime] = deque(maxlen=self.codec.context)
        while chunk := list(islice(waiting, batch_size)):
            early, windows, seen = 0, [], []
            for line in chunk:
                number += 1
                try:
                    (cells,) = csv.reader([line]) if line else ([],)
                    if number > 1 or cells[-len(self.codec.columns) :] != self.codec.columns:
                        self._read_row(cells, rows, times)
                except (ValueError, csv.Error) as error:
                    raise BadLine(number, str(error)) from error
                if len(rows) < self.codec.context:
                    early += 1
                else:
                    windows.append(torch.stack(tuple(rows)))
                    seen.append(list(times))
            width = (0, self.codec.context, len(self.codec.columns))
            stacked = torch.stack(windows) if windows else torch.empty(width)
            yield early, stacked.to(self.device), seen

    def _read_row(self, cells: list[str], rows: deque[Tensor], times: deque[datetime]) -> None:
        codec: SeriesCodec = self.codec
        names = [*([] if codec.date_column is None else [codec.date_column]), *codec.columns]
        if len(cells) != len(names):
            raise ValueError(f"expected {', '.join(names)}, got {len(cells)} cells")
        row = dict(zip(names, cells, strict=True))
        values = [parse_number(row[name], name) for name in codec.columns]
        rows.append(codec.scale(torch.tensor(values, dtype=torch.float64)).float())
        if codec.date_column is not None:
            times.append(parse_time(row[codec.date_column]))


class Forecaster(_SeriesTask):
    """Predicts the next rows of a table from the rows before them.

    The encoder reads the last rows; the decoder takes a step for each row to come, told its time of
    the day and week and how far ahead it is. What the network predicts is the difference to a naive
    forecast, so that it starts from that and need not know the level of the series.

    Evaluation reports mean squared and absolute error of the scaled numbers beside those of two
    naive forecasts: the last row again (`persistence`) and the row of one season ago (`seasonal`).

    Args:
        codec: of the data; see `SeriesCodec`.
        embedding_size: of the vectors that the recurrent layers read.
        encoder_sizes: hidden size of each encoder layer, per direction.
        decoder_sizes: hidden size of each decoder layer.
        cell: `lstm` or `gru`.
        bidirectional: whether the encoder reads in both directions.
        attention: `none`, `dot`, `general` or `additive`.
        input_feeding: whether the attention's result enters the decoder cell at the next step.
        dropout: probability, on embeddings, between layers and before the output.
        source_stride: rows that become one step of the encoder.
        start_from: the naive forecast that is corrected: the `mean` of the rows read, the `last`
            of them, the one of a `season` ago, or `zero`, the mean of the training part.
        center: whether the mean of the rows read is taken from them.
        independent: whether each target column is predicted from its own past alone, all of them by
            the same network, which so has more to learn from and less to get wrong.
        autoregressive: whether each prediction is fed to the next step, in training as in use.
        linear: whether a linear map of each target column's own past, the mean of the rows read
            taken away, is added and learnt with the network, which so has only the rest to learn
            (the autoregressive component of Lai et al., Modeling Long- and Short-Term Temporal
            Patterns with Deep Neural Networks, 2018).
        backend: of the recurrent layers.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate scheduler from the optimizer.

    Raises:
        ValueError: an argument is out of range, or two of them exclude each other.
    """

    monitor = "val/mse"

    def __init__(
        self,
        codec: SeriesCodec,
        embedding_size: int = 64,
        encoder_sizes: Sequence[int] = (64,),
        decoder_sizes: Sequence[int] = (128,),
        cell: Literal["lstm", "gru"] = "lstm",
        bidirectional: bool = True,
        attention: Literal["none", "dot", "general", "additive"] = "general",
        input_feeding: bool = False,
        dropout: float = 0.0,
        source_stride: int = 1,
        start_from: Literal["zero", "mean", "last", "season"] = "mean",
        center: bool = True,
        independent: bool = False,
        autoregressive: bool = False,
        linear: bool = False,
        backend: str = "auto",
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        architecture: dict[str, Any] = {
            "embedding_size": embedding_size,
            "encoder_sizes": encoder_sizes,
            "decoder_sizes": decoder_sizes,
            "cell": cell,
            "bidirectional": bidirectional,
            "attention": attention,
            "input_feeding": input_feeding,
            "dropout": dropout,
            "backend": backend,
            "source_stride": source_stride,
        }
        if start_from not in ("zero", "mean", "last", "season"):
            raise ValueError(f"start_from: expected zero, mean, last or season, got {start_from!r}")
        arguments = {
            "start_from": start_from,
            "center": center,
            "independent": independent,
            "autoregressive": autoregressive,
            "linear": linear,
        }
        sizes = codec.sizes
        if independent:
            sizes["source_features"] += 1 - len(codec.columns)
            sizes["target_features"] = 1
        if autoregressive:
            sizes["target_inputs"] += sizes["target_features"]
        super().__init__(codec, architecture, arguments, optimizer, scheduler, **sizes)
        self.start_from, self.center = start_from, center
        self.independent, self.autoregressive = independent, autoregressive
        shape = len(codec.targets), codec.horizon, codec.context
        self.linear = nn.Parameter(torch.zeros(shape)) if linear else None

    def _new_scores(self) -> nn.ModuleDict:
        scores: dict[str, Metric] = {}
        for suffix in ("", "_persistence", "_seasonal"):
            scores[f"mse{suffix}"] = MeanSquaredError()
            scores[f"mae{suffix}"] = MeanAbsoluteError()
        return nn.ModuleDict(scores)

    def _naive(self, source: Tensor, kind: str) -> Tensor:
        """A naive forecast [B, horizon, targets]; see `start_from`."""
        source = source[..., self.codec.places]
        if kind in ("zero", "mean"):
            level = source.mean(1, keepdim=True) * (kind == "mean")
            return level.expand(-1, self.codec.horizon, -1)
        season = 1 if kind == "last" else self.codec.season
        ahead = torch.arange(self.codec.horizon, device=source.device)
        return source[:, source.shape[1] - season + ahead % season]

    def forward(self, batch: SeriesBatch) -> Tensor:
        """Predict the rows that follow each window, float [B, horizon, targets], scaled."""
        read, steps = batch.source, self._steps(batch.target_calendar)
        times, targets = batch.source_calendar, len(self.codec.targets)
        if self.center:
            read = read - read.mean(1, keepdim=True)
        if self.independent:  # every target of a window becomes a row of its own
            read = read[..., self.codec.places].mT.flatten(0, 1)[..., None]
            times, steps = (x.repeat_interleave(targets, 0) for x in (times, steps))
        source = torch.cat([read, times], -1)
        lengths = torch.full((len(source),), source.shape[1], device=source.device)
        if self.autoregressive:
            first = source.new_zeros(len(source), 1 if self.independent else targets)
            difference, _ = self.model.regress(source, lengths, steps, first)
        else:
            difference, _ = self.model(source, lengths, steps)
        if self.independent:
            difference = difference[..., 0].unflatten(0, (-1, targets)).mT
        if self.linear is not None:
            own = batch.source[..., self.codec.places]
            own = own - own.mean(1, keepdim=True)
            difference = difference + torch.einsum("bsk,khs->bhk", own, self.linear)
        return self._naive(batch.source, self.start_from) + difference

    def _evaluate(self, batch: SeriesBatch, stage: str) -> None:
        forecasts = {
            "": self(batch).float(),
            "_persistence": self._naive(batch.source, "last"),
            "_seasonal": self._naive(batch.source, "season"),
        }
        for suffix, forecast in forecasts.items():
            for name in ("mse", "mae"):
                self._scores(stage)[name + suffix].update(
                    forecast.flatten(), batch.target.flatten()
                )
        self._log_scores(stage, len(batch.target))
        rows = (batch.source[0, :, self.codec.places], batch.target[0], forecasts[""][0])
        self._drawn.append(tuple(row.cpu() for row in rows))

    def _figure(self, *tensors: Tensor) -> Figure:
        read, target, forecast = (self.codec.restore(rows) for rows in tensors)
        figure, axes = _panels(self.codec.targets)
        before, ahead = range(1 - len(read), 1), range(1, len(target) + 1)
        for place, axis in enumerate(axes):
            lines = [
                *axis.plot(before, read[:, place], color="grey", label="read"),
                *axis.plot(ahead, target[:, place], color="black", label="observed"),
                *axis.plot(ahead, forecast[:, place], color="C0", label="forecast"),
            ]
        axes[-1].set_xlabel("rows after the last one read")
        figure.legend(handles=lines, loc="outside upper center", ncols=3)
        return figure

    def predict_lines(  # type: ignore[override]
        self, lines: Iterable[str], batch_size: int = 64
    ) -> Iterator[str]:
        """Yield, for each row of a table, the forecast of the rows after it.

        Args:
            lines: rows of comma-separated values, the time first where the training table had one.
                A header line may come first, and yields an empty line, as does every row before the
                model has read as many as it needs.
            batch_size: rows predicted together; it changes the speed only.

        Yields:
            A JSON object with the numbers of each target column, in the units of the table.

        Raises:
            ValueError: a line has other cells than the training table.
        """
        horizon = self.codec.horizon
        for early, source, times in self._windows(lines, batch_size):
            yield from [""] * early
            if len(source) == 0:
                continue
            read, coming = torch.zeros(len(source), source.shape[1], 0), torch.zeros(1, horizon, 0)
            coming = coming.expand(len(source), -1, -1)
            if self.codec.date_column is not None:
                read = torch.stack([calendar(row) for row in times])
                coming = torch.stack([calendar(_continued(row, horizon)) for row in times])
            target = source.new_zeros(len(source), horizon, len(self.codec.targets))
            read, coming = read.to(self.device), coming.to(self.device)
            with evaluation(self):
                scaled = self(SeriesBatch(source, read, target, coming))
            forecast = self.codec.restore(scaled).cpu()
            for rows in forecast.mT.tolist():
                named = zip(self.codec.targets, rows, strict=True)
                yield json.dumps({name: [round(x, 6) for x in row] for name, row in named})


def _continued(times: Sequence[datetime], count: int) -> list[datetime]:
    """Return the times that follow, as far apart as the last two."""
    step = times[-1] - times[-2] if len(times) > 1 else timedelta(hours=1)
    return [times[-1] + step * ahead for ahead in range(1, count + 1)]


class AnomalyDetector(_SeriesTask):
    """Finds the rows of a series that a model of its usual course cannot reconstruct.

    The encoder reads a window into its final state, and the decoder writes the window from that
    state alone, the last row first (Malhotra et al., LSTM-based Encoder-Decoder for Multi-sensor
    Anomaly Detection, 2016), without being fed any row. Trained on the usual course, it fails on
    what is unusual: the score of a row is its squared error, summed over the columns.

    Evaluation reports the area under the ROC curve of that score (`auroc`) beside those of two
    simple ones: how far a row is from the training part's mean (`auroc_value`) and from the row
    before it (`auroc_change`).

    Args:
        codec: of the data; see `SeriesCodec`.
        embedding_size: of the vectors that the recurrent layers read.
        encoder_sizes: hidden size of each encoder layer, per direction.
        decoder_sizes: hidden size of each decoder layer.
        cell: `lstm` or `gru`.
        bidirectional: whether the encoder reads in both directions.
        dropout: probability, on embeddings, between layers and before the output.
        backend: of the recurrent layers.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate scheduler from the optimizer.

    Raises:
        ValueError: an argument is out of range.
    """

    monitor = "val/auroc"

    def __init__(
        self,
        codec: SeriesCodec,
        embedding_size: int = 32,
        encoder_sizes: Sequence[int] = (64,),
        decoder_sizes: Sequence[int] = (64,),
        cell: Literal["lstm", "gru"] = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        architecture: dict[str, Any] = {
            "embedding_size": embedding_size,
            "encoder_sizes": encoder_sizes,
            "decoder_sizes": decoder_sizes,
            "cell": cell,
            "bidirectional": bidirectional,
            "dropout": dropout,
            "backend": backend,
        }
        super().__init__(codec, architecture, {}, optimizer, scheduler)

    def _model_options(self) -> dict[str, Any]:
        return {"attention": "none"}  # which would copy the window past the bottleneck

    def _new_scores(self) -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "loss": MeanSquaredError(),
                "auroc": BinaryAUROC(),
                "auroc_value": BinaryAUROC(),
                "auroc_change": BinaryAUROC(),
            }
        )

    def forward(self, batch: SeriesBatch) -> Tensor:
        """Reconstruct each window, float [B, T, columns], scaled."""
        source = torch.cat([batch.source, batch.source_calendar], -1)
        lengths = torch.full((len(source),), source.shape[1], device=source.device)
        backwards, _ = self.model(source, lengths, self._steps(batch.target_calendar.flip(1)))
        return backwards.flip(1)

    def _evaluate(self, batch: SeriesBatch, stage: str) -> None:
        assert batch.labels is not None
        reconstruction = self(batch).float()
        unusual = _unusual(reconstruction, batch.target)
        scores = self._scores(stage)
        scores["loss"].update(reconstruction.flatten(), batch.target.flatten())
        before = torch.cat([batch.target[:, :1], batch.target[:, :-1]], 1)
        # BinaryAUROC takes what lies outside [0, 1] for logits, and a sigmoid would round them
        for name, values in (
            ("auroc", unusual),
            ("auroc_value", _unusual(torch.zeros_like(batch.target), batch.target)),
            ("auroc_change", _unusual(before, batch.target)),
        ):
            scores[name].update((values / (1 + values)).flatten(), batch.labels.flatten())
        self._log_scores(stage, len(batch.target))
        for row in batch.labels.any(1).nonzero()[:1, 0].tolist():
            tensors = (batch.target[row], reconstruction[row], unusual[row], batch.labels[row])
            self._drawn.append(tuple(tensor.cpu() for tensor in tensors))

    def _figure(self, *tensors: Tensor) -> Figure:
        window, reconstruction, unusual, labels = tensors
        window, reconstruction = self.codec.restore(window), self.codec.restore(reconstruction)
        figure, axes = _panels([*self.codec.columns, "squared error"])
        for place, axis in enumerate(axes[:-1]):
            lines = [
                *axis.plot(window[:, place], color="black", label="observed"),
                *axis.plot(reconstruction[:, place], color="C0", label="reconstructed"),
            ]
        axes[-1].plot(unusual, color="C3")
        axes[-1].set_xlabel("row of the window")
        shade = axes[-1].fill_between(
            range(len(labels)),
            labels.float(),
            step="mid",
            transform=axes[-1].get_xaxis_transform(),
            color="grey",
            alpha=0.3,
            label="labelled as an anomaly",
        )
        figure.legend(handles=[*lines, shade], loc="outside upper center", ncols=3)
        return figure

    def predict_lines(  # type: ignore[override]
        self, lines: Iterable[str], batch_size: int = 64
    ) -> Iterator[str]:
        """Yield, for each row of a table, how unusual it is given the rows before it.

        Args:
            lines: rows of comma-separated values, the columns of the training table without the
                label. A header line may come first, and yields an empty line, as does every row
                before a whole window has been read.
            batch_size: rows judged together; it changes the speed only.

        Yields:
            The squared error of the reconstruction of the row, the last one of its window.

        Raises:
            ValueError: a line has other cells than the training table.
        """
        for early, source, _ in self._windows(lines, batch_size):
            yield from [""] * early
            if len(source) > 0:
                times = source.new_zeros(*source.shape[:2], 0)
                with evaluation(self):
                    scores = _unusual(self(SeriesBatch(source, times, source, times)), source)
                yield from (f"{score:.6f}" for score in scores[:, -1].tolist())


def _panels(names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Make a figure with a panel for each name, one below another, with one horizontal axis."""
    figure = Figure(figsize=(7, 1 + 1.4 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0].tolist()
    for name, axis in zip(names, axes, strict=True):
        axis.set_ylabel(name)
    return figure, axes


def _unusual(reconstruction: Tensor, window: Tensor) -> Tensor:
    """How unusual each row of each window is: [B, T, columns] -> [B, T]."""
    return (reconstruction.float() - window).square().sum(-1)
