"""Ray Tune's searchers behind the sweep's own interface.

A searcher is asked again, after a crash, what the log says it was asked, and told again what it was told. So it must
take a seed, and answer the same each time: one that does not is refused.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from bootvit.errors import RunFailed, UserError
from tune.decide.log import Trial
from tune.decide.search import MakeSearcher
from tune.decide.select import summary
from tune.spec.domain import Domain
from tune.spec.schema import OWN, Sweep
from tune.spec.space import Setting, canonical, domain_of, in_order, uniform

SEEDS = ("seed", "random_state_seed", "random_state", "random_seed")  # what searchers call it


def searcher_of(sweep: Sweep) -> MakeSearcher | None:
    """What makes the searchers that are not ours."""
    return None if sweep.file.algorithm in (*OWN, "optuna") else TuneSearcher


def check_searcher(sweep: Sweep) -> None:
    """Make one, to see whether it can be had; `UserError` if it cannot."""
    if searcher_of(sweep) is not None:
        if find_spec("ray") is None:
            raise UserError("Ray is not installed: pip install 'bootvit[ray]'")
        make_searcher(sweep, 0)


def make_searcher(sweep: Sweep, seed: int) -> Any:
    """One of Tune's searchers over all keys that are drawn."""
    name = sweep.file.algorithm
    where = f"{sweep.path}: search.algorithm={name}"
    kind = searcher_class(where, name)
    parameters = inspect.signature(kind).parameters
    seeded = next((key for key in SEEDS if key in parameters), None)
    if seeded is None:
        raise UserError(f"{where}: it takes no seed, so after a crash it could not go on as it would have")
    space = {key: to_tune(domain) for key, domain in drawn(sweep).items()}
    try:
        return kind(space=space, metric="value", mode=sweep.file.select.best, **{seeded: seed})
    except Exception as err:  # each has its own: a package that is missing, a domain that it does not know
        lines = str(err).strip().splitlines()
        raise UserError(f"{where}: {type(err).__name__}: {lines[0] if lines else 'no message'}") from err


def searcher_class(where: str, name: str) -> Any:
    """The class that Tune knows by a name, or that is at `module:Class`."""
    from ray.tune.search import SEARCH_ALG_IMPORT, Searcher

    try:
        if name in SEARCH_ALG_IMPORT:
            return SEARCH_ALG_IMPORT[name]()
        module, _, attribute = name.partition(":")
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as err:
        raise UserError(f"{where}: {err}") from err
    if not (isinstance(found, type) and issubclass(found, Searcher)):
        raise UserError(f"{where}: it is no ray.tune.search.Searcher")
    return found


class TuneSearcher:
    """One searcher of Tune's for one cell of the grid."""

    def __init__(self, sweep: Sweep, cell: Setting, seeds: Sequence[int]) -> None:
        self._sweep, self._cell, self.seeds = sweep, cell, seeds
        self.asked = 0
        self._searcher = make_searcher(sweep, int(uniform(sweep.file.search.seed, cell, list(seeds)) * 2**31))
        self._names: dict[str, str] = {}  # setting -> the searcher's name for it
        self._worst: float | None = None

    def ask(self) -> tuple[Setting, bool]:
        """A suggestion, and whether it is new; one that is not is told as failed."""
        name = f"{self.asked:05d}"
        self.asked += 1
        values = self._searcher.suggest(name)
        if not isinstance(values, dict):
            raise RunFailed(f"{self._sweep.file.algorithm} suggests nothing after {name} settings")
        setting = dict(self._cell)
        for key in in_order(self._sweep.file.space):
            domain = domain_of(self._sweep, key, setting)
            if domain is not None and domain.kind != "grid":
                setting[key] = plain(values[name_of(self._sweep, key, domain)], domain)
        if canonical(setting) in self._names:
            self._searcher.on_trial_complete(name, error=True)
            return setting, False
        self._names[canonical(setting)] = name
        return setting, True

    def replay(self, setting: Setting, *, new: bool) -> bool:
        """Ask again what once gave this setting."""
        again, _ = self.ask()
        if canonical(again) != canonical(setting):
            algorithm = self._sweep.file.algorithm
            raise RunFailed(
                f"{self._sweep.place}: {algorithm} now suggests {again} where it suggested {setting}: it cannot be "
                "replayed, or is another version; resume with the version that the sweep was started with"
            )
        return new

    def tell(self, setting: str, trials: Sequence[Trial]) -> None:
        """How a setting's trials ended."""
        told = summary(setting, trials, worst=self._worst)
        name = self._names[setting]
        if told.value is None:
            self._searcher.on_trial_complete(name, error=True)
            return
        worse = min if self._sweep.file.select.best == "max" else max
        self._worst = told.value if self._worst is None else worse(self._worst, told.value)
        steps = max(trial.epochs for trial in trials)
        self._searcher.on_trial_complete(name, {"value": told.value, "training_iteration": steps})


def drawn(sweep: Sweep) -> dict[str, Domain]:
    """Every domain that is drawn from, by the name that the searcher has for it."""
    return {name_of(sweep, key, domain): domain for key, domain in sweep.file.domains if domain.kind != "grid"}


def name_of(sweep: Sweep, key: str, domain: Domain) -> str:
    """A key, with a number where it has several domains."""
    domains = sweep.file.space[key]
    return key if len(domains) == 1 else f"{key}[{domains.index(domain)}]"


def to_tune(domain: Domain) -> Any:
    """A domain as Tune has it."""
    from ray import tune

    if domain.kind == "choice":
        return tune.choice(list(domain.values))
    low, high = domain.values
    if domain.kind == "randint":
        return tune.randint(low, high + 1)
    return tune.loguniform(low, high) if domain.kind == "loguniform" else tune.uniform(low, high)


def plain(value: Any, domain: Domain) -> Any:
    """A suggested value as JSON has it: searchers suggest NumPy's numbers, too."""
    if domain.kind == "choice":
        return value
    return int(value) if domain.kind == "randint" else float(value)
