"""The model that MLflow serves: a run's networks in plain torch and timm, with the code that loads them."""

from __future__ import annotations

import base64
import io
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bootvit.config import Config

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
