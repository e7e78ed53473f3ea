"""`make bench`: what a training step costs on this machine, against the goals, as ratios of neighbours in one run.

    python -m benchmarks.speed [--precision fp32] [--batch 8] [--repeats 7] [--only PATTERN] [--compiled] [--out FOLDER]

Each ratio is of two steps that take turns in one process, so that a busy machine slows both; the median counts. `slow
obvious` is `benchmarks.obvious`. The step's profile, by groups of operators, is taken of both. Writes a JSON file and
a table of the goals.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import Sizes, endless, small_images
from benchmarks.measure import (
    CLASSES,
    RESULTS,
    as_markdown,
    judged,
    noise_batch,
    provenance,
    ratio,
    result_path,
    side_by_side,
)
from benchmarks.obvious import BareLoop, BareViT, ObviousStep
from bootvit.config import Config
from bootvit.data.batches import Batch, TrainBatches
from bootvit.files import write_atomic, write_json
from bootvit.learner import Learner, World
from bootvit.load import load_config

CPU = torch.device("cpu")
Step = Callable[[Batch], object]
# (config, what it is measured against, goal in fp32, goal in bf16 against fp32)
GOALS = (
    ("cifar10/vit-small", "slow obvious", 1.3, 3.0),
    ("cifar10/joint-small", "slow obvious", 1.35, 3.0),
    ("cifar10/shared-small", "slow obvious", 1.7, 3.5),
    ("cifar10/joint-base", "slow obvious", 1.5, 4.5),
    ("cifar10/shared-base", "slow obvious", 2.0, 7.0),
    ("cifar10/vit-small", "timm in a bare loop", 1.5, 1.5),
    ("cifar10/joint-tiny", "a bare loop of the same modules", 1.3, 1.3),
    ("digits/joint", "a bare loop of the same modules", 1.3, 1.3),
)
INPUT = 20.0  # images of 32 px that the input gives, over those that the tiny step takes
START = 0.7  # seconds of `--help` and `config`
GROUPS = {  # of operators, by the beginnings of their names
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "mkldnn::_linear"),
    "convolutions": ("aten::mkldnn_convolution", "aten::convolution", "aten::_slow_conv", "aten::slow_conv"),
    "attention": ("aten::_scaled_dot", "aten::_softmax", "aten::scaled_dot"),
    "random numbers": ("aten::random_", "aten::bernoulli_", "_Masked"),
    "norms": ("aten::native_layer_norm", "aten::native_batch_norm", "aten::batch_norm", "aten::_batch_norm"),
    "GELU": ("aten::gelu",),
    "optimisers": ("aten::_fused", "aten::_foreach", "Optimizer", "aten::lerp", "aten::addcmul", "aten::addcdiv"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::zero_"),
    "elementwise": ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::sum", "aten::native_dropout"),
}


def ours(config: Config) -> Step:
    """A learner's step, numbered."""
    learner, count = Learner(config, CLASSES, World(0, 1, CPU)), itertools.count()
    return lambda batch: learner.step(batch, next(count), 0, 0.0)


def other(config: Config, kind: str) -> Step:
    """What ours is measured against."""
    make = {"slow obvious": ObviousStep, "timm in a bare loop": BareViT, "a bare loop of the same modules": BareLoop}
    return make[kind](config, CLASSES, CPU).step  # type: ignore[no-any-return, operator]


def configured(name: str, precision: str, batch: int) -> Config:
    """A shipped config; at 224 px with this batch, small images with their own."""
    config = load_config(name, [f"precision={precision}"])
    return load_config(name, [f"precision={precision}", f"data.batch_size={batch}"]) if _large(config) else config


def _large(config: Config) -> bool:
    return config.image_size[0] >= 224


def steps(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(lines of the table of goals, seconds of each step)."""
    lines, found = [], []
    for name, kind, fp32, bf16 in GOALS:
        what = f"{name} / {kind}"
        if not fnmatch.fnmatch(what, options.only):
            continue
        config = configured(name, options.precision, options.batch)
        # what a CPU's bf16 is worth is seen against fp32, as the authors' code computes; a bare loop is at the same
        against = config if kind != "slow obvious" else configured(name, "fp32", options.batch)
        batch = noise_batch(config, config.data.batch_size, CPU)
        calls: dict[str, Step] = {"ours": ours(config), kind: other(against, kind)}
        repeats = options.repeats if _large(config) else 5 * options.repeats
        times = side_by_side({key: partial(step, batch) for key, step in calls.items()}, repeats, CPU)
        lines.append(judged(what, fp32 if options.precision == "fp32" else bf16, ratio(times, kind, "ours")))
        medians = {key: round(statistics.median(values), 5) for key, values in times.items()}
        found.append({"what": what, "batch": config.data.batch_size, "precision": options.precision, "s": medians})
        print(lines[-1], medians, file=sys.stderr, flush=True)
    return lines, found


def compiled(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whether compile=true pays here: its step over the eager one, and how often it compiled after the first steps."""
    out = []
    for name in ("cifar10/vit-small", "cifar10/joint-small", "digits/joint"):
        config = configured(name, options.precision, options.batch)
        batch = noise_batch(config, config.data.batch_size, CPU)
        begin = time.perf_counter()
        torch._dynamo.reset()
        fast = ours(config.model_copy(update={"compile": True}))
        for _ in range(3):
            fast(batch)
        took = time.perf_counter() - begin
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        both = {"eager": partial(ours(config), batch), "compiled": partial(fast, batch)}
        times = side_by_side(both, options.repeats, CPU)
        out.append({
            "what": f"{name}, batch {config.data.batch_size}, {options.precision}",
            "eager / compiled": round(ratio(times, "eager", "compiled"), 3),
            "seconds to compile": round(took, 1),
            "compiled again later": torch._dynamo.utils.counters["stats"]["unique_graphs"] - before,
        })  # fmt: skip
        print(out[-1], file=sys.stderr, flush=True)
    return out


# ------------------------------------------------------------------------------------------------ profiles


def profiled(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step by groups of operators: the slow obvious one, and ours."""
    config = configured(name, options.precision, options.batch)
    batch = noise_batch(config, config.data.batch_size, CPU)
    before = other(configured(name, "fp32", options.batch), "slow obvious")
    return {"slow obvious": by_group(before, batch), "ours": by_group(ours(config), batch)}


def by_group(step: Step, batch: Batch, count: int = 3) -> dict[str, float]:
    """Milliseconds a step in each group of operators."""
    step(batch)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(count):
            step(batch)
    spent: dict[str, float] = defaultdict(float)
    for event in record.key_averages():
        spent[group_of(event.key)] += event.self_cpu_time_total / 1e3 / count
    return {name: round(value, 1) for name, value in sorted(spent.items(), key=lambda item: -item[1])}


def group_of(operator: str) -> str:
    """The group of an operator; `rest` for what is in none."""
    for group, beginnings in GROUPS.items():
        if operator.startswith(beginnings):
            return group
    return "rest"


# ------------------------------------------------------------------------------------------- input, start


def input_over_step(options: argparse.Namespace) -> dict[str, Any]:
    """Images of 32 px that `TrainBatches` gives, over those that the tiny step takes."""
    config = configured("cifar10/joint-tiny", "fp32", options.batch)
    size = config.data.batch_size
    source = endless(TrainBatches(small_images(Sizes()), config, rank=0, world=1, device=CPU))
    step, batch = ours(config), noise_batch(config, size, CPU)
    times = side_by_side({"input": lambda: next(source), "step": lambda: step(batch)}, 10 * options.repeats, CPU)
    rates = {name: round(size / statistics.median(values)) for name, values in times.items()}
    print("images/s", rates, file=sys.stderr, flush=True)
    return judged("input of 32-px images / what the tiny step takes", INPUT, ratio(times, "step", "input"))


def starts() -> list[dict[str, Any]]:
    """Seconds of the commands that only look."""
    out = []
    for words in (["--help"], ["config", "cifar10/joint-small"]):
        command = [sys.executable, "-m", "bootvit", *words]
        call = lambda command=command: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: E731
        seconds = statistics.median(side_by_side({"it": call}, 5, CPU)["it"])
        out.append(judged(f"seconds of `bootvit {words[0]}`", START, seconds, at_most=True))
    return out


def profile_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown."""
    lines = []
    for name, ways in found.items():
        lines += [
            f"## Profile of {name}, ms a step",
            "",
            "| operators | slow obvious | ours |",
            "| --- | ---: | ---: |",
        ]
        groups = sorted(set().union(*ways.values()), key=lambda g: -ways["slow obvious"].get(g, 0.0))
        lines += [f"| {g} | {ways['slow obvious'].get(g, 0):.1f} | {ways['ours'].get(g, 0):.1f} |" for g in groups]
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure and write `benchmarks/results/speed_<device>_<date>.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=8, help="images a step at 224 px")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="*", help="lines of the table, such as 'digits*'")
    parser.add_argument("--compiled", action="store_true", help="whether compile=true pays, too: some minutes more")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    lines, seconds = steps(options)
    profiles = {}
    if options.only == "*":
        lines += [input_over_step(options), *starts()]
        profiles = {f"{name}, {options.precision}": profiled(name, options) for name, *_ in GOALS[:5]}
    facts = provenance("benchmarks.speed", CPU, seed=0, repeats=options.repeats, goals=lines, steps=seconds)
    document = facts | {"profiles_ms": profiles} | ({"compiled": compiled(options)} if options.compiled else {})
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(result_path(options.out, f"speed-{options.precision}", CPU), document)
    path = result_path(options.out, f"speed-{options.precision}", CPU, "md")
    text = as_markdown(f"Speed of a step, {options.precision}", facts, lines) + "\n" + profile_table(profiles)
    write_atomic(path, text.encode())
    print(text)


if __name__ == "__main__":
    main()
