"""Kill short runs and sweeps at random moments, start them again until they end, and compare them with uninterrupted
ones.

    python -m benchmarks.kills [--kills 100] [--sweep-kills 6] [--seed 0] [--moto] [--out FILE]

With `--moto` everything is in an object store, a server of moto's that is started here, or in the one that `--address
s3://BUCKET/FOLDER` names; after every other kill the next process finds nothing on its disk, as on another machine.

Each run is a process of its own (a fork of this one, which has imported everything) and is ended with SIGKILL; of a
sweep the driver's process group is. What must hold afterwards: the final weights and moments are bitwise those of the
uninterrupted run or trial, the journal has each step's records once, no file is left half written, no kill cost more
than the steps since the last checkpoint, and the sweep has the same trials, accuracies and winners.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bootvit import checkpoint
from bootvit.__main__ import main as bootvit
from bootvit.errors import UserError
from bootvit.files import write_json
from bootvit.runs import open_run
from bootvit.storage import place_at, read_at
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


SWEEP = """
name: sweep
base: digits/joint
space: {method: {grid: [vit, joint]}, objective.vit.kd: {loguniform: [0.1, 10], when: {method: joint}}}
search: {samples: 2, seed: 0}
concurrency: 1
set:
  data.fraction: 0.1
  data.batch_size: 32
  data.held_out: 0.1
  schedule.epochs: 4
  schedule.warmup_epochs: 0
  schedule.eval_every: 1
  model.vit.width: 18
  model.vit.depth: 2
  model.vit.mlp_width: 24
  tracking.enabled: false
  tracking.log_every: 2
  checkpoint.every_steps: 3
"""


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
    parser.add_argument("--kills", type=int, default=100, help="of runs, at least")
    parser.add_argument("--sweep-kills", type=int, default=6, help="of sweeps, at least")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no further run or sweep is begun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--address", help="an empty folder in an object store")
    parser.add_argument("--moto", action="store_true", help="start such a store here")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * given.minutes
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name, moto(Path(name), started=given.moto) as address:
        folder = Path(name)
        os.environ["BOOTVIT_CACHE"] = f"{folder}/cache"
        place = given.address or address
        report = {
            "kept_in": "an object store" if place else "a folder",
            "runs": kill_runs(folder, place, given.kills, until, dice) if given.kills else None,
            "sweeps": kill_sweeps(folder, place, given.sweep_kills, until, dice) if given.sweep_kills else None,
        }
    report |= {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": source_version(),
        "seed": given.seed,
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=1))
    if given.out:
        write_json(given.out, report)
    raise SystemExit(any(part and part["wrong"] for part in (report["runs"], report["sweeps"])))


@contextmanager
def moto(folder: Path, *, started: bool) -> Iterator[str | None]:
    """The address of an empty folder on a server of moto's; None where none is to be `started`."""
    if not started:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "moto.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        in_a_child(make_bucket)
        yield "s3://kills/runs"
    finally:
        server.terminate()
        server.wait()


def make_bucket() -> None:
    import boto3
    from botocore.exceptions import EndpointConnectionError

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    until = time.monotonic() + 120
    while True:
        try:
            client.create_bucket(Bucket="kills")
            return
        except EndpointConnectionError:
            assert time.monotonic() < until, "moto's server does not answer"
            time.sleep(0.5)


def in_a_child(act: Callable[[], None]) -> None:
    """Do something in a process of its own: forks and S3's threads do not mix."""
    child = os.fork()
    if not child:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, act


def here(folder: Path, address: str | None, name: str) -> Path:
    """A run's folder; of one in a store a copy."""
    if address is None:
        return folder / name
    copy = folder / "copies" / name
    shutil.rmtree(copy, ignore_errors=True)

    def get() -> None:
        try:
            shutil.copytree(open_run(f"{address}/{name}", "all")[1].path, copy)
        except UserError as err:
            if "no run is there" not in str(err):  # else it was killed before there was one
                raise

    in_a_child(get)
    return copy


def patience(seconds: float, kills: int) -> float:
    """The longest time until the next kill of a run that takes so many seconds and was killed so often.

    It grows, because going on takes longer than a start where a killed process's lease must first run out.
    """
    return seconds * (1 + kills / 4)


def kill_runs(folder: Path, address: str | None, kills: int, end: float, dice: random.Random) -> dict[str, Any]:
    """Kill at least so many processes, over runs of every kind, but begin no run behind `end`."""
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
    while done < kills and time.monotonic() < end:
        kind = names[runs % len(names)]
        run, newest, own = f"killed-{runs}", 0, 0
        while True:
            child = start([*base, *RUNS[kind], f"name={run}", "--resume"], log)
            until = time.monotonic() + dice.uniform(0, patience(seconds[kind], own))
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
            done, own = done + 1, own + 1
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
        "most_steps_lost": max(steps_lost, default=0),
        "wrong": wrong,
    }


# --------------------------------------------------------------------------------------------------- sweeps


def kill_sweeps(folder: Path, address: str | None, kills: int, end: float, dice: random.Random) -> dict[str, Any]:
    """Kill at least so many drivers of sweeps, each of which is then resumed until it ends; the same."""
    file = folder / "sweep.yaml"
    file.write_text(SWEEP)
    whole, seconds = finish(folder, file, address, "whole-sweep")
    assert whole == 0, (folder / "log").read_text()[-2000:]
    done = sweeps = 0
    wrong: list[str] = []
    while done < kills and time.monotonic() < end:
        name, own = f"killed-sweep-{sweeps}", 0
        while True:
            status, _ = finish(folder, file, address, name, kill_after=dice.uniform(0, patience(seconds, own)))
            if status is not None:
                break
            done, own = done + 1, own + 1
            if address and done % 2:
                shutil.rmtree(folder / "cache", ignore_errors=True)
        if status:
            wrong.append(f"{name}: status {status}: {(folder / 'log').read_text()[-500:]}")
        else:
            wrong += [f"{name}: {what}" for what in check_sweep(folder, address, name)]
        sweeps += 1
    return {"kills": done, "sweeps": sweeps, "trials": 3, "wrong": wrong}


def finish(
    folder: Path, file: Path, address: str | None, name: str, kill_after: float | None = None
) -> tuple[int | None, float]:
    """Run a sweep to its end, or kill its driver after so many seconds; (its status, None if killed; seconds)."""
    words = ["sweep", str(file), "--resume", f"name={name}", f"ray.storage_path={address or folder}"]
    began = time.monotonic()
    with (folder / "log").open("a") as log:
        command = [sys.executable, "-m", "bootvit", *words]
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            return driver.wait(kill_after), time.monotonic() - began
        except subprocess.TimeoutExpired:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            return None, time.monotonic() - began


def check_sweep(folder: Path, address: str | None, name: str) -> list[str]:
    """What is wrong with a sweep that was killed, beside the one that was not."""
    wrong = []
    one, other = (document(folder, address, which) for which in (name, "whole-sweep"))
    keys = ("id", "status", "epochs", "held_out", "final", "overrides", "seed", "group")
    rows = [[{key: trial[key] for key in keys} for trial in found["trials"]] for found in (one, other)]
    if rows[0] != rows[1] or one["best"] != other["best"] or one["status"] != "finished":
        wrong.append("another sweep.json")
    for trial in (row["id"] for row in rows[1]):
        places = (f"{name}/trials/{trial}", f"whole-sweep/trials/{trial}")
        wrong += [f"{trial}: {what}" for what in check(*(here(folder, address, place) for place in places))]
    return wrong


def document(folder: Path, address: str | None, name: str) -> dict[str, Any]:
    """sweep.json."""
    copy = folder / "document.json"
    in_a_child(lambda: copy.write_bytes(read_at(place_at(address or str(folder)) / name, "sweep.json") or b"") and None)
    return dict(json.loads(copy.read_text()))


if __name__ == "__main__":
    main()
