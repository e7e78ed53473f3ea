"""What a run says: after every epoch, and in `result.json` how it ended, in the same keys whatever the end."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

from bootvit.config import Config, Method, Network
from bootvit.files import read_json

RunStatus = Literal["finished", "failed", "interrupted"]
Accuracy = dict[Network, dict[str, float]]  # {"vit": {"top1": 45.8, ...}, ...}: accuracies and F1 in percent


class EpochReport(NamedTuple):
    """What a caller learns after every epoch, on every rank, once its checkpoint is on disk."""

    epoch: int  # epochs completed
    step: int
    metrics: dict[str, float]  # "held_out/vit/top1": 45.8, ...; empty where this epoch was not evaluated
    last: bool = False


class Best(TypedDict):
    """A network's best evaluation on the way."""

    top1: float
    top5: float
    epoch: int  # epochs completed by then


class Result(TypedDict):
    """The content of `result.json`; null is what was not measured."""

    name: str
    method: Method
    status: RunStatus
    reason: str | None  # why it did not finish
    epochs: int  # completed
    steps: int | None  # optimiser steps taken
    final: Accuracy | None  # the last epoch's on the test set (without one, the held-out part), as in the paper
    best: dict[Network, Best]
    held_out: Accuracy | None  # the last epoch's on held-out training images
    per_class: dict[Network, dict[str, float]] | None  # of `final`: {class: percent of its images that are right}
    images_per_second: float | None
    seconds: float | None
    gpu_seconds: float | None
    fraction: float
    seed: int
    data_fingerprint: str
    subset_digest: str  # of the training images that were used
    skipped: int  # broken images left out
    skipped_images: list[str]  # the first of them, with the reason
    images: dict[str, int] | None  # how many are in use: train, held_out, test
    machine: str | None  # on which it was trained: `4 x NVIDIA H100`
    git: str | None
    mlflow_run_id: str | None


def new_result(
    config: Config, status: RunStatus, epochs: int, *, fingerprint: str, digest: str, reason: str | None = None
) -> Result:
    """A result in which nothing is measured yet."""
    return {
        "name": config.name,
        "method": config.method,
        "status": status,
        "reason": reason,
        "epochs": epochs,
        "steps": None,
        "final": None,
        "best": {},
        "held_out": None,
        "per_class": None,
        "images_per_second": None,
        "seconds": None,
        "gpu_seconds": None,
        "fraction": config.data.fraction,
        "seed": config.seed,
        "data_fingerprint": fingerprint,
        "subset_digest": digest,
        "skipped": 0,
        "skipped_images": [],
        "images": None,
        "machine": None,
        "git": None,
        "mlflow_run_id": None,
    }


def read_result(path: Path) -> Result:
    """What is there; a broken file is a `UserError` that names it."""
    result: Result = read_json(path)
    return result
