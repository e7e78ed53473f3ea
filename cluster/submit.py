"""`bootvit submit`: a training or a sweep as a Ray job, whose failure is the command's failure."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bootvit.addresses import has_secret
from bootvit.errors import RunFailed, UserError
from cluster.capacity import Workers, check_capacity, driver_place, known_nodes, reported_nodes
from cluster.client import connect, dashboard
from cluster.command import check_command
from cluster.environment import pins
from cluster.logs import follow, say
from cluster.staging import stage

PASSED = (  # settings of the clients of MLflow and S3 without secrets: those are set on the cluster's nodes
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
STARTING = "No available agent"  # Ray's answer, after ten seconds, while a head is still coming up
STARTING_S = 30.0  # for which that is asked again


@dataclass(frozen=True)
class Job:
    """What Ray is to run: a shell command in a copy of `folder`, with `env` added to its environment."""

    entrypoint: str
    folder: Path
    env: Mapping[str, str]
    workers: Workers | None = None  # None: whatever it needs is there
    trains: bool = False  # the driver itself, in place of workers
    pip: tuple[str, ...] = ()  # what every node installs first


def submit(
    command: Sequence[str],
    *,
    address: str | None,
    wait: bool,
    submission_id: str | None = None,
    pip: bool = False,
) -> int:
    """Run `train ...` or `sweep ...` as a job; return its exit status, or 0 once accepted without `wait`.

    `pip` has every node install first what is installed here, in the same versions.

    Raises `UserError` for a mistake in the command, a cluster that cannot be reached, a token that is missing
    or wrong, resources that the cluster does not have, and a submission id that is taken.
    """
    checked = check_command(command)
    url = dashboard(address)
    name = check_id(submission_id) if submission_id else new_id(f"{command[0]}-{checked.name}")
    packages = tuple(pins()) if pip else ()
    with TemporaryDirectory(prefix="bootvit-submit-") as folder:
        words = stage(checked, Path(folder))
        env = passed()
        job = Job(
            shlex.join(["python", "-m", "bootvit", *words]),
            Path(folder),
            env,
            checked.workers,
            checked.trains,
            packages,
        )
        client = connect(url)
        send(client, job, url, name)
    return watch(client, url, name, wait=wait)


def passed(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The clients' settings that the job gets: its record shows them, so one with a secret stays here."""
    return {key: env[key] for key in PASSED if key in env and not has_secret(env[key])}


def send(client: Any, job: Job, url: str, name: str) -> None:
    """Submit the job under the id `name`, if the cluster can ever run it.

    Raises `UserError` when it cannot, or when the id is taken, and `RunFailed` when the cluster refuses.
    """
    answer = client._do_request("GET", "/api/cluster_status")  # Ray has no public call for it
    status = answer.json() if answer.status_code == 200 else {}
    nodes = known_nodes(status)
    if job.workers is not None and nodes is not None:
        check_capacity(job.workers, nodes, f"the cluster at {url}")
    place = driver_place(job.workers, reported_nodes(status), trains=job.trains)
    runtime_env: dict[str, Any] = {"working_dir": str(job.folder), "env_vars": dict(job.env)}
    if job.pip:
        runtime_env["pip"] = list(job.pip)
    until = time.monotonic() + STARTING_S
    while True:
        try:
            client.submit_job(entrypoint=job.entrypoint, runtime_env=runtime_env, submission_id=name, **place)
            return
        except (OSError, RuntimeError) as err:
            if "already exists" in str(err):
                raise UserError(
                    f"submission id {name} is taken at {url}: take another, or follow that job with: "
                    f"ray job logs --address {url} --follow {name}"
                ) from None
            if STARTING not in str(err) or time.monotonic() > until:
                raise RunFailed(f"{url} did not take the job: {' '.join(str(err).split())[:300]}") from err


def watch(client: Any, url: str, name: str, *, wait: bool) -> int:
    """Follow a submitted job to its end; Ctrl-C leaves it running (status 130)."""
    again = (
        f"follow it with: ray job logs --address {url} --follow {name}; "
        f"stop it with: ray job stop --address {url} {name}"
    )
    say(f"submitted {name} to {url}" + ("" if wait else f"; {again}"))
    if not wait:
        print(name)
        return 0
    try:
        return follow(client, name)
    except KeyboardInterrupt:
        say(f"interrupted: {name} goes on; {again}")
        return 130
    except (OSError, RuntimeError) as err:
        raise RunFailed(f"lost the cluster at {url} ({type(err).__name__}): {name} may go on; {again}") from err


def new_id(name: str) -> str:
    """A fresh submission id that says what runs."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{secrets.token_hex(4)}"


def check_id(name: str) -> str:
    """A submission id becomes part of URLs and of file names."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"submission id {name!r}: letters, digits, dots, dashes and underscores, please")
    return name
