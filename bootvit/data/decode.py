"""Encoded images: looked at without decoding, decoded to RGB or other channels, and written.

RGB is decoded by the code that goes with exports too.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from bootvit.data.areas import least_area_side
from bootvit.standalone import images
from bootvit.standalone.images import BrokenImage, Picture, Planes, failing_as_broken, to_rgb

__all__ = [
    "BrokenImage",
    "Picture",
    "Planes",
    "Reading",
    "decode",
    "encode_png",
    "failing_as_broken",
    "header_size",
    "to_rgb",
]

NUMPY = b"\x93NUMPY"  # with which its files begin
JPEG = b"\xff\xd8"


def for_the_eye(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(..., channels) as (..., 3): the first three channels, or the first alone, in grey, where there are fewer."""
    return pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)


class Reading(NamedTuple):
    """How stored values become 8-bit channels: what `data.channels` and `data.value_range` say."""

    channels: int = 3
    values: tuple[float, float] | None = None
    crops: tuple[int, int] | None = None  # (rows, columns) that random areas become, for which less is decoded


RGB_READING = Reading()


def decode(data: bytes | memoryview, reading: Reading = RGB_READING) -> Picture:
    """The image, fully loaded: as RGB, or as `Planes` where other channels are read.

    NumPy's files hold (rows, columns) or (rows, columns, channels).
    """
    numpys = bytes(data[: len(NUMPY)]) == NUMPY
    if reading.channels == 3 and not numpys:
        jpeg = bytes(data[: len(JPEG)]) == JPEG
        return decode_reduced(data, reading.crops) if reading.crops and jpeg else images.decode(data)
    if not len(data):
        raise BrokenImage("no bytes: the image is empty, missing or unreadable")
    with failing_as_broken():
        if numpys:
            return planes_of(np.load(io.BytesIO(data), allow_pickle=False), reading)
        with Image.open(io.BytesIO(data)) as image:
            return planes_of(values_of(image, reading.channels), reading)


def decode_reduced(data: bytes | memoryview, crops: tuple[int, int]) -> Image.Image:
    """A JPEG as RGB, at the smallest of 1/1, 1/2, 1/4 and 1/8 of its size whose random areas still have `crops` pixels.

    The decoder leaves out what a smaller image does not show (DCT scaling), which is most of its work.
    """
    with failing_as_broken(), Image.open(io.BytesIO(data)) as image:
        spare = least_area_side(image.height, image.width) / max(crops)
        scale = max(scale for scale in (1, 2, 4, 8) if scale == 1 or scale <= spare)
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        return to_rgb(image)


def values_of(image: Image.Image, channels: int) -> npt.NDArray[Any]:
    """(rows, columns) or (rows, columns, n): a file's bands, or, one after another, its pages."""
    pages = getattr(image, "n_frames", 1)
    if pages > 1 and pages == channels:
        stacked = []
        for page in range(pages):
            image.seek(page)
            stacked.append(np.asarray(image))
        return np.stack(stacked, axis=2)
    if channels == 1 and image.mode not in ("L", "F") and not image.mode.startswith("I"):
        return np.asarray(to_rgb(image).convert("L"))
    return np.asarray(image)


def planes_of(values: npt.NDArray[Any], reading: Reading) -> Picture:
    """Values of any type as 8-bit channels; a `BrokenImage` for another number of channels."""
    values = values[:, :, None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[2] != reading.channels or not values.size:
        raise BrokenImage(f"it holds {'x'.join(map(str, values.shape))} values, but data.channels={reading.channels}")
    pixels = as_bytes(values, reading.values)
    return Image.fromarray(pixels) if reading.channels == 3 else Planes(pixels)


def as_bytes(values: npt.NDArray[Any], given: tuple[float, float] | None) -> npt.NDArray[np.uint8]:
    """Values from low to high as 0 to 255, what lies beyond cut off; 8-bit values stay as they are by themselves."""
    if values.dtype == np.uint8 and given is None:
        return values
    if values.dtype.kind not in "uifb" or (values.dtype.kind == "f" and not np.isfinite(values).all()):
        raise BrokenImage(f"its values of type {values.dtype} are no finite numbers")
    low, high = given or (0.0, float(np.iinfo(values.dtype).max) if values.dtype.kind in "ui" else 1.0)
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    out: npt.NDArray[np.uint8] = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return out


def header_size(data: bytes | memoryview) -> tuple[int, int]:
    """(rows, columns) without decoding the pixels."""
    with failing_as_broken():
        if bytes(data[: len(NUMPY)]) == NUMPY:
            rows, cols = np.load(io.BytesIO(data), allow_pickle=False).shape[:2]
            return rows, cols
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width


def encode_png(pixels: np.ndarray) -> bytes:
    """(rows, columns, channels) uint8 without loss: as PNG, or, where they are not 3, as NumPy's file."""
    out = io.BytesIO()
    if pixels.shape[2] != 3:
        np.save(out, pixels)
        return out.getvalue()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()
