"""What Python programs use: the same runs, weights and answers as on the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, write
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import bootvit
from bootvit.__main__ import main
from bootvit.config import dump_config
from bootvit.data import open_splits
from bootvit.data.batches import EvalBatches
from bootvit.errors import UserError
from bootvit.load import make_config

CHANGES = {"schedule.epochs": 2, "data.fraction": np.float64(0.2)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> bootvit.Run:
    folder = tmp_path_factory.mktemp("api")
    path = write(folder / "tiny.yaml", dump_config(make_config(TINY, "tiny")))
    return bootvit.train(path, CHANGES | {"ray.storage_path": folder / "runs"}, local=True)


def test_the_public_names_are_functions_and_cost_nothing_until_they_are_used() -> None:
    code = (
        "import sys, bootvit\n"
        "assert not {'ray', 'mlflow', 'bootvit.api', 'bootvit.driver'} & set(sys.modules)\n"
        "from bootvit import train, sweep, load_run, load_config\n"
        "assert all(callable(one) for one in (train, sweep, load_run, load_config))\n"
        "import bootvit.cli, bootvit.driver\n"
        "from bootvit import train as again\n"
        "assert again is train and set(bootvit.__all__) <= set(dir(bootvit))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_is_trained_and_found_again(trained: bootvit.Run) -> None:
    found = bootvit.load_run(trained.path)
    assert found.config == trained.config
    assert (found.config.schedule.epochs, found.config.data.fraction) == (2, 0.2)
    assert found.result["status"] == "finished"
    table = found.metrics
    assert table.column_names == ["step", "epoch", "name", "value", "time"]
    last = [row["value"] for row in table.to_pylist() if row["name"] == "test/vit/top1"][-1]
    assert last == pytest.approx(found.result["final"]["vit"]["top1"], abs=1e-3)


def test_evaluate_is_the_runs_own_final_accuracy(trained: bootvit.Run) -> None:
    counts = trained.evaluate()
    for net in ("vit", "agent"):
        assert counts[net]["top1"] == trained.result["final"][net]["top1"]
    assert trained.evaluate({"data.eval_batch_size": 7}) == counts
    with pytest.raises(UserError, match=r"only .* may differ"):
        trained.evaluate({"seed": 3})


def test_networks_are_plain_modules_with_the_weights_of_the_evaluation(trained: bootvit.Run) -> None:
    vit = trained.networks["vit"]
    assert isinstance(vit, VisionTransformer)
    assert not vit.training
    test = open_splits(trained.config.data).test
    facts = trained.data.preparation
    batches = list(EvalBatches(test, trained.config, facts, rank=0, world=1, device=torch.device("cpu")))
    counts = trained.evaluate()
    with torch.no_grad():
        for net, module in trained.networks.items():
            right = sum(int((module(b.images).argmax(1) == b.labels).sum()) for b in batches)
            assert right == counts[net]["correct"]


def test_predict_takes_files_pictures_and_arrays(
    trained: bootvit.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    by_file = trained.predict(path, top=3)
    assert by_file == trained.predict(pixels, top=3) == trained.predict([Image.fromarray(pixels)], top=3)
    assert trained.predict([path, pixels], top=3) == by_file * 2
    assert list(by_file[0]) == ["vit", "agent"]
    assert len(by_file[0]["vit"]) == 3
    capsys.readouterr()
    assert main(["predict", str(trained.path), str(path), "--top", "3", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["network"]: row["classes"] for row in rows} == by_file[0]
    with pytest.raises(UserError, match=r"expected .* of uint8"):
        trained.predict(pixels.astype(float))
    with pytest.raises(UserError, match=r"x\.txt: .*"):
        trained.predict(write(tmp_path / "x.txt", "no image"))


def test_mistakes_are_errors_before_anything_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"override 'data.fractoin=0.1': unknown key"):
        bootvit.train("digits/joint", {"data.fractoin": 0.1}, local=True)
    with pytest.raises(UserError, match="a config has no values of type set"):
        bootvit.load_config("digits/joint", {"data.fraction": {1}})
    with pytest.raises(UserError, match="expected a mapping"):
        bootvit.load_config("digits/joint", "data.fraction=0.1")
    with pytest.raises(UserError, match="gone: no run is there"):
        bootvit.load_run("gone")
    assert not list(tmp_path.iterdir())
    config = bootvit.load_config("digits/joint", {"name": "x", "model.vit.weights": None, "seed": 3})
    assert (config.name, config.model.vit.weights, config.seed) == ("x", None, 3)
