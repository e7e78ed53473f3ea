"""The agent as an ordinary CNN: each block is one square convolution and two of 1x1, with batch norms and residuals.

D width. Maps are (batch, D, rows, cols).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """The approximation of GELU in OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return x * (1.702 * x).sigmoid()


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU, "relu": nn.ReLU, "silu": nn.SiLU}


class Block(nn.Module):
    """A convolution and an MLP at every pixel, each with a batch norm before or behind it and a residual."""

    def __init__(self, width: int, kernel: int, hidden: int, activation: str, *, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.mixer = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.mlp = nn.Sequential(nn.Conv2d(width, hidden, 1), ACTIVATIONS[activation](), nn.Conv2d(hidden, width, 1))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, D, rows, cols) -> the same."""
        if self.pre_norm:
            x = x + self.mixer(self.norm1(x))
            x = x + self.mlp(self.norm2(x))
        else:
            x = x + self.norm1(self.mixer(x))
            x = x + self.norm2(self.mlp(x))
        return x


class ConvolutionalAgent(nn.Module):
    """Stem, blocks, batch norm, GELU, mean over the map, linear head.

    `patch` (rows, cols) is that of the stem; without one the stem is a ResNet's of `stem_width` channels. A 2x2 mean
    follows the blocks that `downsample` numbers.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        kernel: int,
        hidden: int,
        num_classes: int,
        *,
        pre_norm: bool,
        activation: str = "gelu",
        patch: Sequence[int] | None = None,
        stem_width: int = 64,
        downsample: Sequence[int] = (),
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.stem = (
            patch_stem(width, (patch[0], patch[1]), channels) if patch else resnet_stem(width, stem_width, channels)
        )
        self.blocks = nn.ModuleList(Block(width, kernel, hidden, activation, pre_norm=pre_norm) for _ in range(depth))
        self.downsample = frozenset(downsample)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, channels, rows, cols), normalised -> logits (batch, classes)."""
        x = self.stem(images)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.downsample:
                x = F.avg_pool2d(x, 2)
        return self.head(F.gelu(self.norm(x)).mean((2, 3)))  # type: ignore[no-any-return]


def patch_stem(width: int, patch: tuple[int, int], channels: int = 3) -> nn.Module:
    """(batch, channels, rows, cols) -> (batch, D, rows / patch, cols / patch)."""
    return nn.Conv2d(channels, width, patch, stride=patch)


def resnet_stem(width: int, middle: int, channels: int = 3) -> nn.Module:
    """7x7 stride 2, BN, GELU, max-pool stride 2, 3x3 stride 2: an eighth of the image's sides."""
    return nn.Sequential(
        nn.Conv2d(channels, middle, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(middle),
        nn.GELU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(middle, width, 3, stride=2, padding=1),
    )
