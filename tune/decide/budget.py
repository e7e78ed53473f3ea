"""What a sweep may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tune.decide.log import Trials
from tune.spec.schema import BudgetConfig


class Spent(NamedTuple):
    """What counts beside the trials: the winners' tests by earlier drivers."""

    seconds: float = 0.0  # of the drivers
    held: float = 0.0  # seconds in which tests held their resources


NOTHING = Spent()


@dataclass(frozen=True)
class Budget:
    """Says when no new trial may start, and when those that run must stop."""

    config: BudgetConfig
    gpus: float  # of one trial
    tests: Spent = NOTHING

    def spent(self, trials: Trials, hours: float) -> str | None:
        """Why no new trial may start after so many hours of the driver's time; None if one may."""
        limit = self.config.trials
        if limit is not None and sum(trial.started for trial in trials.values()) >= limit:
            return f"budget.trials={limit} are started"
        return self.time_spent(trials, hours)

    def time_spent(self, trials: Trials, hours: float) -> str | None:
        """Which limit of time is reached; None if none is."""
        if self.config.hours is not None and hours + self.tests.seconds / 3600 >= self.config.hours:
            return f"budget.hours={self.config.hours:g} are spent"
        held = sum(trial.seconds for trial in trials.values()) + self.tests.held
        gpu_hours = held * self.gpus / 3600
        if self.config.gpu_hours is not None and gpu_hours >= self.config.gpu_hours:
            return f"budget.gpu_hours={self.config.gpu_hours:g} are spent"
        return None

    def must_stop(self, trials: Trials, hours: float) -> str | None:
        """Why a running trial must stop now; None if it may go on."""
        return self.time_spent(trials, hours) if self.config.at_end == "stop" else None
