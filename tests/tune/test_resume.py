"""A sweep that is killed and resumed ends as one that was not."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from sweep_driver import command, document, finish, journal, kill, mlflow_points, outcome, wait_for_events
from tiny_sweeps import sweep_file

from tune.decide.log import read_events
from tune.decide.stopping import Stopper
from tune.spec.load import load_sweep
from tune.spec.schema import Sweep
from tune.spec.space import Spec

SPACE = {
    "data.fraction": {"grid": [0.05, 0.1]},
    "method": {"grid": ["vit", "joint"]},
    "objective.vit.kd": {"loguniform": [0.1, 10], "when": {"method": "joint"}},
}
KILLS = 3


def make_file(folder: Path) -> Path:
    """24 trials: two fractions, the ViT alone and five weights of joint training, two seeds."""
    search = {"samples": 5, "seed": 3}
    return sweep_file(folder, space=SPACE, search=search, seeds=[0, 1], set={"tracking.log_every": 2})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    status, _, err = finish(command(make_file(folder)))
    assert status == 0, err
    assert len(outcome(folder / "runs" / "sweep")) == 24
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_three_kills_change_nothing(whole: Path, tmp_path: Path, seed: int) -> None:
    """SIGKILL to the driver three times, somewhere: the same trials, journals, results and MLflow points."""
    path = make_file(tmp_path)
    expected, killed = (folder / "runs" / "sweep" for folder in (whole, tmp_path))
    kill_three_times(path, killed, len((expected / "events.jsonl").read_text().splitlines()), seed)
    ended = {t["id"] for t in document(killed)["trials"] if t["status"] == "finished"}
    assert ended, "nothing had finished before the last kill: the test would show little"
    status, out, err = finish(command(path, "--resume"))
    assert status == 0, err

    assert outcome(killed) == outcome(expected)
    assert document(killed)["best"] == document(expected)["best"]
    for name in outcome(expected):
        assert journal(killed / "trials" / name) == journal(expected / "trials" / name), name
    again = {line.split("] ")[1].split("  ")[0] for line in out.splitlines() if line.startswith("[")}
    assert not again & ended, "a finished trial was run again"
    points, wanted = mlflow_points(tmp_path / "mlflow.db"), mlflow_points(whole / "mlflow.db")
    assert len(points) == 25
    for run, found in points.items():
        places = [(key, step) for key, step, _ in found]
        assert len(places) == len(set(places)), f"{run} has a point twice"
        if run != "sweep":
            assert found == wanted[run], run
    status, out, _ = finish(command(path, "--resume"))
    assert (status, out.count("nothing to do")) == (0, 1)


def kill_three_times(path: Path, folder: Path, events: int, seed: int) -> None:
    """Start the sweep and kill its driver, three times, at moments of a log that has so many events in the end."""
    generator = random.Random(seed)
    for moment in sorted(generator.sample(range(2, events - 2), KILLS)):
        process = command(path, "--resume")
        wait_for_events(folder, moment, process)
        time.sleep(generator.uniform(0, 0.5))
        assert process.poll() is None, "it was to be killed before its end"
        kill(process)


@pytest.mark.slow
def test_three_kills_with_early_stopping_two_at_a_time(whole: Path, tmp_path: Path) -> None:
    """Time decides which trial is compared first, and nothing else: the log, replayed, decides again what it says."""
    scheduler = {"name": "asha", "grace_epochs": 1, "reduction": 2}
    search = {"samples": 5, "seed": 3}
    path = sweep_file(tmp_path, space=SPACE, search=search, seeds=[0, 1], scheduler=scheduler, concurrency=2)
    folder, expected = (place / "runs" / "sweep" for place in (tmp_path, whole))
    kill_three_times(path, folder, events=60, seed=1)
    status, _, err = finish(command(path, "--resume"))
    assert status == 0, err
    trials = {t["id"]: t for t in document(folder)["trials"]}
    assert set(trials) == set(outcome(expected))
    assert {t["status"] for t in trials.values()} == {"finished", "stopped"}
    for name, trial in trials.items():
        whole_run = [row for row in journal(expected / "trials" / name) if row[1] < trial["epochs"]]
        found = journal(folder / "trials" / name)
        names = {(row[1], row[2]) for row in found}
        assert [row for row in found if row[2].startswith("held_out")] == [
            row for row in whole_run if row[2].startswith("held_out") and (row[1], row[2]) in names
        ], name
    check_replay(load_sweep(str(path)))


def check_replay(sweep: Sweep) -> None:
    """Give every value of the log to new rungs: they stop the trials that the log says were stopped, and no others."""
    events = list(read_events(sweep.folder / "events.jsonl"))
    specs = {one["id"]: Spec(**one) for event in events if event["event"] == "new" for one in event["trials"]}
    stopper = Stopper(sweep, 3)
    for event in events:
        if event["event"] == "result" and event["value"] is not None:
            stops = stopper.result(specs[event["id"]], event["epoch"], event["value"])
            stopped = event["verdict"] == "stopped"
            assert stopped == stops or event["verdict"] == "finished", event


@pytest.mark.slow
def test_three_kills_of_a_population(tmp_path: Path) -> None:
    """Rounds are decided from values and seed alone: the same copies, settings and accuracies, two at a time."""
    content = {
        "space": {"objective.vit.kd": {"loguniform": [0.1, 10]}},
        "search": {"algorithm": "pbt", "samples": 6, "interval": 1},
        "seeds": [0, 1],
        "set": {"schedule.epochs": 4, "data.fraction": 0.1},
        "concurrency": 2,
    }
    folders = []
    for name in ("whole", "killed"):
        place = tmp_path / name
        place.mkdir()
        path = sweep_file(place, **dict(content))
        folders.append(place / "runs" / "sweep")
        if name == "killed":
            kill_three_times(path, folders[1], len((folders[0] / "events.jsonl").read_text().splitlines()), seed=2)
        status, _, err = finish(command(path, "--resume"))
        assert status == 0, err
    assert outcome(folders[0]) == outcome(folders[1])
    assert document(folders[0])["best"] == document(folders[1])["best"]
    changes = [[t.get("changes") for t in document(folder)["trials"]] for folder in folders]
    assert changes[0] == changes[1]
    assert any(changes[0])
