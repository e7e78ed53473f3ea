"""Two workers against one on this machine, and from the sizes of their messages a prediction for 8 x 8 GPUs.

    python -m benchmarks.scaling [--repeats 9] [--batch 4] [--out FOLDER]

Workers are processes of one thread that reduce through gloo, as two `ray.num_workers` on one node do. Three steps are
timed: as it is; without exchanging gradients; and both workers' gradients reduced with nothing else to do. What the
first takes beyond the second is what the exchange costs; by how much that is less than the third is hidden behind the
backward pass. Writes a JSON file and the prediction as Markdown.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from benchmarks.measure import CLASSES, RESULTS, noise_batch, provenance, result_path, timed
from bootvit.config import Config
from bootvit.files import write_atomic, write_json
from bootvit.learner import Learner, Networks, World
from bootvit.load import load_config
from bootvit.models.sizes import cost_of

CPU = torch.device("cpu")
MEASURED = ("cifar10/joint-tiny", "cifar10/vit-small", "cifar10/joint-small")
PREDICTED = ("vit-small", "joint-small", "shared-small", "joint-base", "shared-base")


class Cluster(NamedTuple):
    """What the prediction takes for granted: nodes of eight H100, NVLink inside, a 400 Gb/s port a GPU between."""

    nodes: int = 8
    gpus: int = 8
    inside: float = 370e9  # bytes/s a GPU of a reduction inside a node: of 450e9 on paper
    between: float = 45e9  # bytes/s a GPU between nodes: of 50e9 on paper
    message: float = 25e-6  # seconds that a message takes whatever its size, of 8 GPUs
    hop: float = 10e-6  # seconds more for each doubling of the nodes
    bucket: float = 25 * 2**20  # bytes that DDP reduces at once
    rate: float = 989e12  # FLOP/s in bf16 of the data sheet
    mfu: float = 0.35  # the goal of a GPU alone; a faster one leaves less time to hide behind


# ----------------------------------------------------------------------------------------------- measured


def worker(rank: int, size: int, name: str, options: argparse.Namespace, folder: str) -> None:
    """One of `size` processes; rank 0 writes the seconds of each kind of step to a file."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{size}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    medians = seconds_of(name, World(rank, size, CPU), options)
    if rank == 0:
        Path(folder, f"{size}.json").write_text(json.dumps(medians), encoding="utf-8")
    gc.collect()  # what still holds the group when it is destroyed would end it while it has the GIL
    dist.destroy_process_group()


def seconds_of(name: str, world: World, options: argparse.Namespace) -> dict[str, float]:
    """Medians of a step, of one that exchanges nothing, and of the exchange alone, which take turns."""
    batch_size = options.batch * world.size
    config = load_config(name, ["precision=fp32", f"data.batch_size={batch_size}"])
    learner, count = Learner(config, CLASSES, world), itertools.count()
    batch = noise_batch(config, options.batch, CPU)._replace(global_size=batch_size)

    def step(*, reduced: bool) -> None:
        ddp = learner._ddp
        with nullcontext() if reduced or ddp is None else ddp.no_sync():
            learner.step(batch, next(count), 0, 0.0)

    gradients = torch.zeros(sum(p.numel() for p in learner.networks.parameters()))
    calls: dict[str, Callable[[], object]] = {
        "step": partial(step, reduced=True),
        "without exchange": partial(step, reduced=False),
        "exchange alone": partial(dist.all_reduce, gradients),
    }
    times: dict[str, list[float]] = {key: [] for key in calls}
    for i in range(options.repeats + 1):
        for key, call in calls.items():
            dist.barrier()
            taken = timed(call, CPU)
            if i:
                times[key].append(taken)
    return {key: statistics.median(values) for key, values in times.items()}


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One and two workers with a batch of the same size each."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, 2):
            mp.spawn(worker, args=(size, name, options, folder), nprocs=size)
            seconds[size] = json.loads(Path(folder, f"{size}.json").read_text(encoding="utf-8"))
    one, two = seconds[1], seconds[2]
    cost = two["step"] - two["without exchange"]
    out = {
        "what": f"{name}, batch {options.batch} a worker, fp32, one thread a worker",
        "ms": {f"{size}": {key: round(1e3 * value, 2) for key, value in own.items()} for size, own in seconds.items()},
        "efficiency of two workers": round(one["step"] / two["step"], 3),
        "of which the exchange": round(two["without exchange"] / two["step"], 3),
        "exchange hidden behind the backward": round(1 - max(cost, 0.0) / two["exchange alone"], 3),
    }
    print(out, flush=True)
    return out


# ---------------------------------------------------------------------------------------------- predicted


class Prediction(NamedTuple):
    """One config on the cluster; times in ms."""

    name: str
    megabytes: float  # of gradients, fp32
    norms: int  # BatchNorms that are synchronised
    step: float  # of a GPU alone
    exchange: float  # of all gradients, if nothing hid it
    shown: float  # what is left of it after the backward
    synchronising: float  # BatchNorms' messages, which nothing hides
    efficiency: float


def prediction(name: str, cluster: Cluster) -> Prediction:
    """The formula of `explanation`, for a batch of 64 images a GPU."""
    config = load_config(f"cifar10/{name}")
    with torch.device("meta"):
        networks = Networks(config, CLASSES)
    size = 4 * sum(p.numel() for p in networks.parameters())
    step = 3 * cost_of(config, CLASSES)[1] * 1e9 * 64 / (cluster.rate * cluster.mfu)
    exchange = reduction(size, cluster)
    hidden = 2 / 3 * step * (1 - min(1.0, cluster.bucket / size))  # from the first full bucket on
    shown = max(reduction(min(size, cluster.bucket), cluster), exchange - hidden)
    norms = synchronised(config, networks)
    synchronising = 2 * norms * latency(cluster)
    whole = step + shown + synchronising
    ms = [round(1e3 * value, 2) for value in (step, exchange, shown, synchronising)]
    return Prediction(name, round(size / 1e6, 1), norms, *ms, efficiency=round(step / whole, 3))


def reduction(size: float, cluster: Cluster) -> float:
    """Seconds to add up `size` bytes over all GPUs: scattered inside nodes, added between them, gathered inside."""
    inside = 2 * (cluster.gpus - 1) / cluster.gpus * size / cluster.inside
    between = 2 * (cluster.nodes - 1) / cluster.nodes * (size / cluster.gpus) / cluster.between
    return inside + between + latency(cluster) * max(1, round(size / cluster.bucket))


def latency(cluster: Cluster) -> float:
    """Seconds of the smallest message among all."""
    return cluster.message + cluster.hop * (cluster.nodes.bit_length() - 1)


def synchronised(config: Config, networks: Networks) -> int:
    """How many BatchNorms exchange their statistics."""
    if not config.model.agent.sync_norm or networks.agent is None:
        return 0
    return sum(isinstance(module, nn.BatchNorm2d) for module in networks.agent.modules())


def explanation(rows: list[Prediction], found: list[dict[str, Any]], cluster: Cluster, facts: dict[str, Any]) -> str:
    """Markdown."""
    total = cluster.nodes * cluster.gpus
    lines = [
        f"# Workers: two measured here, {total} GPUs predicted",
        "",
        "Measured: one and two processes with the same batch each, in ms (gloo through the loopback).",
        "",
        "| config | one worker | two | two, no exchange | exchange alone | efficiency | hidden |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in found:
        ms = one["ms"]
        two = ms["2"]
        lines.append(
            f"| {one['what']} | {ms['1']['step']} | {two['step']} | {two['without exchange']} | "
            f"{two['exchange alone']} | {one['efficiency of two workers']:.0%} | "
            f"{one['exchange hidden behind the backward']:.0%} |"
        )
    lines += [
        "",
        f"Predicted, and not measured: {cluster.nodes} nodes of {cluster.gpus} H100, bf16, 64 images a GPU.",
        "",
        "| config | gradients, MB | BatchNorms | GPU alone, ms | exchange | not hidden | BatchNorms' | efficiency |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.megabytes} | {row.norms} | {row.step} | {row.exchange} | {row.shown} | "
            f"{row.synchronising} | {row.efficiency:.0%} |"
        )
    lines += [
        "",
        "With S bytes of gradients (4 a parameter), G GPUs a node and N nodes:",
        "",
        "- exchange = 2 (G-1)/G S / inside + 2 (N-1)/N (S/G) / between + latency for each 25 MiB bucket;",
        "- latency = message + hop log2 N;",
        "- DDP reduces a bucket while the backward pass (2/3 of a step) goes on: what remains of the exchange is the",
        "  last bucket, or what is longer than the backward after the first bucket;",
        "- each synchronised BatchNorm (`model.agent.sync_norm`) waits for two messages a step, which nothing hides;",
        "- efficiency = GPU alone / (GPU alone + not hidden + BatchNorms').",
        "",
        f"Taken for granted: {cluster._asdict()}; a GPU alone takes 3 x forward FLOPs x 64 / (rate x mfu). When",
        "`benchmarks.gpu` has measured a step, put its ms in place of that.",
        "",
        *(f"- {name}: {facts[name]}" for name in ("command", "date", "commit", "device", "cpu", "torch")),
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, predict and write `benchmarks/results/scaling_<device>_<date>.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4, help="images a worker")
    parser.add_argument("--configs", nargs="*", default=list(MEASURED))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    found = [measured(name, options) for name in options.configs]
    cluster = Cluster()
    rows = [prediction(name, cluster) for name in PREDICTED]
    facts = provenance("benchmarks.scaling", CPU, seed=0)
    options.out.mkdir(parents=True, exist_ok=True)
    document = facts | {
        "measured": found,
        "taken_for_granted": cluster._asdict(),
        "predicted": [r._asdict() for r in rows],
    }
    write_json(result_path(options.out, "scaling", CPU), document)
    text = explanation(rows, found, cluster, facts)
    write_atomic(result_path(options.out, "scaling", CPU, "md"), text.encode())
    print(text)


if __name__ == "__main__":
    main()
