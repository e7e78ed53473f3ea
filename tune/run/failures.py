"""Why an attempt at a trial has failed, and whose fault it is."""

from __future__ import annotations

import socket
from typing import Any

import ray
from ray import cloudpickle
from ray._private.state import actors, state
from ray.exceptions import RayActorError, RayTaskError

from bootvit.addresses import public
from tune.decide.conductor import Cause

CONNECT_S = 2.0  # for a node to answer


def reason_of(pickled: str | None, *, several_workers: bool) -> tuple[str, Cause]:
    """One line for what ended an attempt, from the error that Tune has pickled; and whose fault it is.

    A node that has died is not known to be dead for the seconds in which others miss its heartbeat: so it is asked.
    """
    if pickled is None:
        return "its worker could not be started", "own"
    with open(pickled, "rb") as file:
        error = cloudpickle.load(file)
    text = str(error)
    if isinstance(error, RayTaskError):
        error = error.cause or error
    if getattr(error, "preempted", False):
        return "its node was taken away", "preempted"
    node = node_of(error)
    if (node and is_gone(node)) or "its node has died" in text or (several_workers and any(map(is_gone, live_nodes()))):
        leaving = node is not None and node["NodeID"] in state.get_draining_nodes()
        return ("its node was taken away", "preempted") if leaving else ("its node has died", "node")
    if isinstance(error, RayActorError):
        return "its worker died: killed, or out of memory", "own"
    lines = public(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:500], "own"


def node_of(error: Any) -> dict[str, Any] | None:
    """The node of the actor that has died, as the cluster knows it; None if it never had one."""
    name = getattr(error, "actor_id", None)
    facts = actors(name) if name else {}
    node = (facts.get("Address") or {}).get("NodeID")
    return next((one for one in ray.nodes() if one["NodeID"] == node), None)


def live_nodes() -> list[dict[str, Any]]:
    """The nodes that the cluster believes to be alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def is_gone(node: dict[str, Any]) -> bool:
    """Whether a node is dead, or nothing listens there any more."""
    if not node["Alive"]:
        return True
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=CONNECT_S):
            return False
    except OSError:
        return True
