"""The run directory: its files, who may write to it, and what state it is in."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bootvit import checkpoint, remote
from bootvit.addresses import is_address
from bootvit.config import Config, dump_config, flatten, parse_yaml
from bootvit.data.facts import DataFacts
from bootvit.errors import RunFailed, UserError
from bootvit.files import PREDICTIONS, read_json, remove_parts, write_atomic, write_json
from bootvit.load import load_config, make_config
from bootvit.mirror import mirrored
from bootvit.remote import Hold, TakenOver
from bootvit.result import Result, read_result
from bootvit.storage import Place, Store, place_at, read_at
from bootvit.tracking.artifacts import needed

# what may differ between a run and its resumption: where and how fast it runs, not what it computes
FREE_ON_RESUME = (
    "imports",
    "on_epoch",
    "name",
    "ray.",
    "tracking.",
    "checkpoint.",
    "data.root",
    "data.workers",
    "data.eval_batch_size",
    "compile",
    "model.checkpoint_blocks",
)


@dataclass(frozen=True)
class RunFolder:
    """`<ray.storage_path>/<name>/`. `lease` is the driver's id; a folder without it is only read.

    The workers that a driver starts have one more, `group`: those that it takes for dead, because they are cut off
    from it, stop when it has started others.

    Of a run in an object store, `store`, `path` is this node's working copy, with a lease of its own kind (`hold`)
    where it may be written.
    """

    path: Path
    lease: str | None = None
    group: str | None = None
    store: Store | None = None
    hold: Hold | None = None

    def __str__(self) -> str:
        return str(self.place)

    @property
    def place(self) -> Place:
        """Where the run is."""
        return self.store or self.path

    @property
    def address(self) -> str:
        """The same, as it is given to another process."""
        return self.store.address if self.store else str(self.path)

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def journal(self) -> Path:
        """One JSON record a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The newest `checkpoint.keep`, and the best if that is asked for."""
        return self.path / "checkpoints"

    @property
    def predictions(self) -> Path:
        """What the last evaluation has answered, image by image."""
        return self.path / PREDICTIONS

    @property
    def result(self) -> Path:
        """Written at the end."""
        return self.path / "result.json"

    def check_lease(self) -> None:
        """Raise `RunFailed` if another driver has taken the run: workers of a killed driver live on for seconds."""
        path = self.path / "lease.json"
        held = read_json(path) if path.exists() else {}
        if self.lease is None or held.get("id") != self.lease or self.group not in (None, held.get("group")):
            raise RunFailed(f"{self}: another process has taken over this run; this one stops")

    def for_this_group(self) -> RunFolder:
        """The folder for a new group of the driver's workers, which takes it from the one before."""
        if self.hold is not None:
            return self._copy_for_group(self.hold)
        self.check_lease()
        mine = replace(self, group=secrets.token_hex(8))
        write_json(self.path / "lease.json", {"id": self.lease, "group": mine.group})
        return mine

    def _copy_for_group(self, driver: Hold) -> RunFolder:
        hold = driver.for_group()
        return replace(self, path=remote.new_scratch(hold), hold=hold)

    def in_store(self, told: Mapping[str, Any]) -> RunFolder:
        """The folder with the driver's hold of it, as it was `told`."""
        store = Store(told["store"])
        return replace(self, store=store, hold=Hold(**{**told, "store": store}))

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Keep a driver's copy of a run in a store as its workers' log there says."""
        if self.hold is None:
            yield
            return
        with remote.followed(self.hold, self.path):
            yield

    def fetch_artifacts(self, config: Config) -> None:
        """Get the checkpoints that the driver of a run in a store sends to MLflow."""
        if self.store is not None:
            for saved in needed(config, self.path):
                remote.fetch(self.store, saved)

    def for_other_worker(self) -> RunFolder:
        """The folder of a worker that is not the first: of a run in a store, one for its log alone."""
        if self.store is None:
            return self
        config = self.store.read("config.yaml") or b""
        return replace(self, path=remote.bare_scratch(self.store, config), lease=None, hold=None)

    @contextmanager
    def sent(self) -> Iterator[Callable[[], None]]:
        """For the process that trains: a run in a store is got from there first, and what is written here is sent.

        What is given is called where training is to wait until the store has all of it. `RunFailed` if it has not got
        it then, or at the end. A local run is where it is to be.
        """
        if self.store is None:
            yield lambda: None
            return
        known = None
        if self.hold is not None:
            log = remote.read_log(self.store)
            remote.adopt(self.hold, self.path, log)
            remote.fetch_newest(self.store, self.path)
            known = log.head
        with mirrored(self.store, self.path, self.hold, known) as mirror:
            yield mirror.flush

    def publish(self, name: str) -> None:
        """Put one of the small files of a run in a store there; `TakenOver` if another process writes to it now."""
        if self.store is None or not (self.path / name).exists():
            return
        if self.hold is not None:
            self.hold.check()
        self.store.write(name, (self.path / name).read_bytes())

    def keep_export(self, made: Path) -> Path | Store:
        """Put what was exported into a run's folder where the run is; returns where that is."""
        if self.store is None:
            return made
        for file in sorted(path for path in made.parent.rglob("*") if path.is_file()):
            self.store.write(str(file.relative_to(self.path)), file)
        return self.store / str(made.relative_to(self.path))

    def leave(self) -> None:
        """Remove this process's copy of a run in a store, unless it holds more than is there."""
        if self.store is not None and not (self.hold is not None and self.hold.unsent):
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # another process's is beside it
                self.path.parent.rmdir()

    def write_result(self, result: Result) -> None:
        """Replace result.json; nothing is left in a finished run of files that killed processes were writing."""
        self.check_lease()
        write_json(self.result, result)
        if result["status"] == "finished":
            remove_parts(self.path, before=(self.path / "lease.json").stat().st_mtime)


State = Literal["absent", "unfinished", "finished"]


def place_of(config: Config) -> Place:
    """Where a run is, or will be."""
    top = place_at(config.ray.storage_path)
    return top / config.name


def run_state(place: Place) -> State:
    """What is there under a run's name."""
    if read_at(place, "config.yaml") is None:
        return "absent"
    result = read_at(place, "result.json")
    if result is None:
        return "unfinished"
    if isinstance(place, Path):
        return "finished" if read_result(place / "result.json")["status"] == "finished" else "unfinished"
    return "finished" if json.loads(result)["status"] == "finished" else "unfinished"


def claim(config: Config, *, resume: bool, overwrite: bool) -> tuple[RunFolder, State]:
    """Take the run's folder for writing; raises `UserError` where that would destroy or mix something."""
    place = place_of(config)
    state = run_state(place)
    if state != "absent" and not (resume or overwrite):
        raise UserError(f"{place}: a run of this name exists ({state}): --resume, --overwrite, or name=… for another")
    if state == "absent" and is_foreign(place):
        raise UserError(f"{place}: exists and is not a run; choose another name= or ray.storage_path=")
    anew = state != "absent" and overwrite and not resume
    if state != "absent" and not anew:
        check_same_run(config, place)
        if state == "finished":
            return found_run(place), state
    folder = _claim_in_store(config, place, anew) if isinstance(place, Store) else _claim_here(config, place, anew)
    return folder, "absent" if anew else state


def is_foreign(place: Place) -> bool:
    """Whether something is there; leases without a run are left by a driver that was killed at once."""
    if isinstance(place, Store):
        return any(not item.is_folder and not item.name.startswith(".") for item in place.list())
    return place.exists() and any(not child.name.startswith(".") for child in place.iterdir())


def _claim_here(config: Config, path: Path, anew: bool) -> RunFolder:
    if anew:
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    # the config first: a process that is killed between the two leaves an unfinished run, not a foreign folder
    write_atomic(path / "config.yaml", dump_config(config).encode())
    folder = take_lease(path)
    folder.result.unlink(missing_ok=True)
    return folder


def _claim_in_store(config: Config, store: Store, anew: bool) -> RunFolder:
    try:
        hold = remote.take(store)
    except TakenOver as err:
        raise UserError(f"{err}: wait for it, stop it, or --resume --take-over") from err
    if anew:  # the leases stay: their numbers go on, so that no name is ever used twice
        there = [item.name for item in store.list(deep=True) if not item.is_folder]
        store.delete(*(name for name in there if not name.startswith("leases/") and name != "config.yaml"))
        shutil.rmtree(remote.scratch_of(store), ignore_errors=True)
    store.write("config.yaml", dump_config(config).encode())
    store.delete("result.json")
    return RunFolder(remote.new_scratch(hold), hold.id, store=store, hold=hold)


def take_lease(path: Path) -> RunFolder:
    """Become the only writer of a run: whoever held its lease before stops at the next write."""
    folder = RunFolder(path, secrets.token_hex(8))
    write_json(path / "lease.json", {"id": folder.lease})
    return folder


def take_again(folder: RunFolder) -> RunFolder:
    """The same for a run that has ended, or is to."""
    if folder.store is None:
        return take_lease(folder.path)
    hold = remote.take(folder.store)
    return replace(folder, path=remote.new_scratch(hold), lease=hold.id, hold=hold)


def check_same_run(config: Config, place: Place) -> None:
    """Refuse to resume under a config that computes something else."""
    was, now = flatten(config_at(place)), flatten(config)
    changed = [k for k in {**now, **was} if was.get(k) != now.get(k) and not k.startswith(FREE_ON_RESUME)]
    if changed:
        new, old = (", ".join(f"{key}={one.get(key)}" for key in changed) for one in (now, was))
        raise UserError(f"{place}: cannot resume with {new}: the run was started with {old}")


def config_at(place: Place) -> Config:
    """A run's own config."""
    if isinstance(place, Path):
        return load_config(str(place / "config.yaml"))
    at = f"{place}/config.yaml"
    return make_config(parse_yaml((place.read("config.yaml") or b"").decode(errors="replace"), at), at)


def found_run(place: Place) -> RunFolder:
    """A run that is only read; of one in a store, what its log and its documents say, without weights."""
    if isinstance(place, Store):
        return RunFolder(remote.reading_copy(place), store=place)
    return RunFolder(place)


def known_data(folder: RunFolder) -> DataFacts | None:
    """What a run knows of its data; None before its first checkpoint."""
    if folder.store is not None:
        data = remote.read_log(folder.store).head.data
        return DataFacts.from_dict(data) if data else None
    saved = checkpoint.newest(folder.checkpoints)
    return DataFacts.from_dict(checkpoint.load(saved)["data"]) if saved else None


def check_same_data(folder: RunFolder, facts: DataFacts) -> None:
    """Refuse to resume a run on other images or classes than its own; they may lie elsewhere."""
    known = known_data(folder)
    if known is not None:
        known.check_same(facts, f"{folder}: cannot resume")


Weights = Literal["none", "newest", "best", "all"]


def open_run(name: str, weights: Weights = "none") -> tuple[Config, RunFolder]:
    """A run by its folder or its address, or by its name below ./runs; with those weights at hand."""
    if is_address(name):
        place = place_at(name)
        folder = found_run(place) if isinstance(place, Store) else RunFolder(place.resolve())
        if folder.store is None and not folder.config.is_file():
            raise UserError(f"{name}: no run is there (no config.yaml in it)")
        fetch_weights(folder, weights)
        return load_config(str(folder.config)), folder
    for path in (Path(name), Path("runs") / name):
        if (path / "config.yaml").is_file():
            return load_config(str(path / "config.yaml")), RunFolder(path.resolve())
    raise UserError(f"{name}: no run is there (no config.yaml in it)")


def fetch_weights(folder: RunFolder, weights: Weights) -> None:
    """Get checkpoints of a run in a store; `UserError` where there is none of the newest that is what was written."""
    if folder.store is None:
        return
    if weights == "newest" and remote.fetch_newest(folder.store, folder.path) is None:
        raise UserError(f"{folder}: no usable checkpoint in it")
    best = checkpoint.best_of(folder.checkpoints)
    if weights == "best" and (best is None or not remote.fetch(folder.store, best)):
        raise UserError(f"{folder}: --best: no checkpoint was kept as the best: train with checkpoint.best=true")
    if weights == "all":
        for saved in checkpoint.described(folder.checkpoints):
            remote.fetch(folder.store, saved)


RAY = ".ray--4194304"  # what Ray Train's own folder adds to a run's name, with the largest process number
INSIDE = 300  # bytes that the paths inside of a run's folder add to its own


def check_storage(config: Config) -> None:
    """Refuse a place where the run's folder cannot be made, before anything is taken.

    `UserError` for one below a file, or too long; `RunFailed` for a folder that may not be written, or a store that
    does not answer.
    """
    place, given = place_of(config), f"ray.storage_path={config.ray.storage_path}"
    if isinstance(place, Store):
        return place.check()
    path = place
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        if there == path:
            raise UserError(f"{path}: exists and is not a run; choose another name= or ray.storage_path=")
        what = "a link that leads nowhere" if there.is_symlink() else "not a folder"
        raise UserError(f"{given}: {there} is {what}; give a folder, which may be new")
    most, longest = os.pathconf(there, "PC_NAME_MAX"), os.pathconf(there, "PC_PATH_MAX")
    if len(config.name) + len(RAY) > most:
        raise UserError(f"name={config.name}: at most {most - len(RAY)} characters in {there}")
    parts = [os.fsencode(part) for part in path.parts]
    if max(map(len, parts)) > most or len(os.fsencode(path)) + INSIDE > longest:
        raise UserError(f"{given[:200]}...: this path is too long for {there}: give a shorter one")
    if there != path and not os.access(there, os.W_OK | os.X_OK):
        raise RunFailed(f"{given}: {there} may not be written by this user; give another folder")
    return None
