"""A sweep as `sweep.json` tells it: its trials, the winners of its groups, and what they cost."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bootvit.errors import UserError
from bootvit.report.rows import RunRow, Split, read_config, read_object, read_run, top1
from bootvit.report.tables import SPLITS, Column, Line, Table, made, short_keys
from bootvit.tracking.tags import data_name, param_text


@dataclass(frozen=True)
class Trial:
    """One trial; accuracies are top-1 in percent by network, at its last epoch."""

    id: str
    group: str
    seed: int
    overrides: Mapping[str, Any]  # without the seed
    config: Mapping[str, str]  # the run's, flattened; only the overrides where the run's folder is gone
    status: str
    reason: str
    epochs: int
    held_out: Mapping[str, float]
    final: Mapping[str, float]  # on the test split; empty where it was not used
    seconds: float
    cpu_seconds: float
    gpu_seconds: float
    run: str
    folder: Path  # with its run's files
    test_run: Path | None = None  # that of its retraining, which met the test set

    @property
    def method(self) -> str:
        """The method that it trained."""
        return self.config.get("method", "?")

    @property
    def column(self) -> Column:
        """The data set and the fraction that it trained on."""
        root = self.config.get("data.root", "null")
        data = data_name(self.config.get("data.source", "?"), None if root == "null" else root)
        return Column(data, float(self.config.get("data.fraction", "1.0")))


@dataclass(frozen=True)
class Winner:
    """The best overrides of a group, and the finished trials that have them, one a seed."""

    group: str
    trial: str
    overrides: Mapping[str, Any]
    trials: tuple[Trial, ...]
    final: Mapping[str, float]  # of a retraining, where the trials themselves did not use the test split


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, read."""

    name: str
    status: str
    metric: str  # such as held_out.vit.top1
    maximise: bool
    trials: tuple[Trial, ...]
    winners: tuple[Winner, ...]
    curves: tuple[Mapping[str, Any], ...] = ()  # accuracy over fractions, extrapolated by the sweep

    def score(self, trial: Trial) -> float | None:
        """What the trial was selected by, in percent; an agent alone is judged by its own accuracy."""
        network = self.metric.split(".")[1] if self.metric.startswith("held_out.") else "vit"
        return trial.held_out.get(network, next(iter(trial.held_out.values()), None))

    def searched(self) -> list[str]:
        """The keys that differ between trials, the seed aside."""
        keys = sorted({key for trial in self.trials for key in trial.overrides})
        return [key for key in keys if len({param_text(t.overrides.get(key)) for t in self.trials}) > 1]


def read_sweep(folder: Path) -> Sweep:
    """Read a sweep's folder; `UserError` names a file that is broken, and a sweep without trials."""
    path = folder / "sweep.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; run: bootvit sweep SWEEP")
    document = read_object(path)
    try:
        cpus = float((document.get("resources") or {}).get("cpu", 1))
        trials = tuple(_trial(folder, data, cpus) for data in document["trials"])
        winners = tuple(_winner(group, data, trials) for group, data in (document.get("best") or {}).items())
        select = document.get("select") or {}
        sweep = Sweep(
            name=str(document["name"]),
            status=str(document["status"]),
            metric=str(select.get("metric", "held_out.vit.top1")),
            maximise=select.get("mode", "max") == "max",
            trials=trials,
            winners=winners,
            curves=tuple(document.get("curves") or ()),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise UserError(f"{path}: not a sweep's state: {type(err).__name__}: {err}") from err
    if not sweep.trials:
        raise UserError(f"{path}: the sweep has no trials yet; run: bootvit sweep SWEEP")
    return sweep


def _trial(folder: Path, data: Mapping[str, Any], cpus: float) -> Trial:
    run = data.get("run")
    config_path = folder / run / "config.yaml" if run else None  # an absolute `run` stays what it is
    overrides = {key: value for key, value in (data.get("overrides") or {}).items() if key != "seed"}
    there = read_config(config_path) if config_path and config_path.exists() else {}
    seconds = float(data.get("seconds") or 0.0)
    cpu_seconds = data.get("cpu_seconds")
    return Trial(
        id=str(data["id"]),
        group=str(data.get("group") or "all"),
        seed=int(data.get("seed") or 0),
        overrides=overrides,
        config={**{key: param_text(value) for key, value in overrides.items()}, **there},
        status=str(data["status"]),
        reason=str(data.get("reason") or ""),
        epochs=int(data.get("epochs") or 0),
        held_out=top1(data.get("held_out")),
        final=top1(data.get("final")),
        seconds=seconds,
        cpu_seconds=seconds * cpus if cpu_seconds is None else float(cpu_seconds),
        gpu_seconds=float(data.get("gpu_seconds") or 0.0),
        run=str(run or ""),
        folder=folder / str(run or f"trials/{data['id']}"),
        test_run=folder / str(data["test_run"]) if data.get("test_run") else None,
    )


def _winner(group: str, data: Mapping[str, Any], trials: Sequence[Trial]) -> Winner:
    overrides = {key: value for key, value in (data.get("overrides") or {}).items() if key != "seed"}
    named = data.get("trials")  # the repeats of the winner over seeds; found by their overrides if not named
    own = [t for t in trials if t.group == group and t.status == "finished"]
    own = [t for t in own if (t.id in named if named else t.overrides == overrides)]
    by_seed = {trial.seed: trial for trial in own}
    final = top1(data.get("final"))
    return Winner(group, str(data["trial"]), overrides, tuple(by_seed[s] for s in sorted(by_seed)), final)


# --------------------------------------------------------------------------------------- method x fraction


def winners_tables(sweep: Sweep) -> tuple[Table, ...]:
    """The winners by method, data set and fraction: on the test split where it was used, and held out."""
    return tuple(part for split in SPLITS if (part := winners_table(sweep, split)).cells)


def winners_table(sweep: Sweep, split: Split) -> Table:
    """The winners' accuracy on one split."""
    names = setting_names(sweep)
    used: dict[tuple[Line, Column], tuple[RunRow, ...]] = {}
    for winner in sweep.winners:
        rows = _winner_rows(winner, split)
        for network in rows[0].scores(split) if rows else ():
            line = Line(rows[0].method, network, "")
            key = (line, Column(rows[0].data, rows[0].fraction))
            if key in used:  # groups that differ in more than method and fraction
                key = (line._replace(variant=group_text(winner.group, names)), key[1])
            used[key] = rows
    return made(used, split)


def _winner_rows(winner: Winner, split: Split) -> tuple[RunRow, ...]:
    if split == "held_out":
        return tuple(_row(trial, {}) for trial in winner.trials if trial.held_out)
    tested = [trial for trial in winner.trials if trial.final]
    if tested:
        return tuple(_row(trial, trial.final) for trial in tested)
    return tuple(_row(trial, winner.final) for trial in winner.trials[:1] if winner.final)


def _row(trial: Trial, test: Mapping[str, float]) -> RunRow:
    """A winner as a run; what its folder says besides belongs to the report only if it is still there."""
    folder = trial.test_run if test and trial.test_run is not None else trial.folder
    there = (folder / "config.yaml").exists() and (folder / "result.json").exists()
    known = read_run(folder) if there else None
    column = trial.column
    plain = RunRow(
        name=trial_name(trial.id),
        place=trial.run,
        method=trial.method,
        status=trial.status,
        data=column.data,
        fraction=column.fraction,
        seed=trial.seed,
        config=trial.config,
        test=test,
        held_out=trial.held_out,
        epochs=trial.epochs,
        seconds=trial.seconds,
        gpu_seconds=trial.gpu_seconds,
        folder=folder,
    )
    if known is None:
        return plain
    about = ("curves", "images", "machine", "commit", "ended")
    return replace(plain, **{name: getattr(known, name) for name in about})


# --------------------------------------------------------------------------------------------- short names

AXES = ("method", "data.fraction")  # which have columns of their own


def setting_names(sweep: Sweep) -> dict[str, str]:
    """The short names of the searched keys."""
    return short_keys(sorted({key for trial in sweep.trials for key in trial.overrides}))


def trial_name(name: str) -> str:
    """The number that a trial's name begins with: `0003-fraction=0.1,kd=0.5,seed=0` is trial 3."""
    number = re.match(r"\d+(?=-)", name)
    return f"#{int(number[0])}" if number else name


def settings_text(overrides: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """`kd=0.5, hint=1`: what was searched besides method and fraction."""
    shown = {key: value for key, value in overrides.items() if key not in AXES}
    return ", ".join(f"{names.get(key, key)}={number_text(value)}" for key, value in shown.items()) or "–"


def group_text(group: str, names: Mapping[str, str]) -> str:
    """A group's name with short keys."""
    parts = [part.partition("=") for part in group.split(",")]
    return ", ".join(f"{names.get(key, key)}{sign}{value}" for key, sign, value in parts)


def number_text(value: Any) -> str:
    """Drawn values have 16 digits, of which four say enough."""
    return f"{value:.4g}" if isinstance(value, float) else param_text(value)


# ---------------------------------------------------------------------------------------------------- cost


@dataclass(frozen=True)
class Cost:
    """What a point of the table cost: every trial of its method and fraction, however it ended."""

    method: str
    column: Column
    trials: int
    statuses: Mapping[str, int]
    seconds: float
    cpu_seconds: float
    gpu_seconds: float


def costs(sweep: Sweep) -> list[Cost]:
    """The cost of every method and fraction."""
    points: dict[tuple[str, Column], list[Trial]] = defaultdict(list)
    for trial in sweep.trials:
        points[trial.method, trial.column].append(trial)
    return [
        Cost(
            method=method,
            column=column,
            trials=len(trials),
            statuses={s: sum(t.status == s for t in trials) for s in sorted({t.status for t in trials})},
            seconds=sum(trial.seconds for trial in trials),
            cpu_seconds=sum(trial.cpu_seconds for trial in trials),
            gpu_seconds=sum(trial.gpu_seconds for trial in trials),
        )
        for (method, column), trials in sorted(points.items())
    ]


def write_ledger(sweep: Sweep, path: Path) -> Path:
    """Every trial with its cost, as CSV."""
    names = ("id", "group", "seed", "status", "epochs", "seconds", "cpu_seconds", "gpu_seconds", "reason", "run")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "held_out", "overrides"])
        for trial in sweep.trials:
            values = [getattr(trial, name) for name in names]
            writer.writerow([*values, sweep.score(trial), json.dumps(dict(trial.overrides))])
    return path
