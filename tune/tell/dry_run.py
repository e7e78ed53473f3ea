"""`--dry-run`: what would run, on what, and about how long; timed with a few steps on this machine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from bootvit.config import Config
from bootvit.data.batches import Batch
from bootvit.learner import Learner, World
from bootvit.tracking.tags import param_text
from cluster.capacity import trials_at_once
from tune.decide.stopping import decision_epochs
from tune.spec.domain import Domain
from tune.spec.schema import Sweep
from tune.spec.space import canonical, count_trials, make_specs, planned_settings, settings

SAMPLE_PIXELS = 64 * 1024  # of the batch that is timed, per channel
TIMED_STEPS = 2


class Planned(NamedTuple):
    """A config of the plan, and what its estimate needs of the data."""

    config: Config
    images: int  # of training
    classes: int


def describe_plan(sweep: Sweep, planned: Sequence[Planned]) -> str:
    """Trials (or the space, where it is searched), resources and cost, as text."""
    configs = [config for config, _, _ in planned]
    return "\n".join([*_what(sweep), *_when(sweep, configs), *_where(sweep), *_cost(sweep, planned)])


def _what(sweep: Sweep) -> list[str]:
    file = sweep.file
    lines = [f"sweep {file.name}: {file.algorithm}, scheduler {file.scheduler.name}{_groups(sweep)}"]
    if file.suggests:
        lines += [f"  {key}: {_domain_text(domain)}" for key, domain in file.domains]
        cells = len(list(settings(sweep, None)))
        seeds = ", ".join(map(str, sweep.seeds))
        return [*lines, f"{count_trials(sweep)} trials: {cells} cells x {file.search.samples} samples, seeds {seeds}"]
    specs = make_specs(sweep, [(setting, seed) for setting in planned_settings(sweep) for seed in sweep.seeds], 0)
    width = max(len(spec.id) for spec in specs)
    note = f", at smaller {file.fidelity} first, the best of them at the next" if file.fidelity else ""
    return [
        *lines,
        *(f"  {spec.id:{width}}  {_assignments(spec.overrides)}".rstrip() for spec in specs),
        f"{len(specs)} trials{note}",
    ]


def _when(sweep: Sweep, configs: Sequence[Config]) -> list[str]:
    """After which epochs it is decided which trials stop, or which members of a population copy which."""
    lengths = sorted({(config.schedule.epochs, config.schedule.eval_every) for config in configs})
    lines = []
    for epochs, every in lengths:
        if sweep.file.algorithm == "pbt":
            what, found = "copies", list(range(sweep.file.search.interval, epochs, sweep.file.search.interval))
        else:
            what, found = "stops", decision_epochs(sweep, epochs, every)
        if found:
            lines.append(f"{what}: decided after {', '.join(map(str, found))} of {epochs} epochs")
    return lines


def _groups(sweep: Sweep) -> str:
    return f", groups by {', '.join(sweep.group_by)}" if sweep.group_by else ""


def _assignments(values: Mapping[str, Any]) -> str:
    """As on the command line: key=value key=value."""
    return " ".join(f"{key}={param_text(value)}" for key, value in values.items())


def _domain_text(domain: Domain) -> str:
    condition = f" when {_assignments(domain.when)}" if domain.when else ""
    return f"{domain.kind} {json.dumps(domain.values)}{condition}"


def _where(sweep: Sweep) -> list[str]:
    file = sweep.file
    each = ", ".join(
        [
            quantity(sweep.cpus, "CPU"),
            quantity(file.resources.gpu, "GPU"),
            quantity(sweep.base.ray.most, "worker"),
        ]
    )
    at_once = "as many as fit" if file.concurrency == "auto" else file.concurrency
    budget = _assignments(file.budget.model_dump(exclude_none=True)) if file.budget.limited else "none"
    return [f"each trial: {each}; at once: {at_once}; budget: {budget}"]


def quantity(number: float, unit: str) -> str:
    """1 CPU, 0.5 GPUs."""
    return f"{number:g} {unit}{'' if number == 1 else 's'}"


def _cost(sweep: Sweep, planned: Sequence[Planned]) -> list[str]:
    """The estimate: images x epochs x the time that a training image takes here, whatever a scheduler saves."""
    torch.set_num_threads(max(1, int(sweep.cpus)))
    rates: dict[str, float] = {}
    seconds = 0.0
    for config, images, classes in planned:
        key = canonical([config.method, config.model.model_dump(), config.data.image_size, config.precision])
        if key not in rates:
            rates[key] = seconds_per_image(config, classes, use_gpu=sweep.gpus > 0)
        seconds += images * config.schedule.epochs * rates[key]
    total = seconds / len(planned) * count_trials(sweep)
    here = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    fit = trials_at_once(sweep, [here])
    at_once = sweep.file.concurrency if isinstance(sweep.file.concurrency, int) else max(1, fit)
    device = "GPU" if sweep.gpus and torch.cuda.is_available() else "CPU"
    most = "at most " if sweep.file.scheduler.name != "none" or sweep.file.fidelity else ""
    cpus, gpus = duration(total * sweep.cpus), duration(total * sweep.gpus)
    return [
        f"estimated cost: {most}{duration(total / at_once)} with {at_once} at a time; {cpus} of CPUs, {gpus} of GPUs "
        f"(from a few training steps on this machine's {device}; start-up and evaluation come on top)"
    ]


def seconds_per_image(config: Config, classes: int, *, use_gpu: bool) -> float:
    """The time of a training image in a batch of at most 64 Ki pixels, after a first step."""
    device = torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")
    learner = Learner(config, classes, World(0, 1, device))
    rows, cols = config.image_size
    size = min(config.data.batch_size, max(2, SAMPLE_PIXELS // (rows * cols)))
    batch = Batch(torch.randn(size, 3, rows, cols, device=device), torch.arange(size, device=device) % classes, size)
    learner.step(batch, 0, 0, 0.0)
    begin = time.perf_counter()
    for step in range(1, 1 + TIMED_STEPS):
        terms = learner.step(batch, step, 0, 0.0)
    terms.sum().item()  # waits for the device
    return (time.perf_counter() - begin) / (TIMED_STEPS * size)


def duration(seconds: float) -> str:
    """`42 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
