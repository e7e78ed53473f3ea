"""Where images come from: each source becomes an `ImageTable` per split, and nothing is ever downloaded.

Keys: an image folder's path below its split; a Parquet row's `key` or `image.path`, else the SHA-256 of its bytes;
elsewhere the index in the original files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bootvit.addresses import public_address, wrong_with
from bootvit.config import DataConfig, pair
from bootvit.data import cifar, folders, own, parquet
from bootvit.data.cache import remembered, remembered_rows
from bootvit.data.decode import RGB_READING, BrokenImage, Reading, decode, encode_png, header_size
from bootvit.data.found import Found, relabel
from bootvit.data.keys import LARGE, by_hash, column, fingerprint_of
from bootvit.data.notes import class_notes, orientation_notes, test_notes
from bootvit.data.stores import ADDRESS, StorePath, open_root
from bootvit.data.table import (
    RGB,
    ArrowImages,
    FileImages,
    Images,
    ImageTable,
    ParquetImages,
    PixelImages,
    Place,
    Rows,
)
from bootvit.errors import UserError

Split = Literal["train", "test"]
T = TypeVar("T")

IMAGENET: tuple[RGB, RGB] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = 96  # the longest side, in pixels, of images that are kept decoded in memory
MANY_CLASSES = 100_000  # without names of their own
PROBED = 64  # images whose size decides whether all are small
MEASURED = 1000  # images from which an unknown data set's mean and deviation are computed


def open_table(
    data: DataConfig,
    split: Split,
    like: ImageTable | None = None,
    classes: tuple[str, ...] | None = None,
    notes: list[str] | None = None,
) -> ImageTable | None:
    """One split, or None if the source has no such split; a source without training images is a `UserError`.

    `like` is the training table, whose classes, mean, deviation and size class the test split takes over. With
    `classes`, those of a run, labels count in them, by name. What is assumed is added to `notes`, a sentence each.
    """
    notes = [] if notes is None else notes
    if split == "test" and like is None:
        like = open_table(data, "train", classes=classes)
    found = _read_as(_find(data, split, notes), data)
    if found is None or not len(found.labels):
        if split == "test" and found is None:
            return None
        raise UserError(f"data.root={data.root}: the {split} split of source {data.source!r} has no images")
    return _finish(found, data, like, classes, notes)


def _read_as(found: Found | None, data: DataConfig) -> Found | None:
    """The same with images read as `data.channels` says."""
    if found is None or isinstance(found.images, PixelImages):
        have = 3 if found is None else found.images.pixels.shape[3]  # type: ignore[union-attr]
        if found is not None and have != data.channels:
            raise UserError(f"data.channels={data.channels}: the images of source {data.source!r} have {have}")
        return found
    images = replace(found.images, reading=reading_of(data))
    return found if data.channels == 3 else replace(found, images=images, constants=None)


def reading_of(data: DataConfig) -> Reading:
    """How a config's images are read."""
    return RGB_READING if data.channels == 3 else Reading(data.channels, data.value_range)


def _find(data: DataConfig, split: Split, notes: list[str]) -> Found | None:
    if data.source == "digits":
        return _digits(split, data.channels)
    if data.source == "fake":
        return _fake(data, split)
    if data.source == "dataset":
        return own.read(data, split)
    root = _root(data)
    held_out = data.held_out > 0
    if data.source == "parquet" or isinstance(root, StorePath):
        return parquet.read(root, split, held_out=held_out, notes=notes)
    if data.source in ("cifar10", "cifar100"):
        return cifar.read(root, data.source, split)
    return folders.read(root, split, splits_only=data.source == "imagenet", held_out=held_out, notes=notes)


def _root(data: DataConfig) -> Place:
    if data.root is None:
        raise UserError(f"data.root: source {data.source!r} needs the folder that holds its files")
    if ADDRESS.match(data.root):
        if wrong := wrong_with(data.root, data.source):
            raise UserError(f"data.root={public_address(data.root)}: {wrong}")
        return open_root(data.root)
    root = Path(data.root)
    if not root.is_dir():
        what = "is a file, not the folder that holds the data set" if root.is_file() else "no such folder"
        raise UserError(f"data.root={data.root}: {what}")
    return root


# ------------------------------------------------------------------------------------------ made in memory


def _digits(split: Split, channels: int) -> Found:
    """scikit-learn's 1,797 digits of 8x8 pixels, grey 0..16 as 0..255.

    They come without a split: the test part is the last fifth of each class in hash order, 358 images.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as err:
        raise UserError("data.source=digits needs scikit-learn: pip install scikit-learn") from err
    raw = load_digits()
    grey = np.round(raw.images * (255 / 16)).astype(np.uint8)
    labels = raw.target.astype(np.int64)
    rows = _digits_rows(labels, split)
    pixels = np.repeat(grey[rows, :, :, None], min(channels, 3), axis=3)
    names = tuple(str(digit) for digit in range(10))
    return Found(PixelImages(pixels), labels[rows], column(map(str, rows)), names, auto="none")


def _digits_rows(labels: Rows, split: Split) -> Rows:
    order = by_hash(column(map(str, range(len(labels)))))
    parts = []
    for digit in range(10):
        rows = order[labels[order] == digit]
        kept = len(rows) - round(len(rows) / 5)
        parts.append(rows[:kept] if split == "train" else rows[kept:])
    return np.sort(np.concatenate(parts))


def _fake(data: DataConfig, split: Split) -> Found:
    """Striped noise that a network can learn, for tests: 40 training and 10 test images a class (4 by default).

    Up to 96 px the images are raw and of `data.image_size`, above they are PNG files of various sizes.
    """
    count = data.num_classes or 4
    labels = np.arange((40 if split == "train" else 10) * count, dtype=np.int64) % count
    keys = column(f"{split}-{row}" for row in range(len(labels)))
    classes = tuple(str(label) for label in range(count))
    rows, cols = pair(data.image_size)
    if max(rows, cols) <= SMALL:
        pixels = np.stack([_stripes(row, row % count, count, (rows, cols), split) for row in range(len(labels))])
        return Found(PixelImages(pixels), labels, keys, classes)
    encoded = [
        encode_png(_stripes(row, row % count, count, (rows + row % 7 * 5, cols + row % 5 * 9), split))
        for row in range(len(labels))
    ]
    images = pa.chunked_array([pa.array(encoded, pa.binary())])
    return Found(ArrowImages(images, np.arange(len(encoded))), labels, keys, classes)


def _stripes(row: int, label: int, count: int, size: tuple[int, int], split: Split) -> npt.NDArray[np.uint8]:
    """(*size, 3): stripes whose number tells the class, with noise."""
    rows, cols = size
    noise = np.random.default_rng([row, split == "test"]).normal(0, 20, (rows, cols, 3))
    wave = np.sin(np.linspace(0, 2 * np.pi * (label + 1) / count * 4, rows))[:, None, None]
    out: npt.NDArray[np.uint8] = np.clip(128 + 80 * wave + noise, 0, 255).astype(np.uint8)
    return out


# ----------------------------------------------------------------------------------------------- completion


def _finish(
    found: Found, data: DataConfig, like: ImageTable | None, classes: tuple[str, ...] | None, notes: list[str]
) -> ImageTable:
    names = _own_names(found, data)
    if like is None and classes is None:
        _check_count(names, data)
    own = names + tuple(str(label) for label in range(len(names), data.num_classes or 0))
    wanted = like.classes if like else classes or own
    _check_labels(found, own, data)
    where = f"data.root={data.root}: {found.place}" if found.place else f"data.source={data.source}"
    labels = relabel(found.labels, own, wanted, where)
    images = found.images
    first = [] if like or isinstance(images, PixelImages) else first_images(images)
    native = like.native if like else found.native if found.packed else native_size(found.images, first)
    order = found.order if found.order is not None else _hash_order(found)
    mean, std = (like.mean, like.std) if like else _constants(found, data, native, order)
    auto = like.auto if like else found.auto or ("crop" if native else "area")
    rows = pa.table({"label": pa.array(labels, pa.int64()), "key": found.keys})
    fingerprint = found.fingerprint
    if fingerprint is None:
        make = lambda: [fingerprint_of(images, found.labels, found.keys, order)]  # noqa: E731
        (fingerprint,) = _kept(images, "fingerprint", pa.string(), make, large=len(found.labels) > LARGE)
    if like:
        notes += test_notes(found.place or data.source, labels, like.labels, wanted)
    else:
        notes += class_notes(found.place or data.source, found.labels, names, numbered=found.classes is None)
        notes += orientation_notes(found.place or data.source, first)
    return ImageTable(rows, order, found.images, wanted, mean, std, fingerprint, native, auto)


def _own_names(found: Found, data: DataConfig) -> tuple[str, ...]:
    """The source's class names; without any, the numbers up to the largest label, within reason."""
    if found.classes is not None:
        return found.classes
    row = int(found.labels.argmax())
    count = int(found.labels[row]) + 1
    limit = max(data.num_classes or 0, min(MANY_CLASSES, max(1000, 10 * len(found.labels))))
    if count > limit:
        hint = ", or set data.num_classes" if count <= MANY_CLASSES else ""
        raise UserError(
            f"{found.images.where(row)}: column {found.column!r} has {count - 1}, which would make {count} classes for "
            f"{len(found.labels)} images: number the classes from 0{hint}"
        )
    return tuple(map(str, range(max(count, 1))))


def _check_count(names: tuple[str, ...], data: DataConfig) -> None:
    wanted = data.num_classes or len(names)
    if wanted < len(names):
        raise UserError(f"data.num_classes={wanted}: the source has {len(names)} classes; use null or a larger number")
    if wanted > max(MANY_CLASSES, len(names)):
        raise UserError(f"data.num_classes={wanted}: the source has {len(names)} classes; at most {MANY_CLASSES} here")


def _check_labels(found: Found, classes: Sequence[str], data: DataConfig) -> None:
    wrong = np.flatnonzero((found.labels < 0) | (found.labels >= len(classes)))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{found.place or data.source}: image {found.keys[row].as_py()!r} has label {found.labels[row]}, "
            f"but there are {len(classes)} classes (0 to {len(classes) - 1})"
        )


def _hash_order(found: Found) -> Rows:
    if isinstance(found.images, ParquetImages) and len(found.labels) > LARGE:
        return remembered_rows("hash order", found.images.stamp(np.arange(0)), lambda: by_hash(found.keys))
    return by_hash(found.keys)


def _constants(found: Found, data: DataConfig, native: tuple[int, int] | None, order: Rows) -> tuple[RGB, RGB]:
    """Mean and deviation: the user's, the source's, measured for small images, else ImageNet's."""
    if data.mean is not None and data.std is not None:
        return data.mean, data.std
    if found.constants is not None:
        mean, std = found.constants
    elif data.channels != 3 or (native and not isinstance(found.images, FileImages)):
        numbers = _kept(
            found.images,
            "mean, std",
            pa.float64(),
            lambda: [n for rgb in measure(found.images, order[:MEASURED]) for n in rgb],
        )
        mean, std = _rgb(numbers[: data.channels]), _rgb(numbers[data.channels :])
    else:
        mean, std = IMAGENET
    return data.mean or mean, data.std or std


def _kept(images: Images, what: str, kind: pa.DataType, make: Callable[[], list[T]], *, large: bool = False) -> list[T]:
    """What is made of the images; of those in Parquet files in an object store, or of many, once per node."""
    if isinstance(images, ParquetImages) and (images.stored or large):
        return remembered(what, images.stamp(np.arange(0)), kind, make)
    return make()


def first_images(images: FileImages | ArrowImages | ParquetImages) -> list[bytes]:
    """The first 64 encoded images."""
    if isinstance(images, ParquetImages):
        return _kept(images, "first", pa.large_binary(), lambda: images.first(PROBED))
    count = len(images.paths) if isinstance(images, FileImages) else len(images.column)
    return [data for _, data in images.scan(np.arange(min(PROBED, count)))]


def native_size(images: Images, first: Sequence[bytes]) -> tuple[int, int] | None:
    """(rows, columns) if the first images, broken ones aside, have one size of at most 96 px; else None."""
    if isinstance(images, PixelImages):
        rows, cols = images.pixels.shape[1:3]
        return (rows, cols) if max(rows, cols) <= SMALL else None
    sizes = set()
    for data in first:
        try:
            sizes.add(header_size(data))
        except BrokenImage:
            continue  # reported when the images are used
    size = sizes.pop() if len(sizes) == 1 else None
    return size if size and max(size) <= SMALL else None


def measure(images: Images, rows: Rows) -> tuple[RGB, RGB]:
    """Mean and deviation per channel over the pixels of some images (broken ones aside), to 4 decimals."""
    channels = images.reading.channels
    total, squares, count = np.zeros(channels, np.int64), np.zeros(channels, np.int64), 0
    for pixels in _arrays(images, rows):
        flat = pixels.reshape(-1, channels).astype(np.int64)
        total, squares, count = total + flat.sum(0), squares + (flat**2).sum(0), count + len(flat)
    if not count:
        return IMAGENET if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
    mean = total / count / 255
    std = np.sqrt(np.maximum(squares / count / 255**2 - mean**2, 1e-6))
    return _rgb(mean), _rgb(std)


def _arrays(images: Images, rows: Rows) -> list[npt.NDArray[np.uint8]]:
    if isinstance(images, PixelImages):
        return [images.pixels[row] for row in rows]
    out = []
    for _, data in images.scan(rows):
        try:
            out.append(np.asarray(decode(data, images.reading)))
        except BrokenImage:
            continue  # reported when the images are used
    return out


def _rgb(values: npt.NDArray[np.float64] | Sequence[float]) -> RGB:
    return tuple(round(float(value), 4) for value in values)
