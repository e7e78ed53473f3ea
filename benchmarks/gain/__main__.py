"""Runs cells of the map of the gain, one after another, for some hours, and writes the table of what is there.

    python -m benchmarks.gain --root data/cifar10 --runs runs/gain --hours 0.5

Each cell is a `bootvit train --local --resume` in a process of its own; one that the time ends is asked to stop, saves,
and goes on with its next batch when this is started again. `--hours 0` only writes the table.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gain.cells import Cell, cells
from benchmarks.gain.table import write
from bootvit.files import read_json

HERE = Path(__file__).parent
GRACE = 120.0  # seconds in which a run saves


def finished(runs: Path, cell: Cell) -> bool:
    """Whether a cell's run is at its end."""
    result = runs / cell.name / "result.json"
    return result.exists() and read_json(result)["status"] == "finished"


def run(cell: Cell, runs: Path, root: Path, deadline: float, more: list[str]) -> int | None:
    """Train a cell; its exit status, or None where the time has ended it."""
    command = [sys.executable, "-m", "bootvit", "train", str(HERE / f"{cell.recipe}.yaml"), "--local", "--resume"]
    command += [*cell.overrides(), f"ray.storage_path={runs}", f"data.root={root}", *more]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            return process.wait(max(deadline - time.monotonic(), 0))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            return None


def main(argv: list[str] | None = None) -> int:
    """Status 1 where a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the folder with CIFAR-10, as data.root")
    parser.add_argument("--runs", type=Path, default=Path("runs/gain"))
    parser.add_argument("--out", type=Path, help="where the table and figure go; default: --runs")
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", type=int, help="only the first so many")
    parser.add_argument("--share", default="1/1", help="2/3: the second of three processes that share the cells")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="for every cell, such as ray.use_gpu=true"
    )
    args = parser.parse_args(argv)
    runs, deadline = args.runs.resolve(), time.monotonic() + 3600 * args.hours
    runs.mkdir(parents=True, exist_ok=True)
    failed = 0
    which, of = map(int, args.share.split("/"))
    for cell in list(cells(args.seeds))[: args.cells][which - 1 :: of]:
        if time.monotonic() >= deadline:
            break
        if finished(runs, cell):
            continue
        status = run(cell, runs, args.root.resolve(), deadline, args.set)
        if status is None:
            print(f"{cell.name}: stopped; goes on at the next start", flush=True)
            break
        failed += status != 0
        print(f"{cell.name}: {'finished' if status == 0 else f'failed with status {status}'}", flush=True)
    print(write(runs, args.out or runs))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
