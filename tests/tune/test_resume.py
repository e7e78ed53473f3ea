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
    total = len((expected / "events.jsonl").read_text().splitlines())
    generator = random.Random(seed)
    for moment in sorted(generator.sample(range(2, total - 2), KILLS)):
        process = command(path, "--resume")
        wait_for_events(killed, moment, process)
        time.sleep(generator.uniform(0, 0.5))
        assert process.poll() is None, "it was to be killed before its end"
        kill(process)
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
