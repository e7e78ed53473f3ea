"""What a training step holds: bytes for each image of a batch, by method and by what saves memory.

    python -m benchmarks.memory [--preset small] [--batches 8 24] [--out FOLDER]

Each measurement is a process of its own that takes two steps; on the CPU its largest resident set counts, on CUDA what
torch has allocated. Two batch sizes tell what an image adds from what is there without it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

METHODS = ("vit", "agent", "joint", "shared")
WAYS: dict[str, list[str]] = {
    "plain": [],
    "optim.accumulate=4": ["optim.accumulate=4"],
    "model.checkpoint_blocks=true": ["model.checkpoint_blocks=true"],
}


def peak(name: str, batch: int, overrides: list[str]) -> int:
    """In a process of its own: the bytes that two steps have held at most."""
    import torch

    from bootvit.data.batches import Batch
    from bootvit.learner import Learner, World
    from bootvit.load import load_config

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(name, ["precision=fp32", f"data.batch_size={batch}", *overrides])
    learner = Learner(config, 10, World(0, 1, device))
    images = torch.zeros(batch, 3, *config.image_size, device=device)
    data = Batch(images, torch.zeros(batch, dtype=torch.int64, device=device), batch)
    for step in range(2):
        learner.step(data, step, 0, 0.0)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, batch: int, overrides: list[str]) -> int:
    """`peak`, of a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", name, str(batch), *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and write `benchmarks/results/memory_<device>_<date>.json`."""
    if sys.argv[1:2] == ["--child"]:
        print(peak(sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
        return
    import torch

    from bootvit.files import write_json
    from bootvit.tracking import source_version

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batches", type=int, nargs=2, default=[8, 24])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    small, large = options.batches
    found: dict[str, Any] = {}
    for method in METHODS:
        found[method] = {}
        for way, overrides in WAYS.items():
            bytes_ = [measure(f"cifar10/{method}-{options.preset}", batch, overrides) for batch in (small, large)]
            found[method][way] = round((bytes_[1] - bytes_[0]) / (large - small) / 2**20, 2)
            print(method, way, found[method][way], "MiB an image", file=sys.stderr, flush=True)
    today = datetime.now(UTC).date().isoformat()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()}-thread CPU"
    document = {
        "what": f"MiB that each further image of a batch adds to a step's peak, cifar10/*-{options.preset}, fp32",
        "command": f"python -m benchmarks.memory --preset {options.preset} --batches {small} {large}",
        "date": today,
        "commit": source_version(),
        "device": device,
        "torch": torch.__version__,
        "batches": [small, large],
        "mib_an_image": found,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"memory_{device.replace(' ', '-')}_{today}.json"
    write_json(path, document)
    print(path.read_text())


if __name__ == "__main__":
    main()
