"""Tracking addresses of a wrong form end a command at once; a store that fails, or never answers, holds nothing up."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import TINY, tiny, write

from bootvit.__main__ import main
from bootvit.addresses import public_address
from bootvit.config import dump_config
from bootvit.load import make_config
from bootvit.tracking import Follower, MlflowRun, follow
from bootvit.tracking.store import connect, wrong_form


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write(tmp_path / "tiny.yaml", dump_config(make_config(TINY, "tiny")))
    return tmp_path


TRAIN = ["train", "tiny.yaml", "--local", "schedule.epochs=1"]

# ------------------------------------------------------------------------------------------- wrong forms

WRONG = {
    "ftp://x": "no tracking store is known as ftp:",
    "./mlruns": "a path is no tracking address",
    "/abs/path": "a path is no tracking address",
    "file:///tmp/mlruns": "no longer keeps runs in plain files",
    "sqlite:/x": "not a tracking address",
    "sqlite://x": "three slashes and a file",
    "sqlite:///": "three slashes and a file",
    "sqlite:///:memory:": "three slashes and a file",
    "http:/host": "not a tracking address",
    "http://": "not a host and a port",
    "http://host:port": "not a host and a port",
    "http://ho st": "not a host and a port",
    "http://me:1/secret@host": "write /, ? and # in a password as %2F",
    "http://me:1?secret@host": "no ? or #",
    "http://me:sec ret@host": "not a host and a port",
    "http://host?token=secret": "no ? or #",
    "sqlite:///x.db?y=z": "without a ?",
    "htp://host:5000": "no tracking store is known as htp:",
    "postgresql://": "no host",
    "mysql+nodriver://u:secret@host/db": "mysql.nodriver",
    "postgresql+pg8000://u:secret@host/db": "driver is not installed (pg8000)",
}


@pytest.mark.parametrize("variable", [False, True], ids=["key", "variable"])
@pytest.mark.parametrize("uri", WRONG)
def test_a_wrong_address_is_one_line_before_the_name_is_taken(
    uri: str, variable: bool, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = "MLFLOW_TRACKING_URI" if variable else "tracking.uri"
    arguments = ["tracking.enabled=true"]
    if variable:
        monkeypatch.setenv(where, uri)
    else:
        arguments.append(f"tracking.uri={uri}")
    assert main([*TRAIN, *arguments]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"bootvit: error: {where}={public_address(uri)!r}: ")
    assert "sqlite:///FILE, http://HOST:PORT" in line
    assert "secret" not in line
    assert WRONG[uri] in line
    assert (out, list(here.glob("runs/*"))) == ("", [])


def test_an_address_that_is_not_used_does_not_matter(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    assert main(TRAIN) == 0


@pytest.mark.parametrize(
    "uri",
    ["sqlite:///x.db", "sqlite:////a b/x.db", "http://h", "https://u:p@h:1/x", "http://[::1]:5000", "databricks://p"],
)
def test_right_addresses(uri: str) -> None:
    assert wrong_form(uri) is None


# ---------------------------------------------------------------------------- databases that cannot be opened


def folder_in_its_place(database: Path) -> None:
    database.mkdir()


def file_as_its_folder(database: Path) -> None:
    database.parent.rmdir()
    database.parent.write_text("")


def no_database(database: Path) -> None:
    database.write_text("This is a text of more than sixteen bytes, and no database.\n" * 100)


OPENED: list[sqlite3.Connection] = []


def locked(database: Path) -> None:
    OPENED.append(sqlite3.connect(database, isolation_level=None))
    OPENED[-1].execute("CREATE TABLE x (y)")
    OPENED[-1].execute("BEGIN EXCLUSIVE")


@pytest.fixture
def _unlocked() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


@pytest.mark.usefixtures("_unlocked")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (folder_in_its_place, "unable to open database file"),
        (file_as_its_folder, "File exists"),
        (no_database, "file is not a database"),
        (locked, "database is locked"),
    ],
    ids=["folder", "no folder", "no database", "locked"],
)
def test_training_goes_on_without_its_database(
    spoil: Callable[[Path], None],
    reason: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(uri: str) -> None:
        raise AssertionError("MLflow would try for 100 seconds")

    monkeypatch.setattr("bootvit.tracking.tracked.connect", never)
    monkeypatch.setattr("bootvit.tracking.store.LOCKED_S", 0.1)
    database = here / "db" / "mlflow.db"
    database.parent.mkdir()
    spoil(database)
    assert main([*TRAIN, "tracking.enabled=true", f"tracking.uri=sqlite:///{database}"]) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"bootvit: warning: MLflow at sqlite:///{database} failed: ")
    assert reason in warning
    assert "--resume" in warning
    result = json.loads((here / "runs" / "tiny" / "result.json").read_text())
    assert (result["status"], result["mlflow_run_id"]) == ("finished", None)
    link = json.loads((here / "runs" / "tiny" / "mlflow.json").read_text())
    assert (link["ended"], link["complete"]) == ("FINISHED", False)


def test_what_a_broken_database_missed_is_shipped_by_resume(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = here / "mlflow.db"
    database.mkdir()
    tracked = [*TRAIN, "tracking.enabled=true", f"tracking.uri=sqlite:///{database}"]
    assert main(tracked) == 0
    database.rmdir()
    for _ in range(2):
        assert main([*tracked, "--resume"]) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1
    client = connect(f"sqlite:///{database}")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"
    result = json.loads((here / "runs" / "tiny" / "result.json").read_text())
    assert run.data.metrics["final/vit/top1"] == result["final"]["vit"]["top1"]
    assert [path.name for path in here.glob(".mlflow*")] == []


def test_a_training_that_fails_says_why_and_shows_its_last_points_once(here: Path, empty_store: Path) -> None:
    """A rate of 1e30: the second step's loss is not finite, and there is no checkpoint; --resume fails again."""
    shutil.copy(empty_store, here / "mlflow.db")
    bad = [*TRAIN, "tracking.enabled=true", "tracking.log_every=1", "optim.lr=1e30"]
    client = connect(f"sqlite:///{here}/mlflow.db")
    for words in (bad, [*bad, "--resume"]):
        assert main(words) == 1
        (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
        result = json.loads((here / "runs" / "tiny" / "result.json").read_text())
        assert (run.info.status, run.data.tags["bootvit.reason"]) == ("FAILED", result["reason"])
        assert "not finite" in result["reason"]
        points = client.get_metric_history(run.info.run_id, "train/vit/ce")
        assert [point.step for point in points] == [1]
    link = json.loads((here / "runs" / "tiny" / "mlflow.json").read_text())
    assert run.info.start_time == int(link["started"] * 1000) < run.info.end_time == int(link["ended_at"] * 1000)


# ------------------------------------------------------------------------------- a server that never answers


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A port that takes connections and says nothing, such as that of a stopped process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_the_end_of_a_run_waits_for_a_silent_server_for_a_bounded_time(
    silent_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setattr(follow, "PATIENCE_S", 0.2)
    run = MlflowRun(tiny(tracking__uri=silent_server, tracking__model=False), tmp_path / "run", tags={})
    follower = Follower(run)
    assert follower.run_id() is None
    assert not follower.finish("FINISHED", {"status": "finished"})
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("bootvit: warning: MLflow has not taken everything within 0 s; nothing is lost: ")
    link = json.loads((tmp_path / "run" / "mlflow.json").read_text())
    assert (link["ended"], link["complete"]) == ("FINISHED", False)
