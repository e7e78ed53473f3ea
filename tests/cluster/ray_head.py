"""What the tests against a real Ray head share: the head, its clients, and how it starts and ends."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
JOB = """
import sys
from pathlib import Path
from bootvit.errors import RunFailed, UserError
from cluster.client import connect, dashboard
from cluster.capacity import Workers
from cluster.submit import Job, send, watch

name, entrypoint, folder, cpus = sys.argv[1:]
url = dashboard(None)
try:
    client = connect(url)
    send(client, Job(entrypoint, Path(folder), {}, Workers(1, float(cpus), 0, "that much")), url, name)
    sys.exit(watch(client, url, name, wait=True))
except (RunFailed, UserError) as err:
    sys.exit(f"bootvit: error: {err}")
"""  # what `submit` does with a command, with any command


@dataclass(frozen=True)
class Head:
    """A head: its dashboard, the file with its token, and an environment for clients."""

    url: str
    token: Path
    folder: Path
    env: dict[str, str]

    def start_job(self, name: str, entrypoint: str, cpus: float = 1, **env: str) -> subprocess.Popen[str]:
        """Submit a shell command in the test's folder and follow it, in a process of its own."""
        files = self.folder / "job"
        files.mkdir(exist_ok=True)
        (files / "note.txt").write_text("here\n")
        words = [sys.executable, "-c", JOB, name, entrypoint, str(files), str(cpus)]
        return subprocess.Popen(
            words,
            env=self.env | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder,
        )

    def run_job(self, name: str, entrypoint: str, cpus: float = 1, **env: str) -> tuple[int, str, str]:
        """(status, stdout, stderr) of that, at its end."""
        process = self.start_job(name, entrypoint, cpus, **env)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def ray(self, *words: str) -> str:
        """Ray's own command line against this head."""
        command = [str(Path(sys.executable).parent / "ray"), *words]
        return subprocess.run(command, env=self.env, text=True, capture_output=True, timeout=120, check=False).stdout


def free_ports(count: int) -> list[int]:
    """Free ports above those that Ray gives to its workers."""
    sockets: list[socket.socket] = []
    for port in range(20000 + secrets.randbelow(5000), 32000):
        if len(sockets) == count:
            break
        try:
            sockets.append(socket.create_server(("127.0.0.1", port)))
        except OSError:
            continue
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_for_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until the dashboard answers (401 is an answer); an error if the head dies or two minutes pass."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=2)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the head did not come up (status {process.poll()})")


def end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End the head, which ends its children, and whatever of its own is left."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue  # it has ended meanwhile
