"""Real sweeps on the digits, each started as its users start it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sweep_driver import ROOT, command, document, finish, kill, mlflow_points, mlflow_tags, outcome, wait_for_events
from tiny_sweeps import make_sweep, sweep_file

from bootvit.__main__ import main
from bootvit.errors import UserError

KD = "objective.vit.kd"


def test_a_small_sweep_ends_with_winners_that_met_the_test_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two fractions, two weights, early stopping; sweep.json, run directories, MLflow and the second start."""
    space = {"data.fraction": {"grid": [0.05, 0.1]}, KD: {"grid": [0.5, 2]}}
    path = sweep_file(tmp_path, space=space, scheduler={"name": "asha", "grace_epochs": 2, "reduction": 2})
    status, out, err = finish(command(path), timeout=400)
    assert (status, err) == (0, ""), out
    folder = tmp_path / "runs" / "sweep"
    state = document(folder)
    assert (state["status"], len(state["trials"])) == ("finished", 4)
    assert {t["status"] for t in state["trials"]} <= {"finished", "stopped"}
    assert set(state["best"]) == {"data.fraction=0.05 method=joint", "data.fraction=0.1 method=joint"}
    for group, best in state["best"].items():
        rivals = [t for t in state["trials"] if t["group"] == group and t["status"] == "finished"]
        assert best["held_out"]["vit"]["top1"] == max(t["held_out"]["vit"]["top1"] for t in rivals)
        assert set(best["final"]) == {"vit", "agent"}
    winners = {best["trial"] for best in state["best"].values()}
    for trial in state["trials"]:
        result = json.loads((folder / trial["run"] / "result.json").read_text())
        assert (trial["final"] is not None) == (trial["id"] in winners), "only winners meet the test set"
        assert result["final"] == trial["final"]
        assert result["status"] == {"finished": "finished", "stopped": "interrupted"}[trial["status"]]
        assert trial["seconds"] > 0
        assert trial["epochs"] == result["epochs"] <= 3
    points = mlflow_points(tmp_path / "mlflow.db")
    assert set(points) == {"sweep", *(f"sweep/{t['id']}" for t in state["trials"])}
    assert main(["sweep", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--resume" in line


def test_a_mistake_ends_with_status_2_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(sweep_file(tmp_path, space={KD: {"grid": [1, -1]}}))
    for arguments in (
        [path],
        [path, "search.algoritm=grid"],
        [path, "space.objective.vit.kd.grid=[]"],
        ["sweeps/nothing"],
    ):
        assert main(["sweep", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_trials_resources_and_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(sweep_file(tmp_path, space={KD: {"grid": [1, 2]}, "method": {"grid": ["vit", "joint"]}}))
    assert main(["sweep", path, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for words in (
        "  objective.vit.kd=1 method=vit\n",
        "\n4 trials\n",
        "\neach trial: 1 CPU, 0 GPUs, 1 worker; at once: as many as fit; budget: none\n",
        "\nestimated cost: ",
    ):
        assert words in out
    asha = "scheduler={name: asha, grace_epochs: 1, reduction: 2}"
    assert main(["sweep", path, "--dry-run", asha]) == 0
    assert "\nstops: decided after 1, 2 of 3 epochs\n" in capsys.readouterr().out
    optuna = [
        "search.algorithm=optuna",
        "search.samples=5",
        "space.objective.vit.kd={uniform: [0, 1], grid: null, when: {method: joint}}",
        "budget.trials=3",
        "concurrency=2",
    ]
    assert main(["sweep", path, "--dry-run", *optuna]) == 0
    out = capsys.readouterr().out
    for words in (
        "\n10 trials: 2 cells x 5 samples, seeds 0\n",
        "\n  objective.vit.kd: uniform [0.0, 1.0] when method=joint\n",
        "; at once: 2; budget: trials=3 at_end=finish\n",
    ):
        assert words in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.cluster
def test_a_gpu_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, space={KD: {"grid": [1, 2]}}, resources={"gpu": 1})
    status, _, err = finish(command(path))
    assert (status, err.count("\n")) == (2, 1)
    assert "resources.gpu=1" in err
    assert not (tmp_path / "runs" / "sweep").exists()


@pytest.mark.cluster
def test_a_loss_that_is_not_finite_fails_its_trial_and_no_other(tmp_path: Path) -> None:
    """A rate of 1e30: every retry ends the same way; the sweep ends with 1 and its other trial finished."""
    space = {"optim.lr": {"grid": [1e30, 1e-3]}}
    status, out, err = finish(command(sweep_file(tmp_path, space=space, retries=1)))
    assert status == 1, out + err
    bad, good = document(tmp_path / "runs" / "sweep")["trials"]
    assert (bad["status"], bad["crashes"], good["status"]) == ("failed", 2, "finished")
    assert "not finite" in bad["reason"]
    assert "\n" not in bad["reason"]
    result = json.loads((tmp_path / "runs" / "sweep" / bad["run"] / "result.json").read_text())
    assert (result["status"], result["reason"]) == ("failed", bad["reason"])
    assert mlflow_tags(tmp_path / "mlflow.db", "bootvit.reason") == {f"sweep/{bad['id']}": bad["reason"]}


@pytest.mark.cluster
def test_a_killed_worker_is_retried_from_its_checkpoint(tmp_path: Path) -> None:
    space = {KD: {"grid": [1, 2]}}
    path = sweep_file(tmp_path, space=space, set={"schedule.epochs": 40}, concurrency=1)
    folder = tmp_path / "runs" / "sweep"
    process = command(path)
    wait_for_events(folder, 6, process)
    for worker in trial_workers(process.pid):
        os.kill(worker, signal.SIGKILL)
    status, out, err = finish(process)
    assert status == 0, out + err
    first, second = document(folder)["trials"]
    assert (first["status"], first["crashes"], second["crashes"]) == ("finished", 1, 0)
    epochs = [e["epoch"] for e in events(folder) if e["event"] == "result" and e["id"] == first["id"]]
    assert epochs == list(range(1, 41)), "it went on from its checkpoint: no epoch is there twice"


def trial_workers(driver: int) -> list[int]:
    """The actors that run trials below this process."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode()
        except OSError:
            continue  # it has just ended

    def belongs(pid: int) -> bool:
        while pid in parents and pid != driver:
            pid = parents[pid]
        return pid == driver

    return [pid for pid, title in titles.items() if title.startswith("ray::TrialActor") and belongs(pid)]


def events(folder: Path) -> list[dict[str, object]]:
    """The sweep's log."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.cluster
def test_winners_are_trained_again_with_the_held_out_images(tmp_path: Path) -> None:
    space = {KD: {"grid": [1, 2]}}
    path = sweep_file(tmp_path, space=space, test="retrain", seeds=[0, 1])
    status, out, err = finish(command(path))
    assert status == 0, out + err
    folder = tmp_path / "runs" / "sweep"
    (best,) = document(folder)["best"].values()
    runs = [t for t in document(folder)["trials"] if t["id"] in best["trials"]]
    assert [t["test_run"] for t in runs] == [f"winners/{t['id']}" for t in runs]
    for trial in runs:
        result = json.loads((folder / trial["test_run"] / "result.json").read_text())
        assert result["held_out"] is None
        assert result["final"] == trial["final"]
        assert json.loads((folder / trial["run"] / "result.json").read_text())["final"] is None
    assert best["final"]["vit"]["top1"] == pytest.approx(sum(t["final"]["vit"]["top1"] for t in runs) / 2)


@pytest.mark.cluster
def test_without_a_test_split_no_winner_has_a_test_accuracy(tmp_path: Path) -> None:
    for name, shade in (("dark", 20), ("light", 230)):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8), (shade + i,) * 3).save(tmp_path / "images" / "train" / name / f"{i}.png")
    data = {"source": "imagefolder", "root": str(tmp_path / "images"), "augment": "crop", "batch_size": 8}
    changes = {"data.fraction": 0.5, **{f"data.{key}": value for key, value in data.items()}}
    path = sweep_file(tmp_path, space={KD: {"grid": [1, 2]}}, set=changes)
    status, out, err = finish(command(path))
    assert status == 0, out + err
    state = document(tmp_path / "runs" / "sweep")
    (best,) = state["best"].values()
    assert best["held_out"]["vit"]["top1"] > 0
    assert [best["final"], *(trial["final"] for trial in state["trials"])] == [None] * 3
    assert "no test split" in out


@pytest.mark.cluster
def test_trials_of_two_workers_do_not_wait_for_one_another(tmp_path: Path) -> None:
    """On two CPUs a trial of two workers fills the machine; the third and fourth wait, and nothing hangs."""
    space = {KD: {"grid": [1, 2]}}
    scheduler = {"name": "asha", "grace_epochs": 1, "reduction": 2}
    path = sweep_file(tmp_path, space=space, set={"ray.num_workers": 2, "schedule.epochs": 4}, scheduler=scheduler)
    status, out, err = finish(command(path), timeout=600)
    assert status == 0, out + err
    assert {t["status"] for t in document(tmp_path / "runs" / "sweep")["trials"]} <= {"finished", "stopped"}


@pytest.mark.cluster
def test_a_population_trains_exchanges_and_survives_a_kill(tmp_path: Path) -> None:
    content = {
        "space": {KD: {"loguniform": [0.1, 10]}},
        "search": {"algorithm": "pbt", "samples": 4, "interval": 1},
    }
    outcomes = []
    for name, kills in (("whole", []), ("killed", [9, 16])):
        folder = tmp_path / name
        folder.mkdir()
        path = sweep_file(folder, **content)
        for moment in kills:
            process = command(path, "--resume")
            wait_for_events(folder / "runs" / "sweep", moment, process)
            kill(process)
        status, out, err = finish(command(path, "--resume"))
        assert status == 0, out + err
        outcomes.append(outcome(folder / "runs" / "sweep"))
        assert any(t.get("changes") for t in document(folder / "runs" / "sweep")["trials"])
    assert outcomes[0] == outcomes[1]


@pytest.mark.cluster
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_a_polite_kill_leaves_a_sweep_that_goes_on(sent: signal.Signals, tmp_path: Path) -> None:
    path = sweep_file(tmp_path, space={KD: {"grid": [1, 2]}}, set={"schedule.epochs": 30})
    folder = tmp_path / "runs" / "sweep"
    process = command(path)
    wait_for_events(folder, 8, process)
    process.send_signal(sent)
    status, _, err = finish(process)
    assert (status, "--resume" in err, "Traceback" in err) == (130, True, False)
    assert document(folder)["status"] == "interrupted"
    status, out, err = finish(command(path, "--resume"))
    assert status == 0, out + err


@pytest.mark.cluster
def test_a_server_that_was_down_gets_the_finished_sweep_later(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, space={KD: {"grid": [1, 2]}})
    status, out, err = finish(command(path, "tracking.uri=http://127.0.0.1:9"))
    assert (status, err.count("warning")) == (0, 1), out + err
    status, out, err = finish(command(path, "--resume"))
    assert (status, err) == (0, ""), out
    points = mlflow_points(tmp_path / "mlflow.db")
    assert len(points) == 3
    assert all(found for found in points.values())


@pytest.mark.cluster
@pytest.mark.parametrize("test", ["trial", "retrain"])
def test_a_kill_while_the_winners_are_tested(tmp_path: Path, test: str) -> None:
    path = sweep_file(tmp_path, space={KD: {"grid": [1, 2]}, "method": {"grid": ["vit", "joint"]}}, test=test)
    folder = tmp_path / "runs" / "sweep"
    process = command(path)
    wait_for_events(folder, 4, process, log="test-events.jsonl")
    kill(process)
    status, out, err = finish(command(path, "--resume"))
    assert status == 0, out + err
    state = document(folder)
    winners = {best["trial"] for best in state["best"].values()}
    assert all((t["final"] is not None) == (t["id"] in winners) for t in state["trials"])
    finals = [run for run, points in mlflow_points(tmp_path / "mlflow.db").items() if has_test(points)]
    ending = " retrained winner" if test == "retrain" else ""
    assert set(finals) == {f"sweep/{name}{ending}" for name in winners}


def has_test(points: list[tuple[str, int, float]]) -> bool:
    """Whether a run in MLflow says how it did on the test set."""
    return any(re.fullmatch(r"final/(vit|agent)/top1", key) for key, _, _ in points)


PYTHON_CALL = """
import sys
import bootvit
assert "ray" not in sys.modules
from tensorboardX import SummaryWriter
grid = bootvit.sweep(sys.argv[1], ["search.seed=0"])
best = grid.get_best_result(metric="value", mode="max")
print("errors", grid.num_errors, "trials", len(grid), "best", best.path, best.config)
again = bootvit.sweep(sys.argv[1], resume=True)
print("again", sorted((r.metrics["trial"], r.metrics["epoch"]) for r in again))
"""


@pytest.mark.cluster
def test_the_python_call_returns_tunes_results_and_callbacks_write(tmp_path: Path) -> None:
    """A ResultGrid with every trial by name and folder, also of a finished sweep; TensorBoard's files in the runs."""
    path = sweep_file(
        tmp_path, space={KD: {"grid": [1, 2]}}, callbacks=["ray.tune.logger:TBXLoggerCallback"], concurrency=1
    )
    words = [sys.executable, "-c", PYTHON_CALL, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "sweep"
    (best,) = document(folder)["best"].values()
    line = next(line for line in done.stdout.splitlines() if line.startswith("errors"))
    overrides = {**best["overrides"], "seed": 0}
    assert line == f"errors 0 trials 2 best {folder / 'trials' / best['trial']} {overrides}"
    assert "again [('0000-kd=1,seed=0', 3), ('0001-kd=2,seed=0', 3)]" in done.stdout
    for trial in document(folder)["trials"]:
        assert list((folder / trial["run"]).glob("events.out.tfevents.*")), "TensorBoard's"
        assert json.loads((folder / trial["run"] / "result.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.at.all:Thing", "No module named"),
        ("ray.tune.logger:Nothing", "has no Nothing"),
        ("ray.tune.logger:JsonLoggerCallback", "result.json"),
        ("pathlib:Path", "no ray.tune.Callback"),
    ],
)
def test_a_callback_that_is_none_is_one_line(tmp_path: Path, name: str, words: str) -> None:
    from tune.run.callbacks import make_callbacks

    with pytest.raises(UserError, match=words) as caught:
        make_callbacks(make_sweep(tmp_path, space={KD: {"grid": [1]}}, callbacks=[name]), ())
    assert str(tmp_path / "sweep.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)
