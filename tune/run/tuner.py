"""Ray Tune's interfaces, with the conductor behind them: searcher, scheduler, trainable, callback.

A trial of the sweep is a trial of Tune's, by the same name and in the same folder. What is decided is decided in the
conductor and in its log; Tune executes it, keeps actors, and starts a trial again that has lost its actor. Tune's own
state is not kept: each driver starts a new Tune run, which is told of the trials that have ended. The classes here are
Tune's interfaces and nothing more, so Ray is imported at the top; import this module where Ray is there.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.experiment.config_parser import _create_trial_from_spec
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.search_generator import SearchGenerator

from bootvit.errors import RunFailed
from tune.decide.conductor import Conductor
from tune.decide.log import ENDED, Trial
from tune.run.capacity import Room
from tune.run.failures import reason_of
from tune.run.leaks import Orphans
from tune.run.trial import Job, Report, attempt

MakeJob = Callable[[Trial], Job]


class Work(NamedTuple):
    """What Tune is to execute."""

    conductor: Conductor
    make_job: MakeJob
    room: Room
    resources: dict[str, float]  # of Ray, for each trial's actor
    several_workers: bool
    retries: int
    timeout: float | None = None  # seconds without a report after which a trial is started again
    callbacks: Sequence[tune.Callback] = ()
    table: bool = False  # Tune's own table on the terminal
    trainable: type[tune.Trainable] | None = None  # None: `TrialActor`


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """Runs a trial, an epoch a step."""

    attempt = staticmethod(attempt)

    def setup(self, config: dict[str, Any]) -> None:
        """Only take note: Tune may set an actor up for a trial that another one runs already."""
        self._job = config["job"]
        self._run: Generator[Report, None, None] | None = None

    def step(self) -> dict[str, Any]:
        """One epoch; the result says whose it is."""
        job = Job(**json.loads(self._job))
        if self._run is None:
            self._run = self.attempt(job)
        report = next(self._run)
        value = report.metrics.get(job.metric)
        return {**report.metrics, "trial": self.trial_id, "epoch": report.epoch, "value": value, "over": report.done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run's own checkpoints are on disk."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: `attempt` goes on from the run's own."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial's actor."""
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Leave the trial where it is."""
        if self._run is not None:
            self._run.close()
            self._run = None
            release_memory()

    def __repr__(self) -> str:
        """With the trial's name: Ray's dashboard, its logs and the titles of processes show it."""
        return f"{type(self).__name__}({self.trial_id})"


def release_memory() -> None:
    """Give a GPU's cached memory back to the trials beside this one."""
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


# ------------------------------------------------------------------------------------------------- the searcher


class Source(Unsaved, SearchGenerator):  # type: ignore[misc]
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


class Order(str):
    """A text that is not spelled out where Tune prints a trial's parameters."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "..."


def tune_config(trial: Trial, job: Job | None) -> dict[str, Any]:
    """A trial's config as Tune has it: its own values, and as one text what its actor is to do, while it has one."""
    values = {**trial.overrides, "seed": trial.spec.seed}
    return values if job is None else {**values, "job": Order(json.dumps(job._asdict()))}


# ------------------------------------------------------------------------------------------------ the scheduler


class Judge(Unsaved, FIFOScheduler):  # type: ignore[misc]
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
        self._work.conductor.began(trial.trial_id)

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

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Once a round of Tune's loop."""
        self._judge.agree()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: TuneTrial, **info: Any) -> None:
        """The actor is there."""
        self._judge.began(trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: TuneTrial, **info: Any) -> None:
        """Tune keeps its trials to the end of the sweep: their statistics and orders go now."""
        trial.metric_analysis.clear()
        trial.metric_n_steps.clear()
        trial.set_config({key: value for key, value in trial.config.items() if key != "job"})
        if trial.run_metadata.last_result:
            trial.run_metadata.last_result["config"] = trial.config

    def on_trial_error(self, iteration: int, trials: list[Any], trial: TuneTrial, **info: Any) -> None:
        """The same for one that has failed; if the conductor lets it go on, it gets its order again."""
        self.on_trial_complete(iteration, trials, trial, **info)


# ----------------------------------------------------------------------------------------------------- the run


def execute(work: Work, folder: Path, name: str) -> tune.ResultGrid:
    """Run what the conductor gives out, to its end; a trial's folder is `folder/name/<its id>`."""
    errors = Errors()
    configure(work)
    source = Source(work, errors)
    judge = Judge(work, source.given, errors)
    tuner = tune.Tuner(
        work.trainable or TrialActor,
        tune_config=tune.TuneConfig(
            search_alg=source,
            scheduler=judge,
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(folder),
            verbose=2 if work.table else 0,
            progress_reporter=reporter() if work.table else None,
            callbacks=[Observer(judge), *work.callbacks],
            failure_config=tune.FailureConfig(max_failures=0),  # each trial has its own number
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    try:
        with settled_heap():
            return tuner.fit()
    except Exception:
        if errors.first is not None:
            raise errors.first from None
        raise
    finally:
        remove_state(folder / name)


def configure(work: Work) -> None:
    """Tune's switches: they are variables of the environment.

    Tune copies what callbacks have written into the runs' folders when it saves its state, which nothing else reads.
    """
    for key, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "30" if work.callbacks else "inf",
        "TUNE_MAX_PENDING_TRIALS_PG": str(sys.maxsize),  # `Room` says how many
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": str(sys.maxsize),  # `Room` says so
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
    }.items():
        os.environ[key] = value
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def reporter() -> tune.CLIReporter:
    """Tune's table: each trial by its name, with its values, its epoch and the selection metric."""
    return tune.CLIReporter(metric_columns={"epoch": "epoch", "value": "metric"}, max_report_frequency=10)


def remove_state(folder: Path) -> None:
    """Remove Tune's own files beside the trials': nothing could be restored from them."""
    for pattern in ("*.pkl", "experiment_state-*.json", "searcher-*", "search_gen_state-*", ".validate_storage_marker"):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)


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
