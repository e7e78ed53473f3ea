"""The MLflow run of a sweep: the parent of its trials."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bootvit.tracking.link import RunLink, Status
from bootvit.tracking.store import connect, mlflow_available, public, tracking_uri
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
    ) -> None:
        self._file = file
        tags = {
            "mlflow.runName": name,
            "mlflow.source.name": "bootvit",
            "bootvit.kind": "sweep",
            "bootvit.sweep": name,
            "bootvit.git": source_version(),
        }
        params = {f"space/{key}": param_text(value) for key, value in space.items()}
        super().__init__(sweep_dir, uri, experiment, tags=tags, params=params)

    def update(self, document: Mapping[str, Any]) -> bool:
        """Send what `sweep.json` says now: trials, cost, the best of every group; False if the store failed."""
        return self._attempt(lambda: self._send_state(document))

    def finish(self, status: Status, document: Mapping[str, Any], files: Sequence[Path] = ()) -> bool:
        """Send the last state and the files, and set the status; False if the store failed."""

        def end() -> None:
            self._send_state(document)
            self._send_files(files)
            self._terminate(status)

        return self._attempt(end, now=True)

    def _on_connect(self, run: Any) -> None:
        if self._file:
            self._send_file(self._file)
        if run.info.status != "RUNNING":
            self._reopen()

    def _send_state(self, document: Mapping[str, Any]) -> None:
        self._send_points(state_points(document, int(time.time() * 1000)))
        best = document["best"].items()
        self._send_tags({f"bootvit.best.{safe_name(group)}": json.dumps(found) for group, found in best})
        if best:
            self._client.log_dict(self.run_id, best_table(document["best"]), BEST)
            self._send_tags({"mlflow.loggedArtifacts": json.dumps([{"path": BEST, "type": "table"}])})
        if (self.folder / "sweep.json").exists():
            self._send_file(self.folder / "sweep.json")

    def _send_files(self, files: Sequence[Path]) -> None:
        for file in files:
            self._send_file(file, "report")


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


def attach_to_sweep(sweep_dir: Path, files: Sequence[Path]) -> None:
    """Attach a report to the sweep's parent run, whether or not the sweep still runs; a warning if MLflow fails."""
    path = sweep_dir / "mlflow.json"
    if not path.exists() or not mlflow_available():
        return
    link = RunLink.load(path)
    uri = tracking_uri(None) if "***" in link.uri or not link.uri else link.uri
    try:
        client = connect(uri)
        for file in files if link.run_id else ():
            client.log_artifact(link.run_id, str(file), "report")
    except Exception as err:  # the report is on disk: MLflow's absence does not spoil it
        reason = " ".join(str(err).split())[:200]
        print(f"bootvit: warning: the report is not in MLflow at {public(uri)}: {public(reason)}", file=sys.stderr)
