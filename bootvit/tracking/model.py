"""The model that MLflow serves: a run's networks in plain torch and timm, with the code that loads them."""

from __future__ import annotations

import base64
import io
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bootvit.config import Config
from bootvit.tracking.store import time_to_upload

STEP = "bootvit.step"  # tag of a logged model: of which optimiser step
NAME = "model"  # as in runs:/ID/model
KIND = "image-classifier"
PACKAGES = ("torch", "timm", "safetensors", "pillow", "numpy")


def save_model(config: Config, run_dir: Path, folder: Path, about: Any) -> None:
    """Write MLflow's folder of a finished run's model, which needs no bootvit: weights of the newest checkpoint as
    safetensors, the code that loads them, signature, input example and packages.

    `about` is MLflow's `Model`, which says to what run it belongs.
    """
    import mlflow.pyfunc
    import pandas as pd

    from bootvit.export import PACKAGE, copy_package, opened, write_weights_and_facts

    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        data, code = Path(work) / "networks", Path(work) / PACKAGE
        copy_package(code)
        for net in config.networks:
            (data / net).mkdir(parents=True)
            write_weights_and_facts(opened(config, run_dir, net), data / net)
        mlflow.pyfunc.save_model(
            folder,
            loader_module=f"{PACKAGE}.served",
            data_path=str(data),
            code_paths=[str(code)],
            mlflow_model=about,
            signature=signature(config),
            input_example=pd.DataFrame({"image": [grey(*config.image_size)]}),
            pip_requirements=requirements(config),
        )


def log_model(client: Any, run_id: str, config: Config, run_dir: Path, step: int) -> Any:
    """Log the model of a finished run and return it: once for a step, and what was left half done is done."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    experiment = client.get_run(run_id).info.experiment_id
    model = own_model(client, experiment, run_id, step)
    if model is None:
        tags = {STEP: str(step), "bootvit.method": config.method}
        model = client.create_logged_model(experiment, NAME, run_id, tags=tags, model_type=KIND)
    if model.status == LoggedModelStatus.READY:
        return model
    model_id = str(model.model_id)
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".upload-") as work:
        folder = Path(work) / NAME
        about = Model(artifact_path=model.artifact_location, model_uuid=model_id, run_id=run_id, model_id=model_id)
        save_model(config, run_dir, folder, about)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        with time_to_upload(size):
            client.log_model_artifacts(model_id, str(folder))
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
    return client.finalize_logged_model(model_id, LoggedModelStatus.READY)


def own_model(client: Any, experiment: str, run_id: str, step: int) -> Any:
    """The model of this run and step that the store has; None if it has none."""
    found = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    return next((one for one in found if one.name == NAME and one.tags.get(STEP) == str(step)), None)


def register_model(client: Any, name: str, model: Any, run_id: str) -> None:
    """Make the model a version of a registered one, once."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as err:
        if err.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = model.artifact_location  # `models:/ID` would be looked up in whatever store this process is set to
    if not any(version.source == source for version in client.search_model_versions(f"name = '{name}'")):
        client.create_model_version(name, source, run_id, await_creation_for=0, model_id=model.model_id)


def signature(config: Config) -> Any:
    """A column `image`, and one of probabilities by class for every network; `top` says of how many classes."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType, Map

    answer = [ColSpec(Map(DataType.double), net) for net in config.networks]
    top = ParamSpec("top", DataType.long, 5)
    return ModelSignature(Schema([ColSpec(AnyType(), "image")]), Schema(answer), ParamSchema([top]))


def grey(rows: int, cols: int) -> str:
    """An image as it is sent to the server: a file's bytes in base64."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (cols, rows), (128, 128, 128)).save(out, format="PNG")
    return base64.b64encode(out.getvalue()).decode()


def requirements(config: Config) -> list[str]:
    """What the model imports, as it is installed here: a build of one's own (`+cpu`) is on no index."""
    sparse = ("entmax",) if "vit" in config.networks and config.model.vit.attention != "softmax" else ()
    return [f"{name}=={version(name).partition('+')[0]}" for name in (*PACKAGES, *sparse)]
