"""One attempt at a trial: an ordinary run in an ordinary run directory, an epoch at a time.

A trial with one worker runs the loop in the process that calls `attempt`; with several, Ray Train's workers run it,
and this process hears from them through an actor beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import ray

from bootvit import checkpoint
from bootvit.addresses import is_address
from bootvit.config import Config, validate
from bootvit.driver import pick_device
from bootvit.extensions import import_all
from bootvit.learner import World
from bootvit.loop import TestUse, epochs
from bootvit.ray_workers import InThread, on_workers, train_worker, worker_job
from bootvit.result import EpochReport, Result, read_result
from bootvit.runs import RunFolder, claim, take_again
from bootvit.tracking import read_journal
from bootvit.worker_log import check_seen, worker_log
from tune.run.job import Job, Report

POLL = 0.2  # seconds between two questions to the workers


def attempt(job: Job) -> Generator[Report, None, None]:
    """Go on from the run's newest checkpoint to its end.

    What the directory already holds is reported first, because a driver that was killed may not have heard of it.
    A run that is finished is done at once, unless it has yet to meet the test set.
    """
    config = validate(Config, job.config, "trial")
    import_all(config.imports)
    if not is_address(config.ray.storage_path):  # else the trial would be claimed on this node's own disk
        check_seen(config.run_dir.parent.parent / "sweep.yaml")
    folder, state = claim(config, resume=True, overwrite=False)
    if state == "finished":
        result, found = read_result(folder.result), folder
        end = Report(result["epochs"], reports(found).get(result["epochs"], {}), True)
        if job.test == "never" or result["final"] is not None:
            found.leave()
            yield end
            return
        folder = take_again(found)
        found.leave()
    try:
        yield from go_on(folder, config, job)
    finally:
        folder.leave()


def go_on(folder: RunFolder, config: Config, job: Job) -> Iterator[Report]:
    """The same once the run is taken, and has not ended."""
    known = reports(folder)
    saved = checkpoint.described(folder.checkpoints)
    for epoch in sorted(known)[: -1 if saved and saved[-1].final else None]:
        if epoch > job.heard:
            yield Report(epoch, known[epoch], False)
    run = in_workers(config, folder, job.test) if config.ray.most > 1 else in_process(config, folder, job)
    yield from with_end(run, folder)


def with_end(run: Generator[EpochReport, None, Result], folder: RunFolder) -> Iterator[Report]:
    """A run's epochs, the last one together with the end: it must not be stopped between the two."""
    metrics: dict[str, float] | None = None
    while True:
        try:
            report = next(run)
            while report.last:
                metrics = report.metrics
                next(run)
        except StopIteration as end:
            epochs_done = end.value["epochs"]
            if metrics is None:  # it went on behind its last epoch
                metrics = reports(folder).get(epochs_done, {})
            yield Report(epochs_done, metrics, True)
            return
        yield Report(report.epoch, report.metrics, False)


def reports(folder: RunFolder) -> dict[int, dict[str, float]]:
    """{epochs completed: its held-out metrics}, of those that the newest checkpoint has behind it."""
    saved = checkpoint.described(folder.checkpoints)
    records = [r for r in read_journal(folder.journal)[0] if saved and r.step <= saved[-1].step]
    return {
        end.epoch + 1: {r.name: r.value for r in records if r.epoch == end.epoch and r.name.startswith("held_out/")}
        for end in records
        if end.name == "epoch"
    }


def in_process(config: Config, folder: RunFolder, job: Job) -> Generator[EpochReport, None, Result]:
    """The loop here: no second actor."""
    import torch

    from bootvit.coordinator import Watch

    torch.set_num_threads(max(1, int(job.cpus)))
    watch = Watch()
    try:
        world = World(0, 1, pick_device(config.ray.use_gpu))
        with folder.sent() as flush, worker_log(folder, world):
            return (yield from told_after(flush, epochs(config, world, folder, test=job.test, asked=watch.asked)))
    finally:
        watch.close()


def told_after(
    flush: Callable[[], None], run: Generator[EpochReport, None, Result]
) -> Generator[EpochReport, None, Result]:
    """A run's epochs, each once the store has what it says."""
    with closing(run):
        while True:
            try:
                report = next(run)
            except StopIteration as end:
                result: Result = end.value
                return result
            flush()
            yield report


# ------------------------------------------------------------------------------------------- several workers


def in_workers(config: Config, folder: RunFolder, test: TestUse) -> Generator[EpochReport, None, Result]:
    """The loop in Ray Train's workers; closing this takes their lease away, so that they end and free their CPUs."""
    from bootvit.coordinator import start_coordinator

    coordinator = start_coordinator()
    job = worker_job(config, folder, coordinator, test, sent_first=True)
    training = InThread(lambda: on_workers(config, train_worker, job))
    known, alive = 0, True
    try:
        with folder.followed():
            while alive:
                time.sleep(POLL)
                alive = training.is_alive()
                for report in ray.get(coordinator.reports.remote(known)):
                    known += 1
                    yield report
            result: Result = training.wait()
            return result
    finally:
        if training.is_alive():
            take_again(folder).leave()
            training.wait()
