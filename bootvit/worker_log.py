"""What every worker says, kept with its run: `<run>/logs/attempt-NN/rank-N.log`, each written by its worker alone.

Ray keeps what a worker prints on the worker's own node, for as long as the node is there. Beside the run it outlives
the cluster, and needs none to be read.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

import torch.distributed as dist

from bootvit.errors import UserError
from bootvit.learner import World
from bootvit.remote import fetch_folder
from bootvit.runs import RunFolder

LOGS = "logs"


@contextmanager
def worker_log(folder: RunFolder, world: World) -> Iterator[None]:
    """Copy what this worker prints into its log, warnings included, with where it runs and how it ends.

    Every worker of the attempt must enter this together. `UserError` on a node that does not see the run's folder.
    """
    check_seen(folder.config)
    attempt = folder.path / LOGS / f"attempt-{_new_attempt(folder, world):02d}"
    attempt.mkdir(parents=True, exist_ok=True)
    with (attempt / f"rank-{world.rank}.log").open(
        "a", buffering=1, encoding="utf-8", errors="backslashreplace"
    ) as log:
        log.write(f"{_now()} began: {_place(world)}\n")
        out, err = (cast(TextIO, _Copied(stream, log)) for stream in (sys.stdout, sys.stderr))
        try:
            with redirect_stdout(out), redirect_stderr(err):
                yield
        except (GeneratorExit, KeyboardInterrupt):  # a sweep has stopped its trial, or the run was asked to stop
            log.write(f"{_now()} stopped\n")
            raise
        except BaseException:
            log.write(f"{traceback.format_exc()}{_now()} failed\n")
            raise
        log.write(f"{_now()} ended\n")


def check_seen(file: Path) -> None:
    """Refuse to run on a node that does not see a file which the driver has written, such as a node that came later."""
    if not file.is_file():
        raise UserError(
            f"ray.storage_path: node {platform.node()} does not see {file}: give a folder that every node sees, "
            "such as one on a network file system"
        )


def read_logs(folder: RunFolder, rank: int | None = None, attempt: int | None = None) -> Iterator[str]:
    """The lines of the workers' logs of one attempt, by default the newest; `UserError` for what is not there."""
    run_dir = folder.path
    if folder.store is not None:
        fetch_folder(folder.store, run_dir, "logs")
    attempts = _numbered(run_dir / LOGS, r"attempt-(\d+)")
    if not attempts:
        raise UserError(f"{folder}: no worker has left a log; a run with --local says everything on its terminal")
    number = max(attempts) if attempt is None else attempt
    if number not in attempts:
        raise UserError(f"--attempt {number}: {folder} has {_listed('attempt', attempts)}")
    ranks = _numbered(attempts[number], r"rank-(\d+)\.log")
    if rank is not None and rank not in ranks:
        raise UserError(f"--rank {rank}: attempt {number} of {folder} has {_listed('rank', ranks)}")
    for name, path in sorted(ranks.items()):
        if rank in (None, name):
            yield f"==> {path.relative_to(run_dir)} <=="
            yield from path.read_text(encoding="utf-8").splitlines()


class _Copied:
    """A stream whose text also goes to a log."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream, self._log = stream, log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """To both."""
        self._log.write(text)
        return self._stream.write(text)


def _new_attempt(folder: RunFolder, world: World) -> int:
    """One more than there have been; rank 0 counts, and tells the others."""
    if folder.hold:  # a trial's only process has no lease of a group
        known = (folder.hold.attempt if folder.hold.is_group else folder.hold.number) - 1
    else:
        known = max(_numbered(folder.path / LOGS, r"attempt-(\d+)"), default=0)
    number = [1 + known if world.rank == 0 else 0]
    if world.size > 1:
        dist.broadcast_object_list(number, src=0)
    return number[0]


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """{number in its name: path} of what lies in a folder; none where there is no folder."""
    found = ((re.fullmatch(pattern, path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    return {int(match[1]): path for match, path in found if match}


def _listed(kind: str, numbers: Iterable[int]) -> str:
    return f"{kind} {', '.join(map(str, sorted(numbers))) or 'none'}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _place(world: World) -> str:
    """Where this worker is, and how Ray's own files of it are found while the cluster is there."""
    here = f"rank {world.rank} of {world.size} on {platform.node()}, process {os.getpid()}, {world.device}"
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():  # asking it would start one
        return here
    context = ray.get_runtime_context()
    own = f"ray logs cluster 'worker-{context.get_worker_id()}*' --node-id {context.get_node_id()}"
    return f"{here}, address {ray.util.get_node_ip_address()}; Ray's own files: {own}"
