"""The sweep in MLflow: one process writes, from the trials' journals; a trial is a child run of the sweep."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from bootvit.config import Config
from bootvit.files import write_json
from bootvit.result import read_result
from bootvit.tracking import MlflowRun, SweepRun, run_tags
from bootvit.tracking.follow import UPLOAD_BYTES_PER_S, patience, wait_for
from bootvit.tracking.link import RunLink
from bootvit.tracking.store import import_mlflow
from tune.decide.log import Trial

EVERY = 2.0  # seconds between two looks at the journals
PAUSE = 30.0  # seconds without an attempt after MLflow has failed
ENDS: dict[str, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
}
MakeConfig = Callable[[Trial], Config]


class Heard(NamedTuple):
    """A trial has begun, or it is over."""

    trial: Trial
    over: bool
    at: float | None = None  # when it ended, seconds since 1970


class TrialFolders(Protocol):
    """Where the runs of a sweep's trials are, wherever they are kept."""

    def run_dir(self, config: Config) -> Path:
        """A trial's run, on this machine."""

    def follow(self, run: Path) -> None:
        """Fetch what is new of a run that goes on."""

    def with_artifacts(self, config: Config, *, model: bool) -> AbstractContextManager[None]:
        """The run's uploads, and what its `model` is made of, are here meanwhile."""

    def put(self, *files: Path) -> None:
        """Keep files of a run that were written here."""


class Shipper:
    """A thread that follows the running trials' journals and finishes those that have ended."""

    def __init__(
        self, parent: SweepRun, folder: TrialFolders, sweep_name: str, kind: str, make_config: MakeConfig
    ) -> None:
        self._parent, self._folder, self._make_config = parent, folder, make_config
        self._sweep_name, self._kind = sweep_name, kind
        self._running: dict[str, MlflowRun | None] = {}
        self._trials: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        self._document: Mapping[str, Any] | None = None
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._resume_at = 0.0  # after a pause
        self._answered = 0.0  # when MLflow has last taken something
        self._upload_s = 0.0  # more patience, while a trial's weights are sent
        self._patience = patience(parent.uri)
        with suppress(Exception):  # which the thread meets again, and says
            import_mlflow()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def started(self, trial: Trial) -> None:
        """Follow a trial from now on."""
        self._trials.put(Heard(trial, over=False))

    def ended(self, trial: Trial, at: float | None) -> None:
        """Ship the rest of a trial and its end, in seconds since 1970."""
        self._trials.put(Heard(trial, True, at))

    def update(self, document: Mapping[str, Any]) -> None:
        """The newest sweep.json, its trials left out, for the parent run."""
        self._document = document

    def close(self) -> bool:
        """Ship everything that is there, and end; raises what ended the thread before its time.

        False, and a warning, if MLflow takes nothing any more: nothing may use the parent run then.
        """
        self._stop.set()
        self._answered = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - self._answered < self._patience + self._upload_s:
            self._thread.join(1)
        ended = wait_for(self._thread, 0, self._parent.folder)
        if self._error is not None:
            raise self._error
        return ended

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
            if last or time.monotonic() >= self._resume_at:
                self._resume_at = 0.0 if self._ship(followed) else time.monotonic() + PAUSE
            if last:
                return

    def _ship(self, followed: dict[str, Trial]) -> bool:
        """One round; False if MLflow failed, and then nothing more is tried: `--resume` ships what is left."""
        document, self._document = self._document, None
        if not (self._parent.update(document) if document is not None else self._parent.connect()):
            self._document = self._document or document
            return False
        self._answered = time.monotonic()
        while not self._trials.empty():
            trial, over, at = self._trials.get()
            if over:
                followed.pop(trial.spec.id, None)
                if not self._finish(trial, at):
                    return False
            else:
                followed[trial.spec.id] = trial
        return all(self._sync(trial) for trial in followed.values())

    def _sync(self, trial: Trial) -> bool:
        config = self._make_config(trial)
        run, run_dir = self._running.get(trial.spec.id), self._folder.run_dir(config)
        if trial.began is not None:
            self._folder.follow(run_dir)
        if run is None and trial.began is not None and (run_dir / "config.yaml").exists():
            run = self._running[trial.spec.id] = self._child(trial, config)
        return run is None or self._took(run.sync())

    def _finish(self, trial: Trial, at: float | None) -> bool:
        config = self._make_config(trial)
        run = self._running.pop(trial.spec.id, None) or self._child(trial, config)
        run.connect()
        path = self._folder.run_dir(config) / "result.json"
        result = read_result(path) | {"mlflow_run_id": run.run_id}
        write_json(path, result)
        with self._folder.with_artifacts(config, model=run.logs_model()):
            self._upload_s = run.upload_size() / UPLOAD_BYTES_PER_S
            taken = run.finish(ENDS[trial.status], result, at)
        self._folder.put(path, path.with_name("mlflow.json"))
        return self._took(taken)

    def _took(self, answered: bool) -> bool:
        if answered:
            self._answered, self._upload_s = time.monotonic(), 0.0
        return answered

    def _child(self, trial: Trial, config: Config) -> MlflowRun:
        tags = run_tags(config) | {
            "mlflow.runName": f"{self._sweep_name}/{trial.spec.id}"
            + ("" if self._kind == "trial" else f" {self._kind}"),
            "bootvit.kind": self._kind,
            "bootvit.sweep": self._sweep_name,
            "bootvit.group": trial.spec.group,
        }
        parent = self._parent.run_id
        run_dir = self._folder.run_dir(config)
        run = MlflowRun(config, run_dir, tags=tags, parent=parent, started=trial.began)
        self._folder.put(run_dir / "mlflow.json")  # with our key, before MLflow hears of it
        return run


def is_shipped(run_dir: Path) -> bool:
    """Whether MLflow has been told how this run ended."""
    link = run_dir / "mlflow.json"
    return link.exists() and RunLink.load(link).complete
