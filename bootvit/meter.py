"""The loss terms of training steps, on their way to the journal; and on what they are computed."""

from __future__ import annotations

import math
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bootvit.errors import RunFailed
from bootvit.learner import Learner


class Meter:
    """Collects loss terms on the device and looks at them once every few steps: one transfer, one all-reduce."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._rows: list[Tensor] = []
        self._steps: list[int] = []
        self._images = 0
        self._since = time.monotonic()

    def add(self, terms: Tensor, step: int, images: int) -> None:
        """This worker's share of a step's terms."""
        self._rows.append(terms)
        self._steps.append(step)
        self._images += images

    def take(self) -> dict[str, float]:
        """The means over the steps since the last call, with the rate and the speed; empty where there were none.

        All workers call it after the same steps. Raises `RunFailed` at the first step that is not finite.
        """
        if not self._rows:
            return {}
        values = torch.stack(self._rows)  # (steps, terms)
        if self._learner.world.size > 1:
            dist.all_reduce(values)
        values = values.double().cpu()
        names = self._learner.term_names
        for row, step in zip(values.tolist(), self._steps, strict=True):
            if not all(map(math.isfinite, row)):
                terms = ", ".join(f"{name}={value:g}" for name, value in zip(names, row, strict=True))
                raise RunFailed(f"the loss is not finite at step {step}: {terms}")
        now = time.monotonic()
        metrics = {f"train/{name}": value for name, value in zip(names, values.mean(0).tolist(), strict=True)}
        metrics["train/lr"] = max(group["lr"] for group in self._learner.groups[0].optimizer.param_groups)
        metrics["train/images_per_second"] = self._images / max(now - self._since, 1e-9)
        self._rows, self._steps, self._images, self._since = [], [], 0, now
        return metrics


def name_of(device: torch.device) -> str:
    """What a device is called, for people: `NVIDIA H100`; a processor with the threads that are used of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux only
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"
