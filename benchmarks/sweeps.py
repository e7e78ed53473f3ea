"""What a sweep of many tiny trials costs beyond their training, and whether it grows: memory, open files.

    python -m benchmarks.sweeps --trials 200

A driver of its own is started as users start it, and watched through /proc while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bootvit.files import write_json
from bootvit.tracking import source_version

RUN = {
    "model.vit.width": 18,
    "model.vit.depth": 2,
    "model.vit.mlp_width": 24,
    "data.held_out": 0.2,
    "data.fraction": 0.1,
    "schedule.epochs": 2,
    "schedule.warmup_epochs": 0,
    "schedule.eval_every": 2,
}


class Sample(NamedTuple):
    """One look at the processes of a sweep."""

    ended: int  # trials
    driver_mib: float
    driver_files: int
    workers_mib: float  # the largest worker
    workers_files: int


def sweep_file(folder: Path, trials: int, at_once: int) -> Path:
    """Random weights for joint training on a tenth of the digits."""
    content = {
        "name": "many",
        "base": "digits/joint",
        "set": {**RUN, "ray.storage_path": str(folder / "runs"), "tracking.uri": f"sqlite:///{folder}/mlflow.db"},
        "space": {"objective.vit.kd": {"loguniform": [0.1, 10]}},
        "search": {"samples": trials, "seed": 0},
        "concurrency": at_once,
    }
    path = folder / "many.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def memory_and_files(pid: int) -> tuple[float, int]:
    """(MiB of its own memory, open files) of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = sum(int(line.split()[1]) for line in lines if line.startswith(("Private_", "Swap:")))
    return private / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def children(pid: int) -> list[int]:
    """The processes below one, itself not included."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def look(driver: int, folder: Path) -> Sample | None:
    """A sample, or None while a process that is looked at comes or goes."""
    try:
        workers = [
            memory_and_files(pid)
            for pid in children(driver)
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::TrialActor")
        ]
        own = memory_and_files(driver)
        log = (folder / "runs" / "many" / "events.jsonl").read_text()
    except OSError:
        return None
    if not workers:
        return None
    ended = log.count('"verdict": "finished"')
    return Sample(ended, *own, max(mib for mib, _ in workers), max(files for _, files in workers))


def run(folder: Path, trials: int, at_once: int) -> tuple[float, list[Sample]]:
    """Seconds of the whole command, and its samples."""
    path = sweep_file(folder, trials, at_once)
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "bootvit", "sweep", str(path)], cwd=folder)
    samples = []
    while process.poll() is None:
        sample = look(process.pid, folder)
        samples += [sample] if sample else []
        time.sleep(1)
    if process.returncode:
        raise SystemExit(f"the sweep ended with {process.returncode}")
    return time.monotonic() - begin, samples


def per_trial(folder: Path) -> dict[str, float]:
    """Medians over the trials, the first of each worker left out: seconds held, of training, and the rest."""
    sweep = folder / "runs" / "many"
    trials = json.loads((sweep / "sweep.json").read_text())["trials"]
    events = [json.loads(line) for line in (sweep / "events.jsonl").read_text().splitlines()]
    starts = {e["id"]: e["elapsed"] for e in events if e["event"] == "start"}
    ends = {e["id"]: e["elapsed"] for e in events if e.get("verdict") == "finished"}
    held, training, rest = [], [], []
    for trial in trials[4:]:
        result = json.loads((sweep / trial["run"] / "result.json").read_text())
        images = result["steps"] * 32
        seconds = images / result["images_per_second"]
        whole = ends[trial["id"]] - starts[trial["id"]]
        held.append(whole)
        training.append(seconds)
        rest.append(whole - seconds)
    names = {"seconds_from_start_to_end": held, "training_seconds": training, "overhead_seconds": rest}
    return {name: round(statistics.median(values), 3) for name, values in names.items()}


def quarter_means(samples: list[Sample], trials: int) -> list[dict[str, float]]:
    """The means of each quarter of the trials, so that growth shows."""
    out = []
    for quarter in range(4):
        low, high = quarter * trials / 4, (quarter + 1) * trials / 4
        rows = [s for s in samples if low < s.ended <= high]
        out.append({name: round(statistics.mean(getattr(s, name) for s in rows), 1) for name in Sample._fields})
    return out


def slope_kib(early: dict[str, float], late: dict[str, float], name: str) -> float:
    """Growth of a memory figure, in KiB for each trial that ended between the two quarters."""
    return round(1024 * (late[name] - early[name]) / (late["ended"] - early["ended"]), 1)


def measure(trials: int, at_once: int) -> dict[str, Any]:
    """Everything, as the result file has it."""
    with tempfile.TemporaryDirectory() as name:
        seconds, samples = run(Path(name), trials, at_once)
        quarters = quarter_means(samples, trials)
        return {
            "what": f"{trials} tiny trials, {at_once} at a time (digits 10%, joint, 2 epochs), MLflow in SQLite",
            "command": f"python -m benchmarks.sweeps --trials {trials} --at-once {at_once}",
            "date": datetime.now(UTC).date().isoformat(),
            "commit": source_version(),
            "machine": f"{os.cpu_count()}-core CPU",
            "load_average_at_end": round(os.getloadavg()[1], 1),
            "seeds": {"search": 0, "trials": 0},
            "seconds": round(seconds, 1),
            "per_trial_median": per_trial(Path(name)),
            "private_memory_and_open_files_by_quarter": quarters,
            "kib_per_trial_from_second_quarter_to_last": {
                name: slope_kib(quarters[1], quarters[-1], name) for name in ("driver_mib", "workers_mib")
            },
        }


def main() -> None:
    """Measure, print, and write below benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=2)
    arguments = parser.parse_args()
    result = measure(arguments.trials, arguments.at_once)
    print(json.dumps(result, indent=2))
    folder = Path(__file__).parent / "results"
    cores = os.cpu_count()
    write_json(folder / f"sweep-{arguments.trials}-trials_cpu{cores}_{result['date']}.json", result)


if __name__ == "__main__":
    main()
