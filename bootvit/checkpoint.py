"""Checkpoints: safetensors with plain values, written atomically, known by their SHA-256, read without running code.

`checkpoints/step-NNNNNNNN.safetensors` is one; `step-NNNNNNNN.json`, written after it, describes it, and without a
description it does not exist. `best.json` names the one that `checkpoint.best` keeps.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bootvit.config import CheckpointConfig
from bootvit.errors import UserError
from bootvit.files import read_json, write_atomic, write_json

State = dict[str, Any]  # nested dicts with text keys and lists: of tensors, numbers, texts and None
KEY = "bootvit"  # of a file's metadata: what is no tensor, as JSON
TENSOR = "__tensor__"  # {"__tensor__": name} stands there for one


class Saved(NamedTuple):
    """A checkpoint on disk: what its description says."""

    path: Path
    step: int  # optimiser steps taken
    epoch: int  # epochs completed
    batch: int  # steps taken of the epoch after them
    final: bool  # the end of training
    sha256: str


# -------------------------------------------------------------------------------------------------- content


def on_host(state: State) -> State:
    """The same with copies of its tensors in host memory: what goes on training does not change them."""
    found: State = _replace(state, lambda _, tensor: tensor.detach().to("cpu", copy=True).contiguous())
    return found


def pack(state: State) -> bytes:
    """A state as the content of a safetensors file."""
    tensors: dict[str, Tensor] = {}

    def take(name: str, tensor: Tensor) -> dict[str, str]:
        tensors[name] = tensor.contiguous()
        return {TENSOR: name}

    plain = _replace(state, take)
    data: bytes = safetensors.torch.save(tensors, {KEY: json.dumps(plain, allow_nan=False)})
    return data


def unpack(data: bytes, origin: object) -> State:
    """Inverse of `pack`; a `UserError` that names `origin` for anything else. Nothing in it is executed."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        plain = json.loads(header["__metadata__"][KEY])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as err:
        raise UserError(f"{origin}: not a checkpoint of bootvit: {str(err).splitlines()[0]}") from err
    state: State = _restore(plain, tensors)
    return state


def is_checkpoint(path: Path) -> bool:
    """Whether a safetensors file is one of ours; `UserError` if it is no such file at all."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return KEY in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as err:
        raise UserError(f"{path}: not a readable safetensors file: {err}") from err


def data_of(saved: Saved) -> dict[str, Any] | None:
    """What a checkpoint knows of the run's data, without reading its weights; None if it is gone."""
    try:
        with safetensors.safe_open(saved.path, "pt") as file:
            return dict(json.loads(file.metadata()[KEY])["data"])
    except FileNotFoundError:
        return None


def _replace(node: Any, of: Callable[[str, Tensor], Any], name: str = "") -> Any:
    if isinstance(node, Tensor):
        return of(name, node)
    if isinstance(node, dict):
        return {key: _replace(value, of, f"{name}.{key}" if name else key) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_replace(value, of, f"{name}.{i}") for i, value in enumerate(node)]
    return node


def _restore(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, dict):
        if set(node) == {TENSOR}:
            return tensors[node[TENSOR]]
        return {key: _restore(value, tensors) for key, value in node.items()}
    return [_restore(value, tensors) for value in node] if isinstance(node, list) else node


# --------------------------------------------------------------------------------------------------- folder


def write(folder: Path, data: bytes, *, step: int, epoch: int, batch: int = 0, final: bool = False) -> Saved:
    """Write a packed checkpoint and then its description."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    described_by = path.with_suffix(".json")
    described_by.unlink(missing_ok=True)
    write_atomic(path, data)
    saved = Saved(path, step, epoch, batch, final, hashlib.sha256(data).hexdigest())
    write_json(described_by, {key: value for key, value in saved._asdict().items() if key != "path"})
    return saved


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` and the best, and what a process that was killed has left half done."""
    found = described(folder)
    kept = {saved.path for saved in found[-keep:]}
    if (best := best_of(folder)) is not None:
        kept.add(best.path)
    for saved in found:
        if saved.path not in kept:
            saved.path.with_suffix(".json").unlink(missing_ok=True)
    for path in (*folder.glob("step-*.safetensors"), *folder.glob(".*.part")):
        if path not in kept:
            path.unlink(missing_ok=True)


def described(folder: Path) -> list[Saved]:
    """Every checkpoint that has a description, oldest first, not verified."""
    found = []
    for text in folder.glob("step-*.json"):
        try:
            facts = read_json(text)
        except UserError:
            if text.exists():
                raise
            continue  # its writer has just replaced it by a newer one
        found.append(Saved(text.with_suffix(".safetensors"), **facts))
    return sorted(found, key=lambda saved: saved.step)


def newest(folder: Path) -> Saved | None:
    """The newest checkpoint whose bytes are what was written; a damaged one is passed over with a line on stderr."""
    for saved in reversed(described(folder)):
        if verify(saved):
            return saved
        print(f"bootvit: {saved.path} is damaged; looking for an older checkpoint", file=sys.stderr)
    return None


def verify(saved: Saved) -> bool:
    """Whether a checkpoint is there, with the bytes that were written."""
    return _bytes_of(saved) is not None


def best_of(folder: Path) -> Saved | None:
    """The checkpoint that `checkpoint.best` keeps, if it is there."""
    mark = folder / "best.json"
    step = read_json(mark)["step"] if mark.exists() else None
    return next((saved for saved in described(folder) if saved.step == step), None)


def load(saved: Saved) -> State:
    """A checkpoint's content on the CPU; `UserError` if it is not what was written."""
    data = _bytes_of(saved)
    if data is None:
        raise UserError(f"{saved.path}: is not there, or not what was written (its SHA-256 differs)")
    return unpack(data, saved.path)


def _bytes_of(saved: Saved) -> bytes | None:
    try:
        data = saved.path.read_bytes()
    except FileNotFoundError:
        return None
    return data if hashlib.sha256(data).hexdigest() == saved.sha256 else None


# --------------------------------------------------------------------------------------------------- writing


class Writer:
    """Writes a run's checkpoints in a thread of its own: training waits for the copy to host memory alone."""

    def __init__(self, folder: Path, settings: CheckpointConfig, check_lease: Callable[[], None]) -> None:
        self._folder, self._settings, self._check_lease = folder, settings, check_lease
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    def save(self, state: State, *, step: int, epoch: int, batch: int, final: bool) -> None:
        """Copy a state and begin to write it; waits for the one before, and raises what its writing raised."""
        self.wait()
        held = on_host(state)
        self._last = self._pool.submit(self._write, held, step=step, epoch=epoch, batch=batch, final=final)

    def wait(self) -> None:
        """Until all that was saved is on disk; raises what the writing raised."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()

    def note_best(self, step: int, metric: str, value: float) -> None:
        """With `checkpoint.best`: keep the one of `step` if its value is larger than that of the best before."""
        self.wait()
        mark = self._folder / "best.json"
        if self._settings.best and (not mark.exists() or value > read_json(mark)["value"]):
            write_json(mark, {"step": step, "metric": metric, "value": value})

    def close(self) -> None:
        """End the thread; what is being written is written."""
        self._pool.shutdown()

    def _write(self, state: State, **place: Any) -> None:
        data = pack(state)
        self._check_lease()
        write(self._folder, data, **place)
        prune(self._folder, self._settings.keep)


def optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """An optimiser's state with text keys."""
    state = optimizer.state_dict()
    groups = [{k: v for k, v in group.items() if not isinstance(v, torch.dtype)} for group in state["param_groups"]]
    return {"state": {str(i): moments for i, moments in state["state"].items()}, "groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: State) -> None:
    """Inverse of `optimizer_state`; moments lie in memory as their weights do."""
    state = {int(i): moments for i, moments in saved["state"].items()}
    # how it is computed is this process's choice, and no part of what was saved
    groups = [
        group | {k: v for k, v in own.items() if k in ("fused", "foreach") or k not in group}
        for group, own in zip(saved["groups"], optimizer.state_dict()["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)
