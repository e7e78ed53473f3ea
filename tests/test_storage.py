"""Runs in an object store: the same run as in a folder, whatever is killed, cut, refused or late in between."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ONE, TINY, write
from store_proxy import Proxy, client

from bootvit import checkpoint, mirror, remote, storage
from bootvit.__main__ import main
from bootvit.config import merge
from bootvit.errors import RunFailed, UserError
from bootvit.files import write_json
from bootvit.heartbeat import Heartbeat
from bootvit.loop import EpochReport, fit
from bootvit.remote import read_log
from bootvit.runs import claim, found_run, open_run
from bootvit.storage import Store
from bootvit.tracking import read_journal

SAVING = {"checkpoint": {"every_steps": 3}, "schedule": {"epochs": 4}, "data": {"held_out": 0.1}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, in a folder."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder / "tiny.yaml", yaml.safe_dump(merge(TINY, SAVING)))
    assert main(["train", str(folder / "tiny.yaml"), "--local", f"ray.storage_path={folder}"]) == 0
    return folder / "tiny"


@pytest.fixture
def store(s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The address of a run that is not there yet; this machine knows nothing of it, and tiny.yaml is at hand."""
    bucket = f"runs-{tmp_path.name.replace('_', '-')[:50].strip('-').lower()}"
    client(s3).create_bucket(Bucket=bucket)
    monkeypatch.chdir(tmp_path)
    another_machine(tmp_path, monkeypatch)
    monkeypatch.setattr(storage, "AGAIN", (0.1,))
    monkeypatch.setattr(mirror, "LOOK_S", 0.05)
    monkeypatch.setattr(mirror, "PAUSE_S", 0.1)
    write(tmp_path / "tiny.yaml", yaml.safe_dump(merge(TINY, SAVING)))
    return Store(f"s3://{bucket}/some/runs/tiny")


def another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this one has of any run."""
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    monkeypatch.setenv("BOOTVIT_CACHE", str(tmp_path / "cache"))


def train(store: Store, *words: str) -> int:
    return main(["train", "tiny.yaml", "--local", f"ray.storage_path={store.at.rpartition('/')[0]}", *words])


def learner_of(path: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of a run's newest checkpoint."""
    saved = checkpoint.newest(path / "checkpoints")
    assert saved is not None
    learner = checkpoint.load(saved)["learner"]
    moments = {f"moment {i}": m for o in learner["optimizers"] for i, s in o["state"].items() for m in s.values()}
    return dict(learner["networks"]) | moments


def measured(run: Path) -> list[tuple[int, int, str, float]]:
    """Everything in the journal but times and speed."""
    records = read_journal(run / "metrics.jsonl")[0]
    return [(r.step, r.epoch, r.name, r.value) for r in records if "per_second" not in r.name]


def check_equal(store: Store, whole: Path) -> None:
    """Weights, moments, journal and result are those of the run in a folder."""
    _, folder = open_run(store.at, "newest")
    here, there = learner_of(whole), learner_of(folder.path)
    assert set(here) == set(there)
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert measured(whole) == measured(folder.path)
    results = [json.loads((run / "result.json").read_text()) for run in (whole, folder.path)]
    for key in ("status", "final", "best", "held_out", "steps", "epochs"):
        assert results[0][key] == results[1][key], key


def in_the_store(store: Store) -> set[str]:
    """The names of its objects."""
    return {item.name for item in store.list(deep=True) if not item.is_folder}


def cut_after(store: Store, epoch: int) -> None:
    """Train until an epoch has ended, and leave the run as if the machine had gone."""

    class Gone(BaseException):
        pass

    def gone(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise Gone

    from bootvit.load import load_config

    config = load_config("tiny.yaml", [f"ray.storage_path={store.at.rpartition('/')[0]}"])
    folder, _ = claim(config, resume=True, overwrite=False)
    with pytest.raises(Gone), folder.sent():
        fit(config, ONE, folder, on_epoch=gone)


# ------------------------------------------------------------------------------------------------- one run


def test_a_run_in_a_store_is_the_run_in_a_folder(
    store: Store, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(store) == 0
    check_equal(store, whole)
    kinds = {re.sub(r"step-\d{8}-\w{16}|\d{6}-\d{6}", "N", name) for name in in_the_store(store)}
    small = {"config.yaml", "result.json", "predictions.parquet"}
    assert kinds == small | {"leases/000001.json", "checkpoints/N.safetensors", "log/N.jsonl"}
    assert not [path for path in (tmp_path / "cache" / "runs").iterdir() if not path.name.startswith("read-")]
    assert not (tmp_path / "runs").exists()
    capsys.readouterr()
    assert train(store) == 2
    assert f"{store}: a run of this name exists (finished): --resume, --overwrite" in capsys.readouterr().err
    assert train(store, "--resume") == 0
    assert f"{store} is finished; nothing to do" in capsys.readouterr().out
    assert train(store, "--resume", "optim.lr=1e-4") == 2
    assert f"{store}: cannot resume with optim.lr=0.0001" in capsys.readouterr().err
    assert train(store, "--overwrite", "schedule.epochs=1") == 0
    assert read_log(store).head.checkpoints[-1]["epoch"] == 1
    assert not any(name.startswith("log/000001") for name in in_the_store(store))


@pytest.mark.slow
def test_a_run_that_is_killed_within_an_epoch_goes_on_elsewhere(
    store: Store, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = store.at.rpartition("/")[0]
    words = ["tiny.yaml", "--local", f"ray.storage_path={top}"]
    stuck = """
import sys, time
from bootvit.__main__ import main
from bootvit.learner import Learner

step = Learner.step

def stuck(self, batch, number, *rest):  # in the eighth step, the last of the second epoch
    time.sleep(600 if number == 7 else 0)
    return step(self, batch, number, *rest)

Learner.step = stuck
sys.exit(main(sys.argv[1:]))
"""
    child = subprocess.Popen([sys.executable, "-c", stuck, "train", *words], env=os.environ | {"OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 300
    while not ((known := read_log(store).head.checkpoints) and known[-1]["batch"]):
        assert child.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    step = read_log(store).head.checkpoints[-1]["step"]
    another_machine(tmp_path, monkeypatch)
    monkeypatch.chdir(write(tmp_path / "elsewhere" / "tiny.yaml", (tmp_path / "tiny.yaml").read_text()).parent)
    assert train(store, "--resume") == 0
    assert step < read_log(store).head.checkpoints[-1]["step"]
    check_equal(store, whole)


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_used(
    store: Store, whole: Path, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    cut_after(store, 3)
    another_machine(tmp_path, monkeypatch)
    names = sorted(name for name in in_the_store(store) if name.startswith("checkpoints/"))
    data = store.read(names[-1]) or b""
    flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    store.delete(names[-1])
    if how != "gone":
        store.write(names[-1], flipped if how == "flipped" else data[: len(data) // 2])
    open_run(store.at, "newest")
    assert f"{store}/{names[-1]} is damaged or gone" in capfd.readouterr().err
    assert train(store, "--resume") == 0
    assert f"{store}/{names[-1]} is damaged or gone" in capfd.readouterr().err
    check_equal(store, whole)


def test_a_working_copy_that_is_cleared_away_takes_nothing_from_the_store(store: Store, whole: Path) -> None:
    """As a cleaner of temporary folders does it, or whoever tidies up after a driver whose workers still live."""
    from bootvit.load import load_config

    cut_after(store, 3)
    before = read_log(store)
    config = load_config("tiny.yaml", [f"ray.storage_path={store.at.rpartition('/')[0]}"])
    run, _ = claim(config, resume=True, overwrite=False)

    def cleared_away() -> None:
        with run.sent() as flush:
            shutil.rmtree(run.path)
            flush()

    with pytest.raises(RunFailed, match="working copy was removed"):
        cleared_away()
    after = read_log(store)
    assert (after.journal, after.head.checkpoints) == (before.journal, before.head.checkpoints)
    assert train(store, "--resume") == 0
    check_equal(store, whole)


def test_a_checkpoint_that_is_just_being_replaced_stops_nothing(
    store: Store, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bootvit.load import load_config

    monkeypatch.setattr(mirror, "DOWN_S", 0.1)
    cut_after(store, 3)
    config = load_config("tiny.yaml", [f"ray.storage_path={store.at.rpartition('/')[0]}"])
    run, _ = claim(config, resume=True, overwrite=False)
    with run.sent() as flush:
        newest = checkpoint.described(run.checkpoints)[-1].path.with_suffix(".json")
        text = newest.read_text()
        newest.unlink()
        time.sleep(0.5)  # several looks
        assert read_log(store).head.checkpoints[-1]["step"] == json.loads(text)["step"]
        newest.write_text(text)
        flush()
        fit(config, ONE, run)
    check_equal(store, whole)


# ------------------------------------------------------------------------------------- a store that fails


@pytest.mark.slow
@pytest.mark.parametrize("how", ["503", "cut"])
def test_requests_that_fail_now_and_then_are_sent_again(store: Store, whole: Path, s3: Proxy, how: str) -> None:
    s3.spoil = lambda method, path: how if len(s3.requests) % 5 == 0 and (how == "503" or method == "GET") else None
    assert train(store) == 0
    check_equal(store, whole)


def test_what_a_store_that_is_down_has_not_got_is_sent_later(
    store: Store, whole: Path, s3: Proxy, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(mirror, "END_S", 0.0)
    monkeypatch.setattr(storage, "AGAIN", ())
    down = lambda method, path: "400" if method == "PUT" and "/checkpoints/" in path else None  # noqa: E731
    s3.spoil = lambda method, path: down(method, path)
    assert train(store) == 1
    said = capfd.readouterr().err
    copy = Path(re.search(rf"what {store} has not got of this run is in (\S+) on this machine", said)[1])  # type: ignore[index]
    assert learner_of(copy).keys() == learner_of(whole).keys()
    assert "training goes on, and what is not sent is in" in said
    assert not read_log(store).head.checkpoints
    s3.clear()
    assert train(store, "--resume") == 0
    assert len([path for method, path in s3.requests if method == "PUT" and "/checkpoints/" in path]) == 2  # not again
    check_equal(store, whole)


def test_what_this_machine_holds_is_not_used_once_the_run_has_gone_on_elsewhere(
    store: Store, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_after(store, 1)
    (copy,) = remote.scratch_of(store).iterdir()
    shutil.copytree(copy.parent, tmp_path / "kept")
    another_machine(tmp_path, monkeypatch)
    cut_after(store, 2)
    another_machine(tmp_path, monkeypatch)
    broken = tmp_path / "kept" / "000001" / "checkpoints" / "step-00000099"
    write(broken.with_suffix(".safetensors"), "x")
    fields = {"step": 99, "epoch": 9, "batch": 0, "final": True}
    write_json(broken.with_suffix(".json"), fields | {"sha256": __import__("hashlib").sha256(b"x").hexdigest()})
    shutil.copytree(tmp_path / "kept", remote.scratch_of(store))
    assert train(store, "--resume") == 0
    check_equal(store, whole)


@pytest.mark.parametrize(("how", "words"), [("403", "the store refuses"), ("", "there is no bucket nowhere")])
def test_a_store_that_cannot_be_used_is_one_line(
    store: Store, s3: Proxy, how: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    s3.spoil = lambda method, path: how or None
    given = store if how else Store("s3://nowhere/runs/tiny")
    assert train(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(given) in line
    assert words in line


@pytest.mark.parametrize("place", ["s3://me:secret@bucket/x", "s3://bucket/x?access_key=secret", "hf://x/y", "s3:/x"])
def test_an_address_that_cannot_be_one_is_one_line(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits/joint", "--local", f"ray.storage_path={place}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bootvit: error: override 'ray.storage_path=")
    assert "secret" not in line


# ----------------------------------------------------------------------------------------------- two writers


def test_a_second_driver_is_refused_and_may_take_over(
    store: Store, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bootvit.load import load_config

    monkeypatch.setattr("socket.gethostname", lambda: "first")
    config = load_config("tiny.yaml", [f"ray.storage_path={store.at.rpartition('/')[0]}"])
    first, _ = claim(config, resume=False, overwrite=False)

    def meanwhile() -> None:
        monkeypatch.setattr("socket.gethostname", lambda: "second")
        assert train(store, "--resume") == 2
        assert "is training this run: wait for it, stop it, or --resume --take-over" in capsys.readouterr().err
        assert train(store, "--resume", "--take-over") == 0
        fit(config, ONE, first)

    with Heartbeat(store, every=0.1), pytest.raises(RunFailed, match="has taken over this run"), first.sent():
        meanwhile()
    check_equal(store, whole)


@pytest.mark.parametrize("conditional", [True, False])
def test_one_of_two_drivers_gets_the_lease(store: Store, monkeypatch: pytest.MonkeyPatch, conditional: bool) -> None:
    monkeypatch.setattr(Store, "conditional", conditional)
    monkeypatch.setattr(storage, "SETTLE_S", 0.0)
    first = remote.take(store)
    with monkeypatch.context() as patch:
        patch.setattr(remote, "newest_lease", lambda store: 0)  # at the same moment
        with pytest.raises(RunFailed, match="another process has taken this run at this moment"):
            remote.take(store)
    first.check()
    group = first.for_group()
    group.check()
    first.check()
    other = first.for_group()
    first.check()
    with pytest.raises(RunFailed, match="has taken over"):
        group.check()
    assert (other.attempt, other.number) == (2, 3)


def test_a_lease_that_was_written_although_the_answer_was_lost_is_ours(store: Store, s3: Proxy) -> None:
    lost: list[str] = []

    def spoil(method: str, path: str) -> str | None:
        if method == "PUT" and "leases" in path and not lost:
            lost.append(path)
            return "lost"
        return None

    s3.spoil = spoil
    remote.take(store).check()
    assert lost


# ------------------------------------------------------------------------------------------------- the log


def test_nothing_depends_on_a_listing_that_shows_all(
    store: Store, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_after(store, 2)
    listed = Store.list
    monkeypatch.setattr(Store, "list", lambda self, folder="", deep=False: listed(self, folder, deep=deep)[:1])
    assert read_log(store).head.checkpoints[-1]["epoch"] == 2
    monkeypatch.setattr(Store, "list", lambda self, folder="", deep=False: [])
    assert read_log(store).head.checkpoints[-1]["epoch"] == 2
    assert train(store, "--resume") == 0


def test_a_driver_follows_the_log_of_workers_elsewhere(store: Store, tmp_path: Path) -> None:
    cut_after(store, 1)
    folder = found_run(store)
    log = read_log(store)
    before = log.journal
    inode = folder.journal.stat().st_ino
    hold = remote.take(store)
    store.write(remote.entry_name(hold.number, 0), remote.entry(log.head._replace(start=0), before))
    assert remote.follow(log, store, hold.number)
    remote.lay_out(log, folder.path)
    assert folder.journal.stat().st_ino == inode  # it has only grown
    line = b'{"step": 9, "epoch": 0, "name": "train/x", "value": 1, "time": 1}\n'
    store.write(remote.entry_name(hold.number, 1), remote.entry(log.head._replace(start=10, checkpoints=[]), line))
    assert remote.follow(log, store, hold.number)
    remote.lay_out(log, folder.path)
    assert folder.journal.read_bytes() == before[:10] + line
    assert not checkpoint.described(folder.checkpoints)
    assert not remote.follow(log, store, hold.number)


# ------------------------------------------------------------------------------------------------ commands


def test_commands_take_an_address(
    store: Store, whole: Path, tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    image = tmp_path / "seven.png"
    from PIL import Image

    Image.new("RGB", (8, 8), (90, 0, 0)).save(image)
    assert train(store, "checkpoint.best=true") == 0
    assert train(Store(store.at.replace("tiny", "second")), "name=second", "seed=1") == 0
    assert main(["train", "tiny.yaml", "--local", "name=second", "seed=1"]) == 0
    shutil.copytree(whole, tmp_path / "runs" / "tiny")

    def said(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    here, there = str(whole), store.at
    assert said("eval", there, "--local", "--json") == said("eval", here, "--local", "--json")
    assert said("eval", there, "--local", "--best")
    assert said("predict", there, str(image), "--json") == said("predict", here, str(image), "--json")
    for place in (there, here):
        said("export", place, "--format", "timm", "--out", str(tmp_path / f"timm{len(place)}"))
    files = [(tmp_path / f"timm{len(place)}" / "model.safetensors").read_bytes() for place in (there, here)]
    assert files[0] == files[1]
    assert said("export", there, "--format", "timm").strip() == f"{store}/export/tiny-vit"
    assert store.read("export/tiny-vit/model.safetensors") == files[0]
    tables = [json.loads(said("report", place, "--json")) for place in (store.at.rpartition("/")[0], "runs")]
    text = [re.sub(r'"(place|seconds|name|gpu_seconds)": .*?(,|\})', "", json.dumps(table)) for table in tables]
    assert text[0] == text[1]
    assert '"seeds": [0, 1]' in json.dumps(tables[0])  # both runs
    synced = said("track", "sync", there, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    assert f"has all of {store}" in synced
    link = json.loads(store.read("mlflow.json") or b"")
    assert link["complete"]
    assert said("track", "sync", there, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db") == synced
    assert main(["logs", there]) == 2
    assert f"{store}: no worker has left a log" in capsys.readouterr().err
    assert main(["eval", there + "x", "--local"]) == 2
    assert f"{store}x: no run is there" in capsys.readouterr().err


@pytest.mark.usefixtures("store")  # without its endpoint the last line would ask the real S3
def test_a_secret_or_a_typo_in_the_address_of_a_run_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for address in ("s3://me:secret@bucket/x", "s4://bucket/x"):
        assert main(["eval", address, "--local"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "secret" not in line
    with pytest.raises(UserError, match=r"no such bucket|no bucket|no run"):
        open_run("s3://nowhere/x")
