"""The training loop: plain torch, no Ray, no MLflow. Every worker runs it; rank 0 writes the run directory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bootvit import checkpoint
from bootvit.config import Config, DataConfig, Network
from bootvit.data import DataFacts, DataSplits, facts_of, open_splits
from bootvit.data.batches import EvalBatches, TrainBatches
from bootvit.data.fractions import Subset
from bootvit.errors import RunFailed, UserError
from bootvit.learner import Counts, Learner, World
from bootvit.result import Accuracy, Result, new_result
from bootvit.runs import RunFolder
from bootvit.tracking import Journal, Record, read_journal
from bootvit.weights import warm_start

NAMED = 20  # broken images that result.json names; it counts all
Scores = dict[Network, Counts]
TestUse = Literal["auto", "last", "never"]


class EpochReport(NamedTuple):
    """What a caller learns after every epoch, on every rank, once its checkpoint is on disk."""

    epoch: int  # epochs completed
    step: int
    metrics: dict[str, float]  # "held_out/vit/top1": 45.8, ...; empty where this epoch was not evaluated


@dataclass
class Progress:
    """Where a run stands; saved with the checkpoint."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    images: int = 0
    train_seconds: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)  # broken images left out: {image: reason}

    def add_skipped(self, broken: dict[str, str], data: DataConfig, world: World) -> None:
        """Remember the broken images that any worker has left out."""
        self.skipped |= of_all_workers(broken, data, world)


def fit(
    config: Config,
    world: World,
    folder: RunFolder,
    *,
    test: TestUse = "auto",
    on_epoch: Callable[[EpochReport], None] | None = None,
    keep: int = 2,
) -> Result:
    """Train from the newest checkpoint in `folder` (or from scratch) to the end; returns what `result.json` holds.

    `test` says when the test set is looked at: auto is every evaluation, but only the last one where a part of the
    training images is held out; never is for sweeps that retrain their winners.
    """
    run = epochs(config, world, folder, test=test, keep=keep)
    while True:
        try:
            report = next(run)
        except StopIteration as end:
            result: Result = end.value
            return result
        if on_epoch is not None:
            on_epoch(report)


def epochs(
    config: Config, world: World, folder: RunFolder, *, test: TestUse = "auto", keep: int = 2
) -> Generator[EpochReport, None, Result]:
    """`fit`, an epoch at a time: yields once an epoch's checkpoint is on disk, returns the result."""
    started = time.monotonic()
    splits = open_splits(config.data)
    check_evaluable(config, splits)
    learner = Learner(config, len(splits.classes), world)
    facts = facts_of(splits, config)
    at = restore(learner, folder, facts)
    if at is None:
        warm_start(learner.networks, config, splits.classes)
        at = Progress()
    before = at.seconds
    batches = TrainBatches(
        splits.train, config, facts.preparation, rank=world.rank, world=world.size, device=world.device
    )
    journal = open_journal(folder, at.step) if world.rank == 0 else None
    total = total_steps(config, batches.steps_per_epoch)
    scores: dict[str, Scores] = {}
    while at.step < total:
        train_epoch(config, learner, batches, at, total, journal, folder)
        at.epoch += 1
        last = at.step >= total
        check_finite(learner, at.step, folder)
        at.add_skipped(batches.broken, config.data, world)
        metrics: dict[str, float] = {}
        if last or at.epoch % config.schedule.eval_every == 0:
            with telling_what_is_left(folder):
                scores = evaluate_splits(config, learner, splits, facts, at, test, last)
            metrics = write_scores(scores, at, journal, folder)
        if at.skipped:
            write(journal, folder, {"data/skipped": len(at.skipped)}, at.step, at.epoch - 1)
        at.seconds = before + time.monotonic() - started
        if world.rank == 0:
            folder.check_lease()
            state = {"learner": learner.state_dict(), "progress": vars(at), "data": facts.to_dict()}
            checkpoint.save(folder.checkpoints, state, epoch=at.epoch, step=at.step, final=last, keep=keep)
        yield EpochReport(at.epoch, at.step, metrics)
    if not scores:  # resumed after the last checkpoint, before the result was written
        scores = evaluate_splits(config, learner, splits, facts, at, test, last=True)
    result = summarise(config, splits, at, scores, folder, world)
    if world.rank == 0:
        folder.write_result(result)
    return result


def of_all_workers(broken: dict[str, str], data: DataConfig, world: World) -> dict[str, str]:
    """The broken images {image: reason} that any worker has left out; empty with data.on_error=raise."""
    found: list[dict[str, str]] = [broken] * world.size
    if world.size > 1 and data.on_error == "skip":
        dist.all_gather_object(found, broken)
    return {where: reason for one in found for where, reason in one.items()}


def train_epoch(
    config: Config,
    learner: Learner,
    batches: TrainBatches,
    at: Progress,
    total: int,
    journal: Journal | None,
    folder: RunFolder,
) -> None:
    """One pass over the training images, or what `max_steps` leaves of it."""
    meter = Meter(learner, journal, folder)
    begin = time.monotonic()
    for i, batch in enumerate(batches.epoch(at.epoch)):
        progress = at.epoch + i / batches.steps_per_epoch
        meter.add(learner.step(batch, at.step, at.epoch, progress), at.step + 1, at.epoch, batch.global_size)
        at.step += 1
        at.images += batch.global_size
        if at.step % config.tracking.log_every == 0:
            meter.flush()
        if at.step >= total:
            break
    meter.flush()
    at.train_seconds += time.monotonic() - begin


@dataclass
class Meter:
    """Collects loss terms on the device and looks at them once every few steps: one transfer, one all-reduce."""

    learner: Learner
    journal: Journal | None
    folder: RunFolder
    rows: list[Tensor] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)  # (step, epoch)
    images: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, terms: Tensor, step: int, epoch: int, images: int) -> None:
        """This worker's share of a step's terms."""
        self.rows.append(terms)
        self.places.append((step, epoch))
        self.images += images

    def flush(self) -> None:
        """Write the mean over the steps since the last flush; raise `RunFailed` at the first that is not finite."""
        if not self.rows:
            return
        values = torch.stack(self.rows)  # (steps, terms)
        if self.learner.world.size > 1:
            dist.all_reduce(values)
        values = values.double().cpu()
        names = self.learner.term_names
        for row, (step, _) in zip(values.tolist(), self.places, strict=True):
            if not all(map(math.isfinite, row)):
                terms = ", ".join(f"{name}={value:g}" for name, value in zip(names, row, strict=True))
                raise RunFailed(f"the loss is not finite at step {step}: {terms}{what_is_left(self.folder)}")
        now = time.monotonic()
        step, epoch = self.places[-1]
        metrics = {f"train/{name}": value for name, value in zip(names, values.mean(0).tolist(), strict=True)}
        metrics["train/lr"] = self.learner.groups[0].optimizer.param_groups[0]["lr"]
        metrics["train/images_per_second"] = self.images / max(now - self.since, 1e-9)
        write(self.journal, self.folder, metrics, step, epoch)
        self.rows, self.places, self.images, self.since = [], [], 0, now


def check_finite(learner: Learner, step: int, folder: RunFolder) -> None:
    """Raise `RunFailed` if the last update has broken the weights: no loss has told of it yet."""
    name = learner.not_finite()
    if name is not None:
        raise RunFailed(f"the weights are not finite after step {step}: {name}{what_is_left(folder)}")


def what_is_left(folder: RunFolder) -> str:
    """The end of a failed run's message: the checkpoint that it leaves, whose weights are always finite."""
    saved = checkpoint.described(folder.checkpoints)
    return f"; the checkpoint of step {saved[-1].step} is kept" if saved else "; there is no checkpoint yet"


@contextmanager
def telling_what_is_left(folder: RunFolder) -> Iterator[None]:
    """End the message of a `RunFailed` raised inside with `what_is_left`."""
    try:
        yield
    except RunFailed as err:
        raise RunFailed(f"{err}{what_is_left(folder)}") from err


def evaluate_splits(
    config: Config,
    learner: Learner,
    splits: DataSplits,
    facts: DataFacts,
    at: Progress,
    test: TestUse,
    last: bool,
) -> dict[str, Scores]:
    """Counts on the held-out part and, where `test` allows it now, on the test set."""
    now = test != "never" and (last or (test == "auto" and splits.held_out is None))
    wanted: dict[str, Subset | None] = {"held_out": splits.held_out, "test": splits.test if now else None}
    world = learner.world
    scores: dict[str, Scores] = {}
    for name, subset in wanted.items():
        if subset is None:
            continue
        batches = EvalBatches(subset, config, facts.preparation, rank=world.rank, world=world.size, device=world.device)
        scores[name] = learner.evaluate(batches)
        at.add_skipped(batches.broken, config.data, world)
    return scores


def write_scores(
    scores: dict[str, Scores], at: Progress, journal: Journal | None, folder: RunFolder
) -> dict[str, float]:
    """Journal an evaluation; returns its metrics."""
    metrics = {
        f"{split}/{net}/{name}": getattr(counts, name)
        for split, by_net in scores.items()
        for net, counts in by_net.items()
        for name in ("top1", "top5", "loss")
    }
    write(journal, folder, metrics, at.step, at.epoch - 1)
    return metrics


def write(journal: Journal | None, folder: RunFolder, metrics: dict[str, float], step: int, epoch: int) -> None:
    """Append records of one moment, if this process may."""
    if journal is None:
        return
    folder.check_lease()
    now = time.time()
    journal.write([Record(step, epoch, name, value, now) for name, value in metrics.items()])


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimiser steps of the whole run."""
    steps = config.schedule.epochs * steps_per_epoch
    return min(steps, config.schedule.max_steps or steps)


def check_evaluable(config: Config, splits: DataSplits) -> None:
    """A run that nothing measures is a mistake."""
    if splits.test is None and splits.held_out is None:
        raise UserError(f"data.root={config.data.root}: no test or val split; set data.held_out, such as 0.1")


def restore(learner: Learner, folder: RunFolder, facts: DataFacts) -> Progress | None:
    """Load the newest verified checkpoint, which must be of the same data; None where there is none."""
    saved = checkpoint.newest(folder.checkpoints)
    if saved is None:
        return None
    state = checkpoint.load(saved.path)
    DataFacts.from_dict(state["data"]).check_same(facts, f"{folder.path}: cannot resume")
    learner.load_state_dict(state["learner"])
    return Progress(**state["progress"])


def open_journal(folder: RunFolder, step: int) -> Journal:
    """The journal, cut back to the checkpoint that is gone on from."""
    folder.check_lease()
    journal = Journal(folder.journal)
    journal.cut(step)
    return journal


def summarise(
    config: Config,
    splits: DataSplits,
    at: Progress,
    scores: dict[str, Scores],
    folder: RunFolder,
    world: World,
) -> Result:
    """What `result.json` says of a finished run; `final` is the last epoch's, as in the paper, never the best one's."""
    main = "test" if splits.test is not None else "held_out"
    records = read_journal(folder.journal)[0] if world.rank == 0 else []
    result = new_result(config, "finished", at.epoch, fingerprint=splits.fingerprint, digest=splits.train.digest)
    result.update(
        {
            "steps": at.step,
            "final": percent(scores.get(main)),
            "best": best(records, main, config.networks),
            "held_out": percent(scores.get("held_out")),
            "images_per_second": round(at.images / max(at.train_seconds, 1e-9), 2),
            "seconds": round(at.seconds, 3),
            "gpu_seconds": round(at.seconds * world.size, 3) if world.device.type == "cuda" else 0.0,
            "skipped": len(at.skipped),
            "skipped_images": [f"{where}: {reason}" for where, reason in sorted(at.skipped.items())][:NAMED],
        }
    )
    return result


def percent(scores: Scores | None) -> Accuracy | None:
    """{"vit": {"top1", "top5"}, ...} in percent."""
    if scores is None:
        return None
    return {net: {"top1": round(c.top1, 4), "top5": round(c.top5, 4)} for net, c in scores.items()}


def best(records: list[Record], split: str, networks: tuple[Network, ...]) -> dict[Network, dict[str, Any]]:
    """Each network's best evaluation during the run, and after how many epochs it was."""
    out: dict[Network, dict[str, Any]] = {}
    for net in networks:
        top1 = {r.epoch: r.value for r in records if r.name == f"{split}/{net}/top1"}
        top5 = {r.epoch: r.value for r in records if r.name == f"{split}/{net}/top5"}
        if top1:
            epoch = max(top1, key=lambda e: (top1[e], -e))
            out[net] = {"top1": round(top1[epoch], 4), "top5": round(top5[epoch], 4), "epoch": epoch + 1}
    return out
