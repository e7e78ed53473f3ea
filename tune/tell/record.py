"""sweep.json: what the log and the run directories say, for people, reports and MLflow."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from sys import intern
from typing import Any

from bootvit.files import replacing
from bootvit.tracking import read_journal
from tune.decide.log import ENDED, Trial, Trials
from tune.decide.select import Score
from tune.decide.winners import winners
from tune.spec.schema import Sweep
from tune.tell.curves import curves

Document = dict[str, Any]
NETWORKS = ("vit", "agent")


class Recorder:
    """Writes the document; what a trial that has ended left on disk is read once."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep, self._cpus, self._gpus = sweep, sweep.cpus, sweep.gpus
        self._held_out: dict[str, Any] = {}
        self.final: dict[str, Any] = {}  # trial -> its test accuracy
        self.test_runs: dict[str, str] = {}  # trial -> the run that met the test set
        self.tests_seconds = 0.0  # in which the winners' tests held their resources

    def write(self, trials: Trials, status: str, seconds: float, reason: str | None = None) -> Document:
        """Replace sweep.json as a whole, a row at a time; returns it without its list of trials."""
        over = status != "running"
        summary = {
            "name": self._sweep.file.name,
            "status": status,
            "reason": reason,
            "select": {"metric": self._sweep.file.select.metric, "mode": self._sweep.file.select.best},
            "resources": {"cpu": self._cpus, "gpu": self._gpus},
            "asked": asked(self._sweep),
            "group_by": list(self._sweep.group_by),
            "seconds": round(seconds, 3),
            "cost": self._cost(trials),
            "counts": Counter(status_of(trial, over) for trial in trials.values()),
            "best": {group: self._best(found) for group, found in winners(self._sweep, trials).items()},
            "curves": curves(self._sweep, trials),
        }
        write(self._sweep.folder, summary, (self._row(trial, over) for trial in trials.values()))
        return summary

    def _cost(self, trials: Trials) -> dict[str, float]:
        seconds = sum(trial.seconds for trial in trials.values()) + self.tests_seconds
        return {"seconds": round(seconds, 3), **self._shares(seconds)}

    def _shares(self, seconds: float) -> dict[str, float]:
        return {"cpu_seconds": round(seconds * self._cpus, 3), "gpu_seconds": round(seconds * self._gpus, 3)}

    def _row(self, trial: Trial, over: bool) -> Document:
        name = trial.spec.id
        row = {
            "id": name,
            "group": trial.spec.group,
            "seed": trial.spec.seed,
            "overrides": trial.overrides,
            "status": status_of(trial, over),
            "reason": trial.reason,
            "epochs": trial.epochs,
            "held_out": self.held_out(trial),
            "final": self.final.get(name),
            "seconds": round(trial.seconds, 3),
            **self._shares(trial.seconds),
            "crashes": trial.crashes,
            "run": f"trials/{name}",
            "test_run": self.test_runs.get(name),
        }
        return row | ({"changes": trial.changes} if trial.changes else {})

    def gpu_seconds(self, trial: Trial) -> float:
        """The GPU time that a trial has held, as its row says."""
        return self._shares(trial.seconds)["gpu_seconds"]

    def held_out(self, trial: Trial) -> Any:
        """{"vit": {"top1", "top5"}, ...} after the trial's last epoch; None where it was not evaluated."""
        if trial.status not in ENDED:
            return None
        if trial.spec.id not in self._held_out:
            self._held_out[trial.spec.id] = last_scores(self._sweep.folder / "trials" / trial.spec.id)
        return self._held_out[trial.spec.id]

    def _best(self, found: Score) -> Document:
        names = [trial.spec.id for trial in found.trials]
        finals = [self.final[name] for name in names if self.final.get(name)]
        return {
            "trial": names[0],
            "trials": names,
            "overrides": found.trials[0].overrides,
            "mean": round(found.mean, 4),
            "sd": None if found.sd is None else round(found.sd, 4),
            "held_out": mean_scores([self.held_out(trial) for trial in found.trials]),
            "final": mean_scores(finals) if len(finals) == len(names) else None,
        }


def asked(sweep: Sweep) -> Document:
    """What may be raised when a sweep is resumed."""
    file = sweep.file
    return {
        "budget": file.budget.model_dump(mode="json"),
        "samples": file.search.samples,
        "seeds": list(sweep.seeds),
    }


def status_of(trial: Trial, over: bool) -> str:
    """A trial's status as people read it: one that the end of the sweep left out was not run."""
    return "not_run" if over and not trial.started else trial.status


def last_scores(run_dir: Path) -> Any:
    """What a run's last evaluation found on held-out images, from its journal."""
    out: dict[str, dict[str, float]] = {}
    for record in read_journal(run_dir / "metrics.jsonl")[0]:
        if record.name.startswith("held_out/") and not record.name.endswith("loss"):
            _, net, score = record.name.split("/")
            # every trial has these names: kept once
            out.setdefault(intern(net), {})[intern(score)] = round(record.value, 4)
    return out or None


def mean_scores(every: Sequence[Mapping[str, Any] | None]) -> Any:
    """The mean of each network's accuracies; None if there are none."""
    there = [scores for scores in every if scores]
    nets = [net for net in NETWORKS if all(net in scores for scores in there)]
    return {
        net: {key: round(fmean(scores[net][key] for scores in there), 4) for key in there[0][net]}
        for net in nets
        if there
    } or None


def write(folder: Path, summary: Document, rows: Iterable[Document]) -> None:
    """sweep.json, never whole in memory: it is written at every trial's end, and may have thousands of them."""
    head = json.dumps(summary, indent=2, allow_nan=False).removesuffix("\n}")
    with replacing(folder / "sweep.json") as file:
        file.write(f'{head},\n  "trials": ['.encode())
        for number, row in enumerate(rows):
            file.write(f"{',' if number else ''}\n    {json.dumps(row, allow_nan=False)}".encode())
        file.write(b"\n  ]\n}\n")
