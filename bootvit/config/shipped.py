"""What is shipped: every config with the sentence that its file begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from bootvit.config.files import SHIPPED, shipped_names

Kind = Literal["run", "sweep", "preset"]


class Shipped(NamedTuple):
    """A shipped config."""

    name: str  # `digits/joint`
    kind: Kind  # of `train`, of `sweep`, or only to extend
    about: str


def shipped_configs(shipped: Path = SHIPPED) -> list[Shipped]:
    """All of them: runs, sweeps, presets."""
    found = [Shipped(name, _kind(name), _about(shipped / f"{name}.yaml")) for name in shipped_names(shipped)]
    return sorted(found, key=lambda one: ("run", "sweep", "preset").index(one.kind))


def _kind(name: str) -> Kind:
    folder = name.split("/", maxsplit=1)[0]
    return "preset" if folder == "presets" else "sweep" if folder == "sweeps" else "run"


def _about(path: Path) -> str:
    """The file's first line, which is a comment."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
