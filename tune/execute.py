"""Ray Tune as the executor: it keeps actors, runs trials in them epoch by epoch, and tells the conductor.

A trial of Tune's is a *slot* here: a place on the cluster that takes the sweep's trials one after another, because
Tune keeps each of its trials to the end of the sweep. Tune's own state is not kept: its folder is temporary, and each
driver starts a new Tune run. The classes here are Tune's interfaces and nothing more, so Ray is imported at the top;
import this module where Ray is there.
"""

from __future__ import annotations

import gc
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

SLOT_RESULTS = 100  # after so many a slot takes no further trial: Tune keeps a slot's results until the slot ends

MakeJob = Callable[[Trial], Job]


class Stage(NamedTuple):
    """A part of the work: its trials, and what each of them is to do."""

    conductor: Conductor
    make_job: MakeJob


class Slots(NamedTuple):
    """Where trials run: how many at once, and what each of their actors takes."""

    at_once: int
    resources: dict[str, float]  # of Ray


class Work:
    """The stages, one after another, and the trial that each slot has.

    A slot's trial is in the slot's file, its order: the actor reads it before every epoch, and Tune starts an epoch
    only when what became of the one before it has been decided here.
    """

    def __init__(self, stages: Iterator[Stage], metric: str, folder: Path) -> None:
        self._rest, self._metric, self._folder = stages, metric, folder
        self._stage = next(stages)
        self._orders = 0
        self._trials: dict[str, str] = {}  # slot -> trial

    @property
    def conductor(self) -> Conductor:
        """The present stage's; a stage is over only when all its slots are empty."""
        return self._stage.conductor

    def trial(self, slot: str) -> str:
        """The trial that a slot has."""
        return self._trials[slot]

    def order(self, slot: str) -> Path:
        """A slot's file."""
        return self._folder / f"slot-{slot}.json"

    def fill(self, slot: str) -> bool:
        """Give a slot its next trial; False if there is none now."""
        trial = self.conductor.next()
        if trial is None:
            return False
        job = self._stage.make_job(trial)
        metric = metric_of(validate(Config, job.config, "trial"), self._metric)
        self._orders += 1  # a trial may come back to the slot that it has left
        checkpoint.write_json(self.order(slot), {"number": self._orders, "metric": metric, "job": job._asdict()})
        self._trials[slot] = trial.spec.id
        return True

    def advance(self) -> bool:
        """Begin the next stage; False if there is none."""
        self.conductor.close()
        following = next(self._rest, None)
        if following is not None:
            self._stage = following
        return following is not None


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """A slot's actor: it runs the trial of the slot's order, an epoch a step."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """What one actor takes."""
        return tune.PlacementGroupFactory([config["resources"]])

    def setup(self, config: dict[str, Any]) -> None:
        """Only take note: an error here would have no trial to belong to."""
        self._order = Path(config["order"])
        self._number = 0
        self._run: Generator[Report, None, None] | None = None

    def step(self) -> dict[str, Any]:
        """One epoch of the ordered trial."""
        order = checkpoint.read_json(self._order)
        if self._run is None or order["number"] != self._number:
            self.cleanup()
            self._run, self._number = attempt(Job(**order["job"])), order["number"]
        report = next(self._run)
        return {"epoch": report.epoch, "value": report.metrics.get(order["metric"]), "over": report.done}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another slot's actor."""
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
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def settled_heap() -> Iterator[None]:
    """Leave out of garbage collection what the driver has loaded before its first trial.

    Python looks at its old objects only when the new ones have become a quarter as many. The imports of torch, Ray and
    MLflow would count as old here, and what MLflow's database sessions leave behind would pile up before that.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # from here on nothing is old
    try:
        yield
    finally:
        gc.unfreeze()


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
    """Gives Tune slots as long as there are trials for them."""

    def __init__(self, work: Work, slots: Slots, errors: Errors) -> None:
        super().__init__()
        self._work, self._slots, self._errors = work, slots, errors

    def suggest(self, trial_id: str) -> Any:
        """A slot, with its first trial; None to wait, FINISHED when nothing runs and nothing is left."""
        with self._errors.noted():
            return self._suggest(trial_id)

    def _suggest(self, slot: str) -> Any:
        if self._work.conductor.running >= self._slots.at_once:
            return None
        if self._work.fill(slot):
            return {"order": str(self._work.order(slot)), "resources": self._slots.resources}
        if self._work.conductor.running:
            return None
        return self._suggest(slot) if self._work.advance() else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The conductor knows it from the scheduler."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the log has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the log has it."""


class Referee(Unsaved, FIFOScheduler):  # type: ignore[misc]
    """Tells the conductor what trials report, and gives their slots to the next ones."""

    def __init__(self, work: Work, errors: Errors) -> None:
        super().__init__()
        self._work, self._errors = work, errors

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """An epoch: its trial goes on, or the slot's next one does, or the slot is given back."""
        slot = trial.trial_id
        with self._errors.noted():
            conductor, name = self._work.conductor, self._work.trial(slot)
            if not conductor.result(name, result["epoch"], result["value"], done=result["over"]):
                return str(TrialScheduler.CONTINUE)
            if result["training_iteration"] >= SLOT_RESULTS or not self._work.fill(slot):
                return str(TrialScheduler.STOP)
            conductor.began(self._work.trial(slot))
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A trial has failed, or its worker has died."""
        with self._errors.noted():
            self._work.conductor.crashed(self._work.trial(trial.trial_id), reason_of(trial.pickled_error_file))


class Clock(Unsaved, tune.Callback):  # type: ignore[misc]
    """Tells the conductor when a slot's first trial has its resources; and lets go of a slot that is over."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The actor is there."""
        self._work.conductor.began(self._work.trial(trial.trial_id))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tune keeps the slot to the end of the sweep: its statistics, which nobody reads, go now."""
        trial.metric_analysis.clear()
        trial.metric_n_steps.clear()


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
            "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # seconds between two saves of Tune's state, which nothing reads
            "TUNE_MAX_PENDING_TRIALS_PG": str(slots.at_once),
            "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
            "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
            "RAY_AIR_NEW_OUTPUT": "0",
        }.items():
            os.environ[key] = value
        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        work, errors = Work(stages, metric, Path(storage)), Errors()
        tuner = tune.Tuner(
            TrialActor,
            tune_config=tune.TuneConfig(
                search_alg=Feed(work, slots, errors),
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
            with settled_heap():
                tuner.fit()
        except Exception:
            if errors.first is not None:
                raise errors.first from None
            raise
