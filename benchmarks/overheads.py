"""What Ray Train, MLflow and checkpoints cost a run that trains the same without them, side by side.

    python -m benchmarks.overheads [--repeats 5] [--epochs 8] [--out FILE]

Ray Train: every repeat trains with and without it, each as a command of its own. Its speed is the journal's images/s
(the median of its records after the first epoch); the start is from the command to the journal's first record. What is
done beside training, in a thread, is measured in one process: blocks of steps with it and without it in turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import CLASSES, noise_batch
from bootvit import checkpoint
from bootvit.config import Config
from bootvit.files import write_json
from bootvit.learner import Learner, World
from bootvit.load import load_config
from bootvit.tracking import Journal, MlflowRun, Record, read_journal, source_version

CONFIG = "digits/joint"
CPU = torch.device("cpu")
OFF = ("tracking.enabled=false", "checkpoint.every_minutes=null")
WAYS: dict[str, list[str]] = {"local": ["--local", *OFF], "Ray Train, 1 worker": ["ray.num_workers=1", *OFF]}
BLOCK = 20  # steps
RECORDS = 40  # of a block in the journal: ten values every five steps


def measure(way: str, arguments: list[str], folder: Path, epochs: int) -> dict[str, float]:
    """One run: {"images/s", "seconds to the first record"}."""
    name = way.split(",", maxsplit=1)[0].replace(" ", "-")
    words = ["train", CONFIG, f"name={name}", f"schedule.epochs={epochs}", "ray.storage_path=runs", "--overwrite"]
    words += ["tracking.log_every=5", *arguments]
    began = time.time()
    command = [sys.executable, "-m", "bootvit", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as Ray gives a worker of one CPU
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records, _ = read_journal(folder / "runs" / name / "metrics.jsonl")
    speeds = [r.value for r in records if r.name == "train/images_per_second" and r.epoch > 0]
    return {"images/s": statistics.median(speeds), "seconds to the first record": records[0].time - began}


def start_parts() -> dict[str, float]:
    """Seconds that a start consists of: Python's own, imports, and a Ray on this machine."""
    script = (
        "import time; began = time.time(); import bootvit.driver; imported = time.time(); "
        "from bootvit.ray_connection import connect_ray; connect_ray(1); "
        "print(imported - began, time.time() - imported)"
    )
    began = time.time()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imports, ray = map(float, done.stdout.split())
    return {"imports": imports, "a local Ray": ray, "Python and the end": time.time() - began - imports - ray}


def saving(config: Config) -> dict[str, float]:
    """Seconds that training waits for a checkpoint, and seconds that writing it takes beside training."""
    learner = Learner(config, 10, World(0, 1, CPU))
    state = {"learner": learner.state_dict()}
    held = checkpoint.on_host(state)
    with tempfile.TemporaryDirectory() as folder:
        data = checkpoint.pack(held)
        write: Callable[[], Any] = lambda: checkpoint.write(Path(folder), checkpoint.pack(held), step=1, epoch=1)  # noqa: E731
        return {
            "megabytes": len(data) / 1e6,
            "copy": seconds(lambda: checkpoint.on_host(state)),
            "write": seconds(write),
        }


def beside(repeats: int) -> dict[str, list[float]]:
    """{what a thread does once in a block: time of a block without it / of the next one with it}."""
    config = load_config(CONFIG)
    batch = noise_batch(config, config.data.batch_size, CPU)
    learner = Learner(config, CLASSES, World(0, 1, CPU))

    def block(act: Callable[[], object] | None = None) -> float:
        began = time.perf_counter()
        if act is not None:
            act()
        for step in range(BLOCK):
            learner.step(batch, step, 0, 0.0)
        return time.perf_counter() - began

    out: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, tracked(Path(name)) as sync:
        writer = checkpoint.Writer(Path(name) / "own", config.checkpoint, lambda: None)

        def save() -> None:
            step = len(out["a checkpoint"])
            writer.save({"learner": learner.state_dict()}, step=step, epoch=0, batch=0, final=False)

        for what, act in {"a checkpoint": save, "MLflow": sync, "nothing": lambda: None}.items():
            out[what] = []
            block(act)
            for _ in range(repeats):
                out[what].append(block() / block(act))
        writer.close()
    return out


@contextmanager
def tracked(folder: Path) -> Iterator[Callable[[], None]]:
    """Gives what writes a block's records and sends them to an SQLite store in a thread, as a run's follower does."""
    config = load_config(CONFIG, [f"tracking.uri=sqlite:///{folder}/mlflow.db"])
    run = MlflowRun(config, folder / "run", tags={})
    state = checkpoint.pack({"covers": "every step"})
    checkpoint.write(folder / "run" / "checkpoints", state, step=10**6, epoch=0)  # else nothing would be sent
    journal, pool, steps = Journal(folder / "run" / "metrics.jsonl"), ThreadPoolExecutor(1), itertools.count(1)

    def sync() -> None:
        step, now = next(steps), time.time()
        journal.write([Record(step, 0, f"train/{number}", 0.5, now) for number in range(RECORDS)])
        pool.submit(run.sync)

    assert run.connect()
    yield sync
    pool.shutdown()
    assert run.sync(now=True)


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """The median of a few calls."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def main() -> None:
    """Measure and print; every ratio is the median over repeats of a way to `local` of the same repeat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.repeats):
            rows.append({way: measure(way, words, Path(folder), given.epochs) for way, words in WAYS.items()})
    blocks = beside(4 * given.repeats)
    document: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": source_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seed": 0,
        "config": CONFIG,
        "epochs": given.epochs,
        "images/s ÷ local's": {
            way: round(statistics.median(row[way]["images/s"] / row["local"]["images/s"] for row in rows), 4)
            for way in WAYS
        },
        f"time of {BLOCK} steps ÷ the same with, in a thread beside them": {
            what: [round(value, 3) for value in statistics.quantiles(found, n=4)] for what, found in blocks.items()
        },
        "seconds to the first record": {
            way: round(statistics.median(row[way]["seconds to the first record"] for row in rows), 2) for way in WAYS
        },
        "seconds of a start": {key: round(value, 2) for key, value in start_parts().items()},
        "seconds a checkpoint": {
            name: {key: round(value, 4) for key, value in saving(load_config(name)).items()}
            for name in (CONFIG, "cifar10/joint-small")
        },
        "runs": rows,
    }
    print(json.dumps(document, indent=1, ensure_ascii=False))
    if given.out:
        write_json(given.out, document)


if __name__ == "__main__":
    main()
