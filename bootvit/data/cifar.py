"""CIFAR-10 and CIFAR-100 from torchvision's files (`cifar-10-batches-py`, `cifar-100-python`), never downloaded."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bootvit.data.found import Found
from bootvit.data.keys import column
from bootvit.data.table import RGB, PixelImages, Rows, printable
from bootvit.errors import UserError

STD: RGB = (0.2023, 0.1994, 0.2010)  # CIFAR-10's; the reference uses it for CIFAR-100 too
MEAN: dict[str, RGB] = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4867, 0.4408)}
FOLDER = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
FILES = {
    ("cifar10", "train"): tuple(f"data_batch_{number}" for number in range(1, 6)),
    ("cifar10", "test"): ("test_batch",),
    ("cifar100", "train"): ("train",),
    ("cifar100", "test"): ("test",),
}
NAMES = {"cifar10": ("batches.meta", "label_names"), "cifar100": ("meta", "fine_label_names")}
LABEL = {"cifar10": "labels", "cifar100": "fine_labels"}


class _ArraysOnly(pickle.Unpickler):
    """Refuses everything but NumPy arrays, because a pickle may run any code."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = module.partition(".")[0] == "numpy" and name in ("_reconstruct", "_frombuffer", "ndarray", "dtype")
        if arrays or (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a CIFAR file")


def read(root: Path, source: Literal["cifar10", "cifar100"], split: Literal["train", "test"]) -> Found:
    """All images of a split; keys are their indices in the original files."""
    folder = root / FOLDER[source] if (root / FOLDER[source]).is_dir() else root
    batches = [_load(folder / name, source) for name in FILES[source, split]]
    parts = [_images(batch, source, folder / name) for batch, name in zip(batches, FILES[source, split], strict=True)]
    pixels, labels = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    file, field = NAMES[source]
    names = tuple(str(name) for name in _field(_load(folder / file, source), field, folder))
    keys = column(map(str, range(len(labels))))
    place = printable(folder)
    return Found(PixelImages(pixels), labels, keys, names, constants=(MEAN[source], STD), place=place)


def _images(batch: dict[str, Any], source: str, path: Path) -> tuple[npt.NDArray[np.uint8], Rows]:
    """((N, 32, 32, 3), (N,)) of one file."""
    data, labels = _field(batch, "data", path), _field(batch, LABEL[source], path)
    try:
        pixels = np.asarray(data, np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        numbers = np.asarray(labels, np.int64)
    except (TypeError, ValueError, OverflowError) as err:
        raise UserError(f"{path}: not a CIFAR file: {err}") from err
    if numbers.shape != (len(pixels),):
        raise UserError(f"{path}: not a whole CIFAR file: {len(pixels)} images and {numbers.size} labels")
    return np.ascontiguousarray(pixels), numbers


def _load(path: Path, source: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"data.root: {path} does not exist; source {source!r} reads the unpacked folder {FOLDER[source]!r} "
            "of torchvision and downloads nothing"
        )
    try:
        with path.open("rb") as file:
            content: dict[str, Any] = _ArraysOnly(file, encoding="latin1").load()
    except OSError:
        raise
    except Exception as err:  # a damaged pickle raises errors of any kind
        raise UserError(f"{path}: not a CIFAR file: {' '.join(str(err).split()) or type(err).__name__}") from err
    return content


def _field(content: dict[str, Any], name: str, path: Path) -> Any:
    if not isinstance(content, dict) or name not in content:
        raise UserError(f"{path}: not a CIFAR file: {name!r} is missing")
    return content[name]
