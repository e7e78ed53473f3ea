"""How a member of a population takes over another one's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bootvit import checkpoint
from bootvit.config import Config, dump_config
from bootvit.files import read_json, write_atomic, write_json


def copy_member(run_dir: Path, donor_dir: Path, config: Config, epoch: int) -> None:
    """Put the donor's checkpoint and the new config in a member's place; done twice, it does nothing.

    It may be cut anywhere and is then done again: the new checkpoints take the old ones' place as a folder, and
    `fork.json` is written last: only with it the copy has happened.
    """
    mark = run_dir / "fork.json"
    if mark.exists() and is_copied(mark.read_bytes(), epoch):
        return
    saved = next(s for s in checkpoint.described(donor_dir / "checkpoints") if (s.epoch, s.batch) == (epoch, 0))
    old, new = run_dir / "checkpoints", run_dir / ".checkpoints.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    shutil.copyfile(saved.path, new / saved.path.name)
    description = saved.path.with_suffix(".json")
    write_json(new / description.name, read_json(description))
    if old.exists():
        shutil.rmtree(old)
    new.rename(old)
    write_atomic(run_dir / "config.yaml", dump_config(config).encode())
    write_atomic(mark, mark_copied(epoch, donor_dir.name))


def mark_copied(epoch: int, donor: str) -> bytes:
    """`fork.json`."""
    return f"{json.dumps({'epoch': epoch, 'donor': donor})}\n".encode()


def is_copied(mark: bytes, epoch: int) -> bool:
    """Whether the copy of so many epochs has happened."""
    return bool(json.loads(mark)["epoch"] >= epoch)
