"""Which settings are best: by the mean over their seeds of the selection metric, on held-out images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

from tune.decide.log import Trial
from tune.spec.schema import Sweep

WORST = 1e30  # stands for what is no number, or infinite: a log and JSON hold it, and nothing measured is as bad


def worst(sweep: Sweep) -> float:
    """The value of a trial whose metric is no longer a number."""
    return -WORST if sweep.file.select.best == "max" else WORST


def is_number(value: float | None) -> bool:
    """Whether something was measured."""
    return value is not None and abs(value) < WORST


@dataclass(frozen=True)
class Score:
    """How well a setting did."""

    trials: tuple[Trial, ...]  # those of its seeds that finished, lowest seed first
    mean: float
    sd: float | None  # None for one seed


def scores(sweep: Sweep, trials: Iterable[Trial]) -> list[Score]:
    """The settings of these trials that have a finished trial, best first.

    A setting of which more seeds finished goes before one with fewer: early stopping leaves the lucky seeds of a bad
    setting, whose mean says nothing. A seed whose metric is no number has not finished in this sense.
    """
    by_setting: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.status == "finished" and is_number(trial.value):
            key = trial.spec.id if sweep.file.algorithm == "pbt" else trial.spec.setting
            by_setting.setdefault(key, []).append(trial)
    sign = -1 if sweep.file.select.best == "max" else 1
    found = [score(own) for own in by_setting.values()]
    return sorted(found, key=lambda s: (-len(s.trials), sign * s.mean, s.trials[0].spec.id))


def score(trials: list[Trial]) -> Score:
    """Mean and standard deviation over the trials of one setting."""
    ordered = tuple(sorted(trials, key=lambda trial: trial.spec.seed))
    values = [trial.value for trial in ordered if trial.value is not None]
    return Score(ordered, fmean(values), stdev(values) if len(values) > 1 else None)


class Told(NamedTuple):
    """What a study was told of a setting."""

    setting: str  # canonical
    value: float | None  # None: nothing was measured
    stopped_at: int | None  # epochs, where no seed of it has finished


def summary(setting: str, trials: Sequence[Trial], worst: float | None) -> Told:
    """The mean of the seeds that finished and of those that were stopped; what is no number counts as the worst."""
    ended = [trial for trial in trials if trial.status in ("finished", "stopped") and trial.value is not None]
    values = [trial.value if is_number(trial.value) else worst for trial in ended]
    known = [value for value in values if value is not None]
    finished = any(trial.status == "finished" for trial in ended)
    stopped_at = None if finished else min((trial.epochs for trial in ended), default=None)
    return Told(setting, fmean(known) if known else None, stopped_at)
