"""`bootvit submit --pip`: what is installed here, pinned, for a cluster whose nodes have nothing but Ray.

Ray installs it on every node before anything of the job runs there, and keeps it for the next job that asks for the
same. Ray itself and Python must be there in the same versions, because they are what installs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from bootvit.errors import UserError

ROOTS = ("bootvit", "mlflow", "optuna")  # what a job may import
RAY = "ray"  # with what it needs, it is there already, and Ray forbids to change it


def pins() -> list[str]:
    """`name==version` of all that bootvit needs, directly or not, as it is installed here; `UserError` for a package
    that no index has.
    """
    there = {name for name, _ in _needed([RAY])}
    found = {name: dist for name, dist in _needed(ROOTS) if name not in {*there, "bootvit"}}
    return sorted(_pin(name, dist) for name, dist in found.items())


def _needed(roots: list[str] | tuple[str, ...]) -> Iterator[tuple[str, Distribution]]:
    """(name, distribution) of the packages and of what they need here, each once; extras that are not asked for are
    left out, and so is what is not installed.
    """
    waiting, seen = [(name, "") for name in roots], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            continue
        yield name, dist
        for text in dist.requires or []:
            needs = Requirement(text)
            if needs.marker is None or needs.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(needs.name), one) for one in ("", *needs.extras)]


def _pin(name: str, dist: Distribution) -> str:
    """Its public version: a build of one's own (`2.14.1+cpu`) is on no index, the version is."""
    origin = json.loads(dist.read_text("direct_url.json") or "{}")
    if origin:
        raise UserError(
            f"--pip: {name} {dist.version} was installed here from a folder or an address, where other nodes cannot "
            f"get it: install a released {name}, or install bootvit on the nodes and leave --pip out"
        )
    return f"{name}=={Version(dist.version).public}"
