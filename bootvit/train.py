"""The driver: checks everything, takes the run's folder, and runs the loop under Ray Train or in this process.

The loop writes the run directory and nothing else; the driver follows its journal, for the terminal and for MLflow.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from bootvit import checkpoint, remote
from bootvit.addresses import public
from bootvit.asks import on_signals, say_stopping
from bootvit.config import Config, override, validate, whole
from bootvit.data import DataSplits, facts_of, open_splits
from bootvit.data.cache import cache_folder
from bootvit.errors import RunFailed, UserError
from bootvit.heartbeat import Heartbeat, check_nobody_writes
from bootvit.idle import warn_of_idle_keys
from bootvit.learner import World
from bootvit.load import load_config
from bootvit.loop import EpochReport, TestUse, check_evaluable, fit
from bootvit.models.zoo import check_batches
from bootvit.progress import follow_progress
from bootvit.ray_connection import check_address, one_line_for, session_folder
from bootvit.result import Result, RunStatus, new_result, read_result
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
from bootvit.tracking.artifacts import chosen
from bootvit.weights import check_weights
from bootvit.worker_log import worker_log

START_S = 60.0  # seconds that Ray Train waits for its workers before it counts that as a failure


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
    there = found_run(place_of(config)) if resume and run_state(place_of(config)) != "absent" else None
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
    if follower is None:
        publish(folder, status, "result.json")
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
    progress = threading.Thread(target=follow_progress, args=(config, folder, stop), daemon=True)
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


# ------------------------------------------------------------------------------------------ under Ray Train


def raise_on_sigterm() -> None:
    """A polite kill ends a run like Ctrl-C: recorded as interrupted."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)


def connect_ray(cpus: float) -> None:
    """Connect to RAY_ADDRESS's cluster, or start a Ray here that has at least this many CPUs.

    `UserError` within half a minute if no cluster is there, or a local one could not write its files.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # report() takes about this long
    import logging

    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := check_address():
        with one_line_for(address):
            ray.init(**quiet)
    else:
        cpus = max(os.cpu_count() or 1, math.ceil(cpus))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=session_folder(), **quiet)
    raise_on_sigterm()  # Ray has put its own handler there


def start_ray(config: Config) -> None:
    """A Ray on which the run's workers fit; `UserError` if they do not, or if it is not installed."""
    if importlib_missing("ray"):
        raise UserError("Ray is not installed: pip install 'bootvit[ray]', or add --local")
    from cluster.capacity import check_cluster, train_workers

    connect_ray(config.ray.most * config.ray.cpus_per_worker)
    check_cluster(train_workers(config), "the cluster")


def importlib_missing(name: str) -> bool:
    """Whether a package cannot be imported."""
    from importlib.util import find_spec

    return find_spec(name) is None


def run_under_ray(config: Config, folder: RunFolder) -> Result:
    """The loop on `ray.num_workers` workers; returns rank 0's result.

    Ctrl-C or SIGTERM ends it after the step under way, with a checkpoint; a second one at once.
    """
    from bootvit.coordinator import start_coordinator

    coordinator = start_coordinator()
    job = worker_job(config, folder, coordinator)
    followed = nullcontext() if folder.hold is None else remote.followed(folder.hold, folder.path)
    training = InThread(lambda: on_workers(config, train_worker, job, config.ray.max_failures))

    asked = threading.Event()

    def stop() -> None:
        asked.set()
        say_stopping()
        coordinator.stop.remote()

    try:
        with followed, on_signals(stop):
            result: Result | None = training.wait()
    finally:
        clear_ray_storage(config)
    if result is not None and folder.store is not None and config.tracking.enabled:
        for saved in chosen(config, folder.path):  # for MLflow, which the driver sends it to
            remote.fetch(folder.store, saved)
    if result is None and asked.is_set():
        raise KeyboardInterrupt
    if result is None:
        raise RunFailed("the workers have lost their driver's actor and stopped, with a checkpoint; --resume goes on")
    return result


def worker_job(config: Config, folder: RunFolder, coordinator: Any, test: TestUse = "auto") -> dict[str, Any]:
    """What `train_worker` is given."""
    return {
        "config": whole(config),
        "folder": folder,
        "test": test,
        "coordinator": coordinator,
    }


class InThread:
    """A call beside the main thread, which stays free for signals: Ray Train would take them for itself there."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether it goes on."""
        return self._thread.is_alive()

    def wait(self) -> Any:
        """Its value; raises what it raised."""
        while self._thread.is_alive():
            self._thread.join(0.2)
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as err:  # raised again by `wait`
            self._error = err


def on_workers(
    config: Config, worker: Callable[[dict[str, Any]], Any], job: dict[str, Any], max_failures: int = 0
) -> Any:
    """Run a function on every worker of a `TorchTrainer` and return rank 0's return value.

    The original error of a worker is raised here: `UserError` and `RunFailed` as they are.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # with it, what a worker prints is in its log twice
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = config.ray.use_gpu if config.ray.use_gpu is not None else gpus >= config.ray.fewest
    resources = {"CPU": config.ray.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})
    trainer = TorchTrainer(
        worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=config.ray.num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(timeout_s=math.ceil(config.ray.collective_timeout)),
        run_config=RunConfig(
            name=ray_name(config),
            storage_path=str(ray_storage(config)),
            failure_config=FailureConfig(max_failures, controller_failure_limit=starts(config)),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as err:
        raise original_error(err, config) from err
    except ray.exceptions.RayError as err:  # such as of Ray Train's own actor that was killed for want of memory
        raise RunFailed(f"Ray failed: {type(err).__name__}: {str(err).strip().splitlines()[0]}") from err
    except SystemExit as err:  # Ray Train's answer to Ctrl-C, when it has stopped the workers
        raise KeyboardInterrupt from err
    finally:
        clear_ray_storage(config)


def starts(config: Config) -> int:
    """How often Ray Train may wait anew for nodes that do not come, once its first wait is over."""
    each = float(os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_S))
    return max(0, math.ceil(60 * config.ray.wait_minutes / each) - 1)


def original_error(err: Exception, config: Config) -> Exception:
    """The first error of a worker behind Ray's: the user's and the run's own kinds pass unchanged."""
    if type(getattr(err, "controller_failure", None)).__name__ == "WorkerGroupStartupTimeoutError":
        return RunFailed(
            f"ray.num_workers={config.ray.num_workers}: the cluster had no room for {config.ray.fewest} of them within "
            f"ray.wait_minutes={config.ray.wait_minutes:g}; the same command with --resume goes on once it has"
        )
    failures = getattr(err, "worker_failures", {}) or {}
    errors = list(failures.values())
    for kind in (UserError, RunFailed):
        for failure in errors:
            if isinstance(failure, kind):
                return failure
            if type(failure).__name__ == kind.__name__ or f"{kind.__name__}:" in str(failure):
                return kind(str(failure).split(f"{kind.__name__}:")[-1].strip().splitlines()[0])
    first = errors[0] if errors else err
    last_line = (str(first).strip().splitlines() or [""])[-1]
    return RunFailed(f"a worker failed: {type(first).__name__}: {last_line}")


def ray_name(config: Config) -> str:
    """Of the folder that Ray Train keeps for its bookkeeping; our checkpoints are elsewhere."""
    return f".ray-{config.name}-{os.getpid()}"


def ray_storage(config: Config) -> Path:
    """Where that is; it is never read again. Beside a run in a store it is this node's, so that Ray needs no store."""
    place = place_of(config)
    return place.parent if isinstance(place, Path) else cache_folder()


def clear_ray_storage(config: Config) -> None:
    """Remove it."""
    shutil.rmtree(ray_storage(config) / ray_name(config), ignore_errors=True)


def train_worker(job: dict[str, Any]) -> Result | None:
    """One worker of Ray Train: the loop, with a report an epoch; None where it was asked to stop, and has saved."""
    import ray.train

    from bootvit.coordinator import Watch

    config = validate(Config, job["config"], "job")
    world, coordinator = ray_world(config), job["coordinator"]

    def tell(report: EpochReport) -> None:
        print(f"epoch {report.epoch}, step {report.step}", flush=True)  # to this worker's log
        if world.rank == 0:
            coordinator.report.remote(report)
        ray.train.report({"epoch": report.epoch, "step": report.step})

    given: RunFolder = job["folder"]
    folder = given.for_this_group() if world.rank == 0 else given.for_other_worker()
    watch = Watch(coordinator)
    try:
        with folder.sent(), worker_log(folder, world):
            return fit(config, world, folder, test=job["test"], on_epoch=tell, asked=watch.asked)
    except KeyboardInterrupt:
        return None
    finally:
        watch.close()
        folder.leave()


def ray_world(config: Config) -> World:
    """This worker's place, from Ray Train; uses the CPUs that it was given."""
    import ray.train
    from ray.train.torch import get_device

    torch.set_num_threads(max(1, int(config.ray.cpus_per_worker)))
    context = ray.train.get_context()
    return World(context.get_world_rank(), context.get_world_size(), get_device())
