"""Image folders: root/train/CLASS/... and root/test or root/val, or class folders directly in the root."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from bootvit.data.found import Found
from bootvit.data.table import FileImages
from bootvit.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TEST_FOLDERS = ("test", "val", "validation")


def read(root: Path, split: Literal["train", "test"], *, splits_only: bool) -> Found | None:
    """One split: classes are the training folders in sorted order, keys the paths below the split, with slashes.

    Class folders directly in the root are a training split alone, unless `splits_only` asks for train/ and val/.
    """
    train = root / "train"
    if not train.is_dir():
        if splits_only:
            raise UserError(f"data.root={root}: no folder 'train' there; imagenet needs train/ and val/")
        train = root
    classes = class_folders(train)
    if not classes:
        raise UserError(f"data.root={root}: no class folders in {train}")
    if split == "train":
        return _list(train, classes, every_class=True)
    test = _test_folder(root, "val" if splits_only else None) if train != root else None
    return _list(test, classes, every_class=False) if test else None


def _test_folder(root: Path, only: str | None) -> Path | None:
    """The folder of the test split: one without class folders has no labels and does not count."""
    names = (only,) if only else TEST_FOLDERS
    return next((root / name for name in names if (root / name).is_dir() and class_folders(root / name)), None)


def class_folders(folder: Path) -> list[str]:
    """The sorted names of the sub-folders, hidden ones aside."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _list(folder: Path, classes: list[str], *, every_class: bool) -> Found:
    unknown = sorted(set(class_folders(folder)) - set(classes))
    if unknown:
        raise UserError(f"{folder / unknown[0]}: there is no class {unknown[0]!r} among the training classes")
    keys: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = images_below(folder, name)
        if not files and every_class:
            raise UserError(f"{folder / name}: the class folder holds no images ({', '.join(ENDINGS)})")
        keys += files
        labels += [label] * len(files)
    images = FileImages(folder, pa.array(keys, pa.string()))
    return Found(images, np.array(labels, np.int64), keys, tuple(classes))


def images_below(folder: Path, name: str) -> list[str]:
    """The paths, relative to `folder`, of all images below one class folder, however deep, each once and sorted."""
    found = []
    for place, _, files in os.walk(folder / name, followlinks=True):
        found += [Path(place, file) for file in files if file.lower().endswith(ENDINGS) and not file.startswith(".")]
    return sorted(path.relative_to(folder).as_posix() for path in found)
