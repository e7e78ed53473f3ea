"""Resizing as Pillow does it: on the device in whole batches, bit for bit, and the random crops of large images.

Pillow's bilinear filter works in two passes, horizontal then vertical, with coefficients of 22 bits; each pass is
rounded to 8 bits. `resize_batch` does the same with integers, so it agrees exactly on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bootvit.data.areas import area_box
from bootvit.standalone.images import Picture, enlarge

PRECISION = 22  # bits of a coefficient: 32, less 8 of a pixel and 2 to spare


@lru_cache(maxsize=64)
def bilinear_taps(source: int, target: int) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """(positions, coefficients), each (taps, target): what each output pixel sums over, along one axis."""
    scale = source / target
    support = max(scale, 1.0)
    positions, coefficients = [], []
    for out in range(target):
        center = (out + 0.5) * scale
        first = max(0, int(center - support + 0.5))
        last = min(source, int(center + support + 0.5))
        weights = [max(0.0, 1.0 - abs((x - center + 0.5) * (1.0 / support))) for x in range(first, last)]
        total = sum(weights)
        positions.append(list(range(first, last)))
        coefficients.append([int(0.5 + weight / total * (1 << PRECISION)) for weight in weights])
    taps = max(len(row) for row in positions)
    for row in (*positions, *coefficients):
        row.extend([0] * (taps - len(row)))
    return tuple(zip(*positions, strict=True)), tuple(zip(*coefficients, strict=True))


def resize_batch(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(batch, channels, rows, cols) uint8 to (batch, channels, *size) uint8, equal to Pillow's BILINEAR."""
    rows_first = _rows_first((images.shape[2], images.shape[3]), size)
    for axis in (2, 3) if rows_first else (3, 2):
        images = _resize_axis(images, axis, size[axis - 2])
    return images


@lru_cache(maxsize=64)
def _rows_first(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether the installed Pillow resizes rows before columns (the newest chooses by cost): asked of an example."""
    pixels = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    wanted = np.asarray(enlarge(Image.fromarray(pixels), target))
    example = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    columns_first = _resize_axis(_resize_axis(example, 3, target[1]), 2, target[0])
    return not np.array_equal(columns_first[0].permute(1, 2, 0).numpy(), wanted)


def _resize_axis(images: Tensor, axis: int, target: int) -> Tensor:
    if images.shape[axis] == target:
        return images
    shape = [1, 1, 1, 1]
    shape[axis] = target
    total: Tensor | None = None
    for where, what in _taps_on(images.device, images.shape[axis], target):
        picked = images.index_select(axis, where).int()
        picked *= what.view(shape)
        total = picked if total is None else total.add_(picked)
    assert total is not None  # a pixel has at least one tap
    total += 1 << (PRECISION - 1)
    return (total >> PRECISION).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)
def _taps_on(device: torch.device, source: int, target: int) -> list[tuple[Tensor, Tensor]]:
    """`bilinear_taps` on the device: kept there, because copying them would make every step wait for it."""
    positions, coefficients = (torch.tensor(values) for values in bilinear_taps(source, target))
    return list(zip(positions.to(device), coefficients.to(device, torch.int32), strict=True))


@lru_cache(maxsize=64)
def _channels_on(device: torch.device, values: tuple[float, ...]) -> Tensor:
    """(1, channels, 1, 1) float32."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def area_crop(image: Picture, size: tuple[int, int], numbers: Sequence[float], *, flip: bool) -> Picture:
    """A random part of the image, resized to (rows, columns) and, if `flip`, mirrored half of the time (number 22)."""
    box = area_box(image.height, image.width, numbers)
    part = image.crop((box.left, box.top, box.left + box.cols, box.top + box.rows))
    part = enlarge(part, size)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and numbers[22] < 0.5 else part


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(batch, channels, rows, cols) uint8 to float32: scaled to [0, 1], less the mean, over the deviation."""
    out = images.to(torch.float32).div_(255)
    out -= _channels_on(out.device, tuple(mean))
    return out.div_(_channels_on(out.device, tuple(std)))
