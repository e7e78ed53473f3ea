"""Encoded images: looked at without decoding, decoded (by the code that goes with exports too), and written."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from bootvit.standalone.images import BrokenImage, decode, failing_as_broken, to_rgb

__all__ = ["BrokenImage", "decode", "encode_png", "failing_as_broken", "header_size", "to_rgb"]


def header_size(data: bytes | memoryview) -> tuple[int, int]:
    """(rows, columns) without decoding the pixels."""
    with failing_as_broken(), Image.open(io.BytesIO(data)) as image:
        return image.height, image.width


def encode_png(pixels: np.ndarray) -> bytes:
    """(rows, columns, 3) uint8 as PNG, without loss."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()
