"""The MLflow run of one run directory: it follows the journal from the driver, behind the checkpoints."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bootvit import checkpoint
from bootvit.addresses import public, public_address
from bootvit.config import Config, dump_config
from bootvit.errors import UserError
from bootvit.tracking.artifacts import chosen, files_of, size_of
from bootvit.tracking.journal import iter_journal
from bootvit.tracking.link import Status
from bootvit.tracking.store import tracking_uri
from bootvit.tracking.tags import DIGEST_LIMIT, flat_params
from bootvit.tracking.tracked import REASON, Point, TrackedRun

NOTE = "mlflow.note.content"
NOTE_HEAD = "| network | images | top-1 % | top-5 % |"
TAIL = sys.maxsize  # a step: all of the journal


class MlflowRun(TrackedRun):
    """Ships a run directory to MLflow: parameters, tags, the data set, metrics, and artifacts at the end.

    `sync` may be called at any time, from any thread, again and again, and after any crash: the store gets
    each point of the journal once. It is the driver's: there must be one at a time for a directory.

    What lies beyond the newest checkpoint is done again when a run goes on, so it is shipped only when a run has
    failed: its last points tell why. If it goes on after all, the steps that the store has keep their points.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        tags: Mapping[str, str],
        parent: str | None = None,
        started: float | None = None,
    ) -> None:
        self._config = config
        self._result: dict[str, Any] = {}
        self._offset = 0  # bytes of the journal that are shipped
        self._read_to = 0  # bytes of the journal that have been read, shipped or not
        self._last = -1  # step of the last record that was read
        self._journal_inode = -1  # a journal that was cut is another file: read it again from its start
        self._dataset_sent = self._config_sent = False
        self._finishing = False
        self._kind, self._note = tags.get("bootvit.kind"), ""
        super().__init__(
            run_dir,
            tracking_uri(config.tracking.uri),
            config.tracking.experiment,
            tags={**tags, **({"mlflow.parentRunId": parent} if parent else {})},
            params=flat_params(config),
            started=began(run_dir) if started is None else started,
        )

    def sync(self, *, now: bool = False) -> bool:
        """Ship what the newest checkpoint covers and is not there yet; and the end, if the run has ended.

        False if the store failed, or did so a moment ago and it is not to be asked again `now`.
        """
        return self._attempt(self._sync, now=now)

    def note_end(self, status: Status, result: Mapping[str, Any], at: float | None = None) -> None:
        """Write down how and when the run ended, in its folder only: a `sync`, by whomever, tells MLflow."""
        self._result, self._finishing = dict(result), True
        self._note_end(status, at)

    def upload_size(self) -> int:
        """Bytes, at most, of what becomes artifacts if the run ends now: checkpoints and a model."""
        return size_of(self._config, self.folder)

    def logs_model(self) -> bool:
        """Whether the run has a model to log, if it has finished: trials of a sweep have none."""
        return self._config.tracking.model and self._kind != "trial"

    def finish(self, status: Status, result: Mapping[str, Any], at: float | None = None) -> bool:
        """Ship the rest and the final numbers, set the status and the end (`at`, None: now), then upload artifacts.

        What a store that is down does not take now is taken by the next `sync` of this directory.
        """
        self.note_end(status, result, at)
        return self.sync(now=True)

    def _on_connect(self, run: Any) -> None:
        self._offset = 0
        self._dataset_sent = self._config_sent = False
        self._kind, self._note = run.data.tags.get("bootvit.kind"), run.data.tags.get(NOTE, "")
        if self._link.ended in ("FAILED", "KILLED") and not self._finishing:  # a resumed run goes on
            self._reopen()

    def _sync(self) -> None:
        self._send_dataset()
        covered = covered_step(self.folder)
        ending = self._link.ended if not self._link.complete else None
        upto = TAIL if ending == "FAILED" else covered
        if upto >= 0:
            self._ship(upto)
        if ending:
            self._end(ending, max(covered, self._link.shipped_step, 0))
        if not (self._config_sent or self._link.complete):
            self._client.log_text(self.run_id, dump_config(self._config), "config.yaml")
            self._config_sent = True
        if ending:
            self._send_files()
            if ending == "FINISHED" and self.logs_model():
                self._send_model()
            self._close()

    def _ship(self, covered: int) -> None:
        journal = self.folder / "metrics.jsonl"
        inode = journal.stat().st_ino if journal.exists() else -1
        if inode != self._journal_inode:
            self._offset, self._journal_inode = 0, inode
        if self._link.complete and covered > self._link.shipped_step:
            self._reopen()  # a finished run that was given more epochs
        self._send_points(self._new_points(journal, covered))
        self._offset = self._read_to
        self._update_link(shipped_step=max(self._link.shipped_step, self._last) if covered == TAIL else covered)

    def _new_points(self, journal: Path, covered: int) -> Iterator[Point]:
        """The journal's points up to `covered`."""
        self._read_to = self._offset
        for record, behind in iter_journal(journal, self._offset):
            if record.step > covered:
                break
            yield Point(record.name, record.value, int(record.time * 1000), record.step)
            self._read_to, self._last = behind, record.step

    def _end(self, status: Status, step: int) -> None:
        """The final numbers, the reason, and that the run is over: MLflow has these before any file."""
        path = self.folder / "result.json"
        result = self._result or (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
        milliseconds = int((self._link.ended_at or time.time()) * 1000)
        self._send_values(Point(key, value, milliseconds, step) for key, value in final_metrics(result).items())
        if result.get("reason"):
            self._send_tags({REASON: public(str(result["reason"]))})
        else:
            self._drop_reason()
        if result.get("data_fingerprint"):
            self._tags["bootvit.data_fingerprint"] = str(result["data_fingerprint"])
            self._send_tags({"bootvit.data_fingerprint": self._tags["bootvit.data_fingerprint"]})
            self._send_dataset()
        note = described(result)
        if note and (not self._note or self._note.startswith(NOTE_HEAD)):  # what somebody has written there stays
            self._send_tags({NOTE: note})
        self._terminate(status)

    def _send_files(self) -> None:
        for name in ("config.yaml", "result.json"):
            if (self.folder / name).exists():
                self._send_file(self.folder / name)
        for saved in chosen(self._config, self.folder):
            with files_of(self._config, saved) as files:
                for file in files:
                    self._send_file(file, "checkpoints")

    def _send_model(self) -> None:
        """The model that MLflow serves, and its registered version; what is wrong with it does not stop the rest."""
        from bootvit.tracking.model import log_model, register_model

        saved = checkpoint.described(self.folder / "checkpoints")[-1:]
        if not saved or not saved[0].final or not checkpoint.verify(saved[0]):  # which is said where it is uploaded
            return
        try:
            model = log_model(self._client, str(self.run_id), self._config, self.folder, saved[0].step)
        except UserError as err:
            print(f"bootvit: warning: MLflow has no model of this run: {err}", file=sys.stderr)
            return
        if self._config.tracking.register is not None:
            register_model(self._client, self._config.tracking.register, model, str(self.run_id))

    def _send_dataset(self) -> None:
        """The data sets of training and evaluation as MLflow inputs; the same one twice is stored once."""
        fingerprint = self._tags.get("bootvit.data_fingerprint")
        if not fingerprint or self._dataset_sent:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = self._config.data
        root = data.root and public_address(data.root)
        source = json.dumps({"source": data.source, "root": root, "fraction": data.fraction})
        name = self._tags.get("bootvit.data", data.source)
        digest = fingerprint[:DIGEST_LIMIT]
        inputs = [  # one data set has one context in a run, so the images that are evaluated are another one
            DatasetInput(
                Dataset(name=title, digest=digest, source_type="local", source=source),
                [InputTag("mlflow.data.context", context)],
            )
            for title, context in ((name, "training"), (f"{name} evaluation", "evaluation"))
        ]
        self._client.log_inputs(self.run_id, inputs)
        self._dataset_sent = True


def described(result: Mapping[str, Any]) -> str:
    """The run's table in Markdown, for its page in MLflow; empty without an accuracy."""
    rows = [
        f"| {net} | {where} | {values['top1']:.2f} | {values['top5']:.2f} |"
        for where, key in (("evaluation", "final"), ("held out", "held_out"))
        for net, values in (result.get(key) or {}).items()
    ]
    if not rows:
        return ""
    about = f"{result['method']}, {100 * result['fraction']:g}% of the training images, {result['epochs']} epochs"
    return "\n".join([NOTE_HEAD, "| --- | --- | ---: | ---: |", *rows, "", about])


def covered_step(run_dir: Path) -> int:
    """The newest committed checkpoint's step, up to which the journal is settled; -1 without one."""
    return max((saved.step for saved in checkpoint.described(run_dir / "checkpoints")), default=-1)


def began(run_dir: Path) -> float:
    """When a run that has no link yet began: now, or before its first record (MLflow may have come later)."""
    first = next(iter_journal(run_dir / "metrics.jsonl"), None)
    return min(time.time(), first[0].time) if first else time.time()


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
