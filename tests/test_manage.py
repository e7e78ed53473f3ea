"""Runs on disk: listed, shown, compared and removed, and a run that is being trained is left alone."""

import json
from pathlib import Path

import pytest
from helpers import TINY, write

import bootvit
from bootvit.__main__ import main
from bootvit.config import dump_config
from bootvit.heartbeat import Heartbeat
from bootvit.load import make_config


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs in ./runs: the second with less data, evaluated on held-out images too."""
    folder = tmp_path_factory.mktemp("manage")
    path = write(folder / "tiny.yaml", dump_config(make_config(TINY, "tiny")))
    place = {"ray.storage_path": folder / "runs", "schedule.epochs": 1}
    bootvit.train(path, place, local=True)
    bootvit.train(path, place | {"name": "other", "data.fraction": 0.05, "data.held_out": 0.2}, local=True)
    return folder


@pytest.fixture
def here(two: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(two)
    return two


def said(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(command) == 0
    return capsys.readouterr().out


def test_runs_are_listed_newest_last_with_test_and_held_out_apart(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(["list"], capsys).splitlines()
    assert [line.split()[0] for line in lines] == ["run", "tiny", "other"]
    found = json.loads(said(["list", "--json"], capsys))
    result = json.loads((here / "runs" / "tiny" / "result.json").read_text())
    assert found[0]["test"] == {net: own["top1"] for net, own in result["final"].items()}
    assert found[0]["held_out"] == {}
    assert set(found[1]["held_out"]) == {"vit", "agent"}
    assert (found[1]["data"], found[1]["fraction"], found[1]["status"]) == ("digits", 0.05, "finished")
    assert 0 <= found[1]["age"] <= found[0]["age"] < 3600


def test_a_sweep_is_one_line_and_its_trials_are_shown_on_request(
    tmp_path: Path, two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = tmp_path / "s" / "trials" / "0000-x"
    trial.parent.mkdir(parents=True)
    trial.symlink_to(two / "runs" / "tiny")
    write(tmp_path / "s" / "sweep.json", json.dumps({"status": "finished", "counts": {"finished": 1, "failed": 0}}))
    assert [one["name"] for one in json.loads(said(["list", str(tmp_path), "--json"], capsys))] == ["s"]
    assert "finished (1 finished)" in said(["list", str(tmp_path)], capsys)


def test_a_run_that_is_trained_now_is_listed_as_such_and_not_removed(
    tmp_path: Path, two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "live"
    write(folder / "config.yaml", (two / "runs" / "tiny" / "config.yaml").read_text())
    write(folder / "lease.json", "{}")
    assert "unfinished" in said(["list", str(tmp_path / "runs")], capsys)
    with Heartbeat(folder, every=0.1):
        assert " running " in said(["list", str(tmp_path / "runs")], capsys)
        assert main(["rm", str(folder), "--yes"]) == 2
        assert "is training this run" in capsys.readouterr().err
    assert folder.exists()
    said(["rm", str(folder), "--yes"], capsys)
    assert not folder.exists()


def test_rm_asks_and_leaves_trials_to_their_sweep(
    tmp_path: Path, two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "s" / "trials" / "0000-x"
    write(folder / "config.yaml", (two / "runs" / "tiny" / "config.yaml").read_text())
    monkeypatch.setattr("typer.confirm", lambda question: False)
    said(["rm", str(folder)], capsys)
    assert folder.exists()
    write(tmp_path / "s" / "sweep.json", "{}")
    assert main(["rm", str(folder), "--yes"]) == 2
    assert "a trial of the sweep" in capsys.readouterr().err
    assert folder.exists()


def test_show_says_what_a_run_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(said(["show", "other", "--json"], capsys))
    assert (facts["method"], facts["epochs"], facts["status"]) == ("joint", "1 of 1", "finished")
    assert facts["checkpoints"]
    text = said(["show", "other"], capsys)
    assert f"test top-1         vit {facts['test top-1']['vit']:.2f}  agent" in text


def test_compare_names_what_differs_and_nothing_else(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(["compare", "tiny", "other", "--json"], capsys))
    assert found["data.fraction"] == ["0.1", "0.05"]
    assert found["data.held_out"] == ["0.0", "0.2"]
    assert {"name", "ray.storage_path", "optim.lr", "fingerprint"}.isdisjoint(found)
    assert found["held-out top-1, vit"][0] is None
    assert found["test top-1, vit"][1] is not None


@pytest.mark.parametrize("command", [["list", "gone"], ["show", "gone"], ["compare", "gone", "gone"], ["rm", "gone"]])
def test_what_is_not_there_is_one_line(command: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
