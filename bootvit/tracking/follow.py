"""MLflow in the background: training never waits for it, and at the end of a run not for long."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bootvit.tracking.link import Status
from bootvit.tracking.run import MlflowRun
from bootvit.tracking.store import sqlite_path

PATIENCE_S = 15.0  # at the end of a run, for what MLflow has not got yet
LOCAL_S = 60.0  # more, for an SQLite file: there this machine works, nobody is waited for
MODEL_S = 30.0  # more, for a model that is logged: MLflow imports much for it
UPLOAD_BYTES_PER_S = 4e6  # more, for the upload of a checkpoint that is at least so fast


class Follower:
    """One thread that follows a run's folder to MLflow, from the first step to the end of the run.

    Nothing else may use the `MlflowRun` meanwhile. What is not sent when the patience is at its end stays in the
    folder, with a note that it is to be sent: the same command with `--resume` does.
    """

    def __init__(self, run: MlflowRun, *, every: float = 2.0) -> None:
        self._run, self._every = run, every
        self._tried = threading.Event()  # whether MLflow has been asked for its run, successfully or not
        self._ended = threading.Event()
        self._has_end = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def run_id(self) -> str | None:
        """MLflow's id of the run; None if it has not answered within the patience."""
        self._tried.wait(self._patience())
        return self._run.run_id

    def stop(self) -> None:
        """End the thread without an end of the run."""
        self._ended.set()

    def finish(self, status: Status, result: Mapping[str, Any], at: float | None = None) -> bool:
        """Send the rest and how the run ended, and when (None: now); False, and a warning, if MLflow takes too long."""
        self._run.note_end(status, result, at)
        self._has_end = True
        self._ended.set()
        return wait_for(self._thread, self._patience(), self._run.folder)

    def _patience(self) -> float:
        model = MODEL_S if self._run.logs_model() else 0.0
        return patience(self._run.uri) + model + self._run.upload_size() / UPLOAD_BYTES_PER_S

    def _work(self) -> None:
        self._run.connect()
        self._tried.set()
        while not self._ended.wait(self._every):
            self._run.sync()
        if self._has_end:
            self._run.sync(now=True)


def patience(uri: str) -> float:
    """Seconds to wait at the end for a store that takes nothing."""
    return PATIENCE_S + (LOCAL_S if sqlite_path(uri) else 0.0)


def wait_for(thread: threading.Thread, seconds: float, folder: Path) -> bool:
    """Wait for a thread that speaks with MLflow; False, and a warning, if it has not ended in time."""
    thread.join(seconds)
    if thread.is_alive():
        print(
            f"bootvit: warning: MLflow has not taken everything within {seconds:.0f} s; nothing is lost: "
            f"the rest is in {folder}, sent by the same command with --resume",
            file=sys.stderr,
            flush=True,
        )
    return not thread.is_alive()


def within(action: Callable[[], object], seconds: float, folder: Path) -> bool:
    """Let MLflow do something, for so long at most."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return wait_for(thread, seconds, folder)
