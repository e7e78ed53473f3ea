"""Where trials run: a Ray that is there or one started here, and how many trials fit on it."""

from __future__ import annotations

import os

from bootvit.errors import UserError
from bootvit.train import connect_ray, importlib_missing
from tune.schema import Sweep


def trial_cpus(sweep: Sweep) -> float:
    """CPUs of one trial, all its workers together."""
    ray_config = sweep.base.ray
    return float(sweep.file.resources.cpu or ray_config.num_workers * ray_config.cpus_per_worker)


def check_resources(sweep: Sweep) -> None:
    """Refuse resources that no machine can give as they are asked for."""
    workers, gpu = sweep.base.ray.num_workers, sweep.file.resources.gpu
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


def start_ray(sweep: Sweep) -> None:
    """Connect to RAY_ADDRESS's cluster, or start one here with as many CPUs as the trials ask for."""
    if importlib_missing("ray"):
        raise UserError("Ray is not installed: pip install 'bootvit[ray]'")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    count = sweep.file.concurrency if isinstance(sweep.file.concurrency, int) else 1
    connect_ray(count * trial_cpus(sweep))


def room(sweep: Sweep, nodes: list[dict[str, float]]) -> int:
    """How many trials fit on these nodes at once; the workers of one trial may be on several."""
    workers = sweep.base.ray.num_workers
    need = {"CPU": trial_cpus(sweep) / workers, "GPU": sweep.file.resources.gpu / workers}
    fits = [
        min(int((node.get(name, 0.0) + 1e-6) / amount) for name, amount in need.items() if amount > 0) for node in nodes
    ]
    return sum(fits) // workers


def check_room(sweep: Sweep) -> int:
    """How many trials to run at once on the connected Ray; `UserError` if not even one fits."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = room(sweep, nodes)
    if fit == 0:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        asked = f"resources.cpu={trial_cpus(sweep):g}, resources.gpu={sweep.file.resources.gpu:g}"
        raise UserError(f"{sweep.path}: {asked}: no trial fits on this cluster (nodes: {have})")
    wanted = sweep.file.concurrency
    return fit if wanted == "auto" else min(fit, wanted)


def actor_resources(sweep: Sweep) -> dict[str, float]:
    """What Tune's actor of a trial takes.

    With several workers it takes next to nothing (a byte of memory: Ray refuses an empty request), because Ray Train's
    workers take the CPUs; an actor that held some of them could wait for ever for workers that wait for it.
    """
    if sweep.base.ray.num_workers > 1:
        return {"memory": 1}
    gpu = {"GPU": sweep.file.resources.gpu} if sweep.file.resources.gpu else {}
    return {"CPU": trial_cpus(sweep), **gpu}
