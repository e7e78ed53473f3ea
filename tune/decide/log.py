"""The sweep's log: one JSON event a line, the truth from which everything else is rebuilt after a crash."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bootvit.errors import UserError, naming
from bootvit.files import read_json, write_atomic, write_json
from bootvit.remote import TakenOver
from tune.spec.space import Setting, Spec

Event = dict[str, Any]
Status = Literal["waiting", "running", "finished", "stopped", "failed"]
ENDED: tuple[Status, ...] = ("finished", "stopped", "failed")


class Log:
    """Appends events; the lease sees to it that a driver that was overtaken stops."""

    def __init__(self, path: Path, send: Callable[[str], None] | None = None) -> None:
        """`send` puts an event where the sweep is, if that is not here."""
        self.path, self._send, self._lease = path, send, secrets.token_hex(8)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._held = path.with_name(f"{path.stem}.lease.json")
        write_json(self._held, {"id": self._lease})
        self.events = list(read_events(path))
        write_atomic(path, "".join(f"{json.dumps(event)}\n" for event in self.events).encode())

    def write(self, event: Event) -> None:
        """Append an event and flush it; `TakenOver` if another driver has taken the sweep over."""
        if read_json(self._held)["id"] != self._lease:
            raise TakenOver(f"{self.path.parent}: another process has taken over this sweep; this one stops")
        line = f"{json.dumps(event)}\n"
        if self._send is not None:
            self._send(line)
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def read_events(path: Path) -> Iterator[Event]:
    """The complete events of a log; a torn last line is passed over."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as err:
            if number == len(lines):
                return
            raise UserError(f"{path}: line {number} is no event: {err}") from err


@dataclass(slots=True)
class Trial:
    """What is known of a trial."""

    spec: Spec
    status: Status = "waiting"
    started: bool = False  # ever
    crashes: int = 0  # that spent a retry
    lost_at: int | None = None  # epochs done when it last lost its node
    reason: str | None = None
    stopped_by: str | None = None  # scheduler or budget
    epochs: int = 0
    values: dict[int, float] = field(default_factory=dict)  # epochs done -> selection metric
    began: float | None = None  # seconds since 1970 when it first held its resources, as `ended_at`
    ended_at: float | None = None
    seconds: float = 0.0  # in which it held its resources, over all attempts
    changes: list[Event] = field(default_factory=list)  # pbt: {"epoch", "donor", "overrides"}

    @property
    def value(self) -> float | None:
        """The newest value of the selection metric."""
        return self.values[max(self.values)] if self.values else None

    @property
    def overrides(self) -> Setting:
        """The setting as it is now."""
        return self.changes[-1]["overrides"] if self.changes else self.spec.overrides


Trials = dict[str, Trial]


def spec_event(spec: Spec) -> Event:
    """A trial as an event has it."""
    return {"id": spec.id, "group": spec.group, "seed": spec.seed, "overrides": spec.overrides}
