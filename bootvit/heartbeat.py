"""Whether somebody trains a run: `alive.json` in its folder, which its driver rewrites every few seconds.

No two machines need the same clock: a run is alive if its beat changes while somebody looks.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from bootvit.errors import UserError
from bootvit.files import read_json, write_json

EVERY = 5.0  # seconds between two beats
LOOK = 2.5 * EVERY  # seconds that somebody who would take over looks for a beat


class Heartbeat:
    """Beats while it is entered; what is left behind by a killed process does not change any more."""

    def __init__(self, folder: Path, every: float = EVERY) -> None:
        self._path, self._every = folder / "alive.json", every
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._write(0)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        number = 0
        while not self._end.wait(self._every):
            number += 1
            try:
                self._write(number)
            except OSError:  # a full disk ends the run where it writes what it needs
                continue

    def _write(self, number: int) -> None:
        write_json(self._path, {"beat": number, "host": socket.gethostname(), "pid": os.getpid()})


def check_nobody_writes(folder: Path, look: float = LOOK) -> None:
    """Raise `UserError` for a run that another process is training.

    Looks for a while if the process that trained it last may be alive: it is on another machine, or its number is
    taken.
    """
    last = beat_of(folder)
    if last is None or (last["host"] == socket.gethostname() and not is_running(last["pid"])):
        return
    until = time.monotonic() + look
    while time.monotonic() < until:
        time.sleep(0.2)
        now = beat_of(folder)
        if now is None:
            return
        if now != last:
            raise UserError(
                f"{folder}: process {now['pid']} on {now['host']} is training this run: wait for it, stop it, or "
                "--resume --take-over"
            )


def beat_of(folder: Path) -> dict[str, Any] | None:
    """What the file says; None without one."""
    path = folder / "alive.json"
    try:
        return dict(read_json(path)) if path.exists() else None
    except UserError:
        if path.exists():
            raise
        return None


def is_running(pid: int) -> bool:
    """Whether a process of this number is on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
