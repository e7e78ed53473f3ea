"""A real Ray head with token authentication, in processes of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_head import REPOSITORY, Head, end, free_ports, wait_for_answer


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """A head with two CPUs that wants a token; only its own processes are ended afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="bv"))  # short: sockets lie in it
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    clean |= {"HOME": str(folder), "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    port, dashboard, agent = free_ports(3)
    url = f"http://127.0.0.1:{dashboard}"
    env = clean | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    start = f"ray start --head --block --num-cpus=2 --port={port} --dashboard-port={dashboard}"
    start += f" --dashboard-agent-listen-port={agent} --disable-usage-stats"
    words = [*start.split(), f"--temp-dir={folder / 'ray'}"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(words, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_answer(url, process)
        yield Head(url, token, folder, env | {"RAY_API_SERVER_ADDRESS": url})
    finally:
        end(process, folder)
        shutil.rmtree(folder, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of faults that runs have survived."""
    rows = [
        value
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        for key, value in report.user_properties
        if key == "fault" and report.when == "call"
    ]
    if rows:
        terminalreporter.section("what a run survived")
        heading = ("fault", "steps repeated", "seconds lost", "starts", "largest difference of final weights")
        terminalreporter.write_line("{:36} {:>14} {:>12} {:>6}  {}".format(*heading))
        for fault, repeated, seconds, starts, difference in rows:
            terminalreporter.write_line(f"{fault:36} {repeated:14d} {seconds:12.0f} {starts:6d}  {difference:g}")
