"""The networks: timm's vision Transformer, the agent CNN, and the agent on the Transformer's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Features(NamedTuple):
    """What a network's forward returns."""

    logits: Tensor  # (batch, classes)
    kd_logits: Tensor  # (batch, classes): what distillation compares; `logits` itself unless a DeiT is training
    blocks: tuple[Tensor, ...]  # one (batch, rows, cols, width) map per block, channels last
