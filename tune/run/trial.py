"""One attempt at a trial: an ordinary run in an ordinary run directory, an epoch at a time.

A trial with one worker runs the loop in the process that calls `attempt`; with several, Ray Train's workers run it,
and this process hears from them through an actor beside it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator

import ray

from bootvit import checkpoint
from bootvit.config import Config, validate
from bootvit.driver import pick_device
from bootvit.extensions import import_all
from bootvit.learner import World
from bootvit.loop import TestUse, epochs
from bootvit.ray_workers import InThread, on_workers, train_worker, worker_job
from bootvit.result import EpochReport, Result, read_result
from bootvit.runs import RunFolder, claim, take_lease
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
    check_seen(config.run_dir.parent.parent / "sweep.yaml")  # else the trial would be claimed on this node's own disk
    folder, state = claim(config, resume=True, overwrite=False)
    if state == "finished":
        result = read_result(folder.result)
        if job.test == "never" or result["final"] is not None:
            yield Report(result["epochs"], reports(folder).get(result["epochs"], {}), True)
            return
        folder = take_lease(folder.path)
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
        with worker_log(folder, world):
            return (yield from epochs(config, world, folder, test=job.test, asked=watch.asked))
    finally:
        watch.close()


# ------------------------------------------------------------------------------------------- several workers


def in_workers(config: Config, folder: RunFolder, test: TestUse) -> Generator[EpochReport, None, Result]:
    """The loop in Ray Train's workers; closing this takes their lease away, so that they end and free their CPUs."""
    from bootvit.coordinator import start_coordinator

    coordinator = start_coordinator()
    training = InThread(lambda: on_workers(config, train_worker, worker_job(config, folder, coordinator, test)))
    known, alive = 0, True
    try:
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
            take_lease(folder.path)
            training.wait()
