"""Encoded bytes to RGB pixels, and a large image to the size that a network sees; only Pillow and NumPy.

Everything that can go wrong with one image is a `BrokenImage`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

# of damaged or oversized but readable images Pillow warns once for each and process: `data check` is the place for it
warnings.filterwarnings("ignore", module=r"PIL\..*")


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


def decode(data: bytes | memoryview) -> Image.Image:
    """The image as RGB, fully loaded.

    Grey, palette, CMYK and 16-bit grey images are converted. Transparency is dropped, as `PIL.Image.convert("RGB")`
    and torchvision do it: the colours below it appear. A truncated file is a `BrokenImage`.
    """
    if not len(data):
        raise BrokenImage("no bytes: the image is empty, missing or unreadable")
    with failing_as_broken(), Image.open(io.BytesIO(data)) as image:
        if not min(image.size):
            raise BrokenImage(f"it has {image.height}x{image.width} pixels")
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB; 16-bit grey keeps its upper 8 bits."""
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # Pillow warns about the direct way
    return image.convert("RGB")


def enlarge(image: Picture, size: tuple[int, int]) -> Picture:
    """Pillow's own bilinear resizing to (rows, columns)."""
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


LARGEST = 1 << 28  # pixels of a resized image: one of 1x100000 would fill the memory


def centre_crop(image: Picture, size: tuple[int, int]) -> Picture:
    """Evaluation of large images: shrink so that 256/224 of `size` is just covered, then cut out the centre."""
    rows, cols = shrunk(image.height, image.width, size)
    if rows * cols > LARGEST:
        raise BrokenImage(f"{image.height}x{image.width} pixels: too long to be cropped, {rows}x{cols} once resized")
    image = enlarge(image, (rows, cols))
    top, left = round((rows - size[0]) / 2), round((cols - size[1]) / 2)
    return image.crop((left, top, left + size[1], top + size[0]))


def covered(size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) that an image of any shape is shrunk to cover, before `size` is cut out of it: 256/224 of `size`.

    A square is rounded, as 256 of 224 is; other shapes are rounded down, as timm does it.
    """
    if size[0] == size[1]:
        side = round(size[0] * 256 / 224)
        return side, side
    return size[0] * 256 // 224, size[1] * 256 // 224


def shrunk(rows: int, cols: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of an image of rows x cols once it is shrunk: that of torchvision's Resize, or timm's for an oblong.

    torchvision truncates the longer side, timm's ResizeKeepRatio rounds it.
    """
    wanted = covered(size)
    if wanted[0] == wanted[1]:
        side = wanted[0]
        return (side, int(side * cols / rows)) if rows <= cols else (int(side * rows / cols), side)
    ratio = min(rows / wanted[0], cols / wanted[1])
    return round(rows / ratio), round(cols / ratio)
