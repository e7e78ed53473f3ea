"""Handing a job to a cluster: once it is up, under a free id, and with one line otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bootvit.errors import RunFailed, UserError
from cluster import submit
from cluster.capacity import DRIVER_MEMORY, HEAD
from cluster.submit import Job, check_id, new_id, send, watch

UP = "Request failed with status code 500: No available agent to submit job, please try again later.."
TAKEN = "Request failed with status code 500: ValueError: Job with submission_id x already exists. Please"


class Client:
    """A cluster that answers submissions with these errors, one after another, and then takes one."""

    def __init__(self, *errors: str) -> None:
        self.errors = list(errors)
        self.taken: list[dict[str, Any]] = []

    def _do_request(self, method: str, path: str) -> SimpleNamespace:
        """The cluster's status: a head without CPUs, and nodes that may come."""
        assert (method, path) == ("GET", "/api/cluster_status")
        usage = {"usageByNode": {"ab": {HEAD: [0.0, 1.0], "memory": [0.0, 4.0 * DRIVER_MEMORY]}}}
        status = {"loadMetricsReport": usage, "autoscalerReport": {"nodeTypeMapping": {"ab": "ray.head"}}}
        return SimpleNamespace(status_code=200, json=lambda: {"data": {"clusterStatus": status}})

    def submit_job(self, **job: Any) -> None:
        if self.errors:
            raise RuntimeError(self.errors.pop(0))
        self.taken.append(job)


JOB = Job("python -m bootvit train x", Path("folder"), {"MLFLOW_TRACKING_URI": "http://mlflow"})


def test_a_head_that_is_coming_up_is_asked_again() -> None:
    client = Client(UP, UP)
    send(client, JOB, "http://head", "x")
    env = {"working_dir": "folder", "env_vars": {"MLFLOW_TRACKING_URI": "http://mlflow"}}
    place = {"entrypoint_memory": DRIVER_MEMORY, "entrypoint_resources": {HEAD: 0.001}}
    assert client.taken == [{"entrypoint": JOB.entrypoint, "runtime_env": env, "submission_id": "x", **place}]


def test_what_every_node_installs_first() -> None:
    client = Client()
    send(client, replace(JOB, pip=("timm==1", "torch==2")), "http://head", "x")
    assert client.taken[0]["runtime_env"]["pip"] == ["timm==1", "torch==2"]


def test_a_head_that_does_not_come_up_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "STARTING_S", -1)
    with pytest.raises(RunFailed, match=r"http://head did not take the job: .*No available agent"):
        send(Client(UP), JOB, "http://head", "x")


def test_a_taken_id_and_another_refusal() -> None:
    with pytest.raises(UserError, match="submission id x is taken at http://head"):
        send(Client(TAKEN), JOB, "http://head", "x")
    with pytest.raises(RunFailed, match=r"http://head did not take the job: 413 too large"):
        send(Client("413\n too large"), JOB, "http://head", "x")


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(client: object, name: str) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "follow", interrupted)
    assert watch(Client(), "http://head", "x", wait=True) == 130
    assert "ray job logs --address http://head --follow x; stop it with: ray job stop" in capsys.readouterr().err


def test_a_cluster_that_is_lost_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(client: object, name: str) -> int:
        raise ConnectionError("gone")

    monkeypatch.setattr(submit, "follow", lost)
    with pytest.raises(RunFailed, match=r"lost the cluster at http://head .*: x may go on; follow it with"):
        watch(Client(), "http://head", "x", wait=True)


def test_submission_ids() -> None:
    assert new_id("train-a b/c").startswith("train-a-b-c-")
    assert new_id("train") != new_id("train")
    assert check_id("mine_1.2-3") == "mine_1.2-3"
    with pytest.raises(UserError, match="letters"):
        check_id("../x y")
