"""A sweep's folder as its driver has it: of a sweep in an object store a copy, which goes with the process.

    leases/000001.json                              whose turn it is, as of a run
    events/log/000001-000000.jsonl  test-events/... the sweep's logs, in entries as those of a run's log
    sweep.yaml  sweep.json  mlflow.json  report/... replaced as a whole
    trials/<id>/  winners/<id>/                     runs like any other

Nothing is decided before the store has it: an event is there before it takes effect, and a trial reports an epoch once
all of that epoch is there. Ray Tune's own folder is the copy: nothing is ever read from it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from bootvit import remote
from bootvit.config import Config, dump_config
from bootvit.errors import RunFailed, UserError
from bootvit.files import write_atomic
from bootvit.heartbeat import is_running
from bootvit.remote import Head, Hold, Log, TakenOver, insist
from bootvit.runs import RunFolder, claim, take_lease
from bootvit.storage import AT_ONCE, Store
from bootvit.tracking.artifacts import chosen, needed
from tune.run.copying import copy_member, is_copied, mark_copied
from tune.spec.schema import Sweep

ENTRY = 16 << 10  # bytes of events in an object, which is written anew with each of them
LOGS = ("events", "test-events")
DOCUMENTS = ("sweep.yaml", "sweep.json", "mlflow.json")


class SweepFolder:
    """The folder, and how what is written in it comes to where the sweep is; nothing to do where it is that."""

    def __init__(self, path: Path, store: Store | None = None, hold: Hold | None = None) -> None:
        self.path, self._store, self._hold = path, store, hold
        self._locks: dict[Path, threading.Lock] = {}  # held while a run is read
        self._logs: dict[Path, Log] = {}  # of the running trials' runs, as far as they have been read

    def run_dir(self, config: Config) -> Path:
        """Where the driver has the run of a trial."""
        return self.path / config.ray.storage_path.partition("?")[0].rpartition("/")[2] / config.name

    # ---------------------------------------------------------------------------------------- the sweep's own

    def put(self, *files: Path) -> None:
        """Files have been replaced; `TakenOver` if another driver has the sweep."""
        if self._store is None or self._hold is None:
            return
        for file in files:
            if file.exists():
                name, data = str(file.relative_to(self.path)), file.read_bytes()
                insist(lambda name=name, data=data: self._write(name, data))  # type: ignore[misc]

    def _write(self, name: str, data: bytes) -> None:
        if self._store is not None and self._hold is not None:
            self._hold.check()
            self._store.write(name, data)

    def sender(self, log: Path) -> Callable[[str], None] | None:
        """What takes an event of a log before it takes effect."""
        return None if self._store is None else Sender(self._write, self._store, self._hold, log).send

    # ------------------------------------------------------------------------------------------ trials' runs

    def fetch(self, *runs: Path) -> None:
        """Get what the runs of trials that have ended hold beside their weights."""
        if self._store is not None:
            self._at_once(lambda run: insist(lambda: self._get(run, ended=True)), runs)

    def follow(self, run: Path) -> None:
        """The same of a trial that runs; as far as the store gives it now."""
        if self._store is not None:
            with suppress(RunFailed, UserError):
                self._get(run, ended=False)

    @contextmanager
    def with_artifacts(self, config: Config, *, model: bool) -> Iterator[None]:
        """For as long as this is entered, the checkpoints that go to MLflow, or into its `model`, are here."""
        run = self.run_dir(config)
        found = [] if self._store is None else (needed if model else chosen)(config, run)
        try:
            for saved in found:
                remote.fetch(self._of(run), saved)
            yield
        finally:
            for saved in found:
                saved.path.unlink(missing_ok=True)

    def seize(self, config: Config) -> RunFolder:
        """Take a trial's run, however it stands: whoever writes to it stops."""
        run = self.run_dir(config)
        if self._store is None:
            claim(config, resume=True, overwrite=False)
        else:
            take_run(self._of(run), config)
            self.fetch(run)
        return take_lease(run)

    def copy_member(self, config: Config, donor: Config, epoch: int) -> None:
        """Give a member of a population the weights of another one after so many epochs; twice does no harm."""
        run, source = self.run_dir(config), self.run_dir(donor)
        if self._store is None:
            return copy_member(run, source, config, epoch)
        store = self._of(run)
        fork = insist(lambda: store.read("fork.json"))
        if fork is None or not is_copied(fork, epoch):
            insist(lambda: _copy(self._of(source), store, config, epoch))
            store.write("fork.json", mark_copied(epoch, donor.name))
        return None

    def _get(self, run: Path, *, ended: bool) -> None:
        store = self._of(run)
        with self._locks.setdefault(run, threading.Lock()):
            log = self._logs.get(run)
            if log is None:
                log = self._logs[run] = remote.read_log(store)
            else:
                newest = log.lease
                while store.exists(remote.lease_name(newest + 1)):
                    newest += 1
                remote.follow(log, store, newest)
            remote.lay_out(log, run)
            if ended or not (run / "config.yaml").exists():
                self._get_documents(store, run)
            if ended:
                del self._logs[run]

    def _get_documents(self, store: Store, run: Path) -> None:
        # what the driver itself has told MLflow is newer than what it has put there
        wanted = [name for name in remote.DOCUMENTS if name != "mlflow.json" or not (run / name).exists()]
        for name, data in zip(wanted, store.read_all(wanted), strict=True):
            if data is not None:
                write_atomic(run / name, data)
            elif name == "result.json":
                (run / name).unlink(missing_ok=True)

    def _of(self, run: Path) -> Store:
        assert self._store is not None
        return self._store / str(run.relative_to(self.path))

    @staticmethod
    def _at_once(act: Callable[[Path], None], runs: tuple[Path, ...]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(act, runs))


class Sender:
    """Sends the events of a log, each before it takes effect; an object is written anew until it is full."""

    def __init__(self, write: Callable[[str, bytes], None], store: Store, hold: Hold | None, log: Path) -> None:
        assert hold is not None
        self._write, self._log = write, log
        self._store, self._lease = store / log.stem, hold.number
        self._number, self._start, self._lines = 0, 0, b""

    def send(self, line: str) -> None:
        """One more; `RunFailed` if the store does not take it, `TakenOver` if another driver has the sweep."""
        first = self._number == 0 and not self._lines
        lines = (self._log.read_bytes() if first else self._lines) + line.encode()
        name = remote.entry_name(self._lease, self._number)
        data = remote.entry(Head(self._start, [], None, None), lines)
        insist(lambda: self._write(f"{self._log.stem}/{name}", data))
        self._lines = lines
        if len(lines) >= ENTRY:
            self._number, self._start, self._lines = self._number + 1, self._start + len(lines), b""
        if first:  # this entry has all that earlier drivers have said
            listed = [f"log/{item.name}" for item in insist(lambda: self._store.list("log"))]
            self._store.delete(*(old for old in listed if old < name))


# ------------------------------------------------------------------------------------------- taking a sweep


def open_folder(sweep: Sweep, *, anew: bool) -> tuple[Sweep, SweepFolder]:
    """Become the sweep's driver, with its folder here; of one in a store what it says is got, unless it begins `anew`.

    `UserError` if another driver is faster.
    """
    store = sweep.place
    if not isinstance(store, Store):
        return sweep, SweepFolder(sweep.folder)
    try:
        hold = remote.take(store)
    except TakenOver as err:
        raise UserError(f"{store}: another process has begun this sweep at this moment") from err
    if anew:
        clear(store)
    path = new_copy(store, hold)
    if not anew:
        get_sweep(store, path, hold.number)
    return replace(sweep, copy=path), SweepFolder(path, store, hold)


def new_copy(store: Store, hold: Hold) -> Path:
    """An empty folder for as long as this process lives; those of killed drivers are removed."""
    top = remote.scratch_of(store)
    for old in top.glob("*-*"):
        if not is_running(int(old.name.rpartition("-")[2])):
            shutil.rmtree(old, ignore_errors=True)
    path = top / f"{hold.number:06d}-{os.getpid()}"
    path.mkdir(parents=True)
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def get_sweep(store: Store, path: Path, lease: int) -> None:
    """Lay out what a sweep in a store says of itself; `lease` is the newest one."""
    changed = {item.name: item.changed for item in store.list()}
    for name, data in zip(DOCUMENTS, store.read_all(list(DOCUMENTS)), strict=True):
        if data is not None:
            write_atomic(path / name, data)
            if (when := changed.get(name)) is not None:
                os.utime(path / name, ns=(when, when))
    for name in LOGS:
        if journal := remote.read_log(store / name, lease).journal:
            write_atomic(path / f"{name}.jsonl", journal)


def clear(store: Store) -> None:
    """Remove what an earlier sweep of this name has left, but for leases: their numbers go on, and whoever holds one of
    a trial stops.
    """
    for folder in ("trials", "winners"):
        runs = [item.name for item in store.list(folder) if item.is_folder]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda run, folder=folder: remote.take(store / folder / run), runs))
    there = [item.name for item in store.list(deep=True) if not item.is_folder]
    store.delete(*(name for name in there if "leases" not in name.split("/")[:-1] and name != "sweep.yaml"))


def take_run(store: Store, config: Config) -> Hold:
    """The newest lease of a trial's run, which is there from now on."""
    while True:
        with suppress(TakenOver):  # its worker has begun at this moment
            hold = insist(lambda: remote.take(store))
            break
    if store.read("config.yaml") is None:
        store.write("config.yaml", dump_config(config).encode())
    return hold


def _copy(source: Store, target: Store, config: Config, epoch: int) -> None:
    """The donor's checkpoint becomes the member's only one; its journal stays."""
    hold = take_run(target, config)
    head = remote.read_log(source).head
    wanted = next((one for one in head.checkpoints if (one["epoch"], one["batch"]) == (epoch, 0)), None)
    if wanted is None:
        raise RunFailed(f"{source}: the checkpoint of epoch {epoch} is not there")
    name = remote.object_name(wanted["step"], wanted["sha256"])
    target.system.copy_file(source.path(name), target.path(name))
    journal = remote.read_log(target).journal
    target.write(remote.entry_name(hold.number, 0), remote.entry(Head(0, [wanted], None, head.data), journal))
    target.write("config.yaml", dump_config(config).encode())
