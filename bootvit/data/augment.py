"""Augmentation of small images, in whole batches on the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bootvit.data.transfer import to_device

CROP_NUMBERS = 4  # uniform numbers per image: row, column, flip, 1 to spare


def pad_crop_flip(images: Tensor, numbers: npt.NDArray[np.float64], padding: int, *, flip: bool) -> Tensor:
    """Pad with zeros, cut out the old size at random and mirror half of the images.

    `images` (batch, channels, rows, cols); `numbers` (batch, 4) in [0, 1): row, column, flip, unused.
    """
    batch, _, rows, cols = images.shape
    shifts = (numbers[:, :2] * (2 * padding + 1)).astype(np.int64) - padding
    decided = np.column_stack([shifts, (numbers[:, 2] < 0.5) & flip])  # (batch, 3) int64
    on_device = to_device(torch.from_numpy(decided), images.device)
    shift, mirrored = on_device[:, :2], on_device[:, 2].bool()
    y = torch.arange(rows, device=images.device)[None] + shift[:, :1]  # (batch, rows) in the source
    x = torch.arange(cols, device=images.device)[None].expand(batch, cols)
    x = torch.where(mirrored[:, None], cols - 1 - x, x) + shift[:, 1:]
    inside = ((y >= 0) & (y < rows))[:, :, None] & ((x >= 0) & (x < cols))[:, None, :]
    each = torch.arange(batch, device=images.device)[:, None, None]
    picked = images.permute(0, 2, 3, 1)[each, y.clamp(0, rows - 1)[:, :, None], x.clamp(0, cols - 1)[:, None, :]]
    return (picked * inside[..., None]).permute(0, 3, 1, 2)
