"""Whether somebody trains a run: `alive.json` beside it, which its driver rewrites every few seconds.

No two machines need the same clock: a run is alive if its beat changes while somebody looks.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from bootvit.errors import RunFailed, UserError
from bootvit.storage import Place, Store, delete_at, read_at, write_at

EVERY = 5.0  # seconds between two beats
FILE = "alive.json"
LOOK = 2.5 * EVERY  # seconds that somebody who would take over looks for a beat


class Heartbeat:
    """Beats while it is entered; what is left behind by a killed process does not change any more."""

    def __init__(self, place: Place, every: float = EVERY) -> None:
        self._place, self._every = place, every
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
        with suppress(*((RunFailed, UserError) if isinstance(self._place, Store) else ())):
            delete_at(self._place, FILE)

    def _beat(self) -> None:
        number = 0
        while not self._end.wait(self._every):
            number += 1
            try:
                self._write(number)
            except (OSError, RunFailed, UserError):  # a full disk, or a store, ends the run where it is needed
                continue

    def _write(self, number: int) -> None:
        beat = {"beat": number, "host": socket.gethostname(), "pid": os.getpid()}
        write_at(self._place, FILE, f"{json.dumps(beat)}\n".encode())


def check_nobody_writes(place: Place, look: float = LOOK) -> None:
    """Raise `UserError` for a run that another process is training.

    Looks for a while if the process that trained it last may be alive: it is on another machine, or its number is
    taken.
    """
    last = beat_of(place)
    if last is None or (last["host"] == socket.gethostname() and not is_running(last["pid"])):
        return
    until = time.monotonic() + look
    while time.monotonic() < until:
        time.sleep(0.2)
        now = beat_of(place)
        if now is None:
            return
        if now != last:
            raise UserError(
                f"{place}: process {now['pid']} on {now['host']} is training this run: wait for it, stop it, or "
                "--resume --take-over"
            )


def beat_of(place: Place) -> dict[str, Any] | None:
    """What the file says; None without one."""
    data = read_at(place, FILE)
    try:
        return None if data is None else dict(json.loads(data))
    except ValueError as err:
        raise UserError(f"{place}/{FILE}: not readable as JSON: {err}") from err


def is_running(pid: int) -> bool:
    """Whether a process of this number is on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
