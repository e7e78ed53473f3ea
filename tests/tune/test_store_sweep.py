"""Sweeps in an object store: the same sweep as in a folder, wherever and whenever its driver is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ONE
from store_proxy import Proxy, client
from sweep_driver import command, finish, kill
from tiny_sweeps import make_sweep, run, sweep_file

from bootvit import remote
from bootvit.__main__ import main
from bootvit.config import dump_config
from bootvit.errors import RunFailed, UserError
from bootvit.heartbeat import Heartbeat
from bootvit.loop import fit
from bootvit.remote import TakenOver
from bootvit.runs import claim
from bootvit.storage import Store
from bootvit.tracking import read_journal
from tune.decide.budget import Budget
from tune.decide.conductor import Conductor
from tune.decide.log import Log, read_events
from tune.decide.search import make_source
from tune.decide.stopping import Stopper
from tune.run import kept
from tune.run.folder import check_folder, claim_folder
from tune.run.kept import SweepFolder, open_folder
from tune.spec.schema import Sweep
from tune.spec.space import trial_config

CONTENT: dict[str, Any] = {"space": {"objective.vit.kd": {"uniform": [0, 1]}}, "search": {"samples": 3, "seed": 1}}


@pytest.fixture
def top(s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where sweeps go; this machine knows nothing of them."""
    bucket = f"sweeps-{tmp_path.name.replace('_', '-')[:50].strip('-').lower()}"
    client(s3).create_bucket(Bucket=bucket)
    monkeypatch.setenv("BOOTVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return f"s3://{bucket}/some/sweeps"


def in_store(folder: Path, top: str, **content: Any) -> Sweep:
    return make_sweep(folder, **{**CONTENT, **content, "set": {"ray.storage_path": top}})


def drive(sweep: Sweep, state: str = "unfinished") -> tuple[Sweep, SweepFolder, Conductor]:
    """What a new driver makes of the sweep, without Ray."""
    sweep, folder = open_folder(sweep, anew=state == "absent")
    claim_folder(sweep, state)  # type: ignore[arg-type]
    folder.put(sweep.folder / "sweep.yaml")
    log = Log(path := sweep.folder / "events.jsonl", folder.sender(path))
    return sweep, folder, Conductor(sweep, log, make_source(sweep), Stopper(sweep, 9), Budget(sweep.file.budget, 0))


def events(sweep: Sweep) -> list[tuple[Any, ...]]:
    """The log, times left out."""
    found = read_events(sweep.folder / "events.jsonl")
    return [(e["event"], e.get("id"), e.get("epoch"), e.get("value"), e.get("trials")) for e in found]


# -------------------------------------------------------------------------------------------------- without Ray


@pytest.mark.parametrize("entry", [1, 300, 1 << 20])
def test_every_decision_is_in_the_store_before_it_takes_effect(
    top: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: int
) -> None:
    """Drivers on empty disks, one after another, each killed after some events: they decide what one alone does."""
    monkeypatch.setattr(kept, "ENTRY", entry)
    alone = make_sweep(tmp_path, **CONTENT)
    log = Log(alone.folder / "events.jsonl")
    value = lambda trial, epoch: 10.0 * epoch + trial.spec.overrides["objective.vit.kd"]  # noqa: E731
    run(Conductor(alone, log, make_source(alone), Stopper(alone, 9), Budget(alone.file.budget, 0)), value)

    class Killed(Exception):
        pass

    sweep = in_store(tmp_path, top)
    state, drivers = check_folder(sweep, resume=False, overwrite=False), 0
    assert state == "absent"
    while True:
        mine, _, conductor = drive(sweep, state)
        left = random.Random(drivers).randrange(2, 7)

        def killed(trial: Any, epoch: int) -> float:
            nonlocal left
            left -= 1
            if not left:
                raise Killed
            return value(trial, epoch)

        drivers += 1
        try:
            run(conductor, killed)
            break
        except Killed:
            shutil.rmtree(tmp_path / "cache")
            state = check_folder(sweep, resume=True, overwrite=False)
            assert state == "unfinished"
    assert drivers > 1
    results = [[e for e in events(one) if e[0] in ("new", "result")] for one in (alone, mine)]
    assert results[0] == results[1]
    store = sweep.place
    assert isinstance(store, Store)
    assert {item.name[:6] for item in store.list("events/log")} == {f"{drivers:06d}"}  # what it replaces is gone


def test_nothing_depends_on_a_listing_that_shows_all(top: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "ENTRY", 1)
    sweep = in_store(tmp_path, top)
    first, _, conductor = drive(sweep, "absent")
    run(conductor, lambda trial, epoch: 1.0)
    known = events(first)
    monkeypatch.setattr(Store, "list", lambda self, folder="", deep=False: [])
    assert events(drive(sweep)[0]) == known


def test_a_driver_that_was_overtaken_decides_nothing(top: str, tmp_path: Path) -> None:
    sweep = in_store(tmp_path, top)
    _, first, conductor = drive(sweep, "absent")
    assert conductor.next() is not None
    second, _, other = drive(sweep)
    with pytest.raises(TakenOver, match=f"{sweep.place}: another process has taken over"):
        conductor.next()
    with pytest.raises(TakenOver):
        first.put(first.path / "sweep.yaml")
    assert [trial.status for trial in conductor.trials.values()][:2] == ["running", "waiting"]
    run(other, lambda trial, epoch: 1.0)
    assert events(second)[-1][0] == "result"


def test_a_store_that_is_down_for_a_while_is_waited_for(
    top: str, tmp_path: Path, s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bootvit.storage.AGAIN", ())
    sweep = in_store(tmp_path, top)
    mine, _, conductor = drive(sweep, "absent")
    down = 3

    def spoil(method: str, path: str) -> str | None:
        nonlocal down
        down -= method == "PUT" and "/events/" in path
        return "501" if method == "PUT" and down >= 0 else None

    s3.spoil = spoil
    run(conductor, lambda trial, epoch: 1.0)
    assert down < 0
    assert events(drive(sweep)[0]) == events(mine)
    monkeypatch.setattr(remote, "PATIENCE_S", 0.0)
    s3.spoil = lambda method, path: "501" if method == "PUT" else None
    with pytest.raises((RunFailed, UserError), match=str(sweep.place)):
        drive(sweep)


def test_a_sweep_that_is_there_is_seen(
    top: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(tmp_path, **CONTENT)
    words = ["sweep", str(path), f"ray.storage_path={top}"]
    assert main([*words, "--dry-run"]) == 0
    assert "3 trials" in capsys.readouterr().out
    sweep = in_store(tmp_path, top)
    store = sweep.place
    assert isinstance(store, Store)
    store.write("mine.txt", b"x")
    assert main(words) == 2
    assert f"{store}: exists and is not a sweep" in capsys.readouterr().err
    store.delete("mine.txt")
    drive(sweep, "absent")
    assert main(words) == 2
    assert f"{store}: a sweep of this name exists (unfinished): --resume" in capsys.readouterr().err
    assert main([*words, "--resume", "seeds=[3]"]) == 2
    assert f"{store}: cannot resume with seeds=[3]: it was started with seeds=None" in capsys.readouterr().err


def test_an_overwritten_sweep_leaves_nothing_but_leases(top: str, tmp_path: Path) -> None:
    sweep = in_store(tmp_path, top)
    drive(sweep, "absent")
    config = trial_config(sweep, {}, 0, "0000")
    worker, _ = claim(config, resume=True, overwrite=False)
    assert worker.hold is not None
    drive(sweep, "absent")
    store = sweep.place
    assert isinstance(store, Store)
    names = {item.name for item in store.list(deep=True) if not item.is_folder}
    assert {name for name in names if "leases/" not in name} == {"sweep.yaml"}
    with pytest.raises(TakenOver):  # a worker of the old one must not write into the new one's trial
        worker.hold.check()


def test_the_copy_of_a_member_is_made_in_the_store(top: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"data.fraction": 0.1, "schedule.epochs": 2, "ray.storage_path": top, "tracking.enabled": False}
    sweep = make_sweep(tmp_path, **CONTENT, set=small)
    _, folder, _ = drive(sweep, "absent")
    configs = [trial_config(sweep, {"objective.vit.kd": kd}, 0, name) for kd, name in ((0.1, "0000"), (0.9, "0001"))]
    for config in configs:
        run_folder, _ = claim(config, resume=True, overwrite=False)
        with run_folder.sent():
            fit(config, ONE, run_folder, test="never")
        folder.fetch(folder.run_dir(config))
    member, donor = configs
    changed = member.model_copy(update={"objective": donor.objective})
    before = read_journal(folder.run_dir(member) / "metrics.jsonl")
    for _ in range(2):
        folder.copy_member(changed, donor, 2)
    shutil.rmtree(folder.run_dir(member))
    folder.fetch(folder.run_dir(member))
    assert read_journal(folder.run_dir(member) / "metrics.jsonl") == before
    store = Store(f"{sweep.place}/trials/0000")
    assert (store.read("config.yaml") or b"").decode() == dump_config(changed)
    heads = [remote.read_log(Store(f"{sweep.place}/trials/{name}")).head for name in ("0000", "0001")]
    assert heads[0].checkpoints == [heads[1].checkpoints[-1]]
    assert remote.fetch_newest(store, folder.run_dir(member)) is not None
    monkeypatch.setattr(remote, "PATIENCE_S", 0.0)
    with pytest.raises(RunFailed, match="the checkpoint of epoch 3 is not there"):
        folder.copy_member(changed, donor, 3)


# ----------------------------------------------------------------------------------------------------- with Ray


def documents(store: Store) -> dict[str, Any]:
    return dict(json.loads(store.read("sweep.json") or b"{}"))


def outcome(document: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on where a sweep is, or on interruptions."""
    keys = ("status", "epochs", "held_out", "final", "overrides", "seed", "group")
    return {trial["id"]: {key: trial[key] for key in keys} for trial in document["trials"]}


def measured(path: Path) -> list[tuple[Any, ...]]:
    return [(r.step, r.epoch, r.name, r.value) for r in read_journal(path)[0] if "per_second" not in r.name]


@pytest.mark.slow
def test_a_sweep_in_a_store(top: str, tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is tracked, reported and read again; a trial in it is the run that `train` makes of its config."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    small = {"data.fraction": 0.1, "schedule.epochs": 2, "data.held_out": 0.2}
    path = sweep_file(tmp_path, space={"method": {"grid": ["vit", "joint"]}}, set=small)
    words = ["sweep", str(path), f"ray.storage_path={top}"]
    store = Store(f"{top}/sweep")
    assert main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"trials at a time; {store}\n" in said
    document = documents(store)
    assert (document["status"], document["counts"]) == ("finished", {"finished": 2})
    assert all(trial["final"] for trial in document["trials"])
    assert json.loads(store.read("mlflow.json") or b"")["complete"]
    assert store.exists("report/report.html")
    names = {item.name for item in store.list(deep=True) if not item.is_folder}
    for trial in document["trials"]:
        link = json.loads(store.read(f"{trial['run']}/mlflow.json") or b"")
        result = json.loads(store.read(f"{trial['run']}/result.json") or b"")
        assert link["complete"]
        assert (result["mlflow_run_id"], result["final"]) == (link["run_id"], trial["final"])
    assert not [name for name in names if "params" in name or "error" in name or name.endswith((".pkl", ".part"))]

    assert main(["report", "--sweep", store.at, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "finished"
    assert main(["report", "--sweep", store.at]) == 0
    assert "Best of every group" in capsys.readouterr().out
    assert main(["list", top, "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["status"]) == ("sweep", "finished (2 finished)")
    assert main(["list", top, "--trials", "--json"]) == 0
    listed = {one["name"]: one["status"] for one in json.loads(capsys.readouterr().out)}
    assert listed == {"sweep": "finished (2 finished)"} | {
        f"sweep/{trial['run']}": "finished" for trial in document["trials"]
    }
    assert main(["report", "--sweep", f"{top}/none"]) == 2
    assert f"--sweep {top}/none: no sweep.json there" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert f"{store} is finished; nothing to do" in capsys.readouterr().out

    with Heartbeat(store):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert main([*words, "--resume", "seeds=[0,1]"]) == 2
        assert "is training this run: wait for it, stop it, or --resume --take-over" in capsys.readouterr().err

    name = document["trials"][1]["id"]
    (tmp_path / f"{name}.yaml").write_bytes(store.read(f"trials/{name}/config.yaml") or b"")
    here = ["ray.storage_path=here", "tracking.enabled=false"]
    assert main(["train", str(tmp_path / f"{name}.yaml"), "--local", *here]) == 0
    copy = remote.reading_copy(store / f"trials/{name}")
    rows = [
        [row for row in measured(f) if "test/" not in row[2]]
        for f in (copy / "metrics.jsonl", Path("here") / name / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_sweep_that_is_killed_goes_on_on_another_machine(top: str, tmp_path: Path, seed: int) -> None:
    """SIGKILL to the driver twice, and each time a driver with an empty disk goes on."""
    content: dict[str, Any] = {
        "space": {"method": {"grid": ["vit", "joint"]}, "objective.vit.kd": {"loguniform": [0.1, 10]}},
        "search": {"samples": 2, "seed": 3},
        "set": {"data.fraction": 0.1, "tracking.log_every": 2},
    }
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    whole = sweep_file(tmp_path / "whole", **json.loads(json.dumps(content)))
    status, _, err = finish(command(whole))
    assert status == 0, err
    expected = tmp_path / "whole" / "runs" / "sweep"
    path = sweep_file(tmp_path / "killed", **content)
    store, dice = Store(f"{top}/sweep"), random.Random(seed)
    total = (expected / "events.jsonl").read_text().count("\n")
    for number, moment in enumerate(sorted(dice.sample(range(2, total - 2), 2))):
        os.environ["BOOTVIT_CACHE"] = str(tmp_path / f"machine-{number}")
        process = command(path, "--resume", f"ray.storage_path={top}")
        until = time.monotonic() + 600
        while remote.read_log(store / "events").journal.count(b"\n") < moment:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(dice.uniform(0, 0.5))
        kill(process)
    os.environ["BOOTVIT_CACHE"] = str(tmp_path / "machine-9")
    status, _, err = finish(command(path, "--resume", f"ray.storage_path={top}"))
    assert status == 0, err
    local, found = json.loads((expected / "sweep.json").read_text()), documents(store)
    assert outcome(found) == outcome(local)
    assert found["best"] == local["best"]
    for name in outcome(local):
        copy = remote.reading_copy(store / f"trials/{name}")
        assert measured(copy / "metrics.jsonl") == measured(expected / "trials" / name / "metrics.jsonl"), name
