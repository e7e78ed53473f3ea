"""Under Ray Train: the loop on its workers, whose errors come back as the run's own.

Ray Train's own actor imports this module beside the workers: torch and the loop are imported only in those.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bootvit.addresses import is_address
from bootvit.asks import on_signals, say_stopping
from bootvit.config import Config, validate, whole
from bootvit.errors import RunFailed, UserError
from bootvit.extensions import import_all
from bootvit.result import EpochReport, Result

if TYPE_CHECKING:
    from bootvit.learner import World
    from bootvit.loop import TestUse
    from bootvit.runs import RunFolder

START_S = 60.0  # seconds that Ray Train waits for its workers before it counts that as a failure


def run_under_ray(config: Config, folder: RunFolder) -> Result:
    """The loop on `ray.num_workers` workers; returns rank 0's result.

    Ctrl-C or SIGTERM ends it after the step under way, with a checkpoint; a second one at once.
    """
    from bootvit.coordinator import start_coordinator

    coordinator = start_coordinator()
    job = worker_job(config, folder, coordinator)
    training = InThread(lambda: on_workers(config, train_worker, job, config.ray.max_failures))

    asked = threading.Event()

    def stop() -> None:
        asked.set()
        say_stopping()
        coordinator.stop.remote()

    try:
        with folder.followed(), on_signals(stop):
            result: Result | None = training.wait()
    finally:
        clear_ray_storage(config)
    if result is not None and config.tracking.enabled:
        folder.fetch_artifacts(config)
    if result is None and asked.is_set():
        raise KeyboardInterrupt
    if result is None:
        raise RunFailed("the workers have lost their driver's actor and stopped, with a checkpoint; --resume goes on")
    return result


def worker_job(
    config: Config, folder: RunFolder, coordinator: Any, test: TestUse = "auto", *, sent_first: bool = False
) -> dict[str, Any]:
    """What `train_worker` is given; `sent_first`: what it reports of a run in a store is there before."""
    return {
        "config": whole(config),
        "folder": str(folder.path),
        "lease": folder.lease,
        "hold": None if folder.hold is None else folder.hold.told(),
        "test": test,
        "sent_first": sent_first,
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
    longest = math.ceil(config.ray.collective_timeout)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(longest)  # the barrier in `report`: Ray would wait for ever
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(min(longest, 600))  # of a halted worker
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
        torch_config=TorchConfig(timeout_s=longest),
        run_config=RunConfig(
            name=ray_name(config),
            storage_path=ray_storage(config),
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


def ray_storage(config: Config) -> str:
    """Where that is; it is never read again. Of a run in a store it is on this node, so that Ray needs no store."""
    if not is_address(config.ray.storage_path):
        return config.ray.storage_path
    from bootvit.data.cache import cache_folder

    return str(cache_folder())


def clear_ray_storage(config: Config) -> None:
    """Remove it."""
    import shutil

    shutil.rmtree(Path(ray_storage(config)) / ray_name(config), ignore_errors=True)


def train_worker(job: dict[str, Any]) -> Result | None:
    """One worker of Ray Train: the loop, with a report an epoch; None where it was asked to stop, and has saved."""
    import ray.train

    from bootvit.coordinator import Watch
    from bootvit.loop import fit
    from bootvit.runs import RunFolder
    from bootvit.worker_log import worker_log

    config = validate(Config, job["config"], "job")
    import_all(config.imports)
    world, coordinator = ray_world(config), job["coordinator"]

    def tell(report: EpochReport) -> None:
        print(f"epoch {report.epoch}, step {report.step}", flush=True)  # to this worker's log
        if world.rank == 0 and job["sent_first"]:
            flush()
        if world.rank == 0:
            coordinator.report.remote(report)
        ray.train.report({"epoch": report.epoch, "step": report.step})

    given = RunFolder(Path(job["folder"]), job["lease"])
    if job["hold"] is not None:
        given = given.in_store(job["hold"])
    folder = given.for_this_group() if world.rank == 0 else given.for_other_worker()
    watch = Watch(coordinator)
    try:
        with folder.sent() as flush, worker_log(folder, world):
            return fit(config, world, folder, test=job["test"], on_epoch=tell, asked=watch.asked)
    except KeyboardInterrupt:
        return None
    finally:
        watch.close()
        folder.leave()


def ray_world(config: Config) -> World:
    """This worker's place, from Ray Train; uses the CPUs that it was given."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    from bootvit.learner import World

    torch.set_num_threads(max(1, int(config.ray.cpus_per_worker)))
    context = ray.train.get_context()
    return World(context.get_world_rank(), context.get_world_size(), get_device())
