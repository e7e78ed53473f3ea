"""What a trial's process is told and what it tells; no torch, which an actor imports once it has something to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from bootvit.loop import TestUse


class Report(NamedTuple):
    """What an attempt says after every epoch; `done` once, last."""

    epoch: int  # epochs completed
    metrics: dict[str, float]  # "held_out/vit/top1": 45.8, ...; empty where this epoch was not evaluated
    done: bool


class Job(NamedTuple):
    """What an attempt is to do."""

    config: dict[str, Any]
    metric: str = ""  # the journal's name of the selection metric
    test: TestUse = "never"
    cpus: float = 1
    heard: int = 0  # epochs of which the driver knows
