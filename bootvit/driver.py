"""The driver: checks everything, takes the run's folder, and runs the loop under Ray Train or in this process.

The loop writes the run directory and nothing else; the driver follows its journal, for the terminal and for MLflow.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from bootvit import checkpoint
from bootvit.addresses import public
from bootvit.config import Config, override, whole
from bootvit.data import DataSplits, facts_of, open_splits
from bootvit.errors import RunFailed, UserError
from bootvit.heartbeat import Heartbeat, check_nobody_writes
from bootvit.idle import warn_of_idle_keys
from bootvit.learner import World
from bootvit.load import load_config
from bootvit.loop import TestUse, check_evaluable, fit
from bootvit.models.checks import check_batches
from bootvit.objective import class_weights
from bootvit.progress import follow_progress, opening, run_steps
from bootvit.ray_connection import start_ray
from bootvit.ray_workers import run_under_ray
from bootvit.result import EpochReport, Result, RunStatus, new_result, read_result
from bootvit.runs import (
    RunFolder,
    check_same_data,
    check_storage,
    claim,
    fetch_weights,
    found_run,
    place_of,
    run_state,
)
from bootvit.tracking import Follower, MlflowRun, check_tracking, mlflow_available, run_tags, source_version
from bootvit.weights import check_weights


def train(
    config: Config, *, local: bool, resume: bool = False, overwrite: bool = False, take_over: bool = False
) -> Result:
    """Train one run to its end and return what its `result.json` says.

    Raises `UserError` before anything is taken, and `RunFailed` for a run that could not go on.
    """
    splits = check(config, local=local, resume=resume)
    if local:
        pick_device(config.ray.use_gpu)
    else:
        start_ray(config)
        from cluster.probe import check_nodes, places_of

        check_nodes(places_of(config))
    run = run_local if local else run_under_ray
    if (resume or overwrite) and not take_over:
        check_nobody_writes(place_of(config))
    folder, state = claim(config, resume=resume, overwrite=overwrite)
    if state == "finished":
        print(f"{folder} is finished; nothing to do")
        was = override(load_config(str(folder.config)), {"tracking": whole(config.tracking)})
        if (tracked := open_tracking(was, folder, splits)) is not None:
            fetch_weights(folder, "all")
            tracked.sync()  # what a server that was down has not got yet
            folder.publish("mlflow.json")
        return read_result(folder.result)
    warn_of_idle_keys(config, splits, local=local)
    for note in splits.notes:
        print(f"note: {note}", flush=True)
    print(opening(config, splits, pick_device(config.ray.use_gpu) if local else None), flush=True)
    try:
        with Heartbeat(folder.place), following(config, folder, splits) as follower:
            return finish(config, folder, splits, lambda: run(config, folder), follower)
    finally:
        folder.leave()


def check(config: Config, *, local: bool, resume: bool) -> DataSplits:
    """Open the data and find every mistake that can be found before a resource is taken; raises `UserError`."""
    check_tracking(config)
    check_storage(config)
    if local and config.ray.most > 1:
        raise UserError(f"ray.num_workers={config.ray.num_workers}: --local is one process; leave it out for Ray Train")
    splits = open_splits(config.data)
    check_evaluable(config, splits)
    check_batches(config, len(splits.train))
    class_weights(config.objective, splits.train.labels, len(splits.classes))
    there = found_run(place_of(config)) if resume and run_state(place_of(config)) != "absent" else None
    if there is not None:
        check_same_data(there, facts_of(splits, config))
    if there is None or not checkpoint.described(there.checkpoints):
        for note in check_weights(config, splits.classes):
            print(f"bootvit: {note}", file=sys.stderr)
    return splits


def finish(
    config: Config,
    folder: RunFolder,
    splits: DataSplits,
    run: Callable[[], Result],
    follower: Follower | None,
) -> Result:
    """Run it, and record how it ended in result.json and MLflow, whatever happens."""
    ends: dict[type[BaseException], RunStatus] = {
        KeyboardInterrupt: "interrupted",
        RunFailed: "failed",
        UserError: "failed",
    }
    try:
        result = run()
    except BaseException as err:
        status = ends.get(type(err), "failed")
        if status == "interrupted" or isinstance(err, OSError):
            print(f"{folder}: the same command with --resume goes on", file=sys.stderr)
        known = unfinished(config, folder, splits, status, err)
        record(folder, known, "KILLED" if status == "interrupted" else "FAILED", follower)
        raise
    return record(folder, result, "FINISHED", follower)


def record(
    folder: RunFolder,
    result: Result,
    status: Literal["FINISHED", "FAILED", "KILLED"],
    follower: Follower | None,
) -> Result:
    """Write result.json, at first without MLflow's id, which may not be there yet, and let MLflow know of the end."""
    ended = time.time()
    result = result | {"git": source_version(), "mlflow_run_id": None}
    folder.write_result(result)
    publish(folder, status, "result.json")
    if follower is None:
        return result
    run_id = follower.run_id()
    if run_id is not None:
        result |= {"mlflow_run_id": run_id}
        folder.write_result(result)
        publish(folder, status, "mlflow.json", "result.json")
    follower.finish(status, result, ended)
    publish(folder, status, "mlflow.json")
    return result


def publish(folder: RunFolder, status: str, *names: str) -> None:
    """Put these into the store that a run is in; where it has not finished, why it has not is what is to be said."""
    try:
        for name in names:
            folder.publish(name)
    except (RunFailed, UserError) as err:
        if folder.hold is not None:
            folder.hold.unsent = True
        if status == "FINISHED":
            raise RunFailed(f"{err}; all of the run is in {folder.path} on this machine") from err
        print(f"bootvit: warning: {err}", file=sys.stderr)


def unfinished(config: Config, folder: RunFolder, splits: DataSplits, status: RunStatus, err: BaseException) -> Result:
    """What is known of a run that did not finish."""
    return new_result(
        config,
        status,
        max((s.epoch for s in checkpoint.described(folder.checkpoints)), default=0),
        reason=public(str(err)) or type(err).__name__,
        fingerprint=splits.fingerprint,
        digest=splits.train.digest,
    )


def open_tracking(config: Config, folder: RunFolder, splits: DataSplits) -> MlflowRun | None:
    """The run in MLflow; None where tracking is off or MLflow is not installed, which is said."""
    if not config.tracking.enabled:
        return None
    if not mlflow_available():
        print("bootvit: MLflow is not installed: this run is only in its folder", file=sys.stderr)
        return None
    tags = run_tags(config, data_fingerprint=splits.fingerprint, subset_digest=splits.train.digest)
    tracked = MlflowRun(config, folder.path, tags=tags)
    folder.publish("mlflow.json")  # with our key, before MLflow hears of it: a second run is never made
    return tracked


@contextmanager
def following(config: Config, folder: RunFolder, splits: DataSplits) -> Iterator[Follower | None]:
    """Follow the journal in the background: progress on the terminal, points to MLflow."""
    tracked = open_tracking(config, folder, splits)
    follower = Follower(tracked) if tracked is not None else None
    stop = threading.Event()
    progress = threading.Thread(
        target=follow_progress, args=(config, folder, stop, run_steps(config, splits)), daemon=True
    )
    progress.start()
    try:
        yield follower
    finally:
        stop.set()
        progress.join()
        if follower is not None:
            follower.stop()


# ------------------------------------------------------------------------------------------ in this process


def run_local(
    config: Config,
    folder: RunFolder,
    *,
    test: TestUse = "auto",
    on_epoch: Callable[[EpochReport], None] | None = None,
) -> Result:
    """The loop in this process: no Ray, no process group."""
    world = World(0, 1, pick_device(config.ray.use_gpu))
    with folder.sent():
        return fit(config, world, folder, test=test, on_epoch=on_epoch)


def pick_device(use_gpu: bool | None) -> torch.device:
    """The GPU if there is one and it is not refused; `UserError` if one is demanded and there is none."""
    there = torch.cuda.is_available()
    if use_gpu and not there:
        raise UserError("ray.use_gpu=true: this machine has no CUDA device; set ray.use_gpu=false")
    return torch.device("cuda" if there and use_gpu is not False else "cpu")
