"""The shared agent: the ViT's own weights, with each attention map replaced by a fixed one-pixel shift.

A head's output at a pixel is its value at the head's tap; projected, this is a convolution whose matrix at head h's
tap is W_o^h W_v^h, at 2 D^2 multiply-adds a pixel instead of H D^2 (paper, section 3.3).

D width, H heads, K = D / H. The ViT's modules are held without being registered, so that a weight has one name.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from bootvit.models.agent import Agent, AgentBlock
from bootvit.models.shapes import Tap


class SharedMixer(nn.Module):
    """value projection -> every head's K channels shifted by its tap, zero-padded -> output projection."""

    def __init__(self, attention: Attention, taps: Sequence[Tap], value_bias: bool) -> None:
        super().__init__()
        self._vit = (attention,)
        self.taps = tuple(taps)
        self.value_bias = value_bias

    def forward(self, x: Tensor) -> Tensor:
        """(batch, D, rows, cols) -> the same."""
        return mix_heads(x, *self.weights(), self.taps)

    def weights(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value projection (D, D), output projection (D, D) and bias (D,), all from the ViT's attention."""
        attention = self._vit[0]
        width = attention.proj.weight.shape[0]
        bias = attention.proj.bias
        if self.value_bias and attention.qkv.bias is not None:  # attention's weights sum to one: it passes the bias on
            passed_on = attention.proj.weight @ attention.qkv.bias[2 * width :]
            bias = passed_on if bias is None else bias + passed_on
        return attention.qkv.weight[2 * width :], attention.proj.weight, bias


def mix_heads(x: Tensor, value: Tensor, proj: Tensor, bias: Tensor | None, taps: Sequence[Tap]) -> Tensor:
    """`SharedMixer`'s computation: (batch, D, rows, cols) -> the same; `value` and `proj` are (D, D)."""
    values = F.linear(x.permute(0, 2, 3, 1), value)  # (batch, rows, cols, D)
    return F.linear(shift_heads(values, taps), proj, bias).permute(0, 3, 1, 2)


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
        return mlp_at_pixels(x, self._vit[0], self.drop)

    @property
    def mlp(self) -> Mlp:
        """The ViT's own."""
        return self._vit[0]


def mlp_at_pixels(x: Tensor, mlp: Mlp, drop: nn.Module) -> Tensor:
    """`SharedMLP`'s computation: (batch, D, rows, cols) -> the same."""
    hidden = drop(mlp.act(mlp.fc1(x.permute(0, 2, 3, 1))))
    return mlp.fc2(hidden).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------- without the ViT


class OwnMixer(nn.Module):
    """A `SharedMixer` with copies of the weights that it computes with, as an export keeps them."""

    def __init__(self, mixer: SharedMixer) -> None:
        super().__init__()
        value, proj, bias = (None if weight is None else weight.detach().clone() for weight in mixer.weights())
        assert value is not None
        assert proj is not None
        self.value, self.proj = nn.Parameter(value), nn.Parameter(proj)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.taps = mixer.taps

    def forward(self, x: Tensor) -> Tensor:
        """(batch, D, rows, cols) -> the same."""
        return mix_heads(x, self.value, self.proj, self.bias, self.taps)


class OwnMLP(nn.Module):
    """A `SharedMLP` that holds the MLP's weights."""

    def __init__(self, shared: SharedMLP) -> None:
        super().__init__()
        self.mlp, self.drop = copy.deepcopy(shared.mlp), shared.drop

    def forward(self, x: Tensor) -> Tensor:
        """(batch, D, rows, cols) -> the same."""
        return mlp_at_pixels(x, self.mlp, self.drop)


def standing_alone(agent: Agent) -> Agent:
    """A copy of a shared agent that holds what it computes with, and nothing else of the ViT."""
    alone = copy.deepcopy(agent)
    for block in alone.blocks:
        assert isinstance(block, AgentBlock)
        if isinstance(block.mixer, SharedMixer):
            block.mixer = OwnMixer(block.mixer)
        if isinstance(block.mlp, SharedMLP):
            block.mlp = OwnMLP(block.mlp)
    return alone
