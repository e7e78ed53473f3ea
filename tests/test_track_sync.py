"""`bootvit track sync`: a run whose server was down is sent from its folder, once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import TINY, write

from bootvit.__main__ import main
from bootvit.config import merge
from bootvit.heartbeat import Heartbeat
from bootvit.tracking.store import connect


@pytest.fixture
def here(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished run that MLflow has never heard of: its server was down."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "other.db")
    down = merge(TINY, {"tracking": {"enabled": True, "uri": "http://127.0.0.1:9"}, "schedule": {"epochs": 2}})
    write(tmp_path / "tiny.yaml", yaml.safe_dump(down))
    assert main(["train", "tiny.yaml", "--local"]) == 0
    assert json.loads((tmp_path / "runs" / "tiny" / "mlflow.json").read_text())["run_id"] is None
    return tmp_path


def test_what_is_missing_is_sent_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = f"sqlite:///{here}/other.db"
    for _ in range(2):
        assert main(["track", "sync", "tiny", f"tracking.uri={store}"]) == 0
        assert f"at {store} has all of {here}/runs/tiny" in capsys.readouterr().out
    client = connect(store)
    (experiment,) = [one for one in client.search_experiments() if one.name == "bootvit"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
    journal = [json.loads(line) for line in (here / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    for name in ("test/vit/top1", "train/vit/loss", "epoch"):
        points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        assert points == [(row["step"], row["value"]) for row in journal if row["name"] == name]
    assert run.data.tags["bootvit.data_fingerprint"]
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "result.json"}


def test_a_server_that_is_still_down_is_one_line_and_status_1(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["track", "sync", "tiny"]) == 1
    assert "MLflow at http://127.0.0.1:9 has not taken all of it" in capsys.readouterr().err


def test_other_keys_and_a_run_that_is_trained_now_are_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["track", "sync", "tiny", "optim.lr=1"]) == 2
    assert "only tracking. may differ" in capsys.readouterr().err
    with Heartbeat(here / "runs" / "tiny", every=0.1):
        assert main(["track", "sync", "tiny"]) == 2
    assert f"process {os.getpid()} on" in capsys.readouterr().err
