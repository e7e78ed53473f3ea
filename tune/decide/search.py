"""Where trials come from: the whole plan at once, Optuna's suggestions, or the rungs of a fidelity."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple, Protocol

from tune.decide.log import ENDED, Event, Trial, Trials, spec_event
from tune.decide.select import is_number, scores
from tune.spec.domain import Domain
from tune.spec.schema import Sweep
from tune.spec.space import (
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


class Study:
    """One study of Optuna's, in which only what was asked and told counts.

    Where another version of Optuna answers otherwise than the log says, it is made anew, from the trials that have
    ended.
    """

    def __init__(self, sweep: Sweep, cell: Setting, seeds: Sequence[int]) -> None:
        self._sweep, self._cell, self.seeds = sweep, cell, seeds
        self.asked = 0
        self._told: list[Told] = []
        self._open: dict[str, Any] = {}  # setting -> Optuna's trial
        self._renewed = False
        self._study = self._make(0)

    def ask(self) -> tuple[Setting, bool]:
        """A suggestion, and whether it is new; one that is not is not run, and told as failed."""
        import optuna

        asked = self._study.ask()
        setting = dict(self._cell)
        for key, domain in self._drawn(setting):
            setting[key] = suggest(asked, self._name(key, domain), domain)
        self.asked += 1
        if canonical(setting) in {*self._open, *(told.setting for told in self._told)}:
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
            return setting, False
        self._open[canonical(setting)] = asked
        return setting, True

    def replay(self, setting: Setting, *, new: bool) -> bool:
        """Ask again what once gave this setting; returns whether it is new, as it was then."""
        if not self._renewed:
            again, _ = self.ask()
            if canonical(again) == canonical(setting):
                return new
            self._open.pop(canonical(again), None)
            self._renew()
        else:
            self.asked += 1
        if new:
            self._open[canonical(setting)] = None  # of no trial of Optuna's; added to the study at its end
        return new

    def tell(self, setting: str, trials: Sequence[Trial]) -> None:
        """How a setting's trials ended: Optuna learns from those that were stopped, too."""
        asked = self._open.pop(setting)
        told = summary(setting, trials, worst=self._worst_told())
        self._told.append(told)
        if asked is None:
            self._add(told)
        else:
            _tell(self._study, asked, told)

    def _renew(self) -> None:
        """A new study that knows what the old one was told."""
        print(f"{self._sweep.folder}: this version of Optuna suggests other trials; a new study has those that ended")
        self._renewed = True
        self._study = self._make(self.asked)
        self._open = dict.fromkeys(self._open)
        for told in self._told:
            self._add(told)

    def _add(self, told: Told) -> None:
        """A trial that this study has not suggested."""
        import optuna

        if told.value is None:
            return
        setting = json.loads(told.setting)
        domains = {self._name(key, domain): (key, domain) for key, domain in self._drawn(setting)}
        self._study.add_trial(
            optuna.trial.create_trial(
                params={name: to_optuna(setting[key], domain) for name, (key, domain) in domains.items()},
                distributions={name: distribution(domain) for name, (_, domain) in domains.items()},
                value=told.value,
            )
        )

    def _drawn(self, setting: Setting) -> Iterator[tuple[str, Domain]]:
        """The keys that are suggested, each when those that its `when` asks for are there."""
        for key in in_order(self._sweep.file.space):
            domain = domain_of(self._sweep, key, setting)
            if domain is not None and domain.kind != "grid":
                yield key, domain

    def _name(self, key: str, domain: Domain) -> str:
        domains = self._sweep.file.space[key]
        return key if len(domains) == 1 else f"{key}[{domains.index(domain)}]"

    def _worst_told(self) -> float | None:
        values = [told.value for told in self._told if told.value is not None]
        return (min if self._sweep.file.select.best == "max" else max)(values, default=None)

    def _make(self, already: int) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        search = self._sweep.file.search
        parts = [self._cell, list(self.seeds), *([already] if already else [])]
        seed = int(uniform(search.seed, *parts) * 2**31)
        samplers = {
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
            "gp": lambda: optuna.samplers.GPSampler(seed=seed),
            "qmc": lambda: optuna.samplers.QMCSampler(seed=seed, warn_independent_sampling=False),
        }
        direction = {"max": "maximize", "min": "minimize"}[self._sweep.file.select.best]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.create_study(direction=direction, sampler=samplers[search.sampler]())


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


def _tell(study: Any, asked: Any, told: Told) -> None:
    from optuna.trial import TrialState

    if told.value is None:
        study.tell(asked, state=TrialState.FAIL)
    elif told.stopped_at is None:
        study.tell(asked, told.value)
    else:
        asked.report(told.value, step=told.stopped_at)
        study.tell(asked, state=TrialState.PRUNED)


def suggest(asked: Any, key: str, domain: Domain) -> Any:
    """Optuna's value for a key."""
    if domain.kind == "choice":
        return json.loads(asked.suggest_categorical(key, [canonical(value) for value in domain.values]))
    low, high = domain.values
    if domain.kind == "randint":
        return asked.suggest_int(key, low, high)
    return asked.suggest_float(key, low, high, log=domain.kind == "loguniform")


def distribution(domain: Domain) -> Any:
    """The distribution that `suggest` draws from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if domain.kind == "choice":
        return CategoricalDistribution([canonical(value) for value in domain.values])
    low, high = domain.values
    if domain.kind == "randint":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=domain.kind == "loguniform")


def to_optuna(value: Any, domain: Domain) -> Any:
    """A key's value as Optuna has it."""
    return canonical(value) if domain.kind == "choice" else value
