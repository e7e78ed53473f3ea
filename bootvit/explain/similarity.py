"""How alike the features of two networks are: linear CKA, and the distance that the hint trains on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bootvit.config import ObjectiveConfig
from bootvit.objective import block_hint


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Kornblith's linear centred kernel alignment of `x` (n, d) and `y` (n, e), of the same n things; 0 to 1.

    It does not change with rotations of either's features, shifts, and a common scale. nan where one is constant.
    """
    x, y = (each.double() - each.double().mean(0) for each in (x, y))
    product = (x.T @ y).square().sum()
    return float(product / ((x.T @ x).norm() * (y.T @ y).norm()))


def common_size(maps: Sequence[Tensor]) -> tuple[int, int]:
    """(rows, cols) of the smallest of maps (batch, rows, cols, width)."""
    return min((each.shape[1], each.shape[2]) for each in maps)


def at_positions(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (batch, rows, cols, width) as rows, one a position of a map of `size`: means over what falls into it."""
    pooled = F.adaptive_avg_pool2d(feature.permute(0, 3, 1, 2), size)
    return pooled.permute(0, 2, 3, 1).flatten(0, 2)


def cka_matrix(vit: Sequence[Tensor], agent: Sequence[Tensor]) -> Tensor:
    """Linear CKA of each block of the ViT with each of the agent, (blocks, blocks) float64.

    Maps are (images, rows, cols, width); the things compared are the positions of all images, on the smallest map.
    """
    size = common_size([*vit, *agent])
    ours, theirs = ([at_positions(each, size) for each in maps] for maps in (vit, agent))
    return torch.tensor([[linear_cka(x, y) for y in theirs] for x in ours], dtype=torch.float64)


def hint_distances(vit: Sequence[Tensor], agent: Sequence[Tensor], objective: ObjectiveConfig) -> Tensor:
    """The hint's term of each block, before weight and decay: (blocks,)."""
    pairs = zip(vit, agent, strict=True)
    return torch.stack([block_hint(s, t, objective.hint_pool, objective.hint_norm) for s, t in pairs])
