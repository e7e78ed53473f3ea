"""A run of Ray Tune with the conductor behind its interfaces: searcher, scheduler, trainable, callback.

A trial of the sweep is a trial of Tune's, by the same name and in the same folder. What is decided is decided in the
conductor and in its log; Tune executes it, keeps actors, and starts a trial again that has lost its actor. Tune's own
state is not kept: each driver starts a new Tune run, which is told of the trials that have ended. Ray is
imported at the top here and in those four: import this module where Ray is there.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray import tune

from tune.run.scheduler import Observer, SweepScheduler
from tune.run.searcher import SweepSearcher
from tune.run.trainable import TrialActor
from tune.run.work import Errors, Work


def execute(work: Work, folder: Path, name: str) -> tune.ResultGrid:
    """Run what the conductor gives out, to its end; a trial's folder is `folder/name/<its id>`."""
    errors = Errors()
    configure(work)
    searcher = SweepSearcher(work, errors)
    scheduler = SweepScheduler(work, searcher.given, errors)
    tuner = tune.Tuner(
        work.trainable or TrialActor,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
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
            callbacks=[Observer(scheduler), *work.callbacks],
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
