"""Which running trials stop early: one ASHA for each group, so that trials of two groups never compete."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tune.schema import Sweep
from tune.space import Spec, get_value


class Stopper:
    """Ray Tune's ASHA, one per group; a function of the results in the order in which it was given them.

    After a crash the same results from the log, in the same order, make the same rungs.
    """

    def __init__(self, sweep: Sweep, epochs: int) -> None:
        self._sweep, self._epochs = sweep, epochs
        self._groups: dict[str, Any] = {}
        self._members: set[str] = set()

    def result(self, spec: Spec, epoch: int, value: float) -> bool:
        """Record a trial's value after so many epochs; whether the trial is to stop."""
        asha = self._group(spec)
        if asha is None:
            return False
        trial = SimpleNamespace(trial_id=spec.id)
        if spec.id not in self._members:
            self._members.add(spec.id)
            asha.on_trial_add(None, trial)
        verdict = asha.on_trial_result(None, trial, {"epoch": epoch, "value": value})
        return bool(verdict == "STOP")

    def _group(self, spec: Spec) -> Any:
        config = self._sweep.file.scheduler
        if config.name == "none":
            return None
        key = competition(self._sweep, spec)
        if key not in self._groups:
            from ray.tune.schedulers import AsyncHyperBandScheduler

            self._groups[key] = AsyncHyperBandScheduler(
                time_attr="epoch",
                metric="value",
                mode=self._sweep.file.select.mode,
                max_t=self._epochs,
                grace_period=config.grace_epochs,
                reduction_factor=config.reduction,
                stop_last_trials=False,  # a trial in its last epoch has nothing left to save
            )
        return self._groups[key]


def competition(sweep: Sweep, spec: Spec) -> str:
    """The trials that a trial is compared with while it runs: its group, and its fraction where that is a rung."""
    key = sweep.file.fidelity
    return spec.group if key is None else f"{spec.group} {key}={get_value(sweep, spec.overrides, key)}"
