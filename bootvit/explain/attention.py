"""Where a ViT looks: its attention maps, their rollout, how far heads reach, and how convolutional they have become.

B images, H heads, N tokens of which the first P are no patches (class token, distillation token), R x C patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bootvit.errors import UserError
from bootvit.models.shapes import Tap
from bootvit.models.vit import attention_weights
from bootvit.standalone.sparse import EntmaxAttention

Grid = tuple[int, int]  # rows and columns of patches


def attention_maps(vit: VisionTransformer, images: Tensor) -> Iterator[Tensor]:
    """Every block's attention, (B, H, N, N), of `images` (B, 3, rows, cols); the ViT must be in evaluation mode."""
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    for block in vit.blocks:
        if type(block.attn) is not Attention and not isinstance(block.attn, EntmaxAttention):
            raise UserError(
                f"the maps of timm's {type(block.attn).__name__} cannot be computed, only plain attention's"
            )
        yield attention_weights(block.attn, block.norm1(x))
        x = block(x)


def rollout(attentions: Iterable[Tensor]) -> Tensor:
    """How much of each input token is in each output token, (B, N, N): Abnar and Zuidema's attention rollout.

    A block passes on half of its input and half of what its heads mix on average: the product over blocks of
    (A + 1) / 2.
    """
    rolled: Tensor | None = None
    for attention in attentions:  # (B, H, N, N)
        mixed = attention.mean(1)
        mixed = (mixed + torch.eye(mixed.shape[-1], dtype=mixed.dtype, device=mixed.device)) / 2
        rolled = mixed if rolled is None else mixed @ rolled
    assert rolled is not None
    return rolled


def seen_by_head(rolled: Tensor, grid: Grid, prefix: int, from_class_token: bool) -> Tensor:
    """The patches' shares in what the classifier gets, (B, R, C), which sum to one: of the class token, or the mean."""
    rows = rolled[:, 0] if from_class_token else rolled[:, prefix:].mean(1)  # (B, N)
    patches = rows[:, prefix:]
    return (patches / patches.sum(1, keepdim=True)).reshape(-1, *grid)


def mean_distance(attention: Tensor, grid: Grid, patch: tuple[int, int], prefix: int) -> Tensor:
    """How far each head looks, in pixels, (H,): the mean distance from a patch to the patches that it attends to.

    Each patch's attention to other patches is scaled to sum to one; one that attends to none of them does not count.
    """
    own = attention[:, :, prefix:, prefix:]  # (B, H, RC, RC)
    mass = own.sum(-1)
    reach = (own * distances(grid, patch).to(own)).sum(-1) / mass.clamp_min(torch.finfo(own.dtype).tiny)
    counted = (mass > 0).to(own.dtype)
    return (reach * counted).sum((0, 2)) / counted.sum((0, 2))


def distances(grid: Grid, patch: tuple[int, int]) -> Tensor:
    """Between the middles of patches, in pixels: (RC, RC) float64."""
    rows, cols = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([rows.flatten() * patch[0], cols.flatten() * patch[1]], dim=1).double()
    return torch.cdist(places, places)


def tap_share(attention: Tensor, taps: Sequence[Tap], grid: Grid, prefix: int) -> Tensor:
    """The share of each head's attention on its own tap, (H,): 1 is the agent's convolution, 1/N chance.

    The mean over the patches whose tap lies inside of the map; nan where there is none.
    """
    rows, cols = grid
    index = torch.arange(rows * cols).view(rows, cols)
    shares = []
    for head, (dy, dx) in enumerate(taps):
        inside = index[max(0, -dy) : rows - max(0, dy), max(0, -dx) : cols - max(0, dx)].flatten()
        at_tap = attention[:, head, prefix + inside, prefix + inside + dy * cols + dx]
        shares.append(at_tap.mean())
    return torch.stack(shares)
