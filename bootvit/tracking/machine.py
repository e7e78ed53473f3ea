"""The load of this machine, from the operating system and torch alone, under the names that MLflow's own pages know."""

from __future__ import annotations

import time
from pathlib import Path

import torch

EVERY_S = 10.0
STAT, MEMINFO = Path("/proc/stat"), Path("/proc/meminfo")
MB = 1e6


class Machine:
    """Asked from time to time; what a machine does not tell is left out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.asked_at, self.ticks = time.monotonic(), cpu_ticks()

    def load(self) -> dict[str, float]:
        """{name: value}, of the CPU since the last answer; empty within ten seconds of that."""
        now = time.monotonic()
        if now - self.asked_at < EVERY_S:
            return {}
        before, self.ticks, self.asked_at = self.ticks, cpu_ticks(), now
        return cpu_load(before, self.ticks) | memory() | gpu(self.device)


def cpu_ticks() -> tuple[int, int] | None:
    """(busy, all) ticks of all cores since the machine started; None where that is not told."""
    try:
        fields = [int(field) for field in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return sum(fields) - fields[3] - fields[4], sum(fields)  # without idle and waiting for disks


def cpu_load(before: tuple[int, int] | None, after: tuple[int, int] | None) -> dict[str, float]:
    """Percent of the cores' time that was used between two answers."""
    if before is None or after is None or after[1] <= before[1]:
        return {}
    return {"system/cpu_utilization_percentage": 100 * (after[0] - before[0]) / (after[1] - before[1])}


def memory() -> dict[str, float]:
    """Of the machine, in use."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        total, free = (1024 * int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):
        return {}
    return {
        "system/system_memory_usage_megabytes": (total - free) / MB,
        "system/system_memory_usage_percentage": 100 * (total - free) / total,
    }


def gpu(device: torch.device) -> dict[str, float]:
    """Memory in use on the GPU that this process has, and its load where NVIDIA's Python package is there."""
    if device.type != "cuda":
        return {}
    name, (free, total) = f"system/gpu_{device.index or 0}", torch.cuda.mem_get_info(device)
    found = {
        f"{name}_memory_usage_megabytes": (total - free) / MB,
        f"{name}_memory_usage_percentage": 100 * (total - free) / total,
    }
    try:
        return found | {f"{name}_utilization_percentage": float(torch.cuda.utilization(device))}
    except Exception:  # no such package, or a driver that does not say: of many kinds
        return found
