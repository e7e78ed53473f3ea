"""Where trials come from: the whole plan at once, Optuna's suggestions, or the rungs of a fidelity."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Protocol

from bootvit.errors import RunFailed
from tune.domain import Domain
from tune.log import ENDED, Event, Trial, Trials, spec_event
from tune.schema import Sweep
from tune.select import scores
from tune.space import (
    Setting,
    canonical,
    domain_of,
    get_value,
    in_order,
    make_specs,
    planned_settings,
    settings,
    uniform,
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


def make_source(sweep: Sweep) -> Source:
    """The source that the sweep file asks for."""
    if sweep.file.fidelity:
        return Rungs(sweep)
    return Suggestions(sweep) if sweep.file.algorithm == "optuna" else Plan(sweep)


def new_event(
    sweep: Sweep, chosen: Sequence[Setting], trials: Trials, seeds: Sequence[int] | None = None, **more: Any
) -> Event:
    """The event that creates the trials of these settings, for all seeds or for some."""
    specs = make_specs(sweep, chosen, len(trials), seeds)
    return {"event": "new", "trials": [spec_event(spec) for spec in specs], **more}


class Plan:
    """Grid, random, and PBT's population: everything is known at the start."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def more(self, trials: Trials) -> Event | None:
        """All trials, once."""
        return None if trials else new_event(self._sweep, planned_settings(self._sweep), trials)

    def left(self, trials: Trials) -> bool:
        """Everything is made at once."""
        return not trials

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
    """One Optuna study for each cell of the grid (and each seed, if groups differ in it); they take turns.

    A setting counts as the mean over its seeds.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        parts = [(seed,) for seed in sweep.seeds] if "seed" in sweep.group_by else [sweep.seeds]
        self._cells = [(cell, seeds) for seeds in parts for cell in settings(sweep, None)]
        self._studies = [self._study(cell, seeds) for cell, seeds in self._cells]
        self._asked = [0] * len(self._cells)
        self._open: dict[str, tuple[int, Any]] = {}  # setting and seeds -> study and Optuna's trial

    def more(self, trials: Trials) -> Event | None:
        """The next suggestion of the study that was asked least."""
        if not self.left(trials):
            return None
        number = min(range(len(self._cells)), key=lambda n: self._asked[n])
        setting, new = self._ask(number)
        seeds = self._cells[number][1]
        return new_event(self._sweep, [setting] if new else [], trials, seeds, study=number, setting=setting)

    def left(self, trials: Trials) -> bool:
        """Whether a study has not been asked for all its samples."""
        return min(self._asked) < self._sweep.file.search.samples

    def replay(self, event: Event) -> None:
        """Ask again what was asked: the sampler's state is what its questions and answers make it."""
        setting, _ = self._ask(event["study"])
        if canonical(setting) != canonical(event["setting"]):
            raise RunFailed(
                f"{self._sweep.folder}: Optuna now suggests {setting} where it suggested {event['setting']}: "
                "resume with the version of Optuna that the sweep was started with"
            )

    def ended(self, trial: Trial, trials: Trials) -> None:
        """Tell the study once all seeds of a setting have ended."""
        import optuna

        key = self._key(trial.spec.overrides, self._seeds_with(trial))
        number, asked = self._open[key]
        seeds = [
            t for t in trials.values() if t.spec.setting == trial.spec.setting and t.spec.seed in self._cells[number][1]
        ]
        if any(other.status not in ENDED for other in seeds):
            return
        del self._open[key]
        study = self._studies[number]
        finished = [t.value for t in seeds if t.status == "finished" and t.value is not None]
        stopped = [t for t in seeds if t.status == "stopped" and t.value is not None]
        if finished:
            study.tell(asked, fmean(finished))
        elif stopped:
            asked.report(fmean(float(t.value or 0) for t in stopped), step=min(t.epochs for t in stopped))
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)

    def _seeds_with(self, trial: Trial) -> Sequence[int]:
        return next(seeds for _, seeds in self._cells if trial.spec.seed in seeds)

    @staticmethod
    def _key(setting: Setting, seeds: Sequence[int]) -> str:
        return canonical([setting, list(seeds)])

    def _study(self, cell: Setting, seeds: Sequence[int]) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        search = self._sweep.file.search
        seed = int(uniform(search.seed, cell, list(seeds)) * 2**31)
        samplers = {
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
            "gp": lambda: optuna.samplers.GPSampler(seed=seed),
            "qmc": lambda: optuna.samplers.QMCSampler(seed=seed, warn_independent_sampling=False),
        }
        direction = {"max": "maximize", "min": "minimize"}[self._sweep.file.select.mode]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.create_study(direction=direction, sampler=samplers[search.sampler]())

    def _ask(self, number: int) -> tuple[Setting, bool]:
        """A suggestion, and whether it is new to its study; one that is not is not run, and told as failed."""
        import optuna

        study = self._studies[number]
        cell, seeds = self._cells[number]
        asked = study.ask()
        setting = dict(cell)
        for key in in_order(self._sweep.file.space):
            domain = domain_of(self._sweep, key, setting)
            if domain is not None and domain.kind != "grid":
                domains = self._sweep.file.space[key]
                name = key if len(domains) == 1 else f"{key}[{domains.index(domain)}]"
                setting[key] = suggest(asked, name, domain)
        self._asked[number] += 1
        if any(old.user_attrs.get("setting") == canonical(setting) for old in study.trials):
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
            return setting, False
        asked.set_user_attr("setting", canonical(setting))
        self._open[self._key(setting, seeds)] = (number, asked)
        return setting, True


def suggest(asked: Any, key: str, domain: Domain) -> Any:
    """Optuna's value for a key."""
    if domain.kind == "choice":
        return json.loads(asked.suggest_categorical(key, [canonical(value) for value in domain.values]))
    low, high = domain.values
    if domain.kind == "randint":
        return asked.suggest_int(key, low, high)
    return asked.suggest_float(key, low, high, log=domain.kind == "loguniform")
