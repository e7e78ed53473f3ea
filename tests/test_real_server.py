"""A real `mlflow server`: stopped and started again under a run, and one of which half the requests fail."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import TINY, write

from bootvit.__main__ import main
from bootvit.config import merge
from bootvit.tracking.store import connect

pytestmark = pytest.mark.slow

LONG = {"tracking": {"enabled": True, "log_every": 1}, "schedule": {"epochs": 400, "eval_every": 40}}


class Server:
    """`mlflow server` on a port of its own, with its database in a folder."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = listening.getsockname()[1]
        self.uri, self._folder = f"http://127.0.0.1:{self.port}", folder

    def start(self) -> None:
        words = f"-m mlflow server --host 127.0.0.1 --port {self.port} --workers 1"
        words += f" --backend-store-uri sqlite:///{self._folder}/server.db --artifacts-destination {self._folder}/files"
        log = (self._folder / "server.log").open("a")
        self._process = subprocess.Popen(
            [sys.executable, *words.split()], stdout=log, stderr=log, start_new_session=True, cwd=self._folder
        )
        end = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert self._process.poll() is None, (self._folder / "server.log").read_text()
                assert time.monotonic() < end
                time.sleep(0.2)

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def train(folder: Path, uri: str, *more: str) -> subprocess.Popen[str]:
    write(folder / "run.yaml", yaml.safe_dump(merge(TINY, LONG)))
    words = ["-m", "bootvit", "train", "run.yaml", "--local", f"tracking.uri={uri}", *more]
    return subprocess.Popen(
        [sys.executable, *words], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def steps(folder: Path) -> int:
    path = folder / "runs" / "tiny" / "metrics.jsonl"
    return path.read_text().count("train/vit/loss") if path.exists() else 0


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    while steps(folder) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def check_history(folder: Path, uri: str) -> None:
    """MLflow has one run, with each record of the journal once."""
    client = connect(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'bootvit'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    rows = map(json.loads, (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines())
    wanted: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        wanted.setdefault(row["name"], []).append((row["step"], row["value"]))
    assert len(wanted["train/vit/loss"]) == 400 * 4
    for name, expected in wanted.items():
        found = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        assert sorted(found) == expected, name
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "result.json"}


def test_a_server_that_stops_and_comes_back_under_a_run_has_all_of_it(server: Server, tmp_path: Path) -> None:
    process = train(tmp_path, server.uri)
    wait_for_steps(tmp_path, 200, process)
    server.stop()
    at = steps(tmp_path)
    wait_for_steps(tmp_path, at + 200, process)  # training goes on
    server.start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert err.count("bootvit: warning: MLflow at") <= 1, err
    check_history(tmp_path, server.uri)


def test_a_server_that_is_down_at_the_end_gets_the_rest_from_track_sync(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = train(tmp_path, server.uri)
    wait_for_steps(tmp_path, 200, process)
    server.stop()
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err.count("warning")) == (0, 1), out + err
    server.start()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["track", "sync", "tiny", f"tracking.uri={server.uri}"]) == 0
        check_history(tmp_path, server.uri)


@contextmanager
def flaky(uri: str, seed: int) -> Iterator[tuple[str, list[str]]]:
    """A proxy that fails half the requests: with a 500, with no answer, or after the server has carried them out."""
    dice, lock, failed = random.Random(seed), threading.Lock(), []

    class Handler(BaseHTTPRequestHandler):
        def forward(self) -> None:
            with lock:
                how = dice.choice(["500", "cut", "lost", "", "", ""])
                failed.append(how)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if how == "cut":
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if how == "500":
                self.answer(500, {}, b"no luck")
                return
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
            request = urllib.request.Request(uri + self.path, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=60) as found:
                    status, kept, content = found.status, found.headers, found.read()
            except urllib.error.HTTPError as err:
                status, kept, content = err.code, err.headers, err.read()
            if how == "lost":
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.answer(status, {"Content-Type": kept.get("Content-Type", "application/json")}, content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

        def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content)), "Connection": "close"}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    class Proxy(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None: ...

    proxy = Proxy(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}", failed
    finally:
        proxy.shutdown()
        proxy.server_close()


def test_half_the_requests_failing_loses_and_doubles_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flaky(server.uri, seed=0) as (uri, failed):
        process = train(tmp_path, uri)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        assert err.count("bootvit: warning: MLflow at") == 1, err
        assert sum(map(bool, failed)) > 0
    monkeypatch.chdir(tmp_path)
    assert main(["track", "sync", "tiny", f"tracking.uri={server.uri}"]) == 0
    check_history(tmp_path, server.uri)
