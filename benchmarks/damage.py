"""What a run says and does when its storage fails or its newest checkpoint is damaged, and whether --resume mends it.

    python -m benchmarks.damage [--out FILE]

Every row is the real command on a file system of its own (a tmpfs: takes root). After what went wrong is put right, the
same command with --resume must end with bitwise the weights of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from bootvit import checkpoint
from bootvit.files import write_json
from bootvit.tracking import source_version

TRAIN = [
    *("train", "digits/vit", "--local", "name=run", "data.fraction=0.1", "data.batch_size=32", "model.vit.dropout=0.1"),
    *("schedule.epochs=8", "schedule.eval_every=8", "checkpoint.every_steps=3", "tracking.enabled=false"),
]


class Row(NamedTuple):
    """One line of the table."""

    what: str
    status: int  # of the command that met it
    said: str  # its last line on stderr, or what --resume said of a damaged file
    resumed: str  # "bitwise equal", or what is wrong


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def start(storage: Path, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "bootvit", *TRAIN, f"ray.storage_path={storage}", *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    _, err = process.communicate(timeout=1800)
    return process.returncode, err.strip().splitlines() or [""]


def weights(run: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.newest(run / "checkpoints")
    assert saved is not None
    assert saved.final
    return dict(checkpoint.load(saved)["learner"]["networks"])


def resume(storage: Path, whole: dict[str, torch.Tensor]) -> tuple[str, list[str]]:
    """What --resume comes to, and its stderr."""
    status, err = finish(start(storage, "--resume"))
    if status:
        return f"status {status}: {err[-1]}", err
    found = weights(storage / "run")
    equal = all(torch.equal(found[name], value) for name, value in whole.items())
    return "bitwise equal" if equal else "OTHER WEIGHTS", err


@contextmanager
def small_disk(size: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        mount(folder, f"size={size}", "-t", "tmpfs", "tmpfs")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def mount(folder: str | Path, options: str, *what: str) -> None:
    subprocess.run(["mount", "-o", options, *what, str(folder)], check=True)


def kill(process: subprocess.Popen[str], run: Path) -> None:
    """SIGKILL once the run has two checkpoints."""
    while len(checkpoint.described(run / "checkpoints")) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()


def full_disk(whole: dict[str, torch.Tensor], size: int) -> Row:
    """The first checkpoint fits, the second does not."""
    with small_disk(f"{size * 3 // 2}") as disk:
        status, err = finish(start(disk))
        mount(disk, "remount,size=100m")
        return Row("disk full at a checkpoint", status, shown(err[-1], disk), resume(disk, whole)[0])


def read_only(whole: dict[str, torch.Tensor]) -> Row:
    """The storage of a run that was killed has become read-only when it is to go on."""
    with small_disk("100m") as disk:
        kill(start(disk), disk / "run")
        mount(disk, "remount,ro")
        status, err = finish(start(disk, "--resume"))
        mount(disk, "remount,rw")
        return Row("read-only storage", status, shown(err[-1], disk), resume(disk, whole)[0])


def damaged(what: str, whole: dict[str, torch.Tensor], damage: Callable[[Path], None]) -> Row:
    """The newest checkpoint of a run that was killed is spoilt."""
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        kill(start(storage), storage / "run")
        saved = checkpoint.described(storage / "run" / "checkpoints")
        assert len(saved) == 2
        damage(saved[-1].path)
        resumed, err = resume(storage, whole)
        if (storage / "ran").exists():
            resumed = "CODE FROM THE FILE WAS RUN"
        return Row(what, 0, shown(err[0], storage), resumed)


def shown(line: str, storage: Path) -> str:
    return line.replace(str(storage), "STORAGE")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def poison(path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(path.parents[2] / "ran")))


def main() -> None:
    """Make each thing go wrong and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        status, err = finish(start(Path(folder)))
        assert status == 0, err
        whole = weights(Path(folder) / "run")
        size = sum(path.stat().st_size for path in (Path(folder) / "run" / "checkpoints").iterdir()) // 2
    rows = [
        full_disk(whole, size),
        read_only(whole),
        damaged("newest checkpoint cut in half", whole, cut),
        damaged("one bit of it flipped", whole, flip),
        damaged("a malicious pickle in its place", whole, poison),
    ]
    for row in rows:
        print(f"{row.what}: status {row.status}: {row.said}\n    then --resume: {row.resumed}")
    if given.out:
        date = datetime.now(UTC).date().isoformat()
        write_json(given.out, {"date": date, "commit": source_version(), "rows": [row._asdict() for row in rows]})
    raise SystemExit(any(row.resumed != "bitwise equal" for row in rows))


if __name__ == "__main__":
    main()
