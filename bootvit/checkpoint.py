"""Checkpoints: written atomically, verified by their SHA-256 when read, loaded without running code."""

import hashlib
import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bootvit.errors import UserError
from bootvit.files import read_json, write_atomic, write_json


class Saved(NamedTuple):
    """A checkpoint on disk: what its description says."""

    path: Path
    epoch: int  # epochs completed
    step: int  # optimiser steps taken
    final: bool


def save(folder: Path, state: dict[str, Any], *, epoch: int, step: int, final: bool, keep: int = 2) -> Saved:
    """Write `epoch-NNNN.pt` and then its description, and remove all but the newest `keep`.

    A checkpoint without a description does not exist: the description is written last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"epoch-{epoch:04d}.pt"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    path.with_suffix(".json").unlink(missing_ok=True)
    write_atomic(path, data)
    sha256 = hashlib.sha256(data).hexdigest()
    write_json(path.with_suffix(".json"), {"epoch": epoch, "step": step, "sha256": sha256, "final": final})
    for old in described(folder)[:-keep]:
        old.path.with_suffix(".json").unlink()
        old.path.unlink(missing_ok=True)
    return Saved(path, epoch, step, final)


def described(folder: Path) -> list[Saved]:
    """Every checkpoint that has a description, oldest first, not verified."""
    found = []
    for text in folder.glob("epoch-*.json"):
        try:
            facts = read_json(text)
        except UserError:
            if text.exists():
                raise
            continue  # its writer has just replaced it by a newer one
        found.append(Saved(text.with_suffix(".pt"), facts["epoch"], facts["step"], facts["final"]))
    return sorted(found, key=lambda saved: saved.step)


def newest(folder: Path) -> Saved | None:
    """The newest checkpoint whose bytes are what was written; a damaged one is passed over with a line on stderr."""
    for saved in reversed(described(folder)):
        if verify(saved.path):
            return saved
        print(f"bootvit: {saved.path} is damaged; looking for an older checkpoint", file=sys.stderr)
    return None


def verify(path: Path) -> bool:
    """Whether a checkpoint is there and has the digest of its description."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return False
    expected: str = read_json(path.with_suffix(".json"))["sha256"]
    return hashlib.sha256(data).hexdigest() == expected


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's content on the CPU; only tensors and plain values are accepted (`weights_only`)."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    except Exception as err:  # torch raises many kinds for a file that is no checkpoint
        raise UserError(f"{path}: not a readable checkpoint: {str(err).splitlines()[0]}") from err
