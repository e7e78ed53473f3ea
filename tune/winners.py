"""How the winners meet the test set, once, after the selection: as they are, or trained again with all images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bootvit.config import Config, override
from tune.log import Event, Trial, Trials, spec_event
from tune.schema import BudgetConfig, SchedulerConfig, SearchConfig, Sweep
from tune.space import Spec


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
    folder = str(sweep.folder / "winners")
    return override(config, {"data": {"held_out": 0.0}, "ray": {"storage_path": folder}})
