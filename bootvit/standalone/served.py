"""What MLflow loads and serves: every network of a run, asked for the classes of images.

A row has one column, `image`: the bytes of a file, the same in base64, or an array (rows, columns, 3) of 0 to 255. The
answer to a row is {network: {class: probability}}, the most probable first; the parameter `top` says how many.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import numpy as np

from .images import BrokenImage
from .networks import Loaded, load

Answer = dict[str, dict[str, float]]


class Served:
    """The networks, each under its name."""

    def __init__(self, networks: dict[str, Loaded]) -> None:
        self.networks = networks

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[Answer]:
        """One answer a row of a data frame with the column `image`; ValueError for what is no image."""
        images = [as_image(value, row) for row, value in enumerate(model_input["image"])]
        top = int((params or {}).get("top", 5))
        answers: list[Answer] = [{} for _ in images]
        for name, network in self.networks.items():
            for answer, classes in zip(answers, network.classify(images, top), strict=True):
                answer[name] = classes
        return answers


def as_image(value: Any, row: int) -> bytes | np.ndarray:
    """Bytes that are an image, or pixels."""
    if isinstance(value, str):
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"row {row}: image is a text, but not base64") from None
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    pixels = np.asarray(value)
    if pixels.dtype == object:  # rows of rows in a data frame
        pixels = np.array([[list(pixel) for pixel in line] for line in value])
    whole = pixels.ndim == 3 and pixels.shape[2] == 3 and bool((pixels == pixels.astype(np.uint8)).all())
    if not whole:
        raise ValueError(f"row {row}: image has the shape {pixels.shape}: expected (rows, columns, 3) of 0 to 255")
    return pixels.astype(np.uint8)


def _load_pyfunc(data_path: str) -> Served:
    """MLflow calls this with the folder that has a folder of every network."""
    folders = sorted(path.parent for path in Path(data_path).glob("*/config.json"))
    return Served({folder.name: load(folder) for folder in reversed(folders)})  # vit before agent


__all__ = ["Answer", "BrokenImage", "Served", "as_image"]
