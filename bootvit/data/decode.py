"""Encoded bytes to RGB pixels; everything that can go wrong with one image is a `BrokenImage`."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
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


def header_size(data: bytes | memoryview) -> tuple[int, int]:
    """(rows, columns) without decoding the pixels."""
    with failing_as_broken(), Image.open(io.BytesIO(data)) as image:
        return image.height, image.width


def encode_png(pixels: np.ndarray) -> bytes:
    """(rows, columns, 3) uint8 as PNG, without loss."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()
