"""Jobs on a real head that wants a token: every end has its status and its one line."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from ray_head import Head

pytestmark = pytest.mark.cluster

REATTACH = r"follow it with: ray job logs --address \S+ --follow {0}; stop it with: ray job stop --address \S+ {0}"


def only_line(err: str) -> str:
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for got in process.stdout:
        if line in got:
            return
    raise AssertionError(f"{line!r} never came; {process.communicate()[1]}")


def test_success_is_zero_and_only_the_jobs_own_log_is_shown(head: Head) -> None:
    status, out, err = head.run_job("ok", 'cat note.txt && echo "it\'s done"')
    assert (status, out) == (0, "here\nit's done\n"), err
    assert only_line(err) == f"bootvit: submitted ok to {head.url}\n"
    assert head.token.read_text() not in out + err


@pytest.mark.parametrize(("code", "status"), [(1, 1), (2, 2), (77, 1)])
def test_the_jobs_failure_is_the_commands_failure(head: Head, code: int, status: int) -> None:
    got, out, err = head.run_job(f"fails-{code}", f"echo before; exit {code}")
    assert (got, out) == (status, "before\n")
    assert err.splitlines()[1:] == [f"bootvit: error: fails-{code} failed: exit status {code}"]


def test_a_job_stopped_from_outside_is_a_failure(head: Head) -> None:
    process = head.start_job("stopped", "echo running; sleep 300")
    wait_for(process, "running")
    head.ray("job", "stop", "--address", head.url, "stopped")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert err.splitlines()[1:] == ["bootvit: error: stopped was stopped before its end"]


def test_a_job_killed_from_outside_is_a_failure(head: Head) -> None:
    status, _, err = head.run_job("killed", "kill -9 $$")
    assert status == 1
    assert re.fullmatch(r"bootvit: error: killed failed: exit status -?\d+", err.splitlines()[1])


def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(head: Head) -> None:
    process = head.start_job("left", "echo running; until [ -e finish ]; do sleep 0.2; done; echo the end")
    wait_for(process, "running")
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert re.fullmatch(f"bootvit: interrupted: left goes on; {REATTACH.format('left')}", err.splitlines()[1])
    time.sleep(2)
    assert "RUNNING" in head.ray("job", "status", "--address", head.url, "left")
    head.ray("job", "stop", "--address", head.url, "left")


def test_a_taken_id_is_one_line(head: Head) -> None:
    head.run_job("twice", "true")
    status, _, err = head.run_job("twice", "true")
    assert status != 0
    assert f"submission id twice is taken at {head.url}" in only_line(err)


def test_what_the_cluster_does_not_have_is_refused(head: Head) -> None:
    status, _, err = head.run_job("greedy", "true", cpus=3)
    assert status != 0
    assert "has room for 0 of 1 workers (nodes: 2 CPUs, 0 GPUs)" in only_line(err)
    assert "greedy" not in head.ray("job", "list", "--address", head.url)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "the cluster wants a token: set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN_PATH": ""}, "RAY_AUTH_MODE=token: "),
        ({"RAY_AUTH_TOKEN_PATH": "/nonexistent/token"}, "cannot be opened or is empty: /nonexistent/token"),
        ({"RAY_AUTH_TOKEN": "0123abcd" * 8}, "the cluster refuses this token"),
        ({"RAY_AUTH_TOKEN": "0123\nabcd"}, "one line of plain text"),
        ({"RAY_AUTH_TOKEN": "0123\u00e9abcd"}, "one line of plain text"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}, "no Ray cluster answers there"),
        ({"RAY_API_SERVER_ADDRESS": "http://192.0.2.1:8265"}, "no Ray cluster answers there"),
        ({"RAY_API_SERVER_ADDRESS": "http://no-such-host.invalid"}, "no Ray cluster answers there"),
    ],
)
def test_no_way_in_is_one_line_within_seconds(head: Head, env: dict[str, str], expected: str) -> None:
    process = head.start_job("never", "true", 1, **env)
    out, err = process.communicate(timeout=30)  # Ray's own client would wait for minutes
    assert process.returncode not in (0, -signal.SIGABRT)
    assert out == ""
    assert expected in only_line(err)
    assert "0123" not in err


def bootvit(head: Head, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bootvit", *words]
    return subprocess.run(
        command, env=head.env | env, cwd=head.folder, text=True, capture_output=True, timeout=300, check=False
    )


def test_a_training_is_submitted_from_anywhere_and_leaves_its_run(head: Head) -> None:
    """From an empty folder with a config of one's own; the run and its record lie where they were asked to."""
    (head.folder / "mine.yaml").write_text("name: mine\nschedule: {max_steps: 2, epochs: 1}\n")
    places = (f"ray.storage_path={head.folder}/runs", f"tracking.uri=sqlite:///{head.folder}/mlflow.db")
    model = ("model.vit.width=24", "model.vit.depth=1", "model.vit.heads=3", "data.image_size=16")
    words = ("train", "mine.yaml", "method=vit", "data.batch_size=8", *model, *places)
    done = bootvit(head, "submit", "--", *words)
    assert done.returncode == 0, done.stderr
    assert only_line(done.stderr).startswith("bootvit: submitted train-mine-")
    result = json.loads((head.folder / "runs" / "mine" / "result.json").read_text())
    assert result["status"] == "finished"
    with sqlite3.connect(head.folder / "mlflow.db") as database:
        assert database.execute("select run_uuid, status from runs").fetchall() == [
            (result["mlflow_run_id"], "FINISHED")
        ]
    again = bootvit(head, "submit", "--", *words)  # that name exists: the mistake is found there, and is ours
    assert again.returncode == 2
    assert "mine" in again.stdout
    assert re.fullmatch(r"bootvit: error: train-mine-\w+ failed: exit status 2", again.stderr.splitlines()[-1])


def test_a_sweep_as_a_job_ends_with_zero_and_is_in_mlflow(head: Head) -> None:
    tiny = "model: {vit: {width: 24, depth: 1, heads: 3}}\nschedule: {max_steps: 2, epochs: 1}\n"
    (head.folder / "base.yaml").write_text(
        f"method: vit\ndata: {{image_size: 16, batch_size: 8, held_out: 0.1}}\n{tiny}"
    )
    (head.folder / "few.yaml").write_text("name: few\nbase: base.yaml\nspace: {optim.lr: {grid: [1e-3, 2e-3]}}\n")
    database = head.folder / "sweep.db"
    places = (f"ray.storage_path={head.folder}/runs", f"tracking.uri=sqlite:///{database}")
    done = bootvit(head, "submit", "--", "sweep", "few.yaml", *places)
    assert done.returncode == 0, done.stdout + done.stderr
    assert only_line(done.stderr).startswith("bootvit: submitted sweep-few-")
    sweep = json.loads((head.folder / "runs" / "few" / "sweep.json").read_text())
    assert [trial["status"] for trial in sweep["trials"]] == ["finished", "finished"]
    with sqlite3.connect(database) as connection:
        statuses = [row[0] for row in connection.execute("select status from runs")]
    assert statuses == ["FINISHED"] * 3  # the sweep and its trials


def test_a_mistake_in_the_config_never_gets_there(head: Head) -> None:
    before = head.ray("job", "list", "--address", head.url).count("submission_id=")
    done = bootvit(head, "submit", "--", "train", "digits/joint", "data.fractoin=0.1")
    assert done.returncode == 2
    assert "did you mean 'data.fraction'?" in only_line(done.stderr)
    assert head.ray("job", "list", "--address", head.url).count("submission_id=") == before


def test_without_waiting_the_id_is_printed(head: Head) -> None:
    places = (f"ray.storage_path={head.folder}/runs", "tracking.enabled=false")
    done = bootvit(head, "submit", "--no-wait", "--", "train", "digits/vit", "schedule.max_steps=1", "--local", *places)
    assert done.returncode == 0
    name = done.stdout.strip()
    assert re.fullmatch(f"bootvit: submitted {name} to {head.url}; {REATTACH.format(name)}\n", done.stderr)
    head.ray("job", "stop", "--address", head.url, name)


def test_without_the_token_the_command_is_a_mistake(head: Head) -> None:
    places = (f"ray.storage_path={head.folder}/runs", "tracking.enabled=false")
    done = bootvit(head, "submit", "--", "train", "digits/vit", *places, RAY_AUTH_MODE="disabled")
    assert done.returncode == 2
    assert "the cluster wants a token" in only_line(done.stderr)
