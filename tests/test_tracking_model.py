"""What MLflow gets of a finished run beside its metrics: a model that it serves, its load, its table, its data sets."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ONE, tiny
from PIL import Image

from bootvit.config import Config, override
from bootvit.errors import UserError
from bootvit.files import read_json
from bootvit.loop import fit
from bootvit.predict import predict
from bootvit.runs import claim
from bootvit.tracking import MlflowRun
from bootvit.tracking.machine import Machine, cpu_load
from bootvit.tracking.store import connect


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A shared run of one epoch."""
    config = tiny(method="shared", ray__storage_path=str(tmp_path_factory.mktemp("runs")), schedule__epochs=1)
    folder, _ = claim(config, resume=False, overwrite=False)
    fit(config, ONE, folder)
    return config


@pytest.fixture(scope="module")
def shipped(trained: Config, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, MlflowRun]:
    """The run in a store of its own, registered, sent twice."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(empty_store, folder / "mlflow.db")
    tracking = {"enabled": True, "uri": f"sqlite:///{folder}/mlflow.db", "register": "digits"}
    config = override(trained, {"tracking": tracking})
    for _ in range(2):
        tags = {"bootvit.kind": "run", "bootvit.data": "digits", "bootvit.data_fingerprint": "f" * 32}
        run = MlflowRun(config, config.run_dir, tags=tags)
        assert run.finish("FINISHED", read_json(config.run_dir / "result.json"))
    return config, run


def picture(folder: Path) -> Path:
    """A photograph of 37x53 pixels of noise."""
    path = folder / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def predicted(config: Config, image: Path) -> dict[str, dict[str, float]]:
    """What `bootvit predict` says: {network: {class: probability}}."""
    return {row["network"]: row["classes"] for row in predict(config, config.run_dir, [image])}


def same(answer: dict[str, dict[str, float]], wanted: dict[str, dict[str, float]]) -> None:
    """Networks, classes in their order, and probabilities but for the last digit."""
    assert list(answer) == list(wanted)
    for net, classes in wanted.items():
        assert list(answer[net]) == list(classes)
        assert answer[net] == pytest.approx(classes, abs=2e-6)


def test_a_finished_run_has_one_model_that_answers_as_predict_does(
    shipped: tuple[Config, MlflowRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.artifacts
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.entities import LoggedModelStatus

    config, run = shipped
    client = connect(run.uri)
    found = client.get_run(run.run_id)
    assert len(found.outputs.model_outputs) == 1
    model = client.get_logged_model(found.outputs.model_outputs[0].model_id)
    assert (model.name, model.status, model.source_run_id) == ("model", LoggedModelStatus.READY, run.run_id)
    (version,) = client.search_model_versions("name = 'digits'")
    assert (version.run_id, version.source) == (run.run_id, model.artifact_location)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)  # a model is looked up there, whatever the address given
    folder = mlflow.artifacts.download_artifacts(f"runs:/{run.run_id}/model", dst_path=str(tmp_path))
    assert "bootvit" not in Path(folder, "requirements.txt").read_text()
    loaded = mlflow.pyfunc.load_model(folder)
    image = picture(tmp_path)
    data, pixels = image.read_bytes(), np.asarray(Image.open(image))
    given = [data, base64.b64encode(data).decode(), pixels, pixels.tolist()]
    answers = [loaded.predict(pd.DataFrame({"image": [one]}))[0] for one in given]
    for answer in answers:
        same(answer, predicted(config, image))
    assert len(loaded.predict(loaded.input_example, params={"top": 2})[0]["agent"]) == 2
    with pytest.raises(ValueError, match="row 0: image is a text, but not base64"):
        loaded.predict(pd.DataFrame({"image": ["photo.png"]}))
    with pytest.raises(ValueError, match=r"row 0: image has the shape \(2, 2\)"):
        loaded.predict(pd.DataFrame({"image": [[[1, 2], [3, 4]]]}))


def test_a_run_has_its_table_and_both_data_sets_once(shipped: tuple[Config, MlflowRun]) -> None:
    config, run = shipped
    found = connect(run.uri).get_run(run.run_id)
    final = read_json(config.run_dir / "result.json")["final"]
    note = found.data.tags["mlflow.note.content"]
    assert f"| vit | evaluation | {final['vit']['top1']:.2f} | {final['vit']['top5']:.2f} |" in note
    sets = {(one.dataset.name, one.tags[0].value) for one in found.inputs.dataset_inputs}
    assert sets == {("digits", "training"), ("digits evaluation", "evaluation")}
    assert len(found.inputs.dataset_inputs) == 2


def test_a_note_of_somebody_stays(shipped: tuple[Config, MlflowRun]) -> None:
    config, run = shipped
    client = connect(run.uri)
    before = client.get_run(run.run_id).data.tags["mlflow.note.content"]
    client.set_tag(run.run_id, "mlflow.note.content", "the good one")
    again = MlflowRun(config, config.run_dir, tags={})
    assert again.finish("FINISHED", read_json(config.run_dir / "result.json"))
    assert client.get_run(run.run_id).data.tags["mlflow.note.content"] == "the good one"
    client.set_tag(run.run_id, "mlflow.note.content", before)


@pytest.mark.parametrize(
    ("kind", "status", "tracking"),
    [("trial", "FINISHED", {}), ("run", "KILLED", {}), ("run", "FINISHED", {"model": False})],
)
def test_which_runs_have_no_model(
    trained: Config, empty_store: Path, tmp_path: Path, kind: str, status: Any, tracking: dict[str, Any]
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    shutil.copytree(trained.run_dir, tmp_path / "tiny", ignore=shutil.ignore_patterns("mlflow.json"))
    places = {"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db", "checkpoints": "none", **tracking}
    config = override(trained, {"ray": {"storage_path": str(tmp_path)}, "tracking": places})
    run = MlflowRun(config, config.run_dir, tags={"bootvit.kind": kind})
    assert run.finish(status, read_json(config.run_dir / "result.json"))
    client = connect(run.uri)
    assert not client.search_logged_models([client.get_run(run.run_id).info.experiment_id])


def test_a_name_without_a_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"tracking\.model=false leaves nothing to register"):
        tiny(tracking__model=False, tracking__register="digits")


def test_the_load_of_the_machine_is_told_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("bootvit.tracking.machine.time.monotonic", lambda: clock[0])
    machine = Machine(torch.device("cpu"))
    clock[0] = 9.9
    assert machine.load() == {}
    clock[0] = 10.1
    load = machine.load()
    assert 0 < load["system/system_memory_usage_percentage"] < 100
    assert machine.load() == {}
    assert cpu_load((100, 1000), (400, 1400)) == {"system/cpu_utilization_percentage": 75.0}
    assert cpu_load(None, (1, 2)) == {}


# ---------------------------------------------------------------------------------------------------- serving


@contextmanager
def served(uri: str, model: str, folder: Path) -> Iterator[str]:
    """`mlflow models serve`; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["models", "serve", "-m", model, "--env-manager", "local", "--port", str(port), "--workers", "1"]
    env = os.environ | {
        "MLFLOW_TRACKING_URI": uri,
        "PYTHONPATH": "",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command],
            cwd=folder,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 300
        while time.monotonic() < until and server.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/ping", timeout=2).close()
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail((folder / "server.log").read_text())
        yield url
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


@pytest.mark.slow
def test_the_served_model_answers_as_predict_does(shipped: tuple[Config, MlflowRun], tmp_path: Path) -> None:
    config, run = shipped
    image = picture(tmp_path)
    pixels = np.asarray(Image.open(io.BytesIO(image.read_bytes()))).tolist()
    texts = [base64.b64encode(image.read_bytes()).decode(), pixels]
    with served(run.uri, f"runs:/{run.run_id}/model", tmp_path) as url:
        for given in texts:
            body = json.dumps({"dataframe_records": [{"image": given}]}).encode()
            request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                (said,) = json.load(answer)["predictions"]
            same(said, predicted(config, image))
