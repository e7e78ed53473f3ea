"""One MLflow run that belongs to a folder: found again or created, and never a reason for training to end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bootvit.addresses import public_address, without_secrets
from bootvit.tracking.link import RunLink, Status
from bootvit.tracking.store import check_writable, connect, experiment_id, forget_artifacts, time_to_upload
from bootvit.tracking.tags import TAG_LIMIT

RUN_KEY = "bootvit.run_key"
METRICS_PER_CALL = 1000  # MLflow's limits
PARAMS_PER_CALL = 100
WRITTEN_ONCE = (".safetensors",)  # large, and the same whenever they are sent
REASON = "bootvit.reason"
RETRY_AFTER = 30.0  # seconds without an attempt after a store has failed
T = TypeVar("T")


class Point(NamedTuple):
    """One metric value as MLflow stores it; equal points are stored once."""

    key: str
    value: float
    timestamp: int  # milliseconds; from the journal, so that shipping again is the same point
    step: int


class TrackedRun:
    """The common half of `MlflowRun` and `SweepRun`.

    Every access goes through `_attempt`: a store that fails is one warning on stderr and a pause, and what
    could not be sent is sent later: `_latest`, the last step of each metric that the store itself has, says
    what is missing there. Making one only reads and writes the folder; whatever asks MLflow may take seconds and
    belongs into a thread of its own (`bootvit.tracking.follow`).
    """

    def __init__(
        self,
        folder: Path,
        uri: str,
        experiment: str,
        *,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        started: float | None = None,
    ) -> None:
        self.folder, self.uri, self._experiment = folder, uri, experiment
        self._tags, self._params = dict(tags), dict(params)
        self._link_path = folder / "mlflow.json"
        self._may_be_there = self._link_path.exists()  # a key that was made just now is in no store
        self._link = RunLink.load(self._link_path, started)
        self._client: Any = None
        self._latest: dict[str, int] = {}
        self._values: dict[str, float] = {}  # the store's newest value of each metric
        self._has_reason = False  # whether the store says why the run ended
        self._unsent_tags: dict[str, str] = {}
        self._lock = threading.RLock()  # held while MLflow is asked
        self._link_lock = threading.Lock()  # held for a moment
        self._retry_at = 0.0
        self._warned = False

    @property
    def run_id(self) -> str | None:
        """MLflow's id; None as long as the store has never answered."""
        return self._link.run_id

    def connect(self) -> bool:
        """Find or create the run, if that is not done yet; False if the store failed, or failed a moment ago."""
        return self._attempt(lambda: None)

    def set_tags(self, tags: Mapping[str, str]) -> bool:
        """Set tags that were not known at the start; False if they wait for the store to answer again."""
        with self._lock:
            self._tags |= tags
            self._unsent_tags |= tags
            return self._attempt(lambda: None)

    # ------------------------------------------------------------------------------------- for subclasses

    def _attempt(self, action: Callable[[], None], *, now: bool = False) -> bool:
        """Connect if need be and run `action`; False if the store failed, or failed a moment ago."""
        with self._lock:
            if time.monotonic() < self._retry_at and not now:
                return False
            try:
                if self._client is None:
                    self._connect()
                self._send_tags(self._unsent_tags)
                self._unsent_tags = {}
                action()
            except Exception as err:  # whatever MLflow, its server or its database do: training goes on
                self._retry_at = time.monotonic() + RETRY_AFTER
                self._warn(err)
                return False
            return True

    def _update_link(self, **changes: Any) -> None:
        with self._link_lock:
            link = self._link.model_copy(update=changes)
            if link != self._link:
                self._link = link
                link.save(self._link_path)

    def _on_connect(self, run: Any) -> None:
        """Called with MLflow's run once it is found or created."""

    def _send_points(self, points: Iterable[Point]) -> None:
        """Send the points that are not there yet, in order, so that a cut leaves a prefix behind."""
        self._send(point for point in points if point.step > self._latest.get(point.key, -1))

    def _send_values(self, points: Iterable[Point]) -> None:
        """Send values that may change without a step, such as what a run has cost: those that did, as the newest."""
        at = ((point, self._latest.get(point.key, -1)) for point in points)
        new = ((point, step) for point, step in at if point.step > step or point.value != self._values.get(point.key))
        self._send(point._replace(step=max(point.step, step)) for point, step in new)

    def _send(self, points: Iterable[Point]) -> None:
        from mlflow.entities import Metric

        for batch in _batches(points, METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in batch])
            for point in batch:
                self._latest[point.key] = max(point.step, self._latest.get(point.key, -1))
                self._values[point.key] = point.value

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for batch in _batches(tags.items(), PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, tags=[RunTag(key, value[:TAG_LIMIT]) for key, value in batch])

    def _send_params(self, there: Mapping[str, str]) -> None:
        """Parameters are written once; MLflow refuses to change them, so a change becomes a tag."""
        from mlflow.entities import Param

        new = {key: value for key, value in self._params.items() if key not in there}
        for batch in _batches(new.items(), PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=[Param(key, value) for key, value in batch])
        changed = [f"{key}={value}" for key, value in self._params.items() if there.get(key, value) != value]
        if changed:
            self._send_tags({"bootvit.resumed_with": " ".join(changed)})

    def _send_file(self, path: Path, folder: str | None = None) -> None:
        """Upload a file; a checkpoint, large and never changed, only if it is not there in that size."""
        size = path.stat().st_size
        if path.suffix in WRITTEN_ONCE:
            there = {item.path: item.file_size for item in self._client.list_artifacts(self.run_id, folder)}
            if there.get(f"{folder}/{path.name}") == size:
                return
        with time_to_upload(size):
            self._client.log_artifact(self.run_id, str(path), folder)

    def _note_end(self, status: Status, at: float | None) -> None:
        """Write down how and when the run ended (`at` in seconds since 1970, None: now), in its folder only."""
        self._update_link(ended=status, ended_at=time.time() if at is None else at, complete=False)

    def _reopen(self) -> None:
        """A run that had ended goes on."""
        self._client.update_run(self.run_id, status="RUNNING")
        self._drop_reason()
        self._update_link(ended=None, ended_at=None, complete=False)

    def _drop_reason(self) -> None:
        """What had ended the run earlier no longer holds."""
        if self._has_reason:
            self._client.delete_tag(self.run_id, REASON)
            self._has_reason = False

    def _terminate(self, status: Status) -> None:
        """Set the run's status and the time of its end; artifacts come after that, and `_close` after them."""
        at = self._link.ended_at
        self._client.set_terminated(self.run_id, status, end_time=None if at is None else int(at * 1000))

    def _close(self) -> None:
        """Note that MLflow has all of a run that has ended."""
        self._update_link(complete=True)
        forget_artifacts(self.run_id)

    # ------------------------------------------------------------------------------------------- connecting

    def _connect(self) -> None:
        check_writable(self.uri)
        client = connect(self.uri)
        experiment = experiment_id(client, self.uri, self._experiment)
        run = self._find(client, experiment) if self._may_be_there else None
        self._may_be_there = True
        self._unsent_tags = dict(self._tags) if run else {}
        if run is None:
            tags = {key: value[:TAG_LIMIT] for key, value in self._tags.items()} | {RUN_KEY: self._link.run_key}
            name, started = self._tags.get("mlflow.runName"), self._link.started
            start_time = None if started is None else int(started * 1000)
            run = client.create_run(experiment, start_time=start_time, run_name=name, tags=tags)
        self._has_reason = REASON in run.data.tags
        newest = run.data.to_proto().metrics
        self._latest = {metric.key: metric.step for metric in newest}
        self._values = {metric.key: metric.value for metric in newest}
        self._update_link(
            run_id=run.info.run_id,
            uri=public_address(self.uri),
            experiment=self._experiment,
            experiment_id=run.info.experiment_id,
        )
        self._client = client
        try:
            self._send_params(run.data.params)
            self._on_connect(run)
        except Exception:
            self._client = None  # half connected is not connected: the next attempt starts again
            raise

    def _find(self, client: Any, experiment: str) -> Any:
        """The run of this folder, by its id, else by our key; None if the store has no such run."""
        from mlflow.exceptions import MlflowException

        if self._link.run_id:
            try:
                run = client.get_run(self._link.run_id)
            except MlflowException as err:
                if err.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if run.info.lifecycle_stage == "active":
                    return run
        found = client.search_runs([experiment], f"tags.`{RUN_KEY}` = '{self._link.run_key}'", max_results=1)
        return found[0] if found else None

    def _warn(self, err: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        reason = without_secrets(" ".join(str(err).split()), self.uri)[:300] or type(err).__name__
        print(
            f"bootvit: warning: MLflow at {public_address(self.uri)} failed: {reason}; nothing is lost: "
            f"the rest is in {self.folder}, sent when MLflow answers or by the same command with --resume",
            file=sys.stderr,
            flush=True,
        )


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
