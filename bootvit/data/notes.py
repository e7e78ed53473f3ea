"""What is assumed about a data set, in sentences for `data info` and the first lines of a run."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from bootvit.data.found import listed
from bootvit.data.table import Rows

ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


def class_notes(where: str, labels: Rows, names: Sequence[str], *, numbered: bool) -> Iterator[str]:
    """Of a training split: classes without an image, labels that begin at 1 (`numbered`: no names), a single class."""
    counts = np.bincount(labels, minlength=len(names))
    empty = np.flatnonzero(counts == 0)
    if numbered and counts[0] == 0 and len(empty) == 1:
        yield f"{where}: labels begin at 1, so class '0' has no image"
    elif len(empty):
        yield f"{where}: classes without a training image: {listed(names[int(label)] for label in empty)}"
    if np.count_nonzero(counts) == 1:
        yield f"{where}: all images are of one class, {names[int(counts.argmax())]!r}"


def test_notes(where: str, labels: Rows, trained: Rows, names: Sequence[str]) -> Iterator[str]:
    """Of a test split: classes that were trained and are not tested."""
    counts = (np.bincount(part, minlength=len(names)) for part in (labels, trained))
    tested, known = counts
    empty = np.flatnonzero((tested == 0) & (known > 0))
    if len(empty):
        yield f"{where}: classes without a test image: {listed(names[int(label)] for label in empty)}"


def orientation_notes(where: str, images: Sequence[bytes]) -> Iterator[str]:
    """Photographs that a camera says are to be turned: they are not."""
    turned = sum(orientation(data) != 1 for data in images)
    if turned:
        yield f"{where}: {turned} of the first {len(images)} images have an EXIF orientation, which is left alone"


def orientation(data: bytes) -> int:
    """EXIF's number from 1 to 8, from the head of an encoded image; 1 if it has none, or cannot be read at all."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            return int(exif.get(ORIENTATION, 1))
    except Exception:  # a broken image is reported when it is used; Pillow's errors are of every kind
        return 1
