"""The sweep in MLflow: one process writes, from the trials' journals; a trial is a child run of the sweep."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from bootvit import checkpoint
from bootvit.config import Config
from bootvit.tracking import MlflowRun, SweepRun, run_tags
from bootvit.tracking.link import RunLink
from tune.decide.log import Trial

EVERY = 2.0  # seconds between two looks at the journals
ENDS: dict[str, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
}
MakeConfig = Callable[[Trial], Config]


class Shipper:
    """A thread that follows the running trials' journals and finishes those that have ended."""

    def __init__(self, parent: SweepRun, sweep_name: str, kind: str, make_config: MakeConfig) -> None:
        self._parent, self._sweep_name, self._kind, self._make_config = parent, sweep_name, kind, make_config
        self._running: dict[str, MlflowRun | None] = {}
        self._trials: queue.SimpleQueue[tuple[bool, Trial]] = queue.SimpleQueue()  # (has it ended, trial)
        self._document: Mapping[str, Any] | None = None
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def started(self, trial: Trial) -> None:
        """Follow a trial from now on."""
        self._trials.put((False, trial))

    def ended(self, trial: Trial) -> None:
        """Ship the rest of a trial and its end."""
        self._trials.put((True, trial))

    def update(self, document: Mapping[str, Any]) -> None:
        """The newest sweep.json, its trials left out, for the parent run."""
        self._document = document

    def close(self) -> None:
        """Ship everything that is there, and end; raises what ended the thread before its time."""
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    # ------------------------------------------------------------------------------------------ the thread

    def _work(self) -> None:
        try:
            self._follow()
        except BaseException as err:  # raised again by `close`
            self._error = err

    def _follow(self) -> None:
        followed: dict[str, Trial] = {}
        while True:
            last = self._stop.wait(EVERY)
            document, self._document = self._document, None
            if document is not None:
                self._parent.update(document)
            if self._parent.run_id is not None:  # else MLflow is down, and said so once; `--resume` ships the rest
                self._ship(followed)
            if last:
                return

    def _ship(self, followed: dict[str, Trial]) -> None:
        while not self._trials.empty():
            over, trial = self._trials.get()
            if over:
                followed.pop(trial.spec.id, None)
                self._finish(trial)
            else:
                followed[trial.spec.id] = trial
        for trial in followed.values():
            self._sync(trial)

    def _sync(self, trial: Trial) -> None:
        config = self._make_config(trial)
        run = self._running.get(trial.spec.id)
        if run is None and (config.run_dir / "config.yaml").exists():
            run = self._running[trial.spec.id] = self._child(trial, config)
        if run is not None:
            run.sync()

    def _finish(self, trial: Trial) -> None:
        config = self._make_config(trial)
        run = self._running.pop(trial.spec.id, None) or self._child(trial, config)
        if trial.reason:
            run.set_tags({"bootvit.reason": trial.reason})
        path = config.run_dir / "result.json"
        result = checkpoint.read_json(path) | {"mlflow_run_id": run.run_id}
        checkpoint.write_json(path, result)
        run.finish(ENDS[trial.status], result)

    def _child(self, trial: Trial, config: Config) -> MlflowRun:
        tags = run_tags(config) | {
            "mlflow.runName": f"{self._sweep_name}/{trial.spec.id}"
            + ("" if self._kind == "trial" else f" {self._kind}"),
            "bootvit.kind": self._kind,
            "bootvit.sweep": self._sweep_name,
            "bootvit.group": trial.spec.group,
        }
        return MlflowRun(config, config.run_dir, tags=tags, parent=self._parent.run_id)


def is_shipped(run_dir: Path) -> bool:
    """Whether MLflow has been told how this run ended."""
    link = run_dir / "mlflow.json"
    return link.exists() and RunLink.load(link).complete
