"""The journal, and MLflow behind it: every point once, whatever is cut, killed or down in between."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from bootvit import checkpoint
from bootvit.config import Config
from bootvit.errors import UserError
from bootvit.tracking import (
    Follower,
    Journal,
    MlflowRun,
    Record,
    SweepRun,
    read_journal,
    run_tags,
    tracking_uri,
)
from bootvit.tracking.link import charts
from bootvit.tracking.store import connect, time_to_upload
from bootvit.tracking.sweep import state_points
from bootvit.tracking.tags import param_text, ray_job_id


def rec(step: int, name: str = "train/vit/loss", value: float | None = None, epoch: int = 0) -> Record:
    return Record(step, epoch, name, float(step) if value is None else value, 1_700_000_000.0 + step)


# ------------------------------------------------------------------------------------------------ journal


def test_journal_returns_what_was_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run" / "metrics.jsonl")
    written = [
        rec(1),
        rec(2, "test/vit/top1", 12.5, epoch=3),
        rec(3, value=math.inf),
        rec(4, value=-math.inf),
    ]
    journal.write(written[:2])
    journal.write(written[2:])
    records, end = read_journal(journal.path)
    assert records == written
    assert end == journal.path.stat().st_size


def test_journal_is_strict_json_with_nan_as_text(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.write([rec(1, value=math.nan)])
    line = json.loads(journal.path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert line == {"step": 1, "epoch": 0, "name": "train/vit/loss", "value": "nan", "time": 1_700_000_001.0}
    assert math.isnan(read_journal(journal.path)[0][0].value)


def test_reading_goes_on_from_an_offset_and_leaves_a_line_in_progress(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.write([rec(1)])
    with journal.path.open("a") as file:
        file.write('{"step": 2, "epo')
    first, offset = read_journal(journal.path)
    with journal.path.open("a") as file:
        file.write('ch": 0, "name": "a", "value": 1, "time": 2}\n')
    second, _ = read_journal(journal.path, offset)
    assert [r.step for r in first + second] == [1, 2]
    assert read_journal(tmp_path / "absent.jsonl", 7) == ([], 7)


def test_cut_drops_later_steps_and_a_torn_line_and_leaves_the_rest_as_it_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.write([rec(1), rec(2)])
    before = journal.path.read_bytes()
    journal.write([rec(3)])
    with journal.path.open("a") as file:
        file.write('{"step": 1, "epoch": 0, "na')
    journal.cut(2)
    assert journal.path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_journal_opened_after_a_crash_does_not_glue_lines_together(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Journal(path).write([rec(1)])
    with path.open("a") as file:
        file.write('{"step": 2')
    Journal(path).write([rec(3)])
    assert [r.step for r in read_journal(path)[0]] == [1, 3]


def test_a_broken_line_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": "x"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: no journal record"):
        read_journal(path)


# ------------------------------------------------------------------------------------------------- places


def test_uri_from_config_then_environment_then_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(None) == "http://host:5000"
    assert tracking_uri("sqlite:///sub/other.db") == f"sqlite:///{tmp_path}/sub/other.db"
    with pytest.raises(UserError, match=r"tracking\.uri='mlflow\.db': a path is no tracking address; give sqlite:///"):
        tracking_uri("mlflow.db")


def test_tags_name_the_run_its_data_and_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_7"}}')
    config = Config.model_validate({"name": "a", "seed": 3, "method": "shared", "data": {"fraction": 0.1}})
    tags = run_tags(config, data_fingerprint="f00", subset_digest="d1")
    expected = {
        "mlflow.runName": "a",
        "mlflow.source.type": "JOB",
        "bootvit.method": "shared",
        "bootvit.fraction": "0.1",
        "bootvit.seed": "3",
        "bootvit.data": "digits",
        "bootvit.data_fingerprint": "f00",
        "bootvit.subset_digest": "d1",
        "bootvit.host": socket.gethostname(),
        "bootvit.ray_job_id": "raysubmit_7",
    }
    assert tags.items() >= expected.items()
    assert tags["bootvit.git"]
    assert "bootvit.data_fingerprint" not in run_tags(config)
    assert ray_job_id({}) is None


def test_a_long_parameter_is_cut_to_the_limit() -> None:
    assert len(param_text("x" * 7000)) == 6000
    assert param_text(0.1) == "0.1"
    assert param_text(None) == "null"


# ------------------------------------------------------------------------------------------------- MLflow


class Store:
    """A real SQLite store, and a run directory as the loop writes it."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.run_dir = folder / "runs" / "a"
        self.journal = Journal(self.run_dir / "metrics.jsonl")

    def config(self, **changes: Any) -> Config:
        return Config.model_validate({"name": "a", "tracking": {"uri": self.uri}} | changes)

    def open(self, **changes: Any) -> MlflowRun:
        config = self.config(**changes)
        run = MlflowRun(config, self.run_dir, tags=run_tags(config))
        run.connect()
        return run

    def checkpoint(self, epoch: int, step: int, *, final: bool = False) -> None:
        folder = self.run_dir / "checkpoints"
        folder.mkdir(exist_ok=True)
        state = {"learner": {"networks": {"vit.w": torch.ones(2)}, "optimizers": []}, "data": {"classes": ["a", "b"]}}
        checkpoint.write(folder, checkpoint.pack(state), epoch=epoch, step=step, final=final)

    def result(self, **changes: Any) -> dict[str, Any]:
        result = {
            "status": "finished",
            "method": "joint",
            "fraction": 1.0,
            "epochs": 2,
            "final": {"vit": {"top1": 51.5, "top5": 90.0}},
            "held_out": None,
            "seconds": 3.0,
            "gpu_seconds": 0.0,
            "images_per_second": None,
            "data_fingerprint": "f00d",
        } | changes
        (self.run_dir / "result.json").write_text(json.dumps(result))
        return result

    def runs(self) -> list[Any]:
        client = connect(self.uri)
        return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))

    def points(self, key: str = "train/vit/loss") -> list[tuple[int, float]]:
        """(step, value) of the only run, duplicates included."""
        (run,) = self.runs()
        return [(m.step, m.value) for m in connect(self.uri).get_metric_history(run.info.run_id, key)]


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> Store:
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return Store(tmp_path)


def test_only_what_a_checkpoint_covers_is_shipped_and_only_once(store: Store) -> None:
    run = store.open()
    store.journal.write([rec(1), rec(2), rec(3)])
    run.sync()
    assert store.points() == []
    store.checkpoint(1, step=2)
    run.sync()
    run.sync()
    assert store.points() == [(1, 1.0), (2, 2.0)]
    store.checkpoint(2, step=3)
    run.sync()
    assert store.points() == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_driver_killed_and_resumed_continues_the_same_run_without_a_second_point(store: Store) -> None:
    store.journal.write([rec(1), rec(2), rec(3)])
    store.checkpoint(1, step=2)
    store.open().sync()  # killed here, with step 3 still to be covered
    store.journal.cut(2)
    store.journal.write([rec(3)._replace(time=1_800_000_000.0), rec(4)])
    store.checkpoint(2, step=4)
    store.open().sync()
    assert sorted(store.points()) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_a_run_that_falls_back_behind_what_was_shipped_adds_no_duplicates(store: Store) -> None:
    """The newest checkpoint turned out broken: its steps are done again, at other times."""
    run = store.open()
    store.journal.write([rec(1), rec(2), rec(3)])
    store.checkpoint(2, step=3)
    run.sync()
    store.journal.cut(1)
    # lines of another length, so that a position in the old file means nothing in the new one
    store.journal.write([rec(s, value=s + 0.123456)._replace(time=1_800_000_000.0 + s) for s in (2, 3, 4)])
    store.checkpoint(3, step=4)
    run.sync()
    assert sorted(step for step, _ in store.points()) == [1, 2, 3, 4]


def test_a_crash_between_sending_and_noting_it_down_sends_nothing_twice(store: Store) -> None:
    store.journal.write([rec(1), rec(2)])
    store.checkpoint(1, step=2)
    run = store.open()
    link = (store.run_dir / "mlflow.json").read_text()
    run.sync()
    (store.run_dir / "mlflow.json").write_text(link)
    store.open().sync()
    assert [step for step, _ in store.points()] == [1, 2]


def test_a_run_created_but_not_noted_down_is_found_by_its_key(store: Store) -> None:
    run_id = store.open().run_id
    path = store.run_dir / "mlflow.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_id": None}))
    assert store.open().run_id == run_id
    (run,) = store.runs()
    assert f"/experiments/{run.info.experiment_id}/runs" in str(charts(store.run_dir))


def test_a_run_whose_creation_was_not_answered_is_found_and_not_made_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new key is in no store, so that its run is not searched for; but only until it may have been created."""
    client = type(connect(store.uri))
    create, search = client.create_run, client.search_runs
    searched: list[str] = []

    def unanswered(self: Any, *args: Any, **what: Any) -> None:
        create(self, *args, **what)
        raise ConnectionError("the answer was lost")

    def noted(self: Any, experiments: list[str], query: str = "", **what: Any) -> Any:
        searched.append(query)
        return search(self, experiments, query, **what)

    monkeypatch.setattr("bootvit.tracking.tracked.RETRY_AFTER", 0.0)
    monkeypatch.setattr(client, "create_run", unanswered)
    monkeypatch.setattr(client, "search_runs", noted)
    run = store.open()
    assert "the answer was lost" in capsys.readouterr().err
    assert (run.run_id, searched) == (None, [])
    run.sync()
    assert len(searched) == 1
    (stored,) = store.runs()
    assert stored.info.run_id == run.run_id
    assert stored.data.tags["bootvit.method"] == "joint"


def test_a_run_that_is_resumed_has_the_tags_of_its_newest_driver(store: Store) -> None:
    for host in ("first", "second"):
        MlflowRun(store.config(), store.run_dir, tags={"bootvit.host": host}).connect()
    (run,) = store.runs()
    assert run.data.tags["bootvit.host"] == "second"


def test_a_tag_is_cut_to_the_limit(store: Store) -> None:
    MlflowRun(store.config(), store.run_dir, tags={"long": "x" * 9000}).connect()
    assert store.runs()[0].data.tags["long"] == "x" * 8000


def test_a_store_that_lost_the_run_gets_all_of_it_again(store: Store) -> None:
    store.journal.write([rec(1), rec(2)])
    store.checkpoint(1, step=2)
    first = store.open()
    first.sync()
    connect(store.uri).delete_run(first.run_id)
    second = store.open()
    second.sync()
    assert second.run_id != first.run_id
    assert store.points() == [(1, 1.0), (2, 2.0)]


def test_mlflow_keeps_nothing_in_memory_of_a_run_that_has_ended(store: Store) -> None:
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache as kept

    run = store.open()
    run.sync()
    assert run.run_id in kept
    run.finish("FINISHED", store.result())
    assert run.run_id not in kept
    (stored,) = store.runs()
    assert "result.json" in {file.path for file in connect(store.uri).list_artifacts(stored.info.run_id)}


def test_more_points_than_one_call_takes(store: Store) -> None:
    store.journal.write([rec(step) for step in range(2500)])
    store.checkpoint(1, step=2499)
    store.open().sync()
    assert [step for step, _ in store.points()] == list(range(2500))


def test_values_that_are_not_finite_arrive(store: Store) -> None:
    store.journal.write([rec(1, value=math.nan), rec(2, value=math.inf), rec(3)])
    store.checkpoint(1, step=3)
    store.open().sync()
    store.open().sync()
    values = [value for _, value in store.points()]
    assert math.isnan(values[0])
    assert values[1] > 1e308
    assert values[2:] == [3.0]


def test_parameters_tags_data_set_and_config_describe_the_run(store: Store) -> None:
    long = "x" * 7000
    config = store.config(data={"root": long}, method="vit")
    MlflowRun(config, store.run_dir, tags=run_tags(config, data_fingerprint="f00d")).sync()
    (run,) = store.runs()
    assert run.data.params["optim.lr"] == "0.001"
    assert run.data.params["data.root"].startswith("xxx")
    assert len(run.data.params["data.root"]) == 6000
    assert run.data.tags["bootvit.method"] == "vit"
    inputs = [(given.dataset.name, given.dataset.digest) for given in run.inputs.dataset_inputs]
    assert sorted(inputs) == [("digits", "f00d"), ("digits evaluation", "f00d")]
    client = connect(store.uri)
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
    assert run.info.artifact_uri.startswith((store.run_dir.parents[1] / "mlruns" / "bootvit").as_uri())


def test_a_parameter_changed_on_resume_becomes_a_tag(store: Store) -> None:
    store.open()
    store.open(ray={"num_workers": 3})
    (run,) = store.runs()
    assert run.data.params["ray.num_workers"] == "1"
    assert run.data.tags["bootvit.resumed_with"] == "ray.num_workers=3"


def test_finish_sends_the_final_numbers_and_files_and_is_the_same_twice(store: Store) -> None:
    run = store.open()
    (store.run_dir / "config.yaml").write_text("name: a\n")
    store.journal.write([rec(1), rec(2, "test/vit/top1", 51.5, epoch=1), rec(2, "epoch", 2.0, epoch=1)])
    store.checkpoint(2, step=2)
    result = store.result()
    run.finish("FINISHED", result)
    store.open().finish("FINISHED", result)
    (found,) = store.runs()
    assert found.info.status == "FINISHED"
    assert found.data.metrics["final/vit/top1"] == 51.5
    assert found.data.metrics["epoch"] == 2
    assert len(store.points("final/vit/top1")) == 1
    client = connect(store.uri)
    names = [item.path for item in client.list_artifacts(found.info.run_id)]
    assert names == ["config.yaml", "result.json"]
    assert [item.dataset.digest for item in found.inputs.dataset_inputs] == ["f00d", "f00d"]


def test_resuming_a_failed_run_sets_it_running_again(store: Store) -> None:
    store.open().finish("FAILED", {})
    assert store.runs()[0].info.status == "FAILED"
    store.open()
    (run,) = store.runs()
    assert run.info.status == "RUNNING"


def test_a_finished_run_stays_finished_until_it_gets_more_epochs(store: Store) -> None:
    store.journal.write([rec(1)])
    store.checkpoint(1, step=1, final=True)
    store.open().finish("FINISHED", store.result())
    again = store.open()
    again.sync()
    assert store.runs()[0].info.status == "FINISHED"
    store.journal.write([rec(2)])
    store.checkpoint(2, step=2)
    again.sync()
    assert store.runs()[0].info.status == "RUNNING"
    assert [step for step, _ in store.points()] == [1, 2]


def test_the_parent_is_a_tag(store: Store) -> None:
    config = store.config()
    MlflowRun(config, store.run_dir, tags=run_tags(config), parent="abc").connect()
    assert store.runs()[0].data.tags["mlflow.parentRunId"] == "abc"


def test_a_follower_ships_in_the_background_and_the_end_last(store: Store) -> None:
    config = store.config()
    follower = Follower(MlflowRun(config, store.run_dir, tags=run_tags(config)), every=0.01)
    store.journal.write([rec(1)])
    store.checkpoint(1, step=1)
    assert follower.run_id() == store.runs()[0].info.run_id
    deadline = time.monotonic() + 30
    while not store.points() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert store.points() == [(1, 1.0)]
    assert store.runs()[0].info.status == "RUNNING"
    store.journal.write([rec(2)])
    store.checkpoint(2, step=2, final=True)
    assert follower.finish("FINISHED", store.result())
    assert store.points() == [(1, 1.0), (2, 2.0)]
    assert store.runs()[0].info.status == "FINISHED"


# ------------------------------------------------------------------------------------- when it began and ended


def times(store: Store) -> tuple[int, int]:
    (run,) = store.runs()
    return run.info.start_time, run.info.end_time


def test_a_runs_times_are_its_own_however_late_it_is_shipped(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """The store is down from before the start until long after the end."""
    before = time.time()
    down = store.config(tracking={"uri": f"http://127.0.0.1:{unused_port()}"})
    late = MlflowRun(down, store.run_dir, tags={})
    begun = time.time()
    store.journal.write([rec(1)._replace(time=begun)])
    store.checkpoint(1, step=1, final=True)
    late.finish("FINISHED", store.result(), at=begun + 100.5)
    assert "failed" in capsys.readouterr().err
    store.open().sync()
    start, end = times(store)
    assert before * 1000 - 1 <= start <= begun * 1000
    assert end == int((begun + 100.5) * 1000)


def test_a_run_that_mlflow_hears_of_late_began_at_its_first_record(store: Store) -> None:
    """Such as one that was begun where MLflow was not installed."""
    store.journal.write([rec(1), rec(2)])
    store.open()
    assert store.runs()[0].info.start_time == int(rec(1).time * 1000)


def test_the_end_of_a_resumed_run_is_the_later_one(store: Store) -> None:
    store.open().finish("FAILED", {}, at=1_700_000_100.0)
    again = store.open()
    assert json.loads((store.run_dir / "mlflow.json").read_text())["ended_at"] is None
    again.finish("FINISHED", store.result(), at=1_700_000_200.0)
    assert times(store)[1] == 1_700_000_200_000


# ------------------------------------------------------------------------------------------------ a run that failed


def test_a_failed_run_has_its_last_points_and_its_reason_and_no_point_twice_when_it_goes_on(store: Store) -> None:
    """The points beyond the checkpoint tell why; they are measured again by the run that goes on."""
    store.journal.write([rec(1), rec(2), rec(3), rec(4)])
    store.checkpoint(1, step=2)
    run = store.open()
    run.sync()
    assert [step for step, _ in store.points()] == [1, 2]
    failed = store.result(status="failed", reason="the loss at http://me:secret@h is not finite", final=None, epochs=1)
    run.finish("FAILED", failed)
    assert [step for step, _ in store.points()] == [1, 2, 3, 4]
    (found,) = store.runs()
    assert found.info.status == "FAILED"
    assert found.data.tags["bootvit.reason"] == "the loss at http://***@h is not finite"

    (store.run_dir / "result.json").unlink()
    store.journal.cut(2)
    again = store.open()
    (found,) = store.runs()
    assert (found.info.status, "bootvit.reason" in found.data.tags) == ("RUNNING", False)
    store.journal.write([rec(step)._replace(time=1_800_000_000.0 + step) for step in (3, 4, 5)])
    store.checkpoint(2, step=5, final=True)
    again.finish("FINISHED", store.result())
    assert sorted(store.points()) == [(step, float(step)) for step in range(1, 6)]
    (found,) = store.runs()
    assert found.data.metrics["final/epochs"] == 2


def test_a_failed_run_that_fails_again_before_its_old_end_tells_its_newest_numbers(store: Store) -> None:
    store.journal.write([rec(1), rec(9)])
    store.checkpoint(1, step=1)
    store.open().finish("FAILED", store.result(epochs=1, seconds=3.0))
    store.journal.cut(1)
    store.checkpoint(2, step=5)
    store.open().finish("KILLED", store.result(epochs=2, seconds=7.0))
    assert store.runs()[0].data.metrics["final/seconds"] == 7.0


def test_an_interrupted_run_ships_only_what_a_checkpoint_covers(store: Store) -> None:
    store.journal.write([rec(1), rec(2)])
    store.checkpoint(1, step=1)
    store.open().finish("KILLED", {})
    assert store.points() == [(1, 1.0)]


# ---------------------------------------------------------------------------------------------- files come last


class NoFiles:
    """A client whose artifact store fails."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def log_artifact(self, *what: Any) -> None:
        raise ConnectionError("no artifacts today")

    def log_text(self, *what: Any) -> None:
        raise ConnectionError("no artifacts today")


def test_the_end_does_not_wait_for_files_which_the_next_sync_uploads(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    run = store.open()
    run._client = NoFiles(run._client)
    store.journal.write([rec(1)])
    store.checkpoint(1, step=1, final=True)
    assert not run.finish("FINISHED", store.result(), at=1_800_000_000.0)
    assert "no artifacts today" in capsys.readouterr().err
    (found,) = store.runs()
    assert (found.info.status, found.info.end_time) == ("FINISHED", 1_800_000_000_000)
    assert (store.points(), found.data.metrics["final/vit/top1"]) == ([(1, 1.0)], 51.5)
    link = store.run_dir / "mlflow.json"
    assert json.loads(link.read_text())["complete"] is False
    store.open().sync()
    assert json.loads(link.read_text())["complete"] is True
    assert times(store)[1] == 1_800_000_000_000
    files = [item.path for item in connect(store.uri).list_artifacts(found.info.run_id, "checkpoints")]
    assert files == ["checkpoints/weights-step-00000001.safetensors"]


def test_a_large_upload_is_given_its_time_and_other_requests_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that needs three seconds to store a file, under a limit of one second."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

    class Slow(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(3)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *what: Any) -> None:
            pass

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    file = tmp_path / "weights.pt"
    file.write_bytes(bytes(8_000_000))
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        artifacts = HttpArtifactRepository(f"http://127.0.0.1:{server.server_port}/api/2.0/mlflow-artifacts/artifacts")
        with time_to_upload(file.stat().st_size):
            artifacts.log_artifact(str(file))
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"
        with pytest.raises(MlflowException, match="timeout"):
            artifacts.log_artifact(str(file))
        server.shutdown()


def test_files_are_uploaded_with_their_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.open()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    allowed: dict[str, str] = {}
    log = type(run._client).log_artifact

    def noted(self: Any, run_id: str, path: str, folder: str | None = None) -> None:
        allowed[Path(path).suffix] = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
        log(self, run_id, path, folder)

    monkeypatch.setattr(type(run._client), "log_artifact", noted)
    large = store.run_dir / "x.pt"
    with large.open("wb") as file:
        file.truncate(300_000_000)
    run._send_file(large, "checkpoints")
    assert allowed == {".pt": "302"}
    run._send_file(large, "checkpoints")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "2"


# ------------------------------------------------------------------------------------- when it goes wrong


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_server_that_is_down_is_one_warning_and_everything_is_shipped_later(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.journal.write([rec(1), rec(2)])
    store.checkpoint(1, step=2, final=True)
    down = MlflowRun(
        store.config(tracking={"uri": f"http://me:secret@127.0.0.1:{unused_port()}"}), store.run_dir, tags={}
    )
    down.connect()
    down.sync()
    down.finish("FINISHED", store.result())
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("bootvit: warning: MLflow at http://***@127.0.0.1:")
    assert "secret" not in err
    assert down.run_id is None

    store.open().sync()  # `--resume` of the finished run, the store being there again
    (run,) = store.runs()
    assert [step for step, _ in store.points()] == [1, 2]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["final/vit/top1"] == 51.5


class Flaky:
    """A client of which the n-th batch of metrics is stored, but its answer is lost."""

    def __init__(self, client: Any, fails: int) -> None:
        self._client, self._fails, self.calls = client, fails, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def log_batch(self, run_id: str, **what: Any) -> None:
        self._client.log_batch(run_id, **what)
        if what.get("metrics"):
            self.calls += 1
            if self.calls == self._fails:
                raise ConnectionError("the answer was lost")


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_an_answer_that_is_lost_loses_and_doubles_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: int
) -> None:
    monkeypatch.setattr("bootvit.tracking.tracked.RETRY_AFTER", 0.0)
    store.journal.write([rec(step) for step in range(2500)])
    store.checkpoint(1, step=2499)
    run = store.open()
    run._client = Flaky(run._client, fails)
    run.sync()
    assert "the answer was lost" in capsys.readouterr().err
    run.sync()
    assert [step for step, _ in store.points()] == list(range(2500))


def test_a_damaged_link_names_its_file(store: Store) -> None:
    (store.run_dir / "mlflow.json").write_text("{")
    with pytest.raises(UserError, match=r"mlflow\.json"):
        store.open()


CREATE = """
import sys
from bootvit.tracking.store import connect, experiment_id
experiment_id(connect(sys.argv[1]), sys.argv[1], "shared name")
"""


def test_processes_that_start_together_make_one_database_quietly(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE, uri],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert outputs == [("", ""), ("", "")]
    names = Counter(experiment.name for experiment in connect(uri).search_experiments())
    assert names == {"Default": 1, "shared name": 1}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mlflow.db"]


def test_mlflow_is_quiet(store: Store) -> None:
    from mlflow.utils import logging_utils

    store.open()
    assert logging.getLogger("alembic").level == logging.ERROR
    logging_utils._configure_mlflow_loggers("mlflow")  # the end of its import, which another thread may have begun
    assert [logging.getLogger(name).level for name in ("mlflow", "alembic")] == [logging.ERROR] * 2
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
def test_an_sqlite_store_is_not_held_open_between_calls(store: Store) -> None:
    run = store.open()
    store.journal.write([rec(1)])
    store.checkpoint(1, 1)
    run.sync()
    assert store.points("train/vit/loss")
    files = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert store.uri.removeprefix("sqlite:///") not in files


# -------------------------------------------------------------------------------------------------- sweeps

SWEEP = {
    "name": "s",
    "status": "running",
    "counts": {"finished": 1, "stopped": 1, "running": 1},
    "cost": {"seconds": 3.0, "cpu_seconds": 3.0, "gpu_seconds": 0.5},
    "best": {
        "data.fraction=0.05, method=joint": {
            "trial": "0",
            "overrides": {"objective.vit.kd": 0.5},
            "held_out": {"vit": {"top1": 40.0}},
            "final": None,
        }
    },
}


def test_a_sweep_has_one_parent_run_that_is_found_again(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("name: s\n")
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"png")

    def open_sweep() -> SweepRun:
        space = {"method": {"grid": ["vit", "joint"]}}
        return SweepRun(tmp_path / "runs" / "s", store.uri, "bootvit", name="s", space=space, file=file)

    first = open_sweep()
    first.update(SWEEP)
    second = open_sweep()
    second.update(SWEEP)
    second.finish("FINISHED", SWEEP, [plot])
    assert second.run_id == first.run_id
    (run,) = store.runs()
    assert run.info.status == "FINISHED"
    assert run.data.params["space/method"] == '{"grid": ["vit", "joint"]}'
    assert run.data.metrics["trials/stopped"] == 1
    assert run.data.metrics["cost/seconds"] == 3.0
    assert not [name for name in run.data.metrics if name.startswith("best")]
    best = json.loads(run.data.tags["bootvit.best.data.fraction:0.05_ method:joint"])
    assert best["overrides"] == {"objective.vit.kd": 0.5}
    assert len(store.points("trials/finished")) == 1
    client = connect(store.uri)
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["best.json", "report", "sweep.yaml"]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "best.json", str(tmp_path))).read_text())
    (row,) = (dict(zip(table["columns"], values, strict=True)) for values in table["data"])
    assert (row["group"], row["held_out.vit.top1"]) == ("data.fraction=0.05, method=joint", 40.0)


def test_the_step_of_a_sweeps_metrics_is_the_number_of_ended_trials() -> None:
    assert {point.step for point in state_points(SWEEP, 0)} == {2}
