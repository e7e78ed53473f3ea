"""Where trials run: a Ray that is there or one started here, and how many trials fit on it now."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec

from bootvit.errors import UserError
from bootvit.ray_connection import connect_ray
from cluster.capacity import check_cluster, has_autoscaler, live_nodes, trial_workers, trials_at_once
from cluster.probe import check_nodes, places_of
from tune.spec.schema import Sweep

LOOK_S = 1.0  # seconds between two looks at the cluster's nodes


def check_resources(sweep: Sweep) -> None:
    """Refuse resources that no machine can give as they are asked for."""
    workers, gpu = sweep.base.ray.most, sweep.gpus
    if sweep.base.ray.fewest != workers:
        given = f"ray.num_workers=[{sweep.base.ray.fewest}, {workers}]"
        raise UserError(f"{sweep.path}: {given}: the trials of a sweep have one number of workers")
    if gpu > 1 and gpu != int(gpu):
        raise UserError(f"{sweep.path}: resources.gpu={gpu:g}: a fraction of one GPU, or whole GPUs")
    if workers > 1 and gpu not in (0, workers):
        raise UserError(f"{sweep.path}: resources.gpu={gpu:g} with ray.num_workers={workers}: give 0, or one a worker")
    if workers == 1 and gpu > 1:
        raise UserError(
            f"{sweep.path}: resources.gpu={gpu:g}: a trial with one worker uses one GPU; set ray.num_workers"
        )
    if workers > 1 and sweep.file.algorithm == "pbt":  # they would run ahead of the others while these decide
        raise UserError(f"{sweep.path}: search.algorithm=pbt with ray.num_workers={workers}: set ray.num_workers=1")
    if sweep.base.ray.use_gpu and gpu == 0:
        raise UserError(f"{sweep.path}: ray.use_gpu=true in the base, but resources.gpu=0: say how much of a GPU")


def start_ray(sweep: Sweep) -> bool:
    """Connect to RAY_ADDRESS's cluster, or start one here with as many CPUs as the trials ask for.

    False if there was a connection already.
    """
    if find_spec("ray") is None:
        raise UserError("Ray is not installed: pip install 'bootvit[ray]'")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune reads it when it is imported
    import ray

    if ray.is_initialized():
        return False
    count = sweep.file.concurrency if isinstance(sweep.file.concurrency, int) else 1
    connect_ray(count * sweep.cpus)
    return True


class Room:
    """How many trials may be given out now; it follows the cluster, whose nodes come and go."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._looked, self._trials = float("-inf"), 0
        self._said = False
        check_cluster(trial_workers(sweep), "the cluster")
        check_nodes(places_of(sweep.base))
        self._autoscaler = has_autoscaler()

    def trials(self) -> int:
        """As many as fit; one more than that (or twice as many, for an autoscaler) makes new nodes come."""
        if time.monotonic() - self._looked >= LOOK_S:
            self._trials, self._looked = self._count(), time.monotonic()
        wanted = self._sweep.file.concurrency
        return self._trials if wanted == "auto" else min(self._trials, wanted)

    def _count(self) -> int:
        fit = trials_at_once(self._sweep, live_nodes())
        if fit == 0 and not self._said:
            print("no node has room for a trial now; waiting for one that has", flush=True)
        self._said = fit == 0
        return max(1, 2 * fit if self._autoscaler else fit)


def actor_resources(sweep: Sweep) -> dict[str, float]:
    """What Tune's actor of a trial takes.

    With several workers it takes next to nothing (a byte of memory: Ray refuses an empty request), because Ray Train's
    workers take the CPUs; an actor that held some of them could wait for ever for workers that wait for it.
    """
    if sweep.base.ray.most > 1:
        return {"memory": 1}
    gpu = {"GPU": sweep.gpus} if sweep.gpus else {}
    return {"CPU": sweep.cpus, **gpu}
