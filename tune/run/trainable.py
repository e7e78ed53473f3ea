"""What runs in a trial's process: Ray Tune's trainable around an attempt at the trial."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Generator
from typing import Any

from ray import tune

from tune.run.job import Job, Report


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """Runs a trial, an epoch a step."""

    @staticmethod
    def attempt(job: Job) -> Generator[Report, None, None]:
        """The trial; only now torch is imported, which takes seconds that an actor without a trial does not need."""
        from tune.run.trial import attempt

        return attempt(job)

    def setup(self, config: dict[str, Any]) -> None:
        """Only take note: Tune may set an actor up for a trial that another one runs already."""
        self._job = config["job"]
        self._run: Generator[Report, None, None] | None = None

    def step(self) -> dict[str, Any]:
        """One epoch; the result says whose it is."""
        job = Job(**json.loads(self._job))
        if self._run is None:
            self._run = self.attempt(job)
        report = next(self._run)
        name, value = job.config["name"], report.metrics.get(job.metric)
        return {**report.metrics, "trial": name, "epoch": report.epoch, "value": value, "over": report.done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run's own checkpoints are on disk."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: `attempt` goes on from the run's own."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial's actor."""
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Leave the trial where it is."""
        if self._run is not None:
            self._run.close()
            self._run = None
            release_memory()

    def __repr__(self) -> str:
        """With the trial's name: Ray's dashboard, its logs and the titles of processes show it."""
        return f"{type(self).__name__}({self.trial_id})"


def release_memory() -> None:
    """Give a GPU's cached memory back to the trials beside this one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
