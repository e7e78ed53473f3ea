"""A run in an object store: whose turn it is, what its log says, and how a node gets a working copy of it.

    leases/000003.json               who writes: the newest lease does, each is written once, by whoever is the first
    log/000003-000000.jsonl ...      what that writer has to say, in order, each entry written once
    checkpoints/step-00000040-<the first 16 digits of its SHA-256>.safetensors
    logs/attempt-01/rank-0.log  config.yaml  result.json  mlflow.json  alive.json      replaced as a whole

An entry of the log is a line of JSON (`Head`), and behind it lines of the journal. The first entry of a lease holds
everything so far, so the newest lease with an entry has all of the run. Names follow from one another: what a listing
does not show yet is found by asking for the next name.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bootvit import checkpoint
from bootvit.checkpoint import Saved
from bootvit.data.cache import cache_folder
from bootvit.errors import RunFailed, UserError
from bootvit.files import PREDICTIONS, read_json, replacing, write_atomic, write_json
from bootvit.storage import Store

FOLLOW_S = 2.0  # seconds between two looks of a driver at the log of its workers
PATIENCE_S = 120.0  # with a store that fails, where nothing can go on without it
T = TypeVar("T")
DOCUMENTS = ("config.yaml", "result.json", "mlflow.json", PREDICTIONS)


# ------------------------------------------------------------------------------------------------- leases


class TakenOver(RunFailed):
    """Another process writes to the run now."""


def insist(act: Callable[[], T]) -> T:
    """What `act` returns, called again while the store fails; `RunFailed` once it has failed for `PATIENCE_S`."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return act()
        except TakenOver:
            raise
        except RunFailed:
            if time.monotonic() > until:
                raise
            time.sleep(1.0)


@dataclass
class Hold:
    """The right to write to a run: the lease of this number, as long as there is none behind it.

    A driver's holds on while its own workers, who have its `id`, take theirs; a group of workers (`is_group`) gives
    way to any other.
    """

    store: Store
    number: int
    id: str
    is_group: bool = False
    attempt: int = 0  # groups of workers that the run has had
    driver: int = 0  # the number of the driver's own lease
    unsent: bool = False  # whether this process's copy of the run holds what the store has not got

    def check(self) -> None:
        """Raise `TakenOver` if somebody else has taken the run."""
        while (other := lease_of(self.store, self.number + 1)) is not None:
            if self.is_group or other["id"] != self.id:
                raise TakenOver(f"{self.store}: another process has taken over this run; this one stops")
            self.number, self.attempt = self.number + 1, other["attempt"]
        if not self.store.conditional and (lease_of(self.store, self.number) or {}).get("id") != self.id:
            raise TakenOver(f"{self.store}: another process has taken over this run; this one stops")

    def told(self) -> dict[str, Any]:
        """For another process, in plain values."""
        return vars(self) | {"store": self.store.address}

    def for_group(self) -> Hold:
        """The next lease, for a group of this driver's workers."""
        self.check()
        return _take(Hold(self.store, self.number + 1, self.id, True, self.attempt + 1, self.driver))


def take(store: Store) -> Hold:
    """The next lease, for a driver: whoever held one before stops. `TakenOver` if another driver is faster."""
    newest = newest_lease(store)
    before = lease_of(store, newest) if newest else None
    attempt = before["attempt"] if before else 0
    return _take(Hold(store, newest + 1, secrets.token_hex(8), attempt=attempt, driver=newest + 1))


def _take(hold: Hold) -> Hold:
    said = {"id": hold.id, "attempt": hold.attempt, "group": secrets.token_hex(8) if hold.is_group else None}
    if not hold.store.create(lease_name(hold.number), json.dumps(said).encode()):
        raise TakenOver(f"{hold.store}: another process has taken this run at this moment")
    return hold


def lease_name(number: int) -> str:
    """Of an object."""
    return f"leases/{number:06d}.json"


def lease_of(store: Store, number: int) -> dict[str, Any] | None:
    """What a lease says; None if nobody has taken it."""
    data = store.read(lease_name(number))
    return None if data is None else dict(json.loads(data))


def newest_lease(store: Store) -> int:
    """The number of the newest lease; 0 if there never was one."""
    number = max((int(item.name[:6]) for item in store.list("leases") if item.name[:6].isdigit()), default=0)
    while store.exists(lease_name(number + 1)):
        number += 1
    return number


# ---------------------------------------------------------------------------------------------------- log


class Head(NamedTuple):
    """What an entry says beside the journal's lines."""

    start: int  # bytes of the journal that stay; the entry's lines follow them
    checkpoints: list[dict[str, Any]]  # descriptions of those that the store has, oldest first
    best: dict[str, Any] | None  # what best.json says
    data: dict[str, Any] | None  # what the run knows of its data


@dataclass
class Log:
    """A run's log as far as it has been read."""

    lease: int = 0  # whose; 0: nobody has said anything yet
    entries: int = 0  # of that lease, read so far
    journal: bytes = b""
    head: Head = field(default_factory=lambda: Head(0, [], None, None))

    def add(self, data: bytes) -> None:
        """The next entry."""
        line, _, lines = data.partition(b"\n")
        self.head = Head(**json.loads(line))
        self.journal = self.journal[: self.head.start] + lines
        self.entries += 1


def entry_name(lease: int, number: int) -> str:
    """Of an object."""
    return f"log/{lease:06d}-{number:06d}.jsonl"


def entry(head: Head, lines: bytes) -> bytes:
    """The object."""
    return json.dumps(head._asdict()).encode() + b"\n" + lines


def read_log(store: Store, newest: int | None = None) -> Log:
    """All that the newest lease with an entry says; `newest` is the newest lease, where that is known."""
    for _ in range(3):
        listed = [item.name.split(".")[0].split("-") for item in store.list("log")]
        known = [(int(lease), int(number)) for lease, number in listed]
        log = Log(lease=max(known, default=(0, 0))[0])
        count = len([number for lease, number in known if lease == log.lease])
        found = store.read_all([entry_name(log.lease, number) for number in range(count)])
        if all(data is not None for data in found):  # else a newer lease has cleared them away
            for data in found:
                log.add(data or b"")
            follow(log, store, newest_lease(store) if newest is None else newest)
            return log
    raise RunFailed(f"{store}: its log has changed three times while it was read")


def follow(log: Log, store: Store, newest: int) -> bool:
    """Read on; whether there was anything. `newest` is the newest lease."""
    for lease in range(newest, log.lease, -1):
        if (first := store.read(entry_name(lease, 0))) is not None:
            log.lease, log.entries, log.journal = lease, 0, b""
            log.add(first)
            follow(log, store, lease)
            return True
    more = False
    while log.lease and (data := store.read(entry_name(log.lease, log.entries))) is not None:
        log.add(data)
        more = True
    return more


# --------------------------------------------------------------------------------------- in a working copy


def lay_out(log: Log, path: Path) -> None:
    """Make a folder say what the log does: the journal, and checkpoints by their descriptions, not yet their weights.

    A journal that only grows stays the same file.
    """
    folder, journal = path / "checkpoints", path / "metrics.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    there = journal.read_bytes() if journal.exists() else b""
    if there != log.journal:
        if there and log.journal.startswith(there):
            with journal.open("ab") as file:
                file.write(log.journal[len(there) :])
        else:
            write_atomic(journal, log.journal)
    wanted = {f"step-{one['step']:08d}.json": one for one in log.head.checkpoints}
    for name, one in wanted.items():
        if not (folder / name).exists() or read_json(folder / name) != one:
            write_json(folder / name, one)
    for old in folder.glob("step-*.json"):
        if old.name not in wanted:
            old.unlink()
    if log.head.best is not None:
        write_json(folder / "best.json", log.head.best)


def object_of(saved: Saved) -> str:
    """The name of a checkpoint's object."""
    return object_name(saved.step, saved.sha256)


def object_name(step: int, sha256: str) -> str:
    """The same: the content says it, so nothing else is ever written there."""
    return f"checkpoints/step-{step:08d}-{sha256[:16]}.safetensors"


def fetch(store: Store, saved: Saved) -> bool:
    """Get a checkpoint's weights; False, and a line on stderr, if they are damaged or gone."""
    if checkpoint.verify(saved):
        return True
    with replacing(saved.path) as file:
        digest = hashlib.sha256()

        def take(piece: bytes) -> None:
            nonlocal digest
            if not piece:
                file.seek(0)
                file.truncate()
                digest = hashlib.sha256()
            file.write(piece)
            digest.update(piece)

        store.read_into(object_of(saved), take)
    if digest.hexdigest() == saved.sha256:
        return True
    print(f"bootvit: {store}/{object_of(saved)} is damaged or gone", file=sys.stderr)
    saved.path.unlink()
    saved.path.with_suffix(".json").unlink()
    return False


def fetch_newest(store: Store, path: Path) -> Saved | None:
    """Get the newest checkpoint that is what was written; None without one."""
    found = reversed(checkpoint.described(path / "checkpoints"))
    return next((saved for saved in found if fetch(store, saved)), None)


def reading_copy(store: Store) -> Path:
    """A folder, for as long as this process lives, with what a run's log and its documents say."""
    path = Path(tempfile.mkdtemp(dir=_scratch(), prefix="read-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    fill(store, path)
    return path


def fill(store: Store, path: Path) -> None:
    """Lay out a run in a folder; `UserError` if there is none."""
    for name, data in zip(DOCUMENTS, store.read_all(list(DOCUMENTS)), strict=True):
        if data is not None:
            write_atomic(path / name, data)
    if not (path / "config.yaml").exists():
        raise UserError(f"{store}: no run is there (no config.yaml in it)")
    lay_out(read_log(store), path)


def fetch_folder(store: Store, path: Path, folder: str) -> None:
    """Get small files: what the workers have said (`logs`), what `bootvit explain` has left (`explain`)."""
    names = [f"{folder}/{item.name}" for item in store.list(folder, deep=True) if not item.is_folder]
    for name, data in zip(names, store.read_all(names), strict=True):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data or b"")


# -------------------------------------------------------------------------------------------------- scratch


def _scratch() -> Path:
    folder = cache_folder() / "runs"
    folder.mkdir(exist_ok=True)
    return folder


def scratch_of(store: Store) -> Path:
    """Where this node keeps what it writes of a run: a folder for each lease."""
    return _scratch() / f"{store.at.rpartition('/')[2]}-{hashlib.sha256(store.at.encode()).hexdigest()[:12]}"


def new_scratch(hold: Hold) -> Path:
    """The folder of a new lease, with what the store says of the run."""
    path = scratch_of(hold.store) / f"{hold.number:06d}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    fill(hold.store, path)
    write_json(path / "lease.json", {"id": hold.id})
    return path


def bare_scratch(store: Store, config: bytes) -> Path:
    """A folder for a worker that writes nothing but its log."""
    top = scratch_of(store)
    top.mkdir(exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=top, prefix="worker-"))
    write_atomic(path / "config.yaml", config)
    return path


def adopt(hold: Hold, path: Path, log: Log) -> None:
    """Go on from what an earlier process on this node has not been able to send; remove what such have left here.

    What a lease's folder holds belongs to the run as long as no later one has said anything.
    """
    others = {int(one.name): one for one in path.parent.glob("[0-9]*") if one != path and int(one.name) < hold.number}
    mine = max((saved.step for saved in checkpoint.described(path / "checkpoints")), default=-1)
    for number in sorted((n for n in others if n >= log.lease), reverse=True):
        found = reversed(checkpoint.described(others[number] / "checkpoints"))
        saved = next((one for one in found if checkpoint.verify(one)), None)
        lease = lease_of(hold.store, number)
        held = others[number] / "lease.json"
        same = lease is not None and held.exists() and read_json(held).get("id") == lease["id"]
        if saved is not None and same and saved.step > mine:
            for name in ("checkpoints", "metrics.jsonl"):
                _replace(others[number] / name, path / name)
            break
    for number, folder in others.items():
        if number != hold.driver:
            shutil.rmtree(folder, ignore_errors=True)


def _replace(source: Path, target: Path) -> None:
    """Copy a file, or a folder of files; weights, which are never changed, by a link."""
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, copy_function=_link, ignore=shutil.ignore_patterns(".*"))
    elif source.exists():
        write_atomic(target, source.read_bytes())


def _link(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


@contextmanager
def followed(hold: Hold, path: Path) -> Iterator[None]:
    """Keep a driver's folder as the log of its workers says, who may be on other nodes."""
    log, end = read_log(hold.store), threading.Event()

    def look() -> None:
        newest = hold.number
        while hold.store.exists(lease_name(newest + 1)):
            newest += 1
        if follow(log, hold.store, newest):
            lay_out(log, path)

    def work() -> None:
        while not end.wait(FOLLOW_S):
            try:
                look()
            except (RunFailed, UserError, OSError):  # the store is down for a moment, or an entry was cleared away
                continue

    thread = threading.Thread(target=work, name="store", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        with suppress(RunFailed, UserError, OSError):
            look()
