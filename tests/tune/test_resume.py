"""A sweep that is killed and resumed ends as one that was not."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from sweep_driver import command, document, finish, journal, kill, mlflow_points, outcome, wait_for_events
from tiny_sweeps import sweep_file

SPACE = {
    "data.fraction": {"grid": [0.05, 0.1]},
    "method": {"grid": ["vit", "joint"]},
    "objective.vit.kd": {"loguniform": [0.1, 10], "when": {"method": "joint"}},
}
KILLS = 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_three_kills_change_nothing(tmp_path: Path, seed: int) -> None:
    """24 trials; SIGKILL to the driver three times, somewhere; the same trials, journals and MLflow points."""
    folders = {name: tmp_path / name for name in ("whole", "killed")}
    paths = {}
    for name, folder in folders.items():
        folder.mkdir()
        search = {"samples": 5, "seed": 3}
        paths[name] = sweep_file(folder, space=SPACE, search=search, seeds=[0, 1], set={"tracking.log_every": 2})
    status, out, err = finish(command(paths["whole"]))
    assert status == 0, err
    whole = folders["whole"] / "runs" / "sweep"
    total = len((whole / "events.jsonl").read_text().splitlines())
    assert len(outcome(whole)) == 24

    generator = random.Random(seed)
    killed = folders["killed"] / "runs" / "sweep"
    for moment in sorted(generator.sample(range(2, total - 2), KILLS)):
        process = command(paths["killed"], "--resume")
        wait_for_events(killed, moment, process)
        time.sleep(generator.uniform(0, 0.5))
        assert process.poll() is None, "it was to be killed before its end"
        kill(process)
    ended = {t["id"] for t in document(killed)["trials"] if t["status"] == "finished"}
    assert ended, "nothing had finished before the last kill: the test would show little"
    status, out, err = finish(command(paths["killed"], "--resume"))
    assert status == 0, err

    assert outcome(killed) == outcome(whole)
    assert document(killed)["best"] == document(whole)["best"]
    for name in outcome(whole):
        assert journal(killed / "trials" / name) == journal(whole / "trials" / name), name
    assert not any(line.split("  ")[0].split("] ")[-1] in ended for line in out.splitlines() if line.startswith("["))
    points = {name: mlflow_points(folder / "mlflow.db") for name, folder in folders.items()}
    assert len(points["killed"]) == 25
    for run, found in points["killed"].items():
        places = [(key, step) for key, step, _ in found]
        assert len(places) == len(set(places)), f"{run} has a point twice"
        if run != "sweep":
            assert found == points["whole"][run], run
    status, out, _ = finish(command(paths["killed"], "--resume"))
    assert (status, out.count("nothing to do")) == (0, 1)
