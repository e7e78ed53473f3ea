"""Ray Tune's searcher, with the conductor behind it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.experiment.config_parser import _create_trial_from_spec
from ray.tune.search import Searcher
from ray.tune.search.search_generator import SearchGenerator

from tune.decide.log import ENDED, Trial
from tune.run.work import Errors, Unsaved, Work, tune_config


class SweepSearcher(Unsaved, SearchGenerator):  # type: ignore[misc]
    """Gives Tune the trials that the conductor gives out; first those that have ended, so that Tune shows them all."""

    def __init__(self, work: Work, errors: Errors) -> None:
        super().__init__(Searcher())
        self._work, self._errors = work, errors
        self._ended = [trial for trial in work.conductor.trials.values() if trial.status in ENDED]
        self._resources = tune.PlacementGroupFactory([work.resources])
        self.given: set[str] = set()  # trials that Tune has

    def create_trial_if_possible(self, experiment_spec: dict[str, Any]) -> TuneTrial | None:
        """The next trial; None if there is none now."""
        with self._errors.noted():
            if self._ended:
                return self._past(experiment_spec, self._ended.pop(0))
            conductor = self._work.conductor
            if conductor.running < self._work.room.trials() and (trial := conductor.next(self.given)):
                return self._make(experiment_spec, trial, tune_config(trial, self._work.make_job(trial)))
            if conductor.idle:
                conductor.close()
                self._finished = True
            return None

    def _make(self, spec: dict[str, Any], trial: Trial, config: dict[str, Any]) -> TuneTrial:
        name = trial.spec.id
        self.given.add(name)
        self._counter += 1
        made = _create_trial_from_spec(
            copy.deepcopy(spec) | {"config": config, "resources_per_trial": self._resources},
            self._parser,
            evaluated_params=trial.overrides | {"seed": trial.spec.seed},
            experiment_tag=name,
            trial_id=name,
        )
        made.max_failures = max(0, self._work.retries - trial.crashes)  # as the conductor counts them
        return made

    def _past(self, spec: dict[str, Any], trial: Trial) -> TuneTrial:
        """A trial that an earlier driver has brought to its end."""
        made = self._make(spec, trial, tune_config(trial, None))
        made.init_local_path()
        value = trial.value
        made.update_last_result({"trial": trial.spec.id, "epoch": trial.epochs, "value": value, "config": made.config})
        made.set_status(TuneTrial.ERROR if trial.status == "failed" else TuneTrial.TERMINATED)
        if trial.status == "failed":
            Path(made.local_path, "error.txt").write_text(f"{trial.reason}\n", encoding="utf-8")
            made.run_metadata.error_filename = "error.txt"
        return made

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The conductor knows it from the scheduler."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The conductor knows it from the scheduler."""

    def save_to_dir(self, dirpath: str, session_str: str) -> None:
        """Nothing: the log has it."""

    def restore_from_dir(self, dirpath: str) -> None:
        """Nothing: the log has it."""
