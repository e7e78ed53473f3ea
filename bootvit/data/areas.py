"""Random areas of large images, and how small one can be; without torch, which listing a data set has no need of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle of an image."""

    top: int
    left: int
    rows: int
    cols: int


TRIES = 10
AREA = (0.6, 1.0)  # share of an image that a random crop takes
ASPECT = (3 / 4, 4 / 3)  # its columns per row
AREA_NUMBERS = 24  # uniform numbers an area crop may use: area and aspect of 10 tries, place, flip, 1 to spare


def area_box(
    rows: int,
    cols: int,
    numbers: Sequence[float],
    area: tuple[float, float] = AREA,
    aspect: tuple[float, float] = ASPECT,
) -> Box:
    """A random part of an image, as torchvision's RandomResizedCrop chooses it, from 22 uniform numbers.

    Numbers 2t and 2t+1 are the area and the logarithm of the aspect of try t, 20 and 21 the place. If no try fits,
    the largest central part within the aspects.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for attempt in range(TRIES):
        pixels = rows * cols * (area[0] + (area[1] - area[0]) * numbers[2 * attempt])
        ratio = math.exp(low + (high - low) * numbers[2 * attempt + 1])
        width, height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < width <= cols and 0 < height <= rows:
            top = int(numbers[20] * (rows - height + 1))
            left = int(numbers[21] * (cols - width + 1))
            return Box(top, left, height, width)
    return _central_box(rows, cols, aspect)


def least_area_side(rows: int, cols: int) -> float:
    """The shortest side, in pixels, that `area_box` can give an image of rows x cols."""
    return min(rows, cols, math.sqrt(AREA[0] * rows * cols * ASPECT[0]))


def _central_box(rows: int, cols: int, aspect: tuple[float, float]) -> Box:
    height, width = rows, cols
    if cols / rows < aspect[0]:
        height = round(cols / aspect[0])
    elif cols / rows > aspect[1]:
        width = round(rows * aspect[1])
    return Box((rows - height) // 2, (cols - width) // 2, height, width)
