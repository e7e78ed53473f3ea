"""One attempt at a trial: an ordinary run in an ordinary run directory, an epoch at a time.

A trial with one worker runs the loop in the process that calls `attempt`; with several, Ray Train's workers run it,
and this process follows the run directory that they write.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bootvit import checkpoint
from bootvit.config import Config, validate
from bootvit.learner import World
from bootvit.loop import EpochReport, TestUse, epochs
from bootvit.runs import RunFolder, claim, take_lease
from bootvit.tracking import read_journal
from bootvit.train import on_workers, pick_device, train_worker
from bootvit.worker_log import check_seen, worker_log

POLL = 0.2  # seconds between two looks at the run directory of workers


class Report(NamedTuple):
    """What an attempt says after every epoch; `done` once, last."""

    epoch: int  # epochs completed
    metrics: dict[str, float]  # "held_out/vit/top1": 45.8, ...; empty where this epoch was not evaluated
    done: bool


class Job(NamedTuple):
    """What an attempt is to do."""

    config: dict[str, Any]
    metric: str = ""  # the journal's name of the selection metric
    test: TestUse = "never"
    cpus: float = 1
    heard: int = 0  # epochs of which the driver knows


def attempt(job: Job) -> Generator[Report, None, None]:
    """Go on from the run's newest checkpoint to its end.

    What the directory already holds is reported first, because a driver that was killed may not have heard of it.
    A run that is finished is done at once, unless it has yet to meet the test set.
    """
    config = validate(Config, job.config, "trial")
    check_seen(config.run_dir.parent.parent / "sweep.yaml")  # else the trial would be claimed on this node's own disk
    folder, state = claim(config, resume=True, overwrite=False)
    if state == "finished":
        result = checkpoint.read_json(folder.result)
        if job.test == "never" or result["final"] is not None:
            yield Report(result["epochs"], reports(folder).get(result["epochs"], {}), True)
            return
        folder = take_lease(folder.path)
    known = reports(folder)
    for epoch in sorted(known)[: -1 if is_final(folder) else None]:
        if epoch > job.heard:
            yield Report(epoch, known[epoch], False)
    run = in_workers(config, folder, job.test) if config.ray.num_workers > 1 else in_process(config, folder, job)
    yield from with_end(run, folder)


def with_end(run: Generator[EpochReport, None, dict[str, Any]], folder: RunFolder) -> Iterator[Report]:
    """A run's epochs, the last one together with the end: it must not be stopped between the two."""
    while True:
        try:
            report = next(run)
            while is_final(folder):
                next(run)
        except StopIteration as end:
            yield Report(end.value["epochs"], reports(folder).get(end.value["epochs"], {}), True)
            return
        yield Report(report.epoch, report.metrics, False)


def is_final(folder: RunFolder) -> bool:
    """Whether the newest checkpoint is that of the end of training."""
    saved = checkpoint.described(folder.checkpoints)
    return bool(saved) and saved[-1].final


def reports(folder: RunFolder) -> dict[int, dict[str, float]]:
    """{epochs completed: its held-out metrics} up to the newest checkpoint."""
    saved = checkpoint.described(folder.checkpoints)
    out: dict[int, dict[str, float]] = {epoch: {} for epoch in range(1, saved[-1].epoch + 1)} if saved else {}
    for record in read_journal(folder.journal)[0]:
        if record.epoch + 1 in out and record.name.startswith("held_out/"):
            out[record.epoch + 1][record.name] = record.value
    return out


def in_process(config: Config, folder: RunFolder, job: Job) -> Generator[EpochReport, None, dict[str, Any]]:
    """The loop here: no second actor."""
    import torch

    torch.set_num_threads(max(1, int(job.cpus)))
    world = World(0, 1, pick_device(config.ray.use_gpu))
    with worker_log(folder, world):
        return (yield from epochs(config, world, folder, test=job.test))


# ------------------------------------------------------------------------------------------- several workers


@dataclass
class Outcome:
    """How a `TorchTrainer` in a thread ended."""

    result: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None


def in_workers(config: Config, folder: RunFolder, test: TestUse) -> Generator[EpochReport, None, dict[str, Any]]:
    """The loop in Ray Train's workers; closing this takes their lease away, so that they end and free their CPUs."""
    outcome = Outcome()
    thread = threading.Thread(target=_train, args=(config, folder, test, outcome), daemon=True)
    last = max(reports(folder), default=0)
    thread.start()
    try:
        while thread.is_alive():
            time.sleep(POLL)
            saved = checkpoint.described(folder.checkpoints)
            if not saved or saved[-1].epoch <= last or saved[-1].final:
                continue
            for epoch, metrics in sorted(reports(folder).items()):
                if epoch > last:
                    last = epoch
                    yield EpochReport(epoch, saved[-1].step, metrics)
        thread.join()
    finally:
        if thread.is_alive():
            take_lease(folder.path)
            thread.join()
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def _train(config: Config, folder: RunFolder, test: TestUse, outcome: Outcome) -> None:
    job = {"config": config.model_dump(mode="json"), "folder": str(folder.path), "lease": folder.lease, "test": test}
    try:
        outcome.result = dict(on_workers(config, train_worker, job))
    except BaseException as err:  # raised again in the thread that waits for it
        outcome.error = err
