"""Encoded bytes to pixels, RGB or of other channels; everything that can go wrong with one image is a `BrokenImage`."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

# of damaged or oversized but readable images Pillow warns once for each and process: `data check` is the place for it
warnings.filterwarnings("ignore", module=r"PIL\..*")


NUMPY = b"\x93NUMPY"  # with which its files begin


class BrokenImage(Exception):
    """One image that cannot be decoded; the message says why, the catcher knows which."""


@contextmanager
def failing_as_broken() -> Iterator[None]:
    """Turn whatever is raised inside into `BrokenImage`.

    Pillow's formats raise errors of any kind for damaged bytes (struct.error, KeyError, AttributeError,
    RecursionError ...), and `MemoryError` for absurd sizes.
    """
    try:
        yield
    except BrokenImage:
        raise
    except UnidentifiedImageError as err:  # its text is about a buffer
        raise BrokenImage("not an image, or one of an unknown format") from err
    except Exception as err:
        raise BrokenImage(" ".join(str(err).split())[:300] or type(err).__name__) from err


@dataclass(frozen=True)
class Planes:
    """An image of any number of channels, (rows, columns, channels) uint8, with the methods of Pillow's that we use."""

    pixels: npt.NDArray[np.uint8]

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.pixels.shape[1])

    def crop(self, box: tuple[int, int, int, int]) -> Planes:
        """A part of it: (left, top, right, bottom)."""
        left, top, right, bottom = box
        return Planes(self.pixels[top:bottom, left:right])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Planes:
        """Every channel as Pillow resizes it, to (columns, rows)."""
        planes = [Image.fromarray(plane).resize(size, resample) for plane in np.moveaxis(self.pixels, 2, 0)]
        return Planes(np.stack([np.asarray(plane) for plane in planes], axis=2))

    def transpose(self, method: Image.Transpose) -> Planes:
        """Mirrored left to right, the one way that is used."""
        assert method == Image.Transpose.FLIP_LEFT_RIGHT
        return Planes(self.pixels[:, ::-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.pixels if dtype is None else self.pixels.astype(dtype)


Picture = Image.Image | Planes  # RGB, or of another number of channels


class Reading(NamedTuple):
    """How stored values become 8-bit channels: what `data.channels` and `data.value_range` say."""

    channels: int = 3
    values: tuple[float, float] | None = None


RGB_READING = Reading()


def decode(data: bytes | memoryview, reading: Reading = RGB_READING) -> Picture:
    """The image, fully loaded: as RGB, or as `Planes` where other channels are read. A truncated file is a
    `BrokenImage`.

    For RGB, grey, palette, CMYK and 16-bit grey images are converted. Transparency is dropped, as
    `PIL.Image.convert("RGB")` and torchvision do it: the colours below it appear. NumPy's files hold (rows, columns) or
    (rows, columns, channels).
    """
    if not len(data):
        raise BrokenImage("no bytes: the image is empty, missing or unreadable")
    with failing_as_broken():
        if bytes(data[: len(NUMPY)]) == NUMPY:
            return planes_of(np.load(io.BytesIO(data), allow_pickle=False), reading)
        with Image.open(io.BytesIO(data)) as image:
            if not min(image.size):
                raise BrokenImage(f"it has {image.height}x{image.width} pixels")
            if reading.channels == 3:
                return to_rgb(image)
            return planes_of(values_of(image, reading.channels), reading)


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


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB; 16-bit grey keeps its upper 8 bits."""
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # Pillow warns about the direct way
    return image.convert("RGB")


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
