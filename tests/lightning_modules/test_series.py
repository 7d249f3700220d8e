"""Forecasts and anomalies as a whole: they learn, score, are stored, and read raw rows."""

import csv
import json
import math
from datetime import datetime, timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger
from sklearn.metrics import roc_auc_score

from fusedrnn.train import main
from lightning_modules import AnomalyDetector, Forecaster, Task
from lightning_modules.data.series import AnomalyData, SeriesBatch, SeriesCodec, SeriesData

SMALL = {"embedding_size": 8, "encoder_sizes": [8], "decoder_sizes": [16]}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A wave of the day that grows over the days, and its opposite with noise."""
    path = tmp_path_factory.mktemp("series") / "t.csv"
    draw = torch.Generator().manual_seed(0)
    start = datetime(2016, 7, 1)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", "a", "b"])
        for n in range(600):
            noise = 0.1 * float(torch.randn((), generator=draw))
            wave = (1 + n / 300) * math.sin(2 * math.pi * n / 24)
            writer.writerow([start + timedelta(hours=n), round(wave, 4), round(noise - wave, 4)])
    return path


def make_data(path, **arguments):
    options = {
        "context": 24,
        "horizon": 6,
        "season": 24,
        "rows": (400, 100, 100),
        "batch_size": 32,
        **arguments,
    }
    return SeriesData(str(path), **options)


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
def fitted(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = make_data(table)
    torch.manual_seed(0)
    model = Forecaster(data.codec, **SMALL, optimizer=lambda p: torch.optim.Adam(p, 0.01))
    trainer = make_trainer(folder, max_epochs=6, check_val_every_n_epoch=6)
    trainer.fit(model, data)
    trainer.save_checkpoint(folder / "model.ckpt")
    return model.eval(), data, trainer, folder


def test_it_learns_and_draws(fitted):
    _, _, trainer, folder = fitted
    scores = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert scores["val/mse"] < 0.5 * scores["val/mse_persistence"]
    assert (folder / "media/val").is_dir()
    assert len(list((folder / "media/val").glob("window_0_*.png"))) > 0


def test_scores_are_those_of_all_windows(fitted):
    model, data, _, folder = fitted
    (scores,) = make_trainer(folder / "test").test(model, data, verbose=False)
    batches = list(data.test_dataloader())
    source, target = (torch.cat([getattr(b, n) for b in batches]) for n in ("source", "target"))
    assert len(target) == 95
    with torch.no_grad():
        error = torch.cat([model(b) for b in batches]) - target
    assert scores["test/mse"] == pytest.approx(float(error.square().mean()), rel=1e-4)
    assert scores["test/mae"] == pytest.approx(float(error.abs().mean()), rel=1e-4)
    last, season = target - source[:, -1:], target - source[:, :6]
    assert scores["test/mse_persistence"] == pytest.approx(float(last.square().mean()), rel=1e-4)
    assert scores["test/mae_seasonal"] == pytest.approx(float(season.abs().mean()), rel=1e-4)


@pytest.mark.parametrize("start_from", ["zero", "mean", "last", "season"])
def test_the_network_predicts_a_difference(table, start_from):
    """With an output layer of zeros the forecast is the naive one."""
    codec = SeriesCodec(["a", "b"], [0, 0], [1, 1], ["b"], context=5, horizon=7, season=3)
    model = Forecaster(codec, **SMALL, start_from=start_from)
    torch.nn.init.zeros_(model.model.output.weight)
    torch.nn.init.zeros_(model.model.output.bias)
    source, none = torch.randn(2, 5, 2), torch.zeros(2, 7, 0)
    forecast = model(SeriesBatch(source, torch.zeros(2, 5, 0), torch.zeros(2, 7, 1), none))
    b = source[:, :, 1]
    expected = {
        "zero": torch.zeros(2, 7),
        "mean": b.mean(1, keepdim=True).expand(2, 7),
        "last": b[:, -1:].expand(2, 7),
        "season": b[:, [2, 3, 4, 2, 3, 4, 2]],
    }[start_from]
    torch.testing.assert_close(forecast[..., 0], expected)


def test_a_linear_map_of_each_column_is_added():
    """After an output layer of zeros the difference to the naive forecast is linear."""
    sizes = {"context": 5, "horizon": 4, "season": 3}
    codec = SeriesCodec(["a", "b", "c"], [0] * 3, [1] * 3, ["c", "a"], **sizes)
    model = Forecaster(codec, **SMALL, linear=True, start_from="last", independent=True)
    torch.nn.init.zeros_(model.model.output.weight)
    torch.nn.init.zeros_(model.model.output.bias)
    torch.nn.init.normal_(model.linear)
    source = torch.randn(2, 5, 3)
    batch = SeriesBatch(source, torch.zeros(2, 5, 0), torch.zeros(2, 4, 2), torch.zeros(2, 4, 0))
    with torch.no_grad():
        forecast = model(batch)
    for place, column in enumerate((2, 0)):
        for row in range(2):
            past = source[row, :, column]
            expected = past[-1] + model.linear[place] @ (past - past.mean())
            torch.testing.assert_close(forecast[row, :, place], expected)


def test_a_level_that_is_taken_away_changes_nothing():
    codec = SeriesCodec(["a"], [0], [1], ["a"], context=5, horizon=3, season=3)
    model = Forecaster(codec, **SMALL).eval()
    source, times = torch.randn(2, 5, 1), torch.zeros(2, 5, 0)
    ahead = torch.zeros(2, 3, 0)
    low = model(SeriesBatch(source, times, torch.zeros(2, 3, 1), ahead))
    high = model(SeriesBatch(source + 100, times, torch.zeros(2, 3, 1), ahead))
    torch.testing.assert_close(high, low + 100, atol=1e-4, rtol=0)


def test_independent_columns_know_nothing_of_each_other():
    codec = SeriesCodec(["a", "b", "c"], [0] * 3, [1] * 3, ["c", "a"], 5, 3, 3)
    model = Forecaster(codec, **SMALL, independent=True).eval()
    source, times, ahead = torch.randn(2, 5, 3), torch.zeros(2, 5, 0), torch.zeros(2, 3, 0)
    forecast = model(SeriesBatch(source, times, torch.zeros(2, 3, 2), ahead))
    others = source + torch.tensor([1.0, 5.0, 0.0])
    others[:, :, 0] *= 3
    changed = model(SeriesBatch(others, times, torch.zeros(2, 3, 2), ahead))
    torch.testing.assert_close(changed[..., 0], forecast[..., 0])
    assert not torch.allclose(changed[..., 1], forecast[..., 1])
    swapped = model(SeriesBatch(source[..., [2, 1, 0]], times, torch.zeros(2, 3, 2), ahead))
    torch.testing.assert_close(swapped, forecast.flip(-1))


@pytest.mark.parametrize(
    "arguments",
    [
        {"autoregressive": True},
        {"autoregressive": True, "independent": True},
        {"attention": "none", "cell": "gru", "encoder_sizes": [16], "bidirectional": False},
        {"attention": "additive", "input_feeding": True, "source_stride": 2, "dropout": 0.1},
        {"start_from": "zero", "center": False, "linear": True},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_every_variant_trains_and_is_stored(table, tmp_path, arguments):
    data = make_data(table, targets=["b"])
    model = Forecaster(data.codec, **{**SMALL, **arguments})
    trainer = make_trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=1)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    again = Task.load_from_checkpoint(tmp_path / "m.ckpt")
    (batch, *_) = data.val_dataloader()
    with torch.no_grad():
        assert torch.equal(again(batch), model.eval()(batch))


def test_forecasts_of_raw_rows(fitted, table):
    """The line after the n-th row is the forecast of a window that ends there, in its units."""
    _, data, _, folder = fitted
    model = Task.load_from_checkpoint(folder / "model.ckpt")
    lines = table.read_text().split("\n")
    first = 1 + 500 - 24  # the first window of the test part
    given = [lines[0], *lines[first : first + 26]]
    results = list(model.predict_lines(given, batch_size=4))
    assert results[:24] == [""] * 24 and len(results) == 27
    (batch, *_) = data.test_dataloader()
    with torch.no_grad():
        expected = data.codec.restore(model(batch))[:3]
    for result, rows in zip(results[24:], expected, strict=True):
        assert list(json.loads(result)) == ["a", "b"]
        torch.testing.assert_close(
            torch.tensor(list(json.loads(result).values())), rows.T, atol=1e-4, rtol=1e-4
        )
    assert results == list(model.predict_lines(given, batch_size=100))


ALIKE = [
    pytest.param(Forecaster, {"cell": "gru", "source_stride": 3}, id="forecaster-stride"),
    pytest.param(Forecaster, {"independent": True, "attention": "dot"}, id="forecaster-columns"),
    pytest.param(Forecaster, {"autoregressive": True, "input_feeding": True}, id="forecaster-fed"),
    pytest.param(AnomalyDetector, {"cell": "gru"}, id="detector-gru"),
    pytest.param(AnomalyDetector, {"bidirectional": True}, id="detector-bidirectional"),
]


@pytest.mark.parametrize(("task", "arguments"), ALIKE)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_order_and_batch_size_change_no_output(task, arguments, data):
    codec = SeriesCodec(["a", "b"], [0.5, 0], [2, 1], ["a", "b"], context=7, horizon=7, season=3)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model = task(codec, **{**SMALL, **arguments}).eval()
    count = data.draw(st.integers(2, 6))
    source, none = torch.randn(count, 7, 2), torch.zeros(count, 7, 0)
    order = torch.tensor(data.draw(st.permutations(range(count))))
    together = model(SeriesBatch(source, none, source, none))
    moved = model(SeriesBatch(source[order], none, source[order], none))
    torch.testing.assert_close(moved, together[order])
    alone = [
        model(SeriesBatch(*(x[n : n + 1] for x in (source, none, source, none))))
        for n in range(count)
    ]
    torch.testing.assert_close(torch.cat(alone), together)
    lines = [",".join(f"{x:.4f}" for x in row) for row in source.flatten(0, 1).tolist()]
    read = []
    for size in (1, 3, 100):
        written = [json.loads(line or "null") for line in model.predict_lines(lines, size)]
        assert written[: codec.context - 1] == [None] * (codec.context - 1)
        late = written[codec.context - 1 :]
        read.append(torch.tensor([[*w.values()] if task is Forecaster else [w] for w in late]))
        torch.testing.assert_close(read[-1], read[0], atol=2e-5, rtol=1e-4)


def test_prediction_is_evaluation_even_in_the_middle_of_training(fitted, table):
    model = Forecaster(fitted[1].codec, **SMALL, dropout=0.5).train()
    lines = table.read_text().split("\n")[1:26]
    assert list(model.predict_lines(lines)) == list(model.predict_lines(lines))
    assert model.training


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2016-07-01,1", "line 2: expected date, a, b, got 2 cells"),
        ("", "line 2: expected date, a, b, got 0 cells"),
        ("2016-07-01,1,x", "line 2: expected a finite number in column 'b', got 'x'"),
        ("noon,1,2", "line 2: expected a time"),
    ],
    ids=["few", "blank", "text", "time"],
)
def test_wrong_rows_are_named(fitted, line, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        list(fitted[0].predict_lines(["2016-07-01,1,2", line]))
    (tmp_path / "t.csv").write_text(f"2016-07-01,1,2\n{line}\n")
    command = ["predict", "--ckpt_path", str(fitted[3] / "model.ckpt")]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--input", str(tmp_path / "t.csv")])
    named = message.replace("line 2", "t.csv:2")
    assert f"/{named}" in capsys.readouterr().err.splitlines()[-1]


def test_wrong_arguments_are_named(fitted):
    with pytest.raises(ValueError, match="start_from: expected zero, mean, last or season"):
        Forecaster(fitted[1].codec, **SMALL, start_from="first")
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        list(fitted[0].predict_lines([], batch_size=0))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anomaly")
    data = AnomalyData(window=25, stride=5, rows=(2000, 1000, 1000), batch_size=16)
    torch.manual_seed(0)
    model = AnomalyDetector(
        data.codec,
        embedding_size=8,
        encoder_sizes=[24],
        decoder_sizes=[24],
        optimizer=lambda p: torch.optim.Adam(p, 0.01),
    )
    trainer = make_trainer(folder, max_epochs=8, check_val_every_n_epoch=8)
    trainer.fit(model, data)
    trainer.save_checkpoint(folder / "model.ckpt")
    return model.eval(), data, folder


def test_anomalies_are_found(detector):
    model, data, folder = detector
    (scores,) = make_trainer(folder / "test").test(model, data, verbose=False)
    assert scores["test/auroc"] > 0.8
    assert scores["test/auroc"] > scores["test/auroc_change"] > 0.5
    batches = list(data.test_dataloader())
    with torch.no_grad():
        error = torch.cat([(model(b) - b.target).square().sum(-1) for b in batches])
    labels = torch.cat([b.labels for b in batches])
    expected = roc_auc_score(labels.flatten(), error.flatten())
    assert scores["test/auroc"] == pytest.approx(expected, abs=1e-6)
    assert list((folder / "test/media/test").glob("window_*.png"))


def test_reconstruction_goes_through_the_state_alone(detector):
    assert detector[0].model.attention is None


def test_raw_rows_are_judged(detector):
    _, data, folder = detector
    model = Task.load_from_checkpoint(folder / "model.ckpt")
    rows = data.table.values[3000:3040]
    lines = ["x0,x1", *(f"{a},{b}" for a, b in rows.tolist())]
    results = list(model.predict_lines(lines, batch_size=7))
    assert results[:25] == [""] * 25 and len(results) == 41
    window = model.codec.scale(rows[-25:]).float()[None]
    none = torch.zeros(1, 25, 0)
    with torch.no_grad():
        error = (model(SeriesBatch(window, none, window, none)) - window).square().sum(-1)
    assert float(results[-1]) == pytest.approx(float(error[0, -1]), abs=1e-4)


@pytest.mark.parametrize("name", ["forecast", "anomaly"])
def test_packaged_configs_run(table, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data = []
    if name == "forecast":
        data = [f"--data.path={table}", "--data.rows=[300,150,150]"]
    cli = main(["fit", "--config", name, *data, "--trainer.fast_dev_run=1"])
    assert torch.isfinite(cli.trainer.callback_metrics[cli.model.monitor])
