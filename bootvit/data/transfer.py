"""From this process's memory to the device, without making it wait."""

from __future__ import annotations

import torch
from torch import Tensor

SHARE = 8  # of a GPU's free memory, the part that a data set may fill


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On a GPU without waiting, which needs pinned memory: a plain copy waits for all that the GPU has been given."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes may stay on the device for good; on the CPU what is mapped already is better shared."""
    return device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // SHARE
