"""Whether a cluster can ever run what is asked: Ray itself would leave it pending for ever, silently.

One check for `train`, `sweep` and `submit`. Ray places a worker whole on one node, and a part of a GPU on one GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bootvit.errors import UserError

if TYPE_CHECKING:
    from bootvit.config import Config
    from tune.spec.schema import Sweep

Node = Mapping[str, float]  # resource -> the node's total of it
MANY = 1000  # nodes of a type without a limit
HEAD = "node:__internal_head__"  # a resource that only the head has
DRIVER_MEMORY = 2 * 2**30  # bytes; a sweep of 1,000 trials was measured at 0.65 GiB
ROUNDING = 1e-9  # ten trials of 0.1 GPU fit on one


@dataclass(frozen=True)
class Workers:
    """What a command needs at one time, at least: `count` bundles, each on one node."""

    count: int
    cpus: float
    gpus: float
    asked: str  # the keys that ask for it, for the error
    gpu_if_there: bool = False  # one GPU, where the cluster has any


def train_workers(config: Config) -> Workers:
    """The workers of a run."""
    ray = config.ray
    asked = f"ray.num_workers={ray.num_workers} with ray.cpus_per_worker={ray.cpus_per_worker:g}"
    if ray.use_gpu:
        asked += " and ray.use_gpu=true"
    gpus, if_there = float(bool(ray.use_gpu)), ray.use_gpu is None
    return Workers(ray.fewest, ray.cpus_per_worker, gpus, asked, if_there)


def trial_workers(sweep: Sweep) -> Workers:
    """The workers of one trial; `resources` are those of all of them together."""
    count = sweep.base.ray.most
    asked = f"a trial with resources.cpu={sweep.cpus:g} and resources.gpu={sweep.gpus:g} over ray.num_workers={count}"
    return Workers(count, sweep.cpus / count, sweep.gpus / count, asked)


def room(workers: Workers, nodes: Sequence[Node]) -> int:
    """How many such workers fit on the empty nodes."""
    return sum(_room(workers, node) for node in nodes)


def trials_at_once(sweep: Sweep, nodes: Sequence[Node]) -> int:
    """How many trials fit on the empty nodes; the workers of one trial may be on several."""
    workers = trial_workers(sweep)
    return room(workers, nodes) // workers.count


def check_capacity(workers: Workers, nodes: Sequence[Node], where: str) -> None:
    """Raise `UserError` unless all workers fit on the empty nodes, each worker whole on one node."""
    fit = room(workers, nodes)
    if fit < workers.count:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UserError(f"{workers.asked}: {where} has room for {fit} of {workers.count} workers (nodes: {have})")


def _room(workers: Workers, node: Node) -> int:
    """How many of the workers fit on one empty node."""
    fits = [int(node.get("CPU", 0) / workers.cpus + ROUNDING)] if workers.cpus > 0 else []
    if workers.gpus > 0:
        fits.append(_gpu_room(workers.gpus, node.get("GPU", 0)))
    return min(fits)


def _gpu_room(need: float, gpus: float) -> int:
    """How many workers the GPUs of one node serve: 0.6 of a GPU is on one GPU, and the rest of that is left over."""
    if need >= 1:
        return int(gpus / need + ROUNDING)
    return int(gpus) * int(1 / need + ROUNDING)


# ---------------------------------------------------------------------------------------- which nodes there are


def reported_nodes(status: Mapping[str, Any]) -> list[Node]:
    """The nodes in an answer of `/api/cluster_status`."""
    usage = (_cluster(status).get("loadMetricsReport") or {}).get("usageByNode") or {}
    return [{name: total for name, (_, total) in node.items()} for node in usage.values()]


def known_nodes(status: Mapping[str, Any]) -> list[Node] | None:
    """The same; None where others may come: an autoscaler's, or a new head's.

    Ray names the type of a node that was started by hand `node_<its id>`; an autoscaler names its own types.
    """
    types = (_cluster(status).get("autoscalerReport") or {}).get("nodeTypeMapping") or {}
    if any(kind != f"node_{node}" for node, kind in types.items()):
        return None
    return reported_nodes(status) or None


def _cluster(status: Mapping[str, Any]) -> Mapping[str, Any]:
    return (status.get("data") or {}).get("clusterStatus") or {}


def driver_place(workers: Workers | None, nodes: Sequence[Node], *, trains: bool) -> dict[str, Any]:
    """What a job's driver asks of the cluster, as arguments of `submit_job`; `trains` if it has no workers (`--local`).

    A driver that only watches goes to the head, even to one without CPUs, because the other nodes may be taken away,
    and waits there until its memory is free; where the head is too small, to any node that has the memory.
    """
    if trains and workers is not None:
        gpu = workers.gpu_if_there and any(node.get("GPU", 0) >= 1 for node in nodes)
        return {"entrypoint_num_cpus": workers.cpus, "entrypoint_num_gpus": max(workers.gpus, float(gpu))}
    with_room = [node for node in nodes if node.get("memory", 0) >= DRIVER_MEMORY]
    if not with_room:
        return {}
    at_head = {"entrypoint_resources": {HEAD: 0.001}} if any(HEAD in node for node in with_room) else {}
    return {"entrypoint_memory": DRIVER_MEMORY, **at_head}


def live_nodes() -> list[Node]:
    """The nodes of the connected Ray that may take work: alive, and not about to be taken away."""
    return [node["Resources"] for node in _live()]


def working_nodes() -> list[Mapping[str, Any]]:
    """Those of them that have a CPU or a GPU, as Ray describes them (`NodeID`, `NodeManagerAddress` ...)."""
    return [node for node in _live() if any(node["Resources"].get(kind, 0) for kind in ("CPU", "GPU"))]


def _live() -> list[Mapping[str, Any]]:
    import ray
    from ray._private.state import state

    leaving = state.get_draining_nodes()  # Ray has no public call for it
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def check_cluster(workers: Workers, where: str) -> None:
    """Raise `UserError` if the connected Ray can never run the workers, whatever nodes may still come to it."""
    nodes = live_nodes()
    if not may_grow(nodes):
        check_capacity(workers, nodes, where)
    elif types := autoscaler_types():
        check_capacity(workers, [*nodes, *types], f"{where}, with all nodes that its autoscaler may start,")


def may_grow(nodes: Sequence[Node]) -> bool:
    """Whether nodes may come to the connected Ray: it has an autoscaler, or no node yet that could do any work."""
    return not any(node.get("CPU", 0) or node.get("GPU", 0) for node in nodes) or has_autoscaler()


def has_autoscaler() -> bool:
    """Whether an autoscaler looks after the connected Ray; a head that was started by hand has one without types."""
    import json

    from ray.experimental.internal_kv import _internal_kv_get

    report = json.loads(_internal_kv_get("__autoscaling_status") or "{}")  # the older one's
    types = (report.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    return bool(autoscaler_types()) or any(kind != f"node_{node}" for node, kind in types.items())


def autoscaler_types() -> list[Node]:
    """The nodes that the newer autoscaler may start; none where it is the older one, or there is none."""
    from ray._private.state import state

    config = state.get_cluster_config()
    return [] if config is None else nodes_of(config)


def nodes_of(config: Any) -> list[Node]:
    """A node for each that an autoscaler's config allows; of a type without a limit as many as anyone asks for."""
    groups = config.node_group_configs
    return [dict(group.resources) for group in groups for _ in range(group.max_count if group.max_count > 0 else MANY)]
