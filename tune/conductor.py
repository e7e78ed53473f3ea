"""What runs next, and when a trial ends: decided from the log alone, without Ray.

Every decision is written to the log before it takes effect. A conductor made from the log of a killed driver is the
one that was killed, except that its running trials wait to go on from their checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from tune.budget import Budget
from tune.groups import Stopper
from tune.log import ENDED, Event, Log, Trial, Trials
from tune.pbt import exchange, population
from tune.schema import Sweep
from tune.search import Source
from tune.space import Spec

Verdict = Literal["go", "wait", "finished", "stopped"]
OnEnd = Callable[[Trial], None]
OnCopy = Callable[[Trial, Trial, int], None]  # member, donor, epochs done


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
        self._before, self._begin = 0.0, clock()  # seconds of earlier drivers, start of this one
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

    # ------------------------------------------------------------------------------------------ questions

    def next(self) -> Trial | None:
        """The next trial to run, which then counts as running; None if there is none now."""
        hours = self.seconds / 3600
        spent = self._budget.spent(self.trials, hours)
        for trial in self.trials.values():
            if trial.status != "waiting" or trial.spec.id in self._held:
                continue
            if trial.started and (reason := self._budget.must_stop(self.trials, hours)):
                self._record({"event": "end", "id": trial.spec.id, "status": "stopped", "reason": reason})
            elif trial.started or not spent:
                self._record({"event": "start", "id": trial.spec.id})
                return trial
        if spent is None and (event := self._source.more(self.trials)):
            self._record(event)
            return self.next()
        unstarted = any(trial.status == "waiting" and not trial.started for trial in self.trials.values())
        self.budget_note = spent if unstarted or self._source.left(self.trials) else None
        return None

    def began(self, name: str) -> None:
        """A trial holds its resources from now on."""
        self._since[name] = self._clock()

    def result(self, name: str, epoch: int, value: float | None, *, done: bool) -> bool:
        """A trial has done so many epochs; whether it must leave its worker now."""
        trial = self.trials[name]
        if epoch <= trial.epochs and not done:  # redone after a crash: decided already
            return False
        event: Event = {"event": "result", "id": name, "epoch": epoch, "value": value}
        event |= {"seconds": self._count(name), "verdict": "finished" if done else "go"}
        if self._compare(trial, epoch, value) and not done:
            event |= {"verdict": "stopped", "reason": "its group's other trials are better (ASHA)"}
        reason = self._budget.must_stop(self.trials, self.seconds / 3600)
        if event["verdict"] == "go" and reason:
            event |= {"verdict": "stopped", "reason": reason}
        elif event["verdict"] == "go" and self._exchanges_after(epoch):
            event["verdict"] = "wait"
        self._record(event)
        self._exchange(trial)
        return bool(event["verdict"] != "go")

    def crashed(self, name: str, reason: str) -> None:
        """A trial's worker or loop has failed: it is retried from its checkpoint, or ends as failed."""
        again = self.trials[name].crashes < self._sweep.file.retries
        status = "retry" if again else "failed"
        event = {"event": "crash", "id": name, "reason": reason, "seconds": self._count(name), "verdict": status}
        self._record(event)
        self._exchange(self.trials[name])

    def close(self) -> None:
        """End what was begun and cannot go on: members of a population that the budget has left incomplete."""
        for trial in self.trials.values():
            if trial.started and trial.status == "waiting":
                reason = self.budget_note or "the rest of its population has not been run"
                self._record({"event": "end", "id": trial.spec.id, "status": "stopped", "reason": reason})

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
        self._log.write(event | {"elapsed": round(self.seconds, 3)})
        self._apply(event)
        ended = self.trials.get(event.get("id", ""))
        if ended is not None and ended.status in ENDED:
            self._source.ended(ended, self.trials)
            self._on_end(ended)

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
        if event["event"] == "new":
            for one in event["trials"]:
                spec = Spec(one["id"], one["group"], one["seed"], one["overrides"])
                self.trials[spec.id] = Trial(spec)
            return
        if event["event"] == "round":
            for change in event["changes"]:
                member, donor = self.trials[change["id"]], self.trials[change["donor"]]
                member.changes.append({"epoch": event["epoch"], **change})
                self._on_copy(member, donor, event["epoch"])
            self._held -= set(event["members"])
            return
        trial = self.trials[event["id"]]
        trial.seconds += event.get("seconds", 0.0)
        trial.reason = event.get("reason")
        if event["event"] == "start":
            trial.status, trial.started = "running", True
        elif event["event"] == "end":
            trial.status = event["status"]
        elif event["event"] == "crash":
            trial.crashes += 1
            trial.status = "waiting" if event["verdict"] == "retry" else "failed"
        else:
            self._apply_result(trial, event)

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
