"""How the winners meet the test set, once, after the selection: as they are, or trained again with all images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bootvit.config import Config, override
from bootvit.storage import address_of
from tune.decide.log import Event, Trial, Trials, spec_event
from tune.decide.select import Score, scores
from tune.spec.schema import BudgetConfig, SchedulerConfig, SearchConfig, Sweep
from tune.spec.space import Spec, get_value


def winners(sweep: Sweep, trials: Trials) -> dict[str, Score]:
    """The best setting of every group; with a fidelity only the largest fraction's trials can win."""
    groups: dict[str, list[Trial]] = {}
    key = sweep.file.fidelity
    top = max(sweep.file.space[key][0].values) if key else None
    for trial in trials.values():
        if key is None or get_value(sweep, trial.spec.overrides, key) == top:
            groups.setdefault(trial.spec.group, []).append(trial)
    ranked = {group: scores(sweep, members) for group, members in groups.items()}
    return {group: found[0] for group, found in ranked.items() if found}


class Chosen:
    """A source of trials that are known already."""

    def __init__(self, specs: Sequence[Spec]) -> None:
        self._specs = specs

    def more(self, trials: Trials) -> Event | None:
        """Those that are not there yet: the winners may be others after a budget was raised."""
        new = [spec_event(spec) for spec in self._specs if spec.id not in trials]
        return {"event": "new", "trials": new} if new else None

    def left(self, trials: Trials) -> bool:
        """Whether one of them is not there yet."""
        return any(spec.id not in trials for spec in self._specs)

    def replay(self, event: Event) -> None:
        """Nothing to remember."""

    def ended(self, trial: Trial, trials: Trials) -> None:
        """Nothing to learn."""


def plain(sweep: Sweep) -> Sweep:
    """The same sweep without anything that chooses or stops: its winners are tested whatever that costs."""
    changes = {"scheduler": SchedulerConfig(), "budget": BudgetConfig(), "search": SearchConfig(), "fidelity": None}
    return replace(sweep, file=sweep.file.model_copy(update=changes))


def test_config(sweep: Sweep, config: Config) -> Config:
    """What a winner's trial becomes: itself, or a run of its own on the held-out images too."""
    if sweep.file.test == "trial":
        return config
    place = address_of(sweep.place / "winners")
    return override(config, {"data": {"held_out": 0.0}, "ray": {"storage_path": place}})
