"""The agent CNN: a stem, one block per block of the ViT, batch norm, GELU, global mean, linear head.

D width, H heads. Maps are (batch, D, rows, cols) inside and (batch, rows, cols, D) in `Features.blocks`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from bootvit.models import Features
from bootvit.models.shapes import Tap


class HeadTapConv(nn.Module):
    """A convolution with one D x D matrix per head, each at its tap; what the window lacks is not computed.

    `weight` is (D out, D in, H). The kernel is cut to the taps' bounding box: 6 row-major heads make it 2 x 3.
    """

    def __init__(self, width: int, taps: Sequence[Tap]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width, len(taps)))
        self.bias = nn.Parameter(torch.zeros(width))
        rows, cols = [dy for dy, _ in taps], [dx for _, dx in taps]
        self.pad = (
            max(0, -min(cols)),
            max(0, *cols),
            max(0, -min(rows)),
            max(0, *rows),
        )  # left right top bottom
        self.window = (self.pad[2] + self.pad[3] + 1, self.pad[0] + self.pad[1] + 1)
        places = [(dy + self.pad[2]) * self.window[1] + dx + self.pad[0] for dy, dx in taps]
        self.places: Tensor
        self.register_buffer("places", torch.tensor(places), persistent=False)
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, D, rows, cols) -> the same, zero-padded."""
        kernel = self.weight.new_zeros(*self.weight.shape[:2], self.window[0] * self.window[1])
        kernel = kernel.index_copy(2, self.places, self.weight).view(*self.weight.shape[:2], *self.window)
        return F.conv2d(F.pad(x, self.pad), kernel, self.bias)


class SameConv(nn.Conv2d):
    """A 3x3 convolution that keeps the map's size. On the CPU the gradient of its weights is one matrix product."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, D, rows, cols) -> the same."""
        plain = x.device.type != "cpu" or not self.training or torch.is_autocast_enabled("cpu")
        if plain or torch.compiler.is_compiling():
            return super().forward(x)
        out: Tensor = _GatheredGradient.apply(x, self.weight, self.bias)
        return out


class _GatheredGradient(torch.autograd.Function):
    """oneDNN's gradient of the weights takes half as long again as gathering each pixel's window and one product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        (rows, cols), width = x.shape[2:], x.shape[1]
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        places = [padded[:, dy : dy + rows, dx : dx + cols] for dy in range(3) for dx in range(3)]
        windows = torch.cat(places, -1).flatten(0, 2)  # (batch x rows x cols, 9 D)
        pixels = grad.permute(0, 2, 3, 1).flatten(0, 2)  # (batch x rows x cols, D)
        of_weight = (pixels.T @ windows).view(width, 3, 3, width).permute(0, 3, 1, 2)
        of_x: Tensor = conv2d_input(x.shape, weight, grad, padding=1)  # type: ignore[no-untyped-call]
        return of_x, of_weight, pixels.sum(0)


class ConvMLP(nn.Sequential):
    """Two 1x1 convolutions with GELU and dropout between, computed as matrix products over the pixels."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__(nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Dropout(dropout), nn.Conv2d(hidden, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, D, rows, cols) -> the same; on maps that lie channels last nothing is copied."""
        hidden = self[2](self[1](at_pixels(x.permute(0, 2, 3, 1), self[0])))
        return at_pixels(hidden, self[3]).permute(0, 3, 1, 2)


def at_pixels(x: Tensor, conv: nn.Module) -> Tensor:
    """A 1x1 convolution of (batch, rows, cols, channels) as one matrix product."""
    assert isinstance(conv, nn.Conv2d)
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`, of which only `x` is kept: the backward pass computes it again, with the same dropout masks.

    What BatchNorm has counted the first time it does not count again.
    """
    out: Tensor = checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _uncounted(block)))
    return out


@contextmanager
def _uncounted(block: nn.Module) -> Iterator[None]:
    """Batch norms normalise with the batch's statistics, and none of it enters the running ones."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = norm.num_batches_tracked.clone() if norm.num_batches_tracked is not None else None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


class AgentBlock(nn.Module):
    """`mixer` then `mlp`, each with batch norm and a residual; the method decides which modules these are."""

    def __init__(
        self,
        mixer: nn.Module,
        mlp: nn.Module,
        width: int,
        norm: Literal["pre", "post"],
        dropout: float,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.mixer, self.mlp, self.pre_norm = mixer, mlp, norm == "pre"
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.drop = nn.Dropout(dropout)
        self.path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, D, rows, cols) -> the same."""
        if self.pre_norm:
            x = x + self.path(self.drop(self.mixer(self.norm1(x))))
            x = x + self.path(self.drop(self.mlp(self.norm2(x))))
        else:
            x = x + self.path(self.drop(self.norm1(self.mixer(x))))
            x = x + self.path(self.drop(self.norm2(self.mlp(x))))
        return x


class Agent(nn.Module):
    """The agent CNN. `downsample` lists the blocks after which a 2x2 mean pool halves the map.

    A block's feature is taken before that pool.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[AgentBlock],
        downsample: Sequence[int],
        width: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.downsample = frozenset(downsample)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)
        self.recompute = False  # each block in the backward pass, instead of keeping what is inside

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters are one layer, for timm's layer-wise rates."""
        blocks = r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}

    def forward(self, images: Tensor) -> Features:
        """`images` (batch, 3, rows, cols) in [normalised RGB]."""
        x = self.stem(images)  # (batch, D, rows, cols)
        maps: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = recomputed(block, x) if self.recompute and self.training else block(x)
            maps.append(x.permute(0, 2, 3, 1))
            if i in self.downsample:
                x = F.avg_pool2d(x, 2)
        logits = self.head(F.gelu(self.norm(x)).mean((2, 3)))
        return Features(logits, logits, tuple(maps))


class TimmCNN(nn.Module):
    """A CNN of timm in the agent's place; it has no blocks that mirror the ViT's, so no hint."""

    def __init__(self, cnn: nn.Module) -> None:
        super().__init__()
        self.cnn = cnn

    def forward(self, images: Tensor) -> Features:
        """`images` (batch, 3, rows, cols)."""
        logits = self.cnn(images)
        return Features(logits, logits, ())


@torch.no_grad()
def init_agent(agent: Agent, rule: Literal["timm", "reference"]) -> None:
    """Xavier-uniform convolutions and zero biases; the reference starts patches and MLP biases at a deviation of one.

    Weights that belong to the ViT (shared agent) are not parameters of the agent and stay as they are.
    """
    reference = rule == "reference"
    for module in agent.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if isinstance(agent.stem, nn.Conv2d):
        nn.init.normal_(agent.stem.weight, std=1.0 if reference else 0.02)
    convs = [m for block in agent.blocks if isinstance(block, AgentBlock) for m in block.mlp.modules()]
    if isinstance(agent.stem, nn.Sequential):
        convs.append(agent.stem[-1])
    for conv in convs:
        if isinstance(conv, nn.Conv2d) and conv.bias is not None:
            nn.init.normal_(conv.bias, mean=1e-6 if reference else 0.0, std=1.0 if reference else 1e-6)
