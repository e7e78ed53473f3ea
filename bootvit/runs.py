"""The run directory: its files, who may write to it, and what state it is in."""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bootvit import checkpoint
from bootvit.config import Config, dump_config, flatten
from bootvit.data.facts import DataFacts
from bootvit.errors import RunFailed, UserError
from bootvit.files import read_json, write_atomic, write_json
from bootvit.load import load_config
from bootvit.result import Result, read_result

# what may differ between a run and its resumption: where and how fast it runs, not what it computes
FREE_ON_RESUME = (
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
    """

    path: Path
    lease: str | None = None
    group: str | None = None

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
    def result(self) -> Path:
        """Written at the end."""
        return self.path / "result.json"

    def check_lease(self) -> None:
        """Raise `RunFailed` if another driver has taken the run: workers of a killed driver live on for seconds."""
        path = self.path / "lease.json"
        held = read_json(path) if path.exists() else {}
        if self.lease is None or held.get("id") != self.lease or self.group not in (None, held.get("group")):
            raise RunFailed(f"{self.path}: another process has taken over this run; this one stops")

    def for_this_group(self) -> RunFolder:
        """The folder for a new group of the driver's workers, which takes it from the one before."""
        self.check_lease()
        mine = replace(self, group=secrets.token_hex(8))
        write_json(self.path / "lease.json", {"id": self.lease, "group": mine.group})
        return mine

    def write_result(self, result: Result) -> None:
        """Replace result.json."""
        self.check_lease()
        write_json(self.result, result)


State = Literal["absent", "unfinished", "finished"]


def run_state(path: Path) -> State:
    """What is there under a run's name."""
    folder = RunFolder(path)
    if not folder.config.exists():
        return "absent"
    finished = folder.result.exists() and read_result(folder.result)["status"] == "finished"
    return "finished" if finished else "unfinished"


def claim(config: Config, *, resume: bool, overwrite: bool) -> tuple[RunFolder, State]:
    """Take the run's folder for writing; raises `UserError` where that would destroy or mix something."""
    path = config.run_dir
    state = run_state(path)
    if state != "absent" and not (resume or overwrite):
        raise UserError(f"{path}: a run of this name exists ({state}): --resume, --overwrite, or name=… for another")
    if state == "absent" and path.exists() and any(not child.name.startswith(".") for child in path.iterdir()):
        raise UserError(f"{path}: exists and is not a run; choose another name= or ray.storage_path=")
    if state != "absent" and overwrite and not resume:
        shutil.rmtree(path)
        state = "absent"
    if state != "absent":
        check_same_run(config, path)
    if state == "finished":
        return RunFolder(path), state
    path.mkdir(parents=True, exist_ok=True)
    # the config first: a process that is killed between the two leaves an unfinished run, not a foreign folder
    write_atomic(path / "config.yaml", dump_config(config).encode())
    folder = take_lease(path)
    folder.result.unlink(missing_ok=True)
    return folder, state


def take_lease(path: Path) -> RunFolder:
    """Become the only writer of a run: whoever held its lease before stops at the next write."""
    folder = RunFolder(path, secrets.token_hex(8))
    write_json(path / "lease.json", {"id": folder.lease})
    return folder


def check_same_run(config: Config, path: Path) -> None:
    """Refuse to resume under a config that computes something else."""
    was, now = flatten(load_config(str(path / "config.yaml"))), flatten(config)
    changed = [k for k in {**now, **was} if was.get(k) != now.get(k) and not k.startswith(FREE_ON_RESUME)]
    if changed:
        new, old = (", ".join(f"{key}={one.get(key)}" for key in changed) for one in (now, was))
        raise UserError(f"{path}: cannot resume with {new}: the run was started with {old}")


def known_data(path: Path) -> DataFacts | None:
    """What a run knows of its data; None before its first checkpoint."""
    saved = checkpoint.newest(path / "checkpoints")
    return DataFacts.from_dict(checkpoint.load(saved)["data"]) if saved else None


def check_same_data(config: Config, facts: DataFacts) -> None:
    """Refuse to resume a run on other images or classes than its own; they may lie elsewhere."""
    known = known_data(config.run_dir) if run_state(config.run_dir) != "absent" else None
    if known is not None:
        known.check_same(facts, f"{config.run_dir}: cannot resume")


def open_run(name: str) -> tuple[Config, RunFolder]:
    """A run by its folder, or by its name below ./runs."""
    for path in (Path(name), Path("runs") / name):
        if (path / "config.yaml").is_file():
            return load_config(str(path / "config.yaml")), RunFolder(path.resolve())
    raise UserError(f"{name}: no run is there (no config.yaml in it)")


RAY = ".ray--4194304"  # what Ray Train's own folder adds to a run's name, with the largest process number
INSIDE = 300  # bytes that the paths inside of a run's folder add to its own


def check_storage(config: Config) -> None:
    """Refuse a place where the run's folder cannot be made, before anything is taken.

    `UserError` for one below a file, or too long; `RunFailed` for a folder that may not be written.
    """
    path, given = config.run_dir, f"ray.storage_path={config.ray.storage_path}"
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
