"""What the driver and the workers of a run under Ray tell one another: an actor beside the driver, which dies with it.

Workers learn here that they are to stop, and the driver what they have done, without a file in between.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bootvit.asks import Ask
from bootvit.result import EpochReport

EVERY = 1.0  # seconds between two looks of a worker
LEAVING = 10.0  # seconds between two checkpoints of a node that is about to go: nobody knows which is the last


class Coordinator:
    """The actor's content."""

    def __init__(self) -> None:
        self._reports: list[EpochReport] = []
        self._stopping = False

    def report(self, report: EpochReport) -> None:
        """Rank 0: an epoch is over."""
        self._reports.append(report)

    def reports(self, known: int) -> list[EpochReport]:
        """The driver: all reports but the first `known`."""
        return self._reports[known:]

    def stop(self) -> None:
        """The driver: workers are to save and stop."""
        self._stopping = True

    def stopping(self) -> bool:
        """A worker: whether that is so."""
        return self._stopping


def start_coordinator() -> Any:
    """An actor on this node, which needs no CPU."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Coordinator).options(num_cpus=0, scheduling_strategy=here).remote()


class Watch:
    """Looks, beside a worker's training, for what is asked of it: a stop, or a notice that its node goes away."""

    def __init__(self, coordinator: Any = None) -> None:
        self._coordinator = coordinator
        self._ask = Ask.NOTHING
        self._saved = -math.inf  # when a notice last led to a checkpoint
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def asked(self) -> Ask:
        """What is asked now; a checkpoint only until it was read."""
        ask = self._ask
        if ask == Ask.SAVE:
            self._ask = Ask.NOTHING
        return ask

    def close(self) -> None:
        """Look no more."""
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(EVERY):
            if self._coordinator is not None and is_stopping(self._coordinator):
                self._ask = Ask.STOP
                return
            if time.monotonic() - self._saved >= LEAVING and ray.is_initialized() and is_draining():
                self._ask, self._saved = Ask.SAVE, time.monotonic()


def is_stopping(coordinator: Any) -> bool:
    """Whether a worker is to save and stop; a driver that has died asks for it too."""
    try:
        return bool(ray.get(coordinator.stopping.remote(), timeout=60))
    except ray.exceptions.ActorDiedError:
        return True
    except ray.exceptions.RayError:  # the driver's node is busy, or cut off for a moment
        return False


def is_draining() -> bool:
    """Whether this node has been told that it will be taken away (a spot notice, the end of a Slurm job or a pod)."""
    from ray._private.state import state  # no public call tells it without a barrier of all workers

    try:
        return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()
    except (ray.exceptions.RayError, RuntimeError):  # the head does not answer at this moment
        return False
