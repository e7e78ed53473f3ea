"""Optuna's studies: asked again, after a crash, what they were asked."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from tune.decide.log import Trial
from tune.decide.select import Told, summary
from tune.spec.domain import Domain
from tune.spec.schema import Sweep
from tune.spec.space import Setting, canonical, domain_of, in_order, uniform


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
        print(f"{self._sweep.place}: this version of Optuna suggests other trials; a new study has those that ended")
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
