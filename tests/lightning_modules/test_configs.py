"""What all packaged configurations share; each runs in its task's own tests."""

import pytest
import yaml

from fusedrnn.train import CONFIGS, main, packaged_configs


@pytest.fixture(params=packaged_configs())
def config(request):
    return request.param


def names(entries):
    return [entry["class_path"].rpartition(".")[2] for entry in entries]


def test_config_is_complete(config):
    stored = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text(encoding="utf-8"))
    assert set(stored) == {"seed_everything", "trainer", "model", "data"}
    loggers, callbacks = stored["trainer"]["logger"], stored["trainer"]["callbacks"]
    assert names(loggers) == ["CSVLogger", "RunLogger"]
    assert loggers[0]["init_args"] == {"save_dir": "runs", "name": config}
    assert loggers[1]["init_args"]["name"] == config
    assert {
        "BestCheckpoint",
        "LastCheckpoint",
        "EarlyStopping",
        "LearningRateMonitor",
        "Throughput",
        "LatestRun",
    } <= set(names(callbacks))
    watched = [c["init_args"] for c in callbacks if "monitor" in c.get("init_args", {})]
    assert len({(w["monitor"], w["mode"]) for w in watched}) == 1
    assert "scheduler" in stored["model"]["init_args"]


def test_config_parses_whole(config, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", config, "--print_config"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["use_distributed_sampler"] is False
    assert printed["data"]["class_path"].startswith("lightning_modules.data.")
