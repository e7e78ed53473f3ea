"""Which weights of a run are in MLflow, and that what is downloaded from there is a run that can be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ONE, tiny

from bootvit import checkpoint
from bootvit.__main__ import main
from bootvit.config import Config, override
from bootvit.export import export
from bootvit.files import read_json
from bootvit.loop import fit
from bootvit.runs import claim
from bootvit.tracking import MlflowRun
from bootvit.tracking.artifacts import chosen
from bootvit.tracking.store import connect
from bootvit.weights import check_weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three epochs with a held-out part, of which the last two have their checkpoints."""
    config = tiny(data__held_out=0.3, ray__storage_path=str(tmp_path_factory.mktemp("runs")))
    folder, _ = claim(config, resume=False, overwrite=False)
    fit(config, ONE, folder)
    return config


def with_tracking(config: Config, **tracking: Any) -> Config:
    return override(config, {"tracking": {"enabled": True, **tracking}})


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


def shipped(config: Config, store: Path, **tracking: Any) -> tuple[Path, list[str]]:
    """What a run's artifacts are once they are downloaded: (folder, files in checkpoints/)."""
    config = with_tracking(config, uri=f"sqlite:///{store}/mlflow.db", **tracking)
    (config.run_dir / "mlflow.json").unlink(missing_ok=True)
    run = MlflowRun(config, config.run_dir, tags={})
    assert run.finish("FINISHED", read_json(config.run_dir / "result.json"))
    (store / "downloads").mkdir(exist_ok=True)
    found = connect(run.uri).download_artifacts(run.run_id, "", str(store / "downloads"))
    return Path(found), sorted(path.name for path in Path(found, "checkpoints").glob("*"))


def score(config: Config, top1: dict[int, float]) -> None:
    """Replace the journal's held-out accuracies: {epochs done: top-1}."""
    path = config.run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["name"] == "held_out/vit/top1":
            row["value"] = top1.get(row["epoch"] + 1, row["value"])
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_which_checkpoints_are_chosen(trained: Config) -> None:
    def epochs(**tracking: Any) -> list[int]:
        return [saved.epoch for saved in chosen(with_tracking(trained, **tracking), trained.run_dir)]

    score(trained, {1: 90.0, 2: 40.0, 3: 30.0})
    assert (epochs(), epochs(checkpoints="all"), epochs(checkpoints="none")) == ([2], [2, 3], [])
    score(trained, {2: 30.0, 3: 30.0})
    assert epochs() == [3], "the newer of two equal ones"


def test_without_held_out_images_the_test_set_does_not_choose(tmp_path: Path) -> None:
    config = tiny(ray__storage_path=str(tmp_path), schedule__epochs=2)
    folder, _ = claim(config, resume=False, overwrite=False)
    fit(config, ONE, folder)
    path = folder.journal
    path.write_text(path.read_text().replace('"test/vit/top1", "value": ', '"test/vit/top1", "value": 9', 1))
    assert [saved.epoch for saved in chosen(config, config.run_dir)] == [2]


def test_a_run_that_did_not_finish_keeps_its_weights_to_itself(trained: Config, tmp_path: Path) -> None:
    unfinished = override(trained, {"ray": {"storage_path": str(tmp_path)}})
    state: dict[str, Any] = {"learner": {"networks": {}}, "data": {}}
    checkpoint.write(unfinished.run_dir / "checkpoints", checkpoint.pack(state), epoch=1, step=5, final=False)
    assert chosen(with_tracking(unfinished, checkpoints="all"), unfinished.run_dir) == []


def test_what_is_in_mlflow_is_a_run_without_moments(
    trained: Config, tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`eval`, `export`, `predict` and warm starts take the downloaded folder as they take the run's own."""
    score(trained, {2: 30.0, 3: 40.0})
    folder, names = shipped(trained, store)
    assert names == ["weights-step-00000012.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.yaml", "result.json"]
    weights = folder / "checkpoints" / names[0]
    newest = checkpoint.newest(trained.run_dir / "checkpoints")
    assert newest is not None
    state = checkpoint.load(newest)
    sent = checkpoint.unpack(weights.read_bytes(), weights)["learner"]
    assert list(sent) == ["networks"]
    assert all(torch.equal(tensor, sent["networks"][name]) for name, tensor in state["learner"]["networks"].items())
    assert set(sent["networks"]) == set(state["learner"]["networks"])
    assert not list(trained.run_dir.glob(".upload-*"))

    answers = []
    for run in (trained.run_dir, folder):
        assert main(["eval", str(run), "--local", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert export(trained, folder, "torchscript", out=tmp_path / "x.pt").exists()
    for given in (folder, weights):
        (note,) = check_weights(override(trained, {"name": "warm", "model": {"vit": {"weights": str(given)}}}))
        own = sum(name.startswith("vit.") for name in sent["networks"])
        assert f" of the network's {own} tensors" in note
    damaged = weights.read_bytes()[:-9]
    weights.write_bytes(damaged)
    assert main(["eval", str(folder), "--local"]) == 2
    assert "weights-step-00000012.safetensors: not a checkpoint of bootvit" in capsys.readouterr().err


def test_with_moments_what_is_in_mlflow_can_be_resumed(trained: Config, store: Path) -> None:
    folder, names = shipped(trained, store, checkpoints="all", moments=True)
    assert names == [f"step-000000{step}.{kind}" for step in ("08", "12") for kind in ("json", "safetensors")]
    saved = checkpoint.newest(folder / "checkpoints")
    assert saved is not None
    assert checkpoint.load(saved)["learner"]["optimizers"]


def test_none_uploads_none_and_a_damaged_one_is_said(
    trained: Config, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shipped(trained, store, checkpoints="none")[1] == []
    path = trained.run_dir / "checkpoints" / "step-00000012.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1])
        assert shipped(trained, store, checkpoints="all")[1] == ["weights-step-00000008.safetensors"]
    finally:
        path.write_bytes(whole)
    assert capsys.readouterr().err == f"bootvit: {path} is damaged or gone: it is not in MLflow\n"
