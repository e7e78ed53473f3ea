"""Dropout on the CPU, with masks that cost a tenth: eight elements are decided by one 64-bit random number.

Each gets 8 bits of it, so probabilities are multiples of 1/256 (0.1 becomes 26/256), and what stays is scaled by what
this makes of them. On GPUs torch's own dropout draws its masks inside the kernels that use them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.layers import Attention
from torch import Tensor, nn

STEPS = 256  # in which probabilities are counted


class ByteDropout(nn.Dropout):
    """`nn.Dropout` with masks from torch's generator, a byte an element, and kept for the backward pass as bytes."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        dropped = round(self.p * STEPS)
        if not self.training or not 0 < dropped < STEPS or x.device.type != "cpu":
            return super().forward(x)
        out: Tensor = _Masked.apply(x, dropped)
        return out


def kept(count: int, dropped: int) -> Tensor:
    """A mask of `count` elements, (count,) bool: each is false with a probability of `dropped` in 256.

    torch's generator draws a seed for the mask, and NumPy's SFC64 its bytes, in a third of the time.
    """
    seed = int(torch.empty((), dtype=torch.int64).random_())
    words = np.random.SFC64(seed).random_raw(-(-count // 8))
    return torch.from_numpy(words.view(np.uint8)[:count] >= dropped)  # NumPy compares bytes at full width


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        ctx.scale = STEPS / (STEPS - dropped)
        layout = torch.empty_like(x, device="meta").stride()  # of maps channels last: a mask of another would be slow
        mask = kept(x.numel(), dropped).as_strided(x.shape, layout)
        ctx.save_for_backward(mask)
        return x * _scaled(mask, ctx.scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grads[0] * _scaled(mask, ctx.scale, grads[0].dtype), None


def _scaled(mask: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return mask.view(torch.uint8).to(dtype).mul_(scale)


def use_byte_dropout(networks: nn.Module) -> None:
    """Put it in the place of every `nn.Dropout`; attention that has dropout is written out, since fused kernels on the
    CPU have none."""
    for module in networks.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, ByteDropout(child.p))
        if isinstance(module, Attention) and module.attn_drop.p > 0:
            module.fused_attn = False
