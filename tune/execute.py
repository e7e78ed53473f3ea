"""Ray Tune as the executor: it starts actors, runs trials in them epoch by epoch, and tells the conductor.

Tune's own state is not kept: its folder is temporary, and each driver starts a new Tune run. The classes here are
Tune's interfaces and nothing more, so Ray is imported at the top; import this module where Ray is there.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search.searcher import Searcher

from bootvit import checkpoint
from bootvit.config import Config, validate
from tune.conductor import Conductor
from tune.log import Trial
from tune.space import metric_of
from tune.trial import Job, Report, attempt

MakeJob = Callable[[Trial], Job]


class Stage(NamedTuple):
    """A part of the work: its trials, and what each of them is to do."""

    conductor: Conductor
    make_job: MakeJob


class Work:
    """The stages, one after another; a stage is made when the one before it is done."""

    def __init__(self, stages: Iterator[Stage]) -> None:
        self._rest = stages
        self.begun: list[Stage] = [next(stages)]

    def conductor(self, trial: Any) -> Conductor:
        """The conductor of one of Tune's trials."""
        number: int = trial.config["stage"]
        return self.begun[number].conductor

    def advance(self) -> bool:
        """Begin the next stage; False if there is none."""
        self.begun[-1].conductor.close()
        following = next(self._rest, None)
        if following is not None:
            self.begun.append(following)
        return following is not None


class Slots(NamedTuple):
    """Where trials run: how many at once, and what each of their actors takes."""

    at_once: int
    resources: dict[str, float]  # of Ray


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """An actor that runs one trial after another, an epoch a step."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """What one actor takes; `tune.with_resources` would make another class of this one for every trial."""
        return tune.PlacementGroupFactory([config["resources"]])

    def setup(self, config: dict[str, Any]) -> None:
        """Only take note: an error here would have no trial to belong to."""
        self._job = config
        self._run: Generator[Report, None, None] | None = None

    def step(self) -> dict[str, Any]:
        """One epoch."""
        if self._run is None:
            self._run = attempt(Job(**checkpoint.read_json(Path(self._job["job"]))))
        report = next(self._run)
        return {"epoch": report.epoch, "value": report.metrics.get(self._job["metric"]), "done": report.done}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Leave the trial where it is: its checkpoints are on disk."""
        if self._run is not None:
            self._run.close()
            self._run = None
            release_memory()


def release_memory() -> None:
    """Give a GPU's cached memory back to the trials beside this one."""
    import gc

    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


class Errors:
    """Tune turns an error in one of its parts into a text; the error itself is kept here."""

    def __init__(self) -> None:
        self.first: Exception | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Keep the first error that is raised inside."""
        try:
            yield
        except Exception as err:
            self.first = self.first or err
            raise


class Unsaved:
    """Tune pickles its parts, for a restore that never happens here: the log is what a new driver starts from."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Feed(Unsaved, Searcher):  # type: ignore[misc]
    """Gives the conductor's trials to Tune."""

    def __init__(self, work: Work, slots: Slots, metric: str, errors: Errors, jobs: Path) -> None:
        super().__init__()
        self._work, self._slots, self._selection, self._errors, self._jobs = work, slots, metric, errors, jobs

    def suggest(self, trial_id: str) -> Any:
        """A trial's job; None to wait, FINISHED when nothing runs and nothing is left."""
        with self._errors.noted():
            return self._suggest()

    def _suggest(self) -> Any:
        conductor, make_job = self._work.begun[-1]
        if conductor.running >= self._slots.at_once:
            return None
        trial = conductor.next()
        if trial is None and conductor.running:
            return None
        if trial is None:
            return self._suggest() if self._work.advance() else Searcher.FINISHED
        job = make_job(trial)
        metric = metric_of(validate(Config, job.config, "trial"), self._selection)
        stage = len(self._work.begun) - 1
        path = self._jobs / f"{stage}-{trial.spec.id}.json"  # Tune keeps a trial's config several times over
        checkpoint.write_json(path, job._asdict())
        resources = self._slots.resources
        return {"id": trial.spec.id, "stage": stage, "job": str(path), "metric": metric, "resources": resources}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The conductor knows it from the scheduler."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the log has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the log has it."""


class Referee(Unsaved, FIFOScheduler):  # type: ignore[misc]
    """Tells the conductor what trials report, and Tune what it decides."""

    def __init__(self, work: Work, errors: Errors) -> None:
        super().__init__()
        self._work, self._errors = work, errors

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """An epoch that is not a trial's last."""
        with self._errors.noted():
            conductor = self._work.conductor(trial)
            leave = conductor.result(trial.config["id"], result["epoch"], result["value"], done=False)
        return str(TrialScheduler.STOP if leave else TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial has come to its end; one that was told to leave has been dealt with."""
        conductor = self._work.conductor(trial)
        if conductor.trials[trial.config["id"]].status == "running":
            with self._errors.noted():
                conductor.result(trial.config["id"], result["epoch"], result["value"], done=True)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A trial has failed, or its worker has died."""
        with self._errors.noted():
            reason = reason_of(trial.pickled_error_file)
            self._work.conductor(trial).crashed(trial.config["id"], reason)


KEPT = {"epoch", "value", "done", "training_iteration", "trial_id", "node_ip", "pid"}


class Clock(Unsaved, tune.Callback):  # type: ignore[misc]
    """Tells the conductor when a trial has its resources; and Tune, which never drops a trial, to keep less of it."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Leave of a result what is read of it; Tune computes eight figures for each number in it."""
        for key in result.keys() - KEPT:
            del result[key]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Nobody asks Tune for an ended trial's figures."""
        trial.metric_analysis.clear()
        trial.metric_n_steps.clear()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The actor is there."""
        self._work.conductor(trial).began(trial.config["id"])


def reason_of(pickled: str | None) -> str:
    """One line for what ended an attempt: the error that Tune has pickled."""
    from ray import cloudpickle
    from ray.exceptions import RayActorError, RayTaskError

    if pickled is None:
        return "its worker could not be started"
    with open(pickled, "rb") as file:
        error = cloudpickle.load(file)
    if isinstance(error, RayActorError):
        return "its worker died: killed, or out of memory"
    if isinstance(error, RayTaskError):
        error = error.cause or error
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:500]


def execute(stages: Iterator[Stage], slots: Slots, metric: str, folder: Path) -> None:
    """Run the stages to their ends, `slots.at_once` trials at a time; Tune's files are below `folder`."""
    for left in folder.glob(".tune-*"):  # by a driver that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tune-", ignore_cleanup_errors=True) as storage:
        for key, value in {
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
            "TUNE_DISABLE_SIGINT_HANDLER": "1",
            "TUNE_MAX_PENDING_TRIALS_PG": str(slots.at_once),
            "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
            "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
            "RAY_AIR_NEW_OUTPUT": "0",
        }.items():
            os.environ[key] = value
        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        work, errors = Work(stages), Errors()
        tuner = tune.Tuner(
            TrialActor,
            tune_config=tune.TuneConfig(
                search_alg=Feed(work, slots, metric, errors, Path(storage)),
                scheduler=Referee(work, errors),
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=storage,
                verbose=0,
                callbacks=[Clock(work)],
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            tuner.fit()
        except Exception:
            if errors.first is not None:
                raise errors.first from None
            raise
