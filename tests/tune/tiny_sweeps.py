"""Small sweeps that several tests use."""

from pathlib import Path
from typing import Any

import yaml

from tune.decide.budget import Budget
from tune.decide.conductor import Conductor
from tune.decide.log import Log, Trial
from tune.decide.search import make_source
from tune.decide.stopping import Stopper
from tune.spec.load import load_sweep
from tune.spec.schema import Sweep

TINY_RUN = {
    "model.vit.width": 18,
    "model.vit.depth": 2,
    "model.vit.mlp_width": 24,
    "data.held_out": 0.2,
    "schedule.epochs": 3,
    "schedule.warmup_epochs": 0,
    "schedule.eval_every": 1,
}


def sweep_file(folder: Path, **content: Any) -> Path:
    """A sweep file on the digits, a second a trial; `set` is added to the tiny run's own."""
    run = {key: value for key, value in TINY_RUN.items() if key not in content.get("space", {})}
    settings = {**run, "ray.storage_path": str(folder / "runs"), **content.pop("set", {})}
    settings.setdefault("tracking.uri", f"sqlite:///{folder}/mlflow.db")
    data = {"name": "sweep", "base": "digits/joint", "set": settings, **content}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def make_sweep(folder: Path, **content: Any) -> Sweep:
    """The same, read."""
    return load_sweep(str(sweep_file(folder, **content)))


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_conductor(sweep: Sweep, clock: Clock | None = None, epochs: int = 9, **hooks: Any) -> Conductor:
    """A conductor on the sweep's folder: a second one is what a new driver makes of the first one's log."""
    log = Log(sweep.folder / "events.jsonl")
    budget = Budget(sweep.file.budget, sweep.file.resources.gpu)
    return Conductor(sweep, log, make_source(sweep), Stopper(sweep, epochs), budget, clock=clock or Clock(), **hooks)


def run(conductor: Conductor, value_of: Any, epochs: int = 3, at_once: int = 1) -> None:
    """Run everything, epoch by epoch, `at_once` trials in turn; `value_of(trial, epoch)` is the metric."""
    running: list[Trial] = []
    while True:
        while len(running) < at_once and (trial := conductor.next()):
            conductor.began(trial.spec.id)
            running.append(trial)
        if not running:
            return
        trial = running.pop(0)
        epoch = trial.epochs + 1
        if not conductor.result(trial.spec.id, epoch, value_of(trial, epoch), done=epoch == epochs):
            running.append(trial)
