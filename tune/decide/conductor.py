"""What runs next, and when a trial ends: decided from the log alone, without Ray.

Every decision is written to the log before it takes effect. A conductor made from the log of a killed driver is the
one that was killed, except that its running trials wait to go on from their checkpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container
from typing import Literal

from tune.decide.budget import Budget
from tune.decide.log import ENDED, Event, Log, Trial, Trials
from tune.decide.population import exchange, population
from tune.decide.search import Source
from tune.decide.select import worst
from tune.decide.stopping import Stopper
from tune.spec.schema import Sweep
from tune.spec.space import Spec

Cause = Literal["own", "node", "preempted"]  # of a crash: the trial itself, its node's death, a node taken away
OnEnd = Callable[[Trial], None]
OnCopy = Callable[[Trial, Trial, int], None]  # member, donor, epochs done
BEAT_S = 30.0  # without an event for so long, the time is written down: it counts even if the driver is killed next


class Conductor:
    """Owns the state of all trials of a sweep."""

    def __init__(
        self,
        sweep: Sweep,
        log: Log,
        source: Source,
        stopper: Stopper,
        budget: Budget,
        *,
        on_end: OnEnd = lambda trial: None,
        on_copy: OnCopy = lambda member, donor, epoch: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.trials: Trials = {}
        self.budget_note: str | None = None  # why trials were not run
        self._sweep, self._log, self._source, self._stopper, self._budget = sweep, log, source, stopper, budget
        self._on_end, self._on_copy, self._clock = on_end, on_copy, clock
        self._since: dict[str, float] = {}  # when a running trial's time was last counted
        self._held: set[str] = set()  # members of a population that wait for the others
        self._before = 0.0  # seconds of earlier drivers
        self._begin = self._noted = clock()
        for event in log.events:
            self._replay(event)
        for trial in list(self.trials.values()):
            if trial.status == "running":
                trial.status = "waiting"
            self._exchange(trial)

    @property
    def seconds(self) -> float:
        """The drivers' wall time until now, this one's and those before it."""
        return self._before + self._clock() - self._begin

    @property
    def running(self) -> int:
        """How many trials have been given out and not ended."""
        return sum(trial.status == "running" for trial in self.trials.values())

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing that was begun can go on."""
        return not any(
            trial.status == "running" or (trial.status == "waiting" and trial.started and name not in self._held)
            for name, trial in self.trials.items()
        )

    # ------------------------------------------------------------------------------------------ questions

    def next(self, elsewhere: Container[str] = ()) -> Trial | None:
        """The next trial to give out, which then counts as running; None if there is none now.

        Those in `elsewhere` are with the executor already: it asks for them by `resume`.
        """
        while True:
            spent = self._budget.spent(self.trials, self.seconds / 3600)
            for name, trial in list(self.trials.items()):
                if name not in elsewhere and (trial.started or not spent) and self.resume(name):
                    return trial
            event = None if spent else self._source.more(self.trials)
            if event is None:
                break
            self._record(event)
        unstarted = any(trial.status == "waiting" and not trial.started for trial in self.trials.values())
        self.budget_note = spent if unstarted or self._source.left(self.trials) else None
        return None

    def resume(self, name: str) -> bool:
        """Give a trial out, if it waits for nothing; one that was begun ends here if the budget says so."""
        trial = self.trials[name]
        if trial.status != "waiting" or name in self._held:
            return False
        if trial.started and (reason := self._budget.must_stop(self.trials, self.seconds / 3600)):
            self._record({"event": "end", "id": name, "status": "stopped", "reason": reason, "by": "budget"})
            return False
        self._record({"event": "start", "id": name})
        return True

    def began(self, name: str) -> None:
        """A trial holds its resources from now on."""
        self._since[name] = self._clock()
        if self.trials[name].began is None:
            self._record({"event": "begin", "id": name})

    def result(self, name: str, epoch: int, value: float | None, *, done: bool) -> bool:
        """A trial has done so many epochs; whether it must leave its worker now.

        A value that is no number, or infinite, counts as the worst there is.
        """
        trial = self.trials[name]
        if trial.status in ENDED:
            return True
        if epoch <= trial.epochs and not done:  # redone after a crash: decided already
            return False
        if value is not None and not math.isfinite(value):
            value = worst(self._sweep)
        event: Event = {"event": "result", "id": name, "epoch": epoch, "value": value}
        event |= {"seconds": self._count(name), "verdict": "finished" if done else "go"}
        if self._compare(trial, epoch, value) and not done:
            event |= {"verdict": "stopped", "reason": self._stopper.reason, "by": "scheduler"}
        reason = self._budget.must_stop(self.trials, self.seconds / 3600)
        if event["verdict"] == "go" and reason:
            event |= {"verdict": "stopped", "reason": reason, "by": "budget"}
        elif event["verdict"] == "go" and self._exchanges_after(epoch):
            event["verdict"] = "wait"
        self._record(event)
        self._exchange(trial)
        return bool(event["verdict"] != "go")

    def crashed(self, name: str, reason: str, cause: Cause = "own") -> bool:
        """A trial's worker or loop has failed: whether it goes on from its checkpoint, or has failed for good.

        A node that is taken away costs no retry, nor one that dies, unless the trial has done no epoch since it lost
        one before: then it may be what kills them.
        """
        trial = self.trials[name]
        blameless = cause == "preempted" or (cause == "node" and trial.lost_at != trial.epochs)
        verdict = "lost" if blameless else "retry" if trial.crashes < self._sweep.file.retries else "failed"
        event = {"event": "crash", "id": name, "reason": reason, "seconds": self._count(name), "verdict": verdict}
        self._record(event)
        self._exchange(trial)
        return verdict != "failed"

    def close(self) -> None:
        """End what was begun and cannot go on: members of a population that the budget has left incomplete."""
        for name, trial in self.trials.items():
            if trial.started and trial.status == "waiting":
                reason = self.budget_note or "the rest of its population has not been run"
                self._record({"event": "end", "id": name, "status": "stopped", "reason": reason, "by": "budget"})

    def reopen(self, *, failed: bool) -> None:
        """Let trials go on that an older budget had stopped; with `failed`, those that failed too."""
        again = {"stopped"} if self._budget.time_spent(self.trials, self.seconds / 3600) is None else set()
        again |= {"failed"} if failed else set()
        for name, trial in self.trials.items():
            if trial.status in again and (trial.status == "failed" or trial.stopped_by == "budget"):
                self._record({"event": "reopen", "id": name})

    def beat(self) -> None:
        """Write down the time that has passed, if nothing else did for a while."""
        if self._clock() - self._noted >= BEAT_S:
            running = [name for name in self._since if self.trials[name].status == "running"]
            self._record({"event": "beat", "running": {name: self._count(name) for name in running}})

    # --------------------------------------------------------------------------------------------- events

    def _compare(self, trial: Trial, epoch: int, value: float | None) -> bool:
        """Give the scheduler a value that it has not had; whether it says stop."""
        return value is not None and epoch not in trial.values and self._stopper.result(trial.spec, epoch, value)

    def _count(self, name: str) -> float:
        now = self._clock()
        seconds = now - self._since.get(name, now)
        self._since[name] = now
        return round(seconds, 3)

    def _record(self, event: Event) -> None:
        """Write an event, then let it take effect."""
        event |= {"elapsed": round(self.seconds, 3), "time": round(time.time(), 3)}
        self._log.write(event)
        self._noted = self._clock()
        self._apply(event)
        trial = self.trials.get(event.get("id", ""))
        if trial is not None and trial.status != "running":
            self._since.pop(trial.spec.id, None)
        if trial is not None and trial.status in ENDED:
            self._source.ended(trial, self.trials)
            self._on_end(trial)

    def _replay(self, event: Event) -> None:
        self._before = event["elapsed"]
        if event["event"] == "new":
            self._source.replay(event)
        known = self.trials.get(event.get("id", ""))
        if known is not None and event["event"] == "result":
            self._compare(known, event["epoch"], event["value"])
        self._apply(event)
        if known is not None and known.status in ENDED:
            self._source.ended(known, self.trials)

    def _apply(self, event: Event) -> None:
        kind = event["event"]
        if kind == "new":
            for one in event["trials"]:
                spec = Spec(one["id"], one["group"], one["seed"], one["overrides"])
                self.trials[spec.id] = Trial(spec)
        elif kind == "round":
            self._apply_round(event)
        elif kind == "beat":
            for name, seconds in event["running"].items():
                self.trials[name].seconds += seconds
        else:
            self._apply_to(self.trials[event["id"]], event)

    def _apply_round(self, event: Event) -> None:
        for change in event["changes"]:
            member, donor = self.trials[change["id"]], self.trials[change["donor"]]
            member.changes.append({"epoch": event["epoch"], **change})
            self._on_copy(member, donor, event["epoch"])
        self._held -= set(event["members"])

    def _apply_to(self, trial: Trial, event: Event) -> None:
        if event["event"] == "begin":
            trial.began = event["time"]
            return
        trial.seconds += event.get("seconds", 0.0)
        trial.reason, trial.stopped_by = event.get("reason"), event.get("by")
        kind = event["event"]
        if kind == "start":
            trial.status, trial.started = "running", True
        elif kind == "end":
            trial.status = event["status"]
        elif kind == "reopen":
            trial.crashes = 0 if trial.status == "failed" else trial.crashes
            trial.status = "waiting"
        elif kind == "crash":
            self._apply_crash(trial, event["verdict"])
        else:
            self._apply_result(trial, event)
        trial.ended_at = event.get("time") if trial.status in ENDED else None  # the log of an earlier version has none

    def _apply_crash(self, trial: Trial, verdict: str) -> None:
        if verdict == "lost":
            trial.lost_at = trial.epochs
        else:
            trial.crashes += 1
        trial.status = "failed" if verdict == "failed" else "waiting"

    def _apply_result(self, trial: Trial, event: Event) -> None:
        trial.epochs = event["epoch"]
        if event["value"] is not None:
            trial.values[event["epoch"]] = event["value"]
        if event["verdict"] == "wait":
            trial.status = "waiting"
            self._held.add(trial.spec.id)
        elif event["verdict"] != "go":
            trial.status = event["verdict"]

    # ----------------------------------------------------------------------------------------- populations

    def _exchanges_after(self, epoch: int) -> bool:
        return self._sweep.file.algorithm == "pbt" and epoch % self._sweep.file.search.interval == 0

    def _exchange(self, trial: Trial) -> None:
        """Once all living members of a population wait, decide what they copy, and let them go on."""
        if self._sweep.file.algorithm != "pbt":
            return
        own = population(self._sweep, trial)
        members = [t for t in self.trials.values() if t.status not in ENDED and population(self._sweep, t) == own]
        if not members or not all(t.spec.id in self._held for t in members):
            return
        epoch = members[0].epochs
        changes = exchange(self._sweep, members, epoch)
        self._record({"event": "round", "epoch": epoch, "changes": changes, "members": [t.spec.id for t in members]})
