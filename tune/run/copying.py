"""How a member of a population takes over another one's weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from bootvit import checkpoint
from bootvit.config import Config, dump_config


def copy_member(run_dir: Path, donor_dir: Path, config: Config, epoch: int) -> None:
    """Put the donor's checkpoint and the new config in a member's place; done twice, it does nothing.

    `fork.json` is written last: only with it the copy has happened.
    """
    mark = run_dir / "fork.json"
    if mark.exists() and checkpoint.read_json(mark)["epoch"] >= epoch:
        return
    saved = next(s for s in checkpoint.described(donor_dir / "checkpoints") if s.epoch == epoch)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    shutil.copyfile(saved.path, run_dir / "checkpoints" / saved.path.name)
    description = saved.path.with_suffix(".json")
    checkpoint.write_json(run_dir / "checkpoints" / description.name, checkpoint.read_json(description))
    checkpoint.write_atomic(run_dir / "config.yaml", dump_config(config).encode())
    checkpoint.write_json(mark, {"epoch": epoch, "donor": donor_dir.name})
