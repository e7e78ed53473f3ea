"""Whether a cluster can ever run what is asked: Ray itself would leave it pending for ever, silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bootvit.errors import UserError
from cluster.command import Workers

Node = Mapping[str, float]  # resource -> the node's total of it


def known_nodes(status: Mapping[str, Any]) -> list[Node] | None:
    """The nodes in an answer of `/api/cluster_status`; None where others may come: an autoscaler's, or a new head's.

    Ray names the type of a node that was started by hand `node_<its id>`; an autoscaler names its own types.
    """
    cluster = (status.get("data") or {}).get("clusterStatus") or {}
    types = (cluster.get("autoscalerReport") or {}).get("nodeTypeMapping") or {}
    usage = (cluster.get("loadMetricsReport") or {}).get("usageByNode")
    if not usage or any(kind != f"node_{node}" for node, kind in types.items()):
        return None
    return [{name: total for name, (_, total) in node.items()} for node in usage.values()]


def check_capacity(workers: Workers, nodes: Sequence[Node], where: str) -> None:
    """Raise `UserError` unless all workers fit on the empty nodes, each worker whole on one node."""
    room = sum(_room(workers, node) for node in nodes)
    if room < workers.count:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise UserError(f"{workers.asked}: the cluster at {where} has room for {room} of them (nodes: {have})")


def _room(workers: Workers, node: Node) -> int:
    """How many of the workers fit on one empty node."""
    asked = {"CPU": workers.cpus, "GPU": workers.gpus}
    fits = [int((node.get(name, 0) + 1e-9) // need) for name, need in asked.items() if need > 0]
    return min([workers.count, *fits])
