"""What is written down while a sweep runs: sweep.json, the runs' results, MLflow, and lines on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from bootvit.config import Config
from bootvit.files import write_json
from bootvit.result import Accuracy, Result, RunStatus, new_result, read_result
from bootvit.tracking import SweepRun, mlflow_available, tracking_uri
from bootvit.tracking.follow import patience, within
from bootvit.tracking.tags import git_commit
from tune.decide.log import ENDED, Trial, Trials
from tune.decide.select import is_number
from tune.run.data import fingerprints
from tune.run.kept import SweepFolder
from tune.spec.schema import Sweep
from tune.spec.space import count_trials, metric_of
from tune.tell.mlflow import Shipper, is_shipped
from tune.tell.record import Document, Recorder

ParentStatus = Literal["FINISHED", "FAILED", "KILLED"]
MakeConfig = Callable[[Trial], Config]


class Recording:
    """Everything that others read of a sweep, kept up to date."""

    def __init__(self, sweep: Sweep, folder: SweepFolder, config: MakeConfig) -> None:
        self._sweep, self._folder, self._config = sweep, folder, config
        self.recorder = Recorder(sweep)
        self._commit = git_commit()
        self._planned = None if sweep.file.fidelity else count_trials(sweep)  # rungs take what turns out best
        self._parent: SweepRun | None = None  # connected only when there is something to say: that reopens it
        self._shipper: Shipper | None = None

    # ------------------------------------------------------------------------------------------- the trials

    def follow(self, kind: str, config: MakeConfig, *, goes_on: bool = True) -> None:
        """Send trials of this kind to MLflow from now on; those of another kind are over."""
        self.close()
        self._parent = self._parent or connect(self._sweep, goes_on=goes_on)
        if self._parent is not None:
            self._folder.put(self._parent.folder / "mlflow.json")  # before MLflow hears of it
            self._shipper = Shipper(self._parent, self._folder, self._sweep.file.name, kind, config)

    def started(self, trial: Trial) -> None:
        """A trial is given out."""
        if self._shipper is not None:
            self._shipper.started(trial)

    def ended(self, trial: Trial, at: float | None) -> None:
        """Its result is final, since `at` (seconds since 1970; None: now)."""
        if self._shipper is not None:
            self._shipper.ended(trial, at)

    def settle(self, trial: Trial) -> None:
        """Write down in the run's own folder how the trial ended, and let MLflow know."""
        config = self._config(trial)
        if trial.status == "finished":
            self._folder.fetch(self._folder.run_dir(config))
            self.charge(config, trial)
        else:
            run = self._folder.seize(config)
            result = unfinished(config, trial, self.recorder.held_out(trial), self._commit)
            run.write_result(result | {"gpu_seconds": self.recorder.gpu_seconds(trial)})
            self._folder.put(run.result)
        self.ended(trial, trial.ended_at)

    def charge(self, config: Config, trial: Trial) -> None:
        """Write into a finished run's result what `trial` has cost: the loop does not know its share of a GPU."""
        path = self._folder.run_dir(config) / "result.json"
        write_json(path, read_result(path) | {"gpu_seconds": self.recorder.gpu_seconds(trial)})
        self._folder.put(path)

    def settle_old(self, trials: Iterable[Trial]) -> None:
        """What a killed driver had logged, but not yet written or shipped."""
        for trial in trials:
            run_dir = self._folder.run_dir(self._config(trial))
            recorded = (run_dir / "result.json").exists() and (self._shipper is None or is_shipped(run_dir))
            if trial.status in ENDED and not recorded:
                self.settle(trial)

    def say_end(self, trial: Trial, trials: Trials) -> None:
        """A line for a trial's end."""
        over = sum(t.status in ENDED for t in trials.values())
        metric = metric_of(self._config(trial), self._sweep.file.select.metric)
        value = ""
        if trial.value is not None:
            value = f"  {metric} {trial.value:.2f}" if is_number(trial.value) else f"  {metric} is no number"
        reason = f"  {trial.reason}" if trial.reason else ""
        total = self._planned or len(trials)
        print(
            f"[{over}/{total}] {trial.spec.id}  {trial.status} after {trial.epochs} epochs{value}{reason}", flush=True
        )

    # --------------------------------------------------------------------------------------------- the sweep

    def write(self, trials: Trials, status: str, seconds: float, reason: str | None = None) -> Document:
        """sweep.json, and the parent's state."""
        document = self.recorder.write(trials, status, seconds, reason)
        self._folder.put(self._sweep.folder / "sweep.json")
        if self._shipper is not None:
            self._shipper.update(document)
        return document

    def close(self) -> None:
        """Nothing is sent from here on but the parent's end."""
        if self._shipper is not None:
            shipper, self._shipper = self._shipper, None
            if not shipper.close():
                self._parent = None  # its thread may still wait for MLflow; `--resume` ships the rest

    def finish(
        self, status: ParentStatus, document: Mapping[str, Any], files: Sequence[Path], at: float | None = None
    ) -> None:
        """The end, in MLflow too; it was at `at` (seconds since 1970; None: now)."""
        self.close()
        if (parent := self._parent) is not None:
            within(lambda: parent.finish(status, document, files, at), patience(parent.uri), parent.folder)
            self._folder.put(parent.folder / "mlflow.json")

    def is_complete(self, document: Mapping[str, Any]) -> bool:
        """Whether MLflow has all of a finished sweep."""
        places = [self._sweep.folder, *(self._sweep.folder / trial["run"] for trial in document["trials"])]
        tracked = self._sweep.base.tracking.enabled and mlflow_available()
        return not tracked or all(is_shipped(place) for place in places if place.exists())

    def report(self) -> list[Path]:
        """The report's files."""
        if find_spec("matplotlib") is None or find_spec("sklearn") is None:
            return []
        from bootvit.report import write_sweep_report

        files = write_sweep_report(self._sweep.folder, self._sweep.folder / "report")
        self._folder.put(*files)
        return files


def connect(sweep: Sweep, *, goes_on: bool) -> SweepRun | None:
    """The parent run in MLflow; None where tracking is off or MLflow is not installed, which is said."""
    tracking = sweep.base.tracking
    if not tracking.enabled:
        return None
    if not mlflow_available():
        print("MLflow is not installed: this sweep is only in its folder", file=sys.stderr)
        return None
    dumped = sweep.file.model_dump(mode="json", exclude_defaults=True)["space"]
    space = {key: domains[0] if len(domains) == 1 else domains for key, domains in dumped.items()}
    uri = tracking_uri(tracking.uri)
    name, experiment = sweep.file.name, tracking.experiment
    return SweepRun(sweep.folder, uri, experiment, name=name, space=space, file=sweep.path, goes_on=goes_on)


def unfinished(config: Config, trial: Trial, held_out: Accuracy | None, commit: str | None) -> Result:
    """What is known of a trial that was stopped or failed."""
    facts = fingerprints(config.data)
    status: RunStatus = "failed" if trial.status == "failed" else "interrupted"
    known = new_result(config, status, trial.epochs, reason=trial.reason, fingerprint=facts.data, digest=facts.subset)
    return known | {"held_out": held_out, "seconds": round(trial.seconds, 3), "git": commit}
