"""The MLflow run of a sweep: the parent of its trials."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bootvit.addresses import public
from bootvit.tracking.link import Status
from bootvit.tracking.tags import param_text, source_version
from bootvit.tracking.tracked import Point, TrackedRun

ENDED = ("finished", "stopped", "failed")
BEST = "best.json"


class SweepRun(TrackedRun):
    """One parent run per sweep folder: file, space, the best trial of every group, plots, the ledger.

    Trials become its children by the tag `mlflow.parentRunId` (`MlflowRun(..., parent=sweep_run.run_id)`).
    """

    def __init__(
        self,
        sweep_dir: Path,
        uri: str,
        experiment: str,
        *,
        name: str,
        space: Mapping[str, Any],
        file: Path | None,
        goes_on: bool = True,
    ) -> None:
        """A sweep that has ended and only sends what MLflow has missed does not go on: its end stays what it was."""
        self._file, self._file_sent = file, False
        tags = {
            "mlflow.runName": name,
            "mlflow.source.name": "bootvit",
            "bootvit.kind": "sweep",
            "bootvit.sweep": name,
            "bootvit.git": source_version(),
        }
        params = {f"space/{key}": param_text(value) for key, value in space.items()}
        super().__init__(sweep_dir, uri, experiment, tags=tags, params=params)
        if goes_on:
            self._update_link(ended=None, ended_at=None, complete=False)

    def update(self, document: Mapping[str, Any]) -> bool:
        """Send what `sweep.json` says now: trials, cost, the best of every group; False if the store failed."""

        def send() -> None:
            self._send_state(document)
            self._send_tables(document)

        return self._attempt(send)

    def finish(
        self, status: Status, document: Mapping[str, Any], files: Sequence[Path] = (), at: float | None = None
    ) -> bool:
        """Send the last state, set the status and the end (`at`, None: now), upload the files; False if that failed.

        An end that was written down earlier, when the store was down, is the one that counts.
        """
        if self._link.ended is None:
            self._note_end(status, at)

        def end() -> None:
            self._send_state(document)
            self._terminate(status)
            self._send_tables(document)
            for file in files:
                self._send_file(file, "report")
            self._close()

        return self._attempt(end, now=True)

    def _on_connect(self, run: Any) -> None:
        self._file_sent = False
        if run.info.status != "RUNNING" and self._link.ended is None:
            self._reopen()

    def _send_state(self, document: Mapping[str, Any]) -> None:
        self._send_values(state_points(document, int(time.time() * 1000)))
        best = document["best"].items()
        self._send_tags({f"bootvit.best.{safe_name(group)}": json.dumps(found) for group, found in best})

    def _send_tables(self, document: Mapping[str, Any]) -> None:
        """The artifacts that a sweep has while it runs: its file, the best of every group, sweep.json."""
        if self._file and not self._file_sent:
            self._client.log_text(self.run_id, public(self._file.read_text("utf-8-sig")), self._file.name)
            self._file_sent = True
        if document["best"]:
            self._client.log_dict(self.run_id, best_table(document["best"]), BEST)
            self._send_tags({"mlflow.loggedArtifacts": json.dumps([{"path": BEST, "type": "table"}])})
        if (self.folder / "sweep.json").exists():
            self._send_file(self.folder / "sweep.json")


def state_points(document: Mapping[str, Any], timestamp: int) -> Iterator[Point]:
    """A sweep's state as metrics; the step is the number of trials that have ended, so it only grows."""
    counts, cost = document["counts"], document["cost"]
    step = sum(counts.get(status, 0) for status in ENDED)
    for status in ENDED:
        yield Point(f"trials/{status}", counts.get(status, 0), timestamp, step)
    for key in ("seconds", "gpu_seconds"):
        yield Point(f"cost/{key}", cost[key], timestamp, step)


def best_table(best: Mapping[str, Any]) -> dict[str, Any]:
    """The best of every group, a row each, as MLflow shows tables."""
    scores = [(part, network) for part in ("held_out", "final") for network in ("vit", "agent")]
    columns = ["group", "trial", "overrides", "mean", "sd", *(f"{part}.{network}.top1" for part, network in scores)]
    rows = [
        [
            *(group, found["trial"], json.dumps(found["overrides"]), found.get("mean"), found.get("sd")),
            *((found.get(part) or {}).get(network, {}).get("top1") for part, network in scores),
        ]
        for group, found in best.items()
    ]
    return {"columns": columns, "data": rows}


def safe_name(group: str) -> str:
    """A group as part of a metric's or a tag's name: MLflow knows letters, digits and `_ - . space : /`."""
    return re.sub(r"[^\w\-. :/]", "_", group.replace("=", ":"), flags=re.ASCII)[:150]
