"""Kill short runs at random moments, start them again until they end, and compare them with uninterrupted ones.

    python -m benchmarks.kills --kills 100 [--seed 0] [--address s3://BUCKET/FOLDER] [--out FILE]

With `--address` the runs are in an object store (such as `moto_server`, with AWS_ENDPOINT_URL set and the bucket made),
and after every other kill the next process finds nothing of the run on its disk, as on another machine.

Each run is a process of its own (a fork of this one, which has imported everything) and is ended with SIGKILL. What
must hold afterwards: the final weights and moments are bitwise those of the uninterrupted run, the journal has each
step's records once, no file is left half written, and no kill cost more than the steps since the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bootvit import checkpoint
from bootvit.__main__ import main as bootvit
from bootvit.errors import UserError
from bootvit.files import write_json
from bootvit.runs import open_run
from bootvit.tracking import read_journal, source_version

EVERY = 3  # steps between checkpoints
RUNS = {
    "vit": ["method=vit", "model.vit.dropout=0.1"],
    "joint": ["method=joint", "model.vit.dropout=0.1", "model.agent.dropout=0.1"],
    "shared": ["method=shared", "model.vit.dropout=0.1"],
    "sam, best kept": ["method=vit", "optim.sam_rho=0.1", "checkpoint.best=true", "checkpoint.keep=1"],
}
TINY = [
    *("data.fraction=0.1", "data.batch_size=32", "data.held_out=0.1", "schedule.epochs=5"),
    *("model.vit.width=18", "model.vit.depth=2", "model.vit.mlp_width=24", "tracking.enabled=false"),
    *("tracking.log_every=2", f"checkpoint.every_steps={EVERY}"),
]


def start(arguments: list[str], log: Path) -> int:
    """A child that trains; its output goes to a file. Returns its process id."""
    child = os.fork()
    if child:
        return child
    with log.open("a") as out, redirect_stdout(out):
        sys.stderr = out
        status = bootvit(arguments)
    os._exit(status)


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments at the end of a run."""
    saved = checkpoint.newest(run / "checkpoints")
    assert saved is not None
    assert saved.final, saved
    learner = checkpoint.load(saved)["learner"]
    moments = {
        f"{i}.{index}.{name}": value
        for i, optimizer in enumerate(learner["optimizers"])
        for index, own in optimizer["state"].items()
        for name, value in own.items()
    }
    return dict(learner["networks"]) | moments


def check(run: Path, whole: Path) -> list[str]:
    """What is wrong with a run that was killed, beside one that was not."""
    wrong = []
    one, other = state_of(run), state_of(whole)
    if set(one) != set(other) or not all(torch.equal(one[name], other[name]) for name in one):
        wrong.append("other weights")
    places = Counter((r.step, r.name) for r in read_journal(run / "metrics.jsonl")[0])
    wrong += [f"twice in the journal: {place}" for place, times in places.items() if times > 1]
    ends, again = (
        [(r.step, r.name, r.value) for r in read_journal(folder / "metrics.jsonl")[0] if not r.name.startswith("train")]
        for folder in (run, whole)
    )
    if ends != again:
        wrong.append("other evaluations in the journal")
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, whole)]
    if any(results[0][key] != results[1][key] for key in ("status", "final", "best", "held_out", "steps", "epochs")):
        wrong.append("another result.json")
    wrong += [f"left behind: {path.name}" for path in run.rglob("*.part")]
    for saved in checkpoint.described(run / "checkpoints"):
        checkpoint.load(saved)  # raises for a broken one
    return wrong


def lost(run: Path, before: int) -> tuple[int, int]:
    """(steps of the newest checkpoint, steps that the journal had told beyond it); no checkpoint may get older."""
    saved = checkpoint.newest(run / "checkpoints")
    step = saved.step if saved else 0
    assert step >= before, f"{run}: the newest checkpoint went back from step {before} to {step}"
    told = max((r.step for r in read_journal(run / "metrics.jsonl")[0]), default=0)
    return step, max(0, told - step)


def main() -> None:
    """Kill, compare, and write down what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--address", help="an empty folder in an object store")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BOOTVIT_CACHE"] = f"{folder}/cache"
        report = kill_runs(Path(folder), given.address, given.kills, dice)
    report |= {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": source_version(),
        "seed": given.seed,
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=1))
    if given.out:
        write_json(given.out, report)
    raise SystemExit(1 if report["wrong"] else 0)


def here(folder: Path, address: str | None, name: str) -> Path:
    """A run's folder; of one in a store a copy, which a process of its own gets: forks and S3's threads do not mix."""
    if address is None:
        return folder / name
    copy = folder / "copies" / name
    shutil.rmtree(copy, ignore_errors=True)
    child = os.fork()
    if not child:
        status = 1
        try:
            shutil.copytree(open_run(f"{address}/{name}", "all")[1].path, copy)
            status = 0
        except UserError as err:  # killed before there was a run
            status = 0 if "no run is there" in str(err) else 1
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, name
    return copy


def kill_runs(folder: Path, address: str | None, kills: int, dice: random.Random) -> dict[str, Any]:
    """Kill at least so many processes, over runs of every kind."""
    names, log = list(RUNS), folder / "log"
    base = ["train", "digits/joint", "--local", f"ray.storage_path={address or folder}", *TINY]
    seconds: dict[str, float] = {}
    for name in names:
        began = time.monotonic()
        _, status = os.waitpid(start([*base, *RUNS[name], f"name=whole-{names.index(name)}"], log), 0)
        assert status == 0, log.read_text()
        seconds[name] = time.monotonic() - began
    done = runs = 0
    steps_lost: list[int] = []
    wrong: list[str] = []
    while done < kills:
        kind = names[runs % len(names)]
        run, newest = f"killed-{runs}", 0
        while True:
            child = start([*base, *RUNS[kind], f"name={run}", "--resume"], log)
            until = time.monotonic() + dice.uniform(0, seconds[kind])
            ended, status = 0, 0
            while not ended and time.monotonic() < until:
                ended, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.002)
            if ended:
                if status:
                    wrong.append(f"{run} ({kind}): status {status}: {log.read_text()[-500:]}")
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done += 1
            newest, beyond = lost(here(folder, address, run), newest)
            steps_lost.append(beyond)
            if address and done % 2:
                shutil.rmtree(folder / "cache", ignore_errors=True)
        if not wrong:
            whole = here(folder, address, f"whole-{names.index(kind)}")
            wrong += [f"{run} ({kind}): {what}" for what in check(here(folder, address, run), whole)]
        runs += 1
    return {
        "kills": done,
        "runs": runs,
        "every_steps": EVERY,
        "kept_in": "an object store" if address else "a folder",
        "most_steps_lost": max(steps_lost),
        "wrong": wrong,
    }


if __name__ == "__main__":
    main()
