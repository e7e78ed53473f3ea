"""A data set of the user's own: anything with `__len__` and `__getitem__` that gives (image, label).

It is read once when it is opened and kept in memory: small images of one size as pixels, others encoded, without loss.
`bootvit data pack` makes Parquet files of one that is too large for that.
"""

from __future__ import annotations

import operator
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from bootvit.config import DataConfig
from bootvit.data.decode import encode_png, to_rgb
from bootvit.data.found import Found
from bootvit.data.keys import column
from bootvit.data.table import ArrowImages, PixelImages
from bootvit.errors import UserError
from bootvit.extensions import named

FORMS = "a PIL image, an array (rows, columns, 3) or (rows, columns) of uint8, a file's path, or its bytes"


def read(data: DataConfig, split: Literal["train", "test"]) -> Found | None:
    """The images of one split; None if `data.dataset` gives None for it. Keys are the places in the data set."""
    if data.dataset is None:
        raise UserError("data.dataset: source 'dataset' needs MODULE:NAME, which is called with 'train' and 'test'")
    where = f"data.dataset={data.dataset}"
    make = named("data.dataset", data.dataset)
    try:
        given = make(split)
        if given is None:
            return None
        items = [given[place] for place in range(len(given))]
    except Exception as err:  # whatever the user's code raises
        raise UserError(f"{where}: {split}: {type(err).__name__}: {' '.join(str(err).split())[:300]}") from err
    if not items:
        return None if split == "test" else _empty(where)
    images, labels = [], []
    for place, item in enumerate(items):
        try:
            image, label = item
            labels.append(operator.index(label))
            images.append(encoded_or_pixels(image))
        except (TypeError, ValueError, OSError) as err:
            raise UserError(f"{where}: {split}: item {place}: {err}; expected (image, label): {FORMS}") from err
    classes = getattr(given, "classes", None)
    names = tuple(str(name) for name in classes) if classes is not None else None
    keys = column(map(str, range(len(items))))
    return Found(together(images), np.array(labels, np.int64), keys, names, place=where)


def _empty(where: str) -> Found:
    raise UserError(f"{where}: there are no training images")


def encoded_or_pixels(image: Any) -> bytes | np.ndarray:
    """A file's bytes as they are; anything in memory as (rows, columns, 3) uint8."""
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(image))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise ValueError(f"an image of shape {pixels.shape} and {pixels.dtype}")
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)


def together(images: list[bytes | np.ndarray]) -> PixelImages | ArrowImages:
    """One array where all are pixels of one size, else all of them encoded."""
    pixels = [image for image in images if isinstance(image, np.ndarray)]
    if len(pixels) == len(images) and len({image.shape for image in pixels}) == 1:
        return PixelImages(np.stack(pixels))
    encoded = [image if isinstance(image, bytes) else encode_png(image) for image in images]
    return ArrowImages(pa.chunked_array([pa.array(encoded, pa.large_binary())]), np.arange(len(encoded)))


def pack_own(data: Any, out: Path) -> None:
    """Write a data set in memory, or two, (training, test), to a folder of Parquet files."""
    from bootvit.data.pack import pack

    train, test = data if isinstance(data, tuple) else (data, None)
    module = ModuleType("bootvit_given")
    module.split = lambda name: train if name == "train" else test  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    try:
        pack(DataConfig(source="dataset", dataset=f"{module.__name__}:split"), out)
    finally:
        del sys.modules[module.__name__]
