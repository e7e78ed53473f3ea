"""Where trials come from: the whole plan at once, a searcher's suggestions, or the rungs of a fidelity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tune.decide.log import ENDED, Event, Trial, Trials, spec_event
from tune.decide.optuna_study import Study
from tune.decide.select import scores
from tune.spec.schema import Sweep
from tune.spec.space import (
    Setting,
    canonical,
    get_value,
    make_specs,
    planned_settings,
    settings,
)


class Source(Protocol):
    """Makes trials; a function of the events in the log, so that after a crash it goes on as it would have."""

    def more(self, trials: Trials) -> Event | None:
        """An event that creates trials (perhaps none), or None if there is nothing to create now."""

    def left(self, trials: Trials) -> bool:
        """Whether `more` would create trials now."""

    def replay(self, event: Event) -> None:
        """Such an event, read from the log."""

    def ended(self, trial: Trial, trials: Trials) -> None:
        """A trial has ended."""


class Searcher(Protocol):
    """Suggests settings within one cell of the grid; learns from the trials that have ended."""

    seeds: Sequence[int]
    asked: int

    def ask(self) -> tuple[Setting, bool]:
        """A suggestion, and whether it is new; one that is not is not run."""

    def replay(self, setting: Setting, *, new: bool) -> bool:
        """Ask again what once gave this setting; returns whether it is new, as it was then."""

    def tell(self, setting: str, trials: Sequence[Trial]) -> None:
        """How a setting's trials ended."""


MakeSearcher = Callable[[Sweep, Setting, Sequence[int]], Searcher]


def make_source(sweep: Sweep, make_searcher: MakeSearcher | None = None) -> Source:
    """The source that the sweep file asks for; `make_searcher` makes what is not Optuna's."""
    if sweep.file.fidelity:
        return Rungs(sweep)
    return Suggestions(sweep, make_searcher or Study) if sweep.file.suggests else Plan(sweep)


def new_event(
    sweep: Sweep, chosen: Sequence[Setting], trials: Trials, seeds: Sequence[int] | None = None, **more: Any
) -> Event:
    """The event that creates the trials of these settings, for all seeds or for some."""
    pairs = [(setting, seed) for setting in chosen for seed in seeds or sweep.seeds]
    return new_trials(sweep, pairs, len(trials)) | more


def new_trials(sweep: Sweep, pairs: Sequence[tuple[Setting, int]], first: int) -> Event:
    """The event that creates a trial for each setting and seed, numbered from `first`."""
    return {"event": "new", "trials": [spec_event(spec) for spec in make_specs(sweep, pairs, first)]}


class Plan:
    """Grid, random, and PBT's population: everything is known at the start, and more when samples or seeds grow."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._complete = False  # whether the log has all that the file asks for

    def more(self, trials: Trials) -> Event | None:
        """All trials that are not there yet, at once."""
        missing = self._missing(trials)
        return new_trials(self._sweep, missing, len(trials)) if missing else None

    def left(self, trials: Trials) -> bool:
        """Whether there are such."""
        return bool(self._missing(trials))

    def _missing(self, trials: Trials) -> list[tuple[Setting, int]]:
        if self._complete or (trials and self._sweep.file.algorithm == "pbt"):  # whose members may be equal
            return []
        known = {(trial.spec.setting, trial.spec.seed) for trial in trials.values()}
        pairs = [(setting, seed) for setting in planned_settings(self._sweep) for seed in self._sweep.seeds]
        missing = [(setting, seed) for setting, seed in pairs if (canonical(setting), seed) not in known]
        self._complete = not missing
        return missing

    def replay(self, event: Event) -> None:
        """Nothing to remember."""

    def ended(self, trial: Trial, trials: Trials) -> None:
        """Nothing to learn."""


# ------------------------------------------------------------------------------------------------- fidelity


class Rungs:
    """Successive halving over fractions: all settings at the smallest, the best of each group at the next."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._key = str(sweep.file.fidelity)
        self._fractions = sorted(sweep.file.space[self._key][0].values)

    def more(self, trials: Trials) -> Event | None:
        """The first rung, and later the next rung of a group whose last one is complete."""
        if not trials:
            lowest = [s for s in planned_settings(self._sweep) if s[self._key] == self._fractions[0]]
            return new_event(self._sweep, lowest, trials)
        groups: dict[str, list[Trial]] = {}
        for trial in trials.values():
            groups.setdefault(trial.spec.group, []).append(trial)
        for members in groups.values():
            chosen = self.promoted(members)
            if chosen:
                return new_event(self._sweep, chosen, trials)
        return None

    def left(self, trials: Trials) -> bool:
        """Whether a rung is due."""
        return self.more(trials) is not None

    def promoted(self, members: Sequence[Trial]) -> list[Setting]:
        """The settings that a group's last rung sends to the next fraction; none while it is not complete."""
        top = max(self._fraction(trial) for trial in members)
        rung = [trial for trial in members if self._fraction(trial) == top]
        if top == self._fractions[-1] or any(trial.status not in ENDED for trial in rung):
            return []
        after = self._fractions[self._fractions.index(top) + 1]
        settings_there = len({trial.spec.setting for trial in rung})
        keep = math.ceil(settings_there / self._sweep.file.scheduler.reduction)
        best = scores(self._sweep, rung)[:keep]
        return [{**found.trials[0].spec.overrides, self._key: after} for found in best]

    def _fraction(self, trial: Trial) -> float:
        return float(get_value(self._sweep, trial.spec.overrides, self._key))

    def replay(self, event: Event) -> None:
        """Nothing to remember: the trials say it all."""

    def ended(self, trial: Trial, trials: Trials) -> None:
        """Nothing to learn: the trials say it all."""


# --------------------------------------------------------------------------------------------------- Optuna


class Suggestions:
    """One searcher for each cell of the grid (and each seed, if groups differ in it); they take turns.

    A setting counts as the mean over its seeds. After a crash each searcher is asked again what it was asked: its
    state is what its questions and answers make it.
    """

    def __init__(self, sweep: Sweep, make: MakeSearcher) -> None:
        self._sweep = sweep
        parts = [(seed,) for seed in sweep.seeds] if "seed" in sweep.group_by else [sweep.seeds]
        self._studies = [make(sweep, cell, seeds) for seeds in parts for cell in settings(sweep, None)]
        self._open: dict[str, Searcher] = {}  # setting and seeds -> study that waits for its end

    def more(self, trials: Trials) -> Event | None:
        """The next suggestion of the study that was asked least."""
        if not self.left(trials):
            return None
        number = min(range(len(self._studies)), key=lambda n: self._studies[n].asked)
        study = self._studies[number]
        setting, new = study.ask()
        self._note(study, setting, new)
        return new_event(self._sweep, [setting] if new else [], trials, study.seeds, study=number, setting=setting)

    def left(self, trials: Trials) -> bool:
        """Whether a study has not been asked for all its samples."""
        return min(study.asked for study in self._studies) < self._sweep.file.search.samples

    def replay(self, event: Event) -> None:
        """Ask again what was asked."""
        study = self._studies[event["study"]]
        self._note(study, event["setting"], study.replay(event["setting"], new=bool(event["trials"])))

    def ended(self, trial: Trial, trials: Trials) -> None:
        """Tell the study once all seeds of a setting have ended; one that goes on later is not told again."""
        seeds = next(study.seeds for study in self._studies if trial.spec.seed in study.seeds)
        key = canonical([trial.spec.overrides, list(seeds)])
        every = [t for t in trials.values() if t.spec.setting == trial.spec.setting and t.spec.seed in seeds]
        if key in self._open and all(other.status in ENDED for other in every):
            self._open.pop(key).tell(trial.spec.setting, every)

    def _note(self, study: Searcher, setting: Setting, new: bool) -> None:
        if new:
            self._open[canonical([setting, list(study.seeds)])] = study
