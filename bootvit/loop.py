"""The training loop: plain torch, no Ray, no MLflow. Every worker runs it; rank 0 writes the run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import pyarrow as pa
import torch.distributed as dist
from torch import Tensor

from bootvit import checkpoint
from bootvit.asks import Agreement, Ask, Asked, deferring_signals, nothing
from bootvit.checkpoint import Saved, Writer
from bootvit.config import Config, DataConfig, Network
from bootvit.data import DataFacts, DataSplits, facts_of, open_splits
from bootvit.data.batches import EvalBatches, TrainBatches
from bootvit.data.fractions import Subset
from bootvit.errors import RunFailed, UserError
from bootvit.explain.measure import batches_of, few, look_inside, pixels_of, records_of
from bootvit.extensions import named
from bootvit.learner import Counts, Learner, World
from bootvit.meter import Meter, name_of
from bootvit.objective import class_weights
from bootvit.predictions import Answers, write_predictions
from bootvit.result import Accuracy, Best, EpochReport, Result, new_result
from bootvit.runs import RunFolder
from bootvit.tracking import Journal, Record, read_journal
from bootvit.tracking.machine import Machine
from bootvit.weights import warm_start

NAMED = 20  # broken images that result.json names; it counts all
PATIENCE = 60.0  # seconds that a worker waits for a checkpoint that rank 0 sees
Scores = dict[Network, Counts]
TestUse = Literal["auto", "last", "never"]
T = TypeVar("T")


@dataclass
class Progress:
    """Where a run stands; saved with the checkpoint."""

    epoch: int = 0  # completed
    batch: int = 0  # steps of the epoch after them
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
    asked: Asked = nothing,
) -> Result:
    """Train from the newest checkpoint in `folder` (or from scratch) to the end; returns what `result.json` holds.

    `test` says when the test set is looked at: auto is every evaluation, but only the last one where a part of the
    training images is held out; never is for sweeps that retrain their winners. Raises KeyboardInterrupt, with a
    checkpoint on disk, where it is `asked` to stop.
    """
    run = epochs(config, world, folder, test=test, asked=asked)
    while True:
        try:
            report = next(run)
        except StopIteration as end:
            result: Result = end.value
            return result
        if on_epoch is not None:
            on_epoch(report)


def epochs(
    config: Config, world: World, folder: RunFolder, *, test: TestUse = "auto", asked: Asked = nothing
) -> Generator[EpochReport, None, Result]:
    """`fit`, an epoch at a time: yields once an epoch's checkpoint is on disk, returns the result."""
    training = Training(config, world, folder, test, asked)
    try:
        if training.ends_an_epoch and not training.told:  # cut between its checkpoint and its evaluation
            yield training.end_epoch()
        while training.at.step < training.total and not training.given_up:
            training.train_epoch()
            yield training.end_epoch()
        return training.finish()
    finally:
        training.writer.close()


class Training:
    """One run as one of its workers sees it."""

    def __init__(self, config: Config, world: World, folder: RunFolder, test: TestUse, asked: Asked) -> None:
        self.clock = self.saved_at = time.monotonic()
        self.config, self.world, self.folder, self.test, self.asked = config, world, folder, test, asked
        self.splits = open_splits(config.data)
        check_evaluable(config, self.splits)
        classes = len(self.splits.classes)
        weights = class_weights(config.objective, self.splits.train.labels, classes)
        self.learner = Learner(config, classes, world, weights)
        self.facts = facts_of(self.splits, config)
        self.at = self._restore()
        self.batches = TrainBatches(
            self.splits.train, config, self.facts.preparation, rank=world.rank, world=world.size, device=world.device
        )
        self.total = total_steps(config, self.batches.steps_per_epoch)
        self.journal, self.told = self._open_journal()
        self.meter = Meter(self.learner)
        self.machine = Machine(world.device)
        self.agreement = Agreement(world.size)
        self.writer = Writer(folder.checkpoints, config.checkpoint, folder.check_lease)
        self.scores: dict[str, Scores] = {}
        self.given_up = self._gives_up({})
        self.answers: dict[str, Answers] = {}  # the last evaluation's, by split
        self.looked_at: Tensor | None = None

    # ------------------------------------------------------------------------------------------ going on

    def _restore(self) -> Progress:
        """Load the newest verified checkpoint, which must be of the same data; else start from the given weights."""
        saved = choose(self.folder, self.world)
        if saved is None:
            warm_start(self.learner.networks, self.config, self.splits.classes)
            return Progress()
        state = load_chosen(saved, self.world, here=self.folder.store is None)
        DataFacts.from_dict(state["data"]).check_same(self.facts, f"{self.folder}: cannot resume")
        self.learner.load_state_dict(state["learner"])
        return Progress(**state["progress"])

    def _open_journal(self) -> tuple[Journal | None, bool]:
        """Rank 0's journal, cut back to where the run stands, and whether it tells of the end of the last epoch."""
        told, journal = False, None
        if self.world.rank == 0:
            self.folder.check_lease()
            journal = Journal(self.folder.journal)
            told = any(r.name == "epoch" and r.step == self.at.step for r in read_journal(self.folder.journal)[0])
            journal.cut(self.at.step, evaluated=told)
        return journal, from_rank_0(told, self.world)

    @property
    def ends_an_epoch(self) -> bool:
        """Whether no step of the next epoch has been taken."""
        return self.at.epoch > 0 and self.at.batch == 0

    # ------------------------------------------------------------------------------------------ an epoch

    def train_epoch(self) -> None:
        """What is left of one pass over the training images, or of `max_steps`; saved as it goes, and at its end."""
        config, at, steps = self.config, self.at, self.batches.steps_per_epoch
        self._count_seconds()
        with deferring_signals(self.asked) as asked:
            for batch in self.batches.epoch(at.epoch, at.batch):
                terms = self.learner.step(batch, at.step, at.epoch, at.epoch + at.batch / steps)
                at.step, at.batch, at.images = at.step + 1, at.batch + 1, at.images + batch.global_size
                self.meter.add(terms, at.step, batch.global_size)
                if at.step % config.tracking.log_every == 0:
                    self._write_terms()
                if at.step >= self.total or at.batch == steps:
                    break
                ask = self.agreement.of_all(max(asked(), self._due()))
                if ask or (config.checkpoint.every_steps and at.step % config.checkpoint.every_steps == 0):
                    self._save()
                if ask == Ask.STOP:
                    self.writer.wait()
                    raise KeyboardInterrupt
            at.epoch, at.batch = at.epoch + 1, 0
            self._save()

    def _due(self) -> Ask:
        """Whether rank 0's clock asks for a checkpoint."""
        minutes = self.config.checkpoint.every_minutes
        if self.world.rank > 0 or minutes is None or time.monotonic() - self.saved_at < 60 * minutes:
            return Ask.NOTHING
        self.saved_at = time.monotonic()  # asked once
        return Ask.SAVE

    def _save(self) -> None:
        """Begin to write a checkpoint of this moment; raise `RunFailed` if its weights or losses are not finite."""
        at = self.at
        self._write_terms()
        self._check_finite()
        at.add_skipped(self.batches.broken, self.config.data, self.world)
        now = time.monotonic()
        at.train_seconds += now - self.clock
        self._count_seconds()
        if self.world.rank == 0:
            state = {"learner": self.learner.state_dict(), "progress": vars(at), "data": self.facts.to_dict()}
            final = at.step >= self.total
            self.writer.save(state, step=at.step, epoch=at.epoch, batch=at.batch, final=final)
        self.saved_at = time.monotonic()

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.at.seconds, self.clock = self.at.seconds + now - self.clock, now

    def _check_finite(self) -> None:
        """Raise `RunFailed` if the last update has broken the weights: no loss has told of it yet."""
        name = self.learner.not_finite()
        if name is not None:
            self.writer.wait()
            left = what_is_left(self.folder)
            raise RunFailed(f"the weights are not finite after step {self.at.step}: {name}{left}")

    def _write_terms(self) -> None:
        with self._telling_what_is_left():
            terms = self.meter.take()
        load = self.machine.load() if self.config.tracking.system and self.world.rank == 0 else {}
        self._write(terms | load, self.at.epoch - (self.at.batch == 0))

    @contextmanager
    def _telling_what_is_left(self) -> Iterator[None]:
        """End the message of a `RunFailed` raised inside with the checkpoint that the run leaves."""
        try:
            yield
        except RunFailed as err:
            self.writer.wait()
            raise RunFailed(f"{err}{what_is_left(self.folder)}") from err

    # ------------------------------------------------------------------------------------- its evaluation

    def end_epoch(self) -> EpochReport:
        """Evaluate where that is due, and tell of the epoch in the journal, once its checkpoint is on disk."""
        at, last = self.at, self.at.step >= self.total
        metrics: dict[str, float] = {}
        inside: dict[str, float] = {}
        if last or at.epoch % self.config.schedule.eval_every == 0:
            with self._telling_what_is_left():
                self.scores = self._evaluate(last)
                self.given_up = not last and self._gives_up(metrics_of(self.scores))
                if self.given_up:
                    last = True
                    self.scores = self._evaluate(last)
            metrics, inside = metrics_of(self.scores), self._look_inside()
        self._count_seconds()
        self.writer.wait()
        skipped = {"data/skipped": float(len(at.skipped))} if at.skipped else {}
        if metrics and self.world.rank == 0:
            name = best_metric(self.config, metrics)
            self.writer.note_best(at.step, name, metrics[name])
        self._write(metrics | inside | skipped | {"epoch": float(at.epoch)}, at.epoch - 1)
        report = EpochReport(at.epoch, at.step, metrics, last)
        if self.world.rank == 0:
            self._call_back(report)
        return report

    def _call_back(self, report: EpochReport) -> None:
        """The user's own functions; what one raises ends the run as failed."""
        for given in self.config.on_epoch:
            try:
                named("on_epoch", given)(self.config, report)
            except Exception as err:
                raise RunFailed(f"on_epoch={given}: {type(err).__name__}: {err}{what_is_left(self.folder)}") from err

    def _gives_up(self, metrics: dict[str, float]) -> bool:
        """Whether, after an evaluation that is not in the journal yet, `schedule.patience` is at its end.

        It follows from the journal, so that a run that goes on ends where it would have ended.
        """
        patience = self.config.schedule.patience
        if patience is None:
            return False
        name = f"held_out/{self.config.networks[0]}/top1"
        records = read_journal(self.folder.journal)[0] if self.world.rank == 0 else []
        values = [r.value for r in records if r.name == name] + [v for key, v in metrics.items() if key == name]
        return from_rank_0(bool(values) and len(values) - 1 - values.index(max(values)) >= patience, self.world)

    def _evaluate(self, last: bool) -> dict[str, Scores]:
        """Counts on the held-out part and, where `test` allows it now, on the test set."""
        config, splits, world = self.config, self.splits, self.world
        now = self.test != "never" and (last or (self.test == "auto" and splits.held_out is None))
        wanted: dict[str, Subset | None] = {"held_out": splits.held_out, "test": splits.test if now else None}
        scores: dict[str, Scores] = {}
        for name, subset in wanted.items():
            if subset is None:
                continue
            prepared = self.facts.preparation
            batches = EvalBatches(subset, config, prepared, rank=world.rank, world=world.size, device=world.device)
            if last:
                self.answers[name] = Answers()
            scores[name] = self.learner.evaluate(batches, self.answers.get(name))
            self.at.add_skipped(batches.broken, config.data, world)
        return scores

    def _look_inside(self) -> dict[str, float]:
        """What `tracking.explain_images` asks for, on rank 0, always of the same images."""
        config, world = self.config, self.world
        count = config.tracking.explain_images
        if not count or world.rank > 0 or "vit" not in config.networks:
            return {}
        if self.looked_at is None:
            self.looked_at = pixels_of(config, few(self.splits, count), self.facts.preparation)[0].to(world.device)
        return records_of(look_inside(self.learner.networks, batches_of(self.looked_at)))

    def _write(self, metrics: dict[str, float], epoch: int) -> None:
        """Append records of one moment, if this process may."""
        if self.journal is None or not metrics:
            return
        self.folder.check_lease()
        now = time.time()
        self.journal.write([Record(self.at.step, epoch, name, value, now) for name, value in metrics.items()])

    # -------------------------------------------------------------------------------------------- the end

    def finish(self) -> Result:
        """result.json; `final` is the last epoch's, as in the paper, never the best one's."""
        if not self.scores:  # resumed after the last checkpoint, before the result was written
            self.scores = self._evaluate(last=True)
        config, at, world = self.config, self.at, self.world
        main = "test" if self.splits.test is not None else "held_out"
        records = read_journal(self.folder.journal)[0] if world.rank == 0 else []
        fingerprint, digest = self.splits.fingerprint, self.splits.train.digest
        result = new_result(config, "finished", at.epoch, fingerprint=fingerprint, digest=digest)
        result.update(
            {
                "steps": at.step,
                "final": percent(self.scores.get(main)),
                "best": best(records, main, config.networks),
                "held_out": percent(self.scores.get("held_out")),
                "per_class": per_class(self.scores.get(main), self.splits.classes),
                "images_per_second": round(at.images / max(at.train_seconds, 1e-9), 2),
                "seconds": round(at.seconds, 3),
                "gpu_seconds": round(at.seconds * world.size, 3) if world.device.type == "cuda" else 0.0,
                "skipped": len(at.skipped),
                "skipped_images": [f"{where}: {reason}" for where, reason in sorted(at.skipped.items())][:NAMED],
                "images": {name: len(part) for name, part in self._parts().items() if part is not None},
                "machine": f"{world.size} x {name_of(world.device)}",
            }
        )
        told = [self._told(name, answers) for name, answers in self.answers.items()]
        if world.rank == 0:
            self.folder.check_lease()
            write_predictions(told, self.splits.classes, self.folder.predictions)
            self.folder.write_result(result)
        return result

    def _parts(self) -> dict[str, Subset | None]:
        return {"train": self.splits.train, "held_out": self.splits.held_out, "test": self.splits.test}

    def _told(self, split: str, answers: Answers) -> pa.Table | None:
        """What was answered of a split, on rank 0."""
        subset = self._parts()[split]
        assert subset is not None
        return answers.table(split, subset, self.world.rank, self.world.size)


# ----------------------------------------------------------------------------------------- among the workers


def from_rank_0(value: T, world: World) -> T:
    """Rank 0's value on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def choose(folder: RunFolder, world: World) -> Saved | None:
    """The newest checkpoint whose bytes are what was written: what rank 0 finds is what all of them take."""
    return from_rank_0(checkpoint.newest(folder.checkpoints) if world.rank == 0 else None, world)


def load_chosen(saved: Saved, world: World, *, here: bool) -> checkpoint.State:
    """Its content; a file system that has not shown it to this node yet is given a minute.

    Where it is not `here`, as it is in a store, rank 0 has a copy, and tells the others.
    """
    if not here:
        return from_rank_0(checkpoint.load(saved) if world.rank == 0 else {}, world)
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return checkpoint.load(saved)
        except UserError as err:
            if world.rank == 0 or time.monotonic() > until:
                raise RunFailed(f"worker {world.rank}: {err}") from err
            time.sleep(0.5)


def of_all_workers(broken: dict[str, str], data: DataConfig, world: World) -> dict[str, str]:
    """The broken images {image: reason} that any worker has left out; empty with data.on_error=raise."""
    found: list[dict[str, str]] = [broken] * world.size
    if world.size > 1 and data.on_error == "skip":
        dist.all_gather_object(found, broken)
    return {where: reason for one in found for where, reason in one.items()}


# ------------------------------------------------------------------------------------------------ in numbers


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimiser steps of the whole run."""
    steps = config.schedule.epochs * steps_per_epoch
    return min(steps, config.schedule.max_steps or steps)


def check_evaluable(config: Config, splits: DataSplits) -> None:
    """A run that nothing measures is a mistake."""
    if splits.test is None and splits.held_out is None:
        raise UserError(f"data.root={config.data.root}: no test or val split; set data.held_out, such as 0.1")


def what_is_left(folder: RunFolder) -> str:
    """The end of a failed run's message: the checkpoint that it leaves, whose weights are always finite."""
    saved = checkpoint.described(folder.checkpoints)
    return f"; the checkpoint of step {saved[-1].step} is kept" if saved else "; there is no checkpoint yet"


def metrics_of(scores: dict[str, Scores]) -> dict[str, float]:
    """An evaluation by the journal's names."""
    return {
        f"{split}/{net}/{name}": value
        for split, by_net in scores.items()
        for net, counts in by_net.items()
        for name, value in measures_of(counts).items()
    }


def measures_of(counts: Counts) -> dict[str, float]:
    """One network's measures by name, accuracies and F1 in percent; `ema_` before those of averaged weights."""
    found = {"top1": counts.top1, "top5": counts.top5, "loss": counts.loss, **counts.measures}
    averaged = {} if counts.ema is None else measures_of(counts.ema)
    return found | {f"ema_{name}": value for name, value in averaged.items()}


def best_metric(config: Config, metrics: dict[str, float]) -> str:
    """What `checkpoint.best` goes by: the first network's top-1 on held-out images, else on the test set."""
    names = [f"{split}/{config.networks[0]}/top1" for split in ("held_out", "test")]
    return next(name for name in names if name in metrics)


def percent(scores: Scores | None) -> Accuracy | None:
    """{"vit": {"top1", "top5", "loss", ...}, ...}: `measures_of` every network."""
    if scores is None:
        return None
    return {net: {name: round(value, 4) for name, value in measures_of(c).items()} for net, c in scores.items()}


def per_class(scores: Scores | None, classes: tuple[str, ...]) -> dict[Network, dict[str, float]] | None:
    """Percent of each class's images that each network has right, of the classes that have images."""
    if scores is None:
        return None
    named = {net: zip(classes, counts.per_class, strict=True) for net, counts in scores.items()}
    return {net: {name: round(own, 4) for name, own in found if own is not None} for net, found in named.items()}


def best(records: list[Record], split: str, networks: tuple[Network, ...]) -> dict[Network, Best]:
    """Each network's best evaluation during the run, and after how many epochs it was."""
    out: dict[Network, Best] = {}
    for net in networks:
        top1 = {r.epoch: r.value for r in records if r.name == f"{split}/{net}/top1"}
        top5 = {r.epoch: r.value for r in records if r.name == f"{split}/{net}/top5"}
        if top1:
            epoch = max(top1, key=lambda e: (top1[e], -e))
            out[net] = {"top1": round(top1[epoch], 4), "top5": round(top5[epoch], 4), "epoch": epoch + 1}
    return out
