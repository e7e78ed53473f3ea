"""Encoded bytes to RGB pixels; everything that can go wrong with one image is a `BrokenImage`."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

_PIL_FAILURES = (
    OSError,  # truncated or unknown formats, and files that cannot be read
    SyntaxError,  # PNG chunks
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BrokenImage(Exception):
    """One image that cannot be decoded; the message says why, the catcher knows which."""


def decode(data: bytes | memoryview) -> Image.Image:
    """The image as RGB, fully loaded.

    Grey, palette, CMYK and 16-bit grey images are converted. Transparency is dropped, as `PIL.Image.convert("RGB")`
    and torchvision do it: the colours below it appear. A truncated file is a `BrokenImage`.
    """
    if not len(data):
        raise BrokenImage("no bytes: the image is empty, missing or unreadable")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(image)
    except _PIL_FAILURES as err:
        raise BrokenImage(" ".join(str(err).split()) or type(err).__name__) from err


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB; 16-bit grey keeps its upper 8 bits."""
    if image.mode in ("I", "I;16", "I;16L", "I;16B"):
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # Pillow warns about the direct way
    return image.convert("RGB")


def header_size(data: bytes | memoryview) -> tuple[int, int]:
    """(rows, columns) without decoding the pixels."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except _PIL_FAILURES as err:
        raise BrokenImage(" ".join(str(err).split()) or type(err).__name__) from err


def encode_png(pixels: np.ndarray) -> bytes:
    """(rows, columns, 3) uint8 as PNG, without loss."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()
