"""Whether every node is fit for a run: each is asked, before anything is taken.

A worker on a node that does not see the run's folder would write into one of its own, and one with another torch would
compute something else. So each node that takes work answers, from a task that is pinned to it, whether it sees a file,
or an object, that this process has just written beside the run, whether it can read the data, and what is installed.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bootvit.errors import RunFailed, UserError
from bootvit.storage import Store, address_of, delete_at, place_at, write_at
from cluster.capacity import working_nodes

if TYPE_CHECKING:
    from bootvit.config import Config

ANSWER_S = 60.0  # seconds for all nodes to answer: each starts a Python process for it
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "pyarrow", "entmax", "scikit-learn", "safetensors")
SHARED = "give a folder that every node sees, such as one on a network file system"
KEYS = "set there what the store's own tools need, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL"


@dataclass(frozen=True)
class Place:
    """A file or folder that every node must see."""

    given: str  # `key=value`, for the error
    path: Path | Store
    wanted: str  # what would be right
    written: bool = False  # the run writes there; it may be new


Asked = tuple[str, str | None]  # a path or address, and what is to be read there; None: it only has to be readable
Answer = Mapping[str, Any]  # see `answerer`


def places_of(config: Config) -> list[Place]:
    """Where a run is written and recorded, and what it reads."""
    from bootvit.tracking import tracking_uri
    from bootvit.tracking.store import sqlite_path
    from bootvit.weights import key_of, named

    storage, data = config.ray.storage_path, config.data.root
    place = place_at(storage)
    wanted = KEYS if isinstance(place, Store) else SHARED
    places = [Place(f"ray.storage_path={storage}", place, wanted, written=True)]
    if config.tracking.enabled:
        uri = tracking_uri(config.tracking.uri)
        if database := sqlite_path(uri):
            places.append(Place(f"tracking.uri={uri}", database.parent, f"{SHARED}, or http://HOST:PORT", written=True))
    inputs = [] if data is None or "://" in data else [(f"data.root={data}", data)]  # a store's answer is a worker's
    inputs += [(key_of(config, net), getattr(config.model, net).weights) for net in named(config)]
    places += [reads(given, Path(path)) for given, path in inputs]
    return [one for one in places if one.written or (isinstance(one.path, Path) and one.path.exists())]


def reads(given: str, path: Path) -> Place:
    """A place that is only read."""
    return Place(given, path, "put it at the same place on every node")


def check_nodes(places: Sequence[Place]) -> None:
    """Ask every node of the connected Ray that takes work, except this process's own.

    `UserError` for one that does not see a place, or has other packages; `RunFailed` for one that does not answer.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in working_nodes() if node["NodeID"] != here}
    if not nodes:
        return
    with marked(places) as asked:
        mine = answerer()(asked)
        for node, theirs in answers(nodes, asked):
            compare(nodes[node], places, mine, theirs)


@contextmanager
def marked(places: Sequence[Place]) -> Iterator[list[Asked]]:
    """Leave a file, or an object, at each place that is written to, for the nodes to look for."""
    name = f".bootvit-probe-{secrets.token_hex(8)}"
    tops = [_there(place.path) for place in places if place.written]
    try:
        for top in set(tops):
            write_at(top, name, name.encode())
        of_written = iter(tops)
        yield [(address_of(next(of_written) / name), name) if p.written else (str(p.path), None) for p in places]
    finally:
        for top in set(tops):
            delete_at(top, name)


def _there(place: Path | Store) -> Path | Store:
    """What of a place is there already."""
    return place if isinstance(place, Store) else next(f for f in (place, *place.parents) if f.is_dir())


def answerer() -> Callable[[Sequence[Asked]], Answer]:
    """What a node runs. A function within a function is sent whole, so that it also answers where there is no bootvit.

    Its answer: `wrong`, what is wrong with each place or None; `packages`, their versions; `code`, a digest of bootvit.
    """
    packages = PACKAGES

    def answer(asked: Sequence[Asked]) -> Answer:
        import hashlib
        import importlib.metadata
        import importlib.util
        import os
        from pathlib import Path

        def wrong_in_store(address: str, mark: str) -> str | None:
            try:
                from bootvit.errors import RunFailed, UserError
                from bootvit.storage import Store
            except ImportError:  # `code` tells of it
                return None
            try:
                return None if Store(address).read("") == mark.encode() else "it is another folder"
            except (RunFailed, UserError) as err:
                return str(err)

        def wrong(path: Path, mark: str | None) -> str | None:
            try:
                if mark is None:
                    return None if os.access(path, os.R_OK) else os.strerror(13 if path.exists() else 2)
                if path.read_text() != mark:
                    return "it is another folder"
                return None if os.access(path.parent, os.W_OK) else "it cannot be written"
            except OSError as err:
                return err.strerror

        def version(name: str) -> str | None:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                return None

        spec = importlib.util.find_spec("bootvit")
        roots = (spec.submodule_search_locations or []) if spec else []
        files = sorted(path for root in roots for path in Path(root).rglob("*.py"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest() if files else None
        return {
            "wrong": [
                wrong_in_store(place, mark) if mark and "://" in place else wrong(Path(place), mark)
                for place, mark in asked
            ],
            "packages": {name: version(name) for name in packages},
            "code": digest,
        }

    return answer


def answers(nodes: Mapping[str, str], asked: Sequence[Asked]) -> Iterator[tuple[str, Answer]]:
    """(node id, its answer), each as soon as it is there; a node that has gone meanwhile needs to give none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(answerer())
    pinned = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes}
    waiting = {task.options(scheduling_strategy=pinned[node]).remote(asked): node for node in nodes}
    until = time.monotonic() + ANSWER_S
    while waiting:
        ready, _ = ray.wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
        if not ready:
            silent = [address for node, address in nodes.items() if node in waiting.values() and _is_there(node)]
            if silent:
                raise RunFailed(f"node {', '.join(silent)}: no answer in {ANSWER_S:g} s; remove it, or try again")
            return
        node = waiting.pop(ready[0])
        try:
            answer = ray.get(ready[0])
        except ray.exceptions.RayError as err:
            if _is_there(node):
                raise RunFailed(f"node {nodes[node]} cannot run anything: {' '.join(str(err).split())[:300]}") from err
            continue
        yield node, answer


def _is_there(node: str) -> bool:
    return any(one["NodeID"] == node for one in working_nodes())


def compare(address: str, places: Sequence[Place], mine: Answer, theirs: Answer) -> None:
    """`UserError` if a node lacks a place or a package, or has another one than this process."""
    for place, wrong in zip(places, theirs["wrong"], strict=True):
        if wrong:
            raise UserError(f"{place.given}: node {address} does not see {place.path} ({wrong}): {place.wanted}")
    cure = "install the same on every node, or send it along: bootvit submit --pip"
    if theirs["code"] != mine["code"]:
        what = "bootvit is not installed" if theirs["code"] is None else "another version of bootvit's sources"
        raise UserError(f"node {address}: {what}: {cure}")
    for name, version in mine["packages"].items():
        if theirs["packages"][name] != version:
            raise UserError(f"node {address}: {name} {theirs['packages'][name]}, here {version}: {cure}")
