"""The shared agent: the ViT's own weights, with each attention map replaced by a fixed one-pixel shift.

A head's output at a pixel is its value at the head's tap; projected, this is a convolution whose matrix at head h's
tap is W_o^h W_v^h, at 2 D^2 multiply-adds a pixel instead of H D^2 (paper, section 3.3).

D width, H heads, K = D / H. The ViT's modules are held without being registered, so that a weight has one name.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from bootvit.models.agent import Tap


class SharedMixer(nn.Module):
    """value projection -> every head's K channels shifted by its tap, zero-padded -> output projection."""

    def __init__(self, attention: Attention, taps: Sequence[Tap], value_bias: bool) -> None:
        super().__init__()
        self._vit = (attention,)
        self.taps = tuple(taps)
        self.value_bias = value_bias

    def forward(self, x: Tensor) -> Tensor:
        """(batch, D, rows, cols) -> the same."""
        attention = self._vit[0]
        width = x.shape[1]
        values = F.linear(x.permute(0, 2, 3, 1), attention.qkv.weight[2 * width :])  # (batch, rows, cols, D)
        mixed = shift_heads(values, self.taps)
        bias = attention.proj.bias
        if self.value_bias and attention.qkv.bias is not None:  # attention's weights sum to one: it passes the bias on
            passed_on = attention.proj.weight @ attention.qkv.bias[2 * width :]
            bias = passed_on if bias is None else bias + passed_on
        return F.linear(mixed, attention.proj.weight, bias).permute(0, 3, 1, 2)


def shift_heads(values: Tensor, taps: Sequence[Tap]) -> Tensor:
    """(batch, rows, cols, D): head h's channels at a pixel become those at the pixel + tap h, zero outside."""
    rows, cols = values.shape[1:3]
    reach = max(max(abs(dy), abs(dx)) for dy, dx in taps)
    padded = F.pad(values, (0, 0, reach, reach, reach, reach))
    heads = padded.chunk(len(taps), dim=-1)  # K channels each
    shifted = [
        head[:, reach + dy : reach + dy + rows, reach + dx : reach + dx + cols]
        for head, (dy, dx) in zip(heads, taps, strict=True)
    ]
    return torch.cat(shifted, dim=-1)


class SharedMLP(nn.Module):
    """The ViT block's MLP applied at every pixel: its matrices as 1x1 convolutions."""

    def __init__(self, mlp: Mlp, dropout: float) -> None:
        super().__init__()
        self._vit = (mlp,)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, D, rows, cols) -> the same."""
        mlp = self._vit[0]
        hidden = self.drop(mlp.act(mlp.fc1(x.permute(0, 2, 3, 1))))
        return mlp.fc2(hidden).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
