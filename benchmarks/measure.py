"""What all benchmarks share: timing side by side, where and with what it was measured, and where results go."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bootvit.config import Config
from bootvit.data.batches import Batch
from bootvit.tracking import source_version

RESULTS = Path(__file__).parent / "results"
CLASSES = 10


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begin


def side_by_side(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times in turns after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            taken = timed(call, device)
            if i:
                times[name].append(taken)
    return times


def ratio(times: Mapping[str, list[float]], of: str, to: str) -> float:
    """The median of the ratios of neighbours: what slows the machine for a while slows both."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def noise_batch(config: Config, size: int, device: torch.device, seed: int = 0) -> Batch:
    """Normal images and random labels on the device."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, *config.image_size, generator=generator)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return Batch(images.to(device), labels.to(device), size)


def device_name(device: torch.device) -> str:
    """The card, or the CPU with the threads that torch computes with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()}-thread CPU"


def provenance(module: str, device: torch.device, **more: Any) -> dict[str, Any]:
    """What a result needs to be believed."""
    import timm

    return {
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": source_version(),
        "device": device_name(device),
        "cpu": f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "timm": timm.__version__,
    } | more


def cpu_model() -> str:
    """As the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def result_path(folder: Path, theme: str, device: torch.device, ending: str = "json") -> Path:
    """`theme_device_date.ending`."""
    name = device_name(device).replace(" ", "-")
    return folder / f"{theme}_{name}_{datetime.now(UTC).date().isoformat()}.{ending}"


def judged(what: str, goal: float, value: float | None, *, at_most: bool = False) -> dict[str, Any]:
    """One line of a table of goals."""
    met = value is not None and (value <= goal if at_most else value >= goal)
    state = "not measured" if value is None else "met" if met else "missed"
    return {
        "what": what,
        "goal": f"{'<=' if at_most else '>='} {goal:g}",
        "measured": None if value is None else float(f"{value:.3g}"),
        "state": state,
    }


def as_markdown(title: str, facts: Mapping[str, Any], goals: list[dict[str, Any]]) -> str:
    """A table of goals with where its numbers come from."""
    lines = [f"# {title}", "", "| what | goal | measured | |", "| --- | ---: | ---: | --- |"]
    for one in goals:
        measured = "" if one["measured"] is None else f"{one['measured']:g}"
        lines.append(f"| {one['what']} | {one['goal']} | {measured} | {one['state']} |")
    kept = ("command", "date", "commit", "device", "cpu", "torch", "timm", "seed")
    lines += ["", *(f"- {name}: {facts[name]}" for name in kept if facts.get(name) is not None), ""]
    return "\n".join(lines)
