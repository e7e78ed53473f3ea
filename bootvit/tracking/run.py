"""The MLflow run of one run directory: it follows the journal from the driver, behind the checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bootvit.checkpoint import described
from bootvit.config import Config, dump_config
from bootvit.tracking.journal import iter_journal
from bootvit.tracking.link import Status
from bootvit.tracking.store import tracking_uri
from bootvit.tracking.tags import DIGEST_LIMIT, flat_params
from bootvit.tracking.tracked import Point, TrackedRun


class MlflowRun(TrackedRun):
    """Ships a run directory to MLflow: parameters, tags, the data set, metrics, and artifacts at the end.

    `sync` may be called at any time, from any thread, again and again, and after any crash: the store gets
    each point of the journal once. It is the driver's: there must be one at a time for a directory.
    """

    def __init__(self, config: Config, run_dir: Path, *, tags: Mapping[str, str], parent: str | None = None) -> None:
        self._config = config
        self._result: dict[str, Any] = {}
        self._offset = 0  # bytes of the journal that are shipped
        self._read_to = 0  # bytes of the journal that have been read, shipped or not
        self._journal_inode = -1  # a journal that was cut is another file: read it again from its start
        self._dataset_sent = False
        self._finishing = False
        super().__init__(
            run_dir,
            tracking_uri(config.tracking.uri),
            config.tracking.experiment,
            tags={**tags, **({"mlflow.parentRunId": parent} if parent else {})},
            params=flat_params(config),
        )

    def sync(self, *, now: bool = False) -> bool:
        """Ship what the newest checkpoint covers and is not there yet; and the end, if the run has ended.

        False if the store failed, or did so a moment ago and it is not to be asked again `now`.
        """
        return self._attempt(self._sync, now=now)

    def note_end(self, status: Status, result: Mapping[str, Any]) -> None:
        """Write down how the run ended, in its folder only: a `sync`, by whomever, tells MLflow."""
        self._result, self._finishing = dict(result), True
        self._update_link(ended=status, complete=False)

    def finish(self, status: Status, result: Mapping[str, Any]) -> bool:
        """Ship the rest, the final numbers and the artifacts, and set the status.

        What a store that is down does not take now is taken by the next `sync` of this directory.
        """
        self.note_end(status, result)
        return self.sync(now=True)

    def _on_connect(self, run: Any) -> None:
        self._offset, self._dataset_sent = 0, False
        self._client.log_text(self.run_id, dump_config(self._config), "config.yaml")
        if self._link.ended in ("FAILED", "KILLED") and not self._finishing:  # a resumed run goes on
            self._reopen()

    def _sync(self) -> None:
        self._send_dataset()
        covered = covered_step(self.folder)
        if covered >= 0:
            self._ship(covered)
        if self._link.ended and not self._link.complete:
            self._complete(self._link.ended, covered)

    def _ship(self, covered: int) -> None:
        journal = self.folder / "metrics.jsonl"
        inode = journal.stat().st_ino if journal.exists() else -1
        if inode != self._journal_inode:
            self._offset, self._journal_inode = 0, inode
        if self._link.complete and covered > self._link.shipped_step:
            self._reopen()  # a finished run that was given more epochs
        self._send_points(self._new_points(journal, covered))
        self._offset = self._read_to
        self._update_link(shipped_step=covered)

    def _new_points(self, journal: Path, covered: int) -> Iterator[Point]:
        """The journal's points up to `covered`."""
        self._read_to = self._offset
        for record, behind in iter_journal(journal, self._offset):
            if record.step > covered:
                break
            yield Point(record.name, record.value, int(record.time * 1000), record.step)
            self._read_to = behind

    def _complete(self, status: Status, covered: int) -> None:
        path = self.folder / "result.json"
        result = self._result or (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
        milliseconds = int(time.time() * 1000)
        self._send_points(Point(key, value, milliseconds, covered) for key, value in final_metrics(result).items())
        if result.get("data_fingerprint"):
            self._tags["bootvit.data_fingerprint"] = str(result["data_fingerprint"])
            self._send_tags({"bootvit.data_fingerprint": self._tags["bootvit.data_fingerprint"]})
            self._send_dataset()
        for name in ("config.yaml", "result.json"):
            if (self.folder / name).exists():
                self._send_file(self.folder / name)
        for file in final_checkpoint(self.folder):
            self._send_file(file, "checkpoint")
        self._terminate(status)

    def _send_dataset(self) -> None:
        """The data set as an MLflow input; the same one twice is stored once."""
        fingerprint = self._tags.get("bootvit.data_fingerprint")
        if not fingerprint or self._dataset_sent:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = self._config.data
        source = json.dumps({"source": data.source, "root": data.root, "fraction": data.fraction})
        name = self._tags.get("bootvit.data", data.source)
        dataset = Dataset(name=name, digest=fingerprint[:DIGEST_LIMIT], source_type="local", source=source)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        self._client.log_inputs(self.run_id, inputs)
        self._dataset_sent = True


def covered_step(run_dir: Path) -> int:
    """The newest committed checkpoint's step, up to which the journal is settled; -1 without one."""
    return max((saved.step for saved in described(run_dir / "checkpoints")), default=-1)


def final_checkpoint(run_dir: Path) -> list[Path]:
    """The files of the checkpoint at the end of training; none if it is not there."""
    finals = [saved.path for saved in described(run_dir / "checkpoints") if saved.final]
    return [file for path in finals[-1:] for file in (path, path.with_suffix(".json")) if file.exists()]


def final_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """A result's numbers as metrics: `final/vit/top1`, `final/held_out/vit/top1`, `final/seconds` ..."""
    metrics: dict[str, float] = {}
    for prefix, scores in (("final", result.get("final")), ("final/held_out", result.get("held_out"))):
        for network, values in (scores or {}).items():
            metrics |= {f"{prefix}/{network}/{name}": float(value) for name, value in values.items()}
    for name in ("epochs", "seconds", "gpu_seconds", "images_per_second", "skipped"):
        if result.get(name) is not None:
            metrics[f"final/{name}"] = float(result[name])
    return metrics
