"""What the searcher, the scheduler and the tuner have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ray import tune

from tune.decide.conductor import Conductor
from tune.decide.log import Trial
from tune.run.capacity import Room
from tune.run.job import Job

MakeJob = Callable[[Trial], Job]


class Work(NamedTuple):
    """What Tune is to execute."""

    conductor: Conductor
    make_job: MakeJob
    room: Room
    resources: dict[str, float]  # of Ray, for each trial's actor
    several_workers: bool
    retries: int
    timeout: float | None = None  # seconds without a report after which a trial is started again
    callbacks: Sequence[tune.Callback] = ()
    table: bool = False  # Tune's own table on the terminal
    trainable: type[tune.Trainable] | None = None  # None: `TrialActor`


class Errors:
    """Tune turns an error in one of its parts into a text; the error itself is kept here."""

    def __init__(self) -> None:
        self.first: Exception | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Keep the first error that is raised inside."""
        try:
            yield
        except Exception as err:
            self.first = self.first or err
            raise


class Unsaved:
    """Tune pickles its parts, for a restore that never happens here: the log is what a new driver starts from."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Order(str):
    """A text that is not spelled out where Tune prints a trial's parameters."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "..."


def tune_config(trial: Trial, job: Job | None) -> dict[str, Any]:
    """A trial's config as Tune has it: its own values, and as one text what its actor is to do, while it has one."""
    values = {**trial.overrides, "seed": trial.spec.seed}
    return values if job is None else {**values, "job": Order(json.dumps(job._asdict()))}
