"""Which running trials stop early: rules of their own for each group, so that trials of two groups never compete.

Every rule is a function of the results in the order in which it was given them: after a crash the same results from
the log make the same decisions. ASHA and the median rule decide as Ray Tune's do (a test compares them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Protocol

import numpy as np

from tune.decide.select import is_number
from tune.spec.schema import SchedulerConfig, Sweep
from tune.spec.space import Spec, get_value

NAMES = {"asha": "ASHA", "hyperband": "HyperBand", "median": "the median rule"}
MEDIAN_OF = 3  # other trials, at least, before one can be worse than their median


class Rule(Protocol):
    """Early stopping within one group; `score` is better when it is larger."""

    def result(self, name: str, epoch: int, score: float) -> bool:
        """Record a trial's score after so many epochs; whether the trial is to stop."""


class Halving:
    """Asynchronous successive halving (ASHA): at each rung a trial goes on if it is in the top 1/reduction so far."""

    def __init__(self, grace: int, epochs: int, reduction: float) -> None:
        self._reduction = reduction
        self.rungs: list[tuple[float, dict[str, float]]] = [(rung, {}) for rung in rungs(grace, epochs, reduction)]

    def result(self, name: str, epoch: int, score: float) -> bool:
        """Compare at the highest rung that the trial has reached, once."""
        reached = [recorded for rung, recorded in self.rungs if epoch >= rung]
        if not reached or name in reached[-1]:
            return False
        others = reached[-1]
        cutoff = float(np.percentile(list(others.values()), (1 - 1 / self._reduction) * 100)) if others else -math.inf
        others[name] = score
        return score < cutoff


class HyperBand:
    """Asynchronous HyperBand: several halvings with longer and longer grace, among which new trials are divided.

    Each bracket gets its share of the trials as HyperBand has it: reduction^s / (s + 1) for the one with s + 1 rungs.
    """

    def __init__(self, grace: int, epochs: int, reduction: float) -> None:
        count = len(rungs(grace, epochs, reduction))
        starts = [math.ceil(grace * reduction**s) for s in range(count)]
        self.brackets = [Halving(start, epochs, reduction) for start in starts]
        shares = [reduction ** (count - 1 - s) / (count - s) for s in range(count)]
        self._shares = [share / sum(shares) for share in shares]
        self._members: dict[str, int] = {}

    def result(self, name: str, epoch: int, score: float) -> bool:
        """The decision of the trial's own bracket; a new trial goes to the one that lacks most of its share."""
        if name not in self._members:
            have = [list(self._members.values()).count(s) for s in range(len(self.brackets))]
            total = len(self._members) + 1
            self._members[name] = max(range(len(have)), key=lambda s: self._shares[s] * total - have[s])
        return self.brackets[self._members[name]].result(name, epoch, score)


class Median:
    """A trial stops if its best score is worse than the median of the others' means up to the same epoch."""

    def __init__(self, grace: int) -> None:
        self._grace = grace
        self._scores: dict[str, list[tuple[int, float]]] = {}

    def result(self, name: str, epoch: int, score: float) -> bool:
        """Compare with all that have come so far."""
        own = self._scores.setdefault(name, [])
        own.append((epoch, score))
        if epoch < self._grace:
            return False
        means = [
            fmean(scores)
            for other, history in self._scores.items()
            if other != name and history[-1][0] >= epoch and (scores := self._until(history, epoch))
        ]
        return len(means) >= MEDIAN_OF and max(value for _, value in own) < median(means)

    def _until(self, history: Sequence[tuple[int, float]], epoch: int) -> list[float]:
        return [score for at, score in history if self._grace <= at <= epoch and is_number(score)]


class Stopper:
    """One rule per group."""

    def __init__(self, sweep: Sweep, epochs: int) -> None:
        self._sweep, self._epochs = sweep, epochs
        self._sign = 1 if sweep.file.select.best == "max" else -1
        self._groups: dict[str, Rule] = {}

    @property
    def reason(self) -> str:
        """Why a trial stops."""
        return f"its group's other trials are better ({NAMES[self._sweep.file.scheduler.name]})"

    def result(self, spec: Spec, epoch: int, value: float) -> bool:
        """Record a trial's value after so many epochs; whether the trial is to stop."""
        config = self._sweep.file.scheduler
        if config.name == "none":
            return False
        key = competition(self._sweep, spec)
        if key not in self._groups:
            self._groups[key] = make_rule(config, self._epochs)
        return self._groups[key].result(spec.id, epoch, self._sign * value)


def make_rule(config: SchedulerConfig, epochs: int) -> Rule:
    """The rule that the sweep file names."""
    if config.name == "median":
        return Median(config.grace_epochs)
    kind = Halving if config.name == "asha" else HyperBand
    return kind(config.grace_epochs, epochs, config.reduction)


def rungs(grace: int, epochs: int, reduction: float) -> list[float]:
    """The epochs at which trials are compared: grace, grace x reduction, ... up to the whole run."""
    count = int(math.log(epochs / grace) / math.log(reduction) + 1)
    return [grace * reduction**k for k in range(count)]


def decision_epochs(sweep: Sweep, epochs: int, eval_every: int) -> list[int]:
    """The epochs after which a trial of so many may be stopped: the first evaluation at or after every rung."""
    config = sweep.file.scheduler
    evaluated = [epoch for epoch in range(1, epochs) if epoch % eval_every == 0]
    if config.name == "median":
        return [epoch for epoch in evaluated if epoch >= config.grace_epochs]
    if config.name == "none":
        return []
    first = (
        next((at for at in evaluated if at >= rung), None)
        for rung in rungs(config.grace_epochs, epochs, config.reduction)
    )
    return sorted({epoch for epoch in first if epoch is not None})


def competition(sweep: Sweep, spec: Spec) -> str:
    """The trials that a trial is compared with while it runs: its group, and its fraction where that is a rung."""
    key = sweep.file.fidelity
    return spec.group if key is None else f"{spec.group} {key}={get_value(sweep, spec.overrides, key)}"
