"""Ray Tune's scheduler, with the conductor behind it."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from bootvit.errors import RunFailed
from tune.decide.log import ENDED
from tune.run.failures import reason_of
from tune.run.leaks import Orphans
from tune.run.work import Errors, Unsaved, Work, tune_config


class SweepScheduler(Unsaved, FIFOScheduler):  # type: ignore[misc]
    """Tells the conductor what trials report and how they fail, and Tune what became of them."""

    def __init__(self, work: Work, given: set[str], errors: Errors) -> None:
        super().__init__()
        self._work, self._given, self._errors = work, given, errors
        self._controller: Any = None
        self._heard: dict[str, float] = {}  # trial -> when it last said something
        self._silent: set[str] = set()  # killed because they said nothing
        self._pausing: list[TuneTrial] = []  # members of a population that must leave their actors
        self._orphans = Orphans()

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """A new trial, or one that Tune starts again after a failure: from where the log has it."""
        self._controller = tune_controller
        ours = self._work.conductor.trials[trial.trial_id]
        with self._errors.noted():
            if ours.status == "waiting" and self._work.conductor.resume(trial.trial_id):
                trial.set_config(tune_config(ours, self._work.make_job(ours)))

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """An epoch: the trial goes on, waits for its population, or ends."""
        name, conductor = trial.trial_id, self._work.conductor
        self._heard[name] = time.monotonic()
        with self._errors.noted():
            if result["trial"] != name:
                raise RunFailed(f"trial {name}: a result of {result['trial']} came in its place")
            if not conductor.result(name, result["epoch"], result["value"], done=result["over"]):
                return str(TrialScheduler.CONTINUE)
        if conductor.trials[name].status != "waiting":
            return str(TrialScheduler.STOP)
        self._pausing.append(trial)
        return str(TrialScheduler.NOOP)

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """A trial has failed, or its worker has died."""
        name = trial.trial_id
        with self._errors.noted():
            if self._work.conductor.trials[name].status != "running":  # Tune says it twice where it gives a trial up
                return
            reason, cause = reason_of(trial.pickled_error_file, several_workers=self._work.several_workers)
            if name in self._silent:
                self._silent.discard(name)
                reason, cause = f"it has reported nothing for trial_timeout={self._work.timeout:g} seconds", "own"
            self._heard.pop(name, None)
            self._work.conductor.crashed(name, reason, cause)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """A member of a population that need not wait any longer; what is new starts without being chosen."""
        conductor, live = self._work.conductor, tune_controller.get_live_trials()
        paused = sorted((t for t in live if t.status == TuneTrial.PAUSED), key=lambda t: t.trial_id)
        with self._errors.noted():
            for trial in paused if conductor.running < self._work.room.trials() else ():
                if conductor.resume(trial.trial_id):
                    ours = conductor.trials[trial.trial_id]
                    trial.set_config(tune_config(ours, self._work.make_job(ours)))
                    return trial
        return None

    def began(self, trial: TuneTrial) -> None:
        """A trial has its actor."""
        self._heard[trial.trial_id] = time.monotonic()
        with self._errors.noted():
            self._work.conductor.began(trial.trial_id)

    def is_over(self, trial: TuneTrial) -> bool:
        """Whether the conductor has done with a trial."""
        return self._work.conductor.trials[trial.trial_id].status in ENDED

    def agree(self) -> None:
        """Bring Tune's trials to what the conductor says of them, and look for what happens without an event."""
        with self._errors.noted():
            self._work.conductor.beat()
            while self._pausing:  # Tune's own PAUSE leaves an empty folder in the run's each time
                self._controller.pause_trial(self._pausing.pop(), should_checkpoint=False)
            for trial in list(self._controller.get_live_trials()) if self._controller else ():
                self._agree_on(trial)
            if self._work.several_workers:
                self._orphans.remove()

    def _agree_on(self, trial: TuneTrial) -> None:
        name, status = trial.trial_id, trial.status
        ours = self._work.conductor.trials[name]
        if ours.status in ENDED and status in (TuneTrial.PENDING, TuneTrial.PAUSED):
            self._controller.stop_trial(trial)
        elif ours.status == "waiting" and status == TuneTrial.ERROR:  # given up by Tune, and not by the conductor
            self._controller._requeue_trial(trial)
        elif status == TuneTrial.RUNNING and self._overdue(name):
            self._silent.add(name)
            ray.kill(trial.temporary_state.ray_actor)

    def _overdue(self, name: str) -> bool:
        limit = self._work.timeout
        if limit is None or name in self._silent or name not in self._heard:
            return False
        return time.monotonic() - self._heard[name] > limit


class Observer(Unsaved, tune.Callback):  # type: ignore[misc]
    """Tells the scheduler what Tune says only to callbacks; lets go of what nobody reads of a trial that is over."""

    def __init__(self, scheduler: SweepScheduler) -> None:
        self._scheduler = scheduler

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Once a round of Tune's loop."""
        self._scheduler.agree()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: TuneTrial, **info: Any) -> None:
        """The actor is there."""
        self._scheduler.began(trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: TuneTrial, **info: Any) -> None:
        """Tune keeps its trials to the end of the sweep: their last results and their orders go now."""
        trial.metric_n_steps.clear()
        trial.set_config({key: value for key, value in trial.config.items() if key != "job"})
        if trial.run_metadata.last_result:
            trial.run_metadata.last_result["config"] = trial.config

    def on_trial_error(self, iteration: int, trials: list[Any], trial: TuneTrial, **info: Any) -> None:
        """The same for one that has failed, unless the conductor lets it go on: Tune needs the rest of it then."""
        if self._scheduler.is_over(trial):
            self.on_trial_complete(iteration, trials, trial, **info)
