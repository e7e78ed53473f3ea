"""Which of a run's checkpoints become artifacts in MLflow, and in which form."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bootvit import checkpoint
from bootvit.checkpoint import Saved
from bootvit.config import Config
from bootvit.result import read_result
from bootvit.tracking.journal import read_journal


def chosen(config: Config, run_dir: Path) -> list[Saved]:
    """The checkpoints that `tracking.checkpoints` says, of those in the folder of a run that has finished.

    `best` is that of the highest held-out accuracy of the run's first network, the newer of two equal ones; where
    nothing is held out it is the final one, since the test set must not choose.
    """
    saved = checkpoint.described(run_dir / "checkpoints")
    if config.tracking.checkpoints == "none" or not saved or not (saved[-1].final or ended_early(config, run_dir)):
        return []
    if config.tracking.checkpoints == "all":
        return saved
    metric = f"held_out/{config.networks[0]}/top1"
    scores = {r.step: r.value for r in read_journal(run_dir / "metrics.jsonl")[0] if r.name == metric}
    return [max(saved, key=lambda one: (scores.get(one.step, -1.0), one.step))]


def ended_early(config: Config, run_dir: Path) -> bool:
    """Whether `schedule.patience` has ended the run: its last checkpoint was written before that was known."""
    result = run_dir / "result.json"
    return config.schedule.patience is not None and result.exists() and read_result(result)["status"] == "finished"


def needed(config: Config, run_dir: Path) -> list[Saved]:
    """Those checkpoints, and the final one, of which the model is made."""
    saved = checkpoint.described(run_dir / "checkpoints")[-1:]
    model = [one for one in saved if config.tracking.model and (one.final or ended_early(config, run_dir))]
    return [*chosen(config, run_dir), *model]


def size_of(config: Config, run_dir: Path) -> int:
    """Bytes of what is sent of them, at most: without the optimiser's moments it is less."""
    return sum(one.path.stat().st_size for one in needed(config, run_dir) if one.path.exists())


@contextmanager
def files_of(config: Config, saved: Saved) -> Iterator[list[Path]]:
    """What is uploaded of a checkpoint: its weights as a file made for it, or, with `tracking.moments`, itself."""
    if not checkpoint.verify(saved):
        print(f"bootvit: {saved.path} is damaged or gone: it is not in MLflow", file=sys.stderr)
        yield []
    elif config.tracking.moments:
        yield [saved.path, saved.path.with_suffix(".json")]
    else:
        from bootvit.weights import weights_only  # with timm, which a journal does not need

        with tempfile.TemporaryDirectory(dir=saved.path.parent.parent, prefix=".upload-") as folder:
            yield [weights_only(saved, Path(folder))]
