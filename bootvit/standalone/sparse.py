"""Sparse attention for timm's ViTs.

D width, H heads, K = D / H width of a head, N tokens.
"""

import torch
from entmax import entmax_bisect
from timm.layers import Attention
from torch import Tensor, nn


class EntmaxAttention(Attention):  # type: ignore[misc]
    """timm's attention with alpha-entmax in the softmax's place and one learned alpha (Correia et al., 2019)."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(batch, N, D) -> (batch, N, D); masks are not supported."""
        if attn_mask is not None or is_causal:
            raise ValueError("entmax attention takes no mask")
        scores, v = scores_and_values(self, x)
        weights = self.attn_drop(sparse_weights(scores, self.alpha).to(v.dtype))
        mixed = (weights @ v).transpose(1, 2).flatten(2)  # (batch, N, D)
        return self.proj_drop(self.proj(self.norm(mixed)))  # type: ignore[no-any-return]


class FixedEntmaxAttention(EntmaxAttention):
    """Sparse attention whose alpha is no parameter."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        del self.alpha
        self.register_buffer("alpha", torch.tensor(1.5), persistent=False)


def scores_and_values(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the weights are made of, (batch, H, N, N), and what they mix, (batch, H, N, K); `x` is (batch, N, D)."""
    qkv = attention.qkv(x).unflatten(2, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # (batch, H, N, K) each
    return (attention.q_norm(q) * attention.scale) @ attention.k_norm(k).transpose(-2, -1), v


def sparse_weights(scores: Tensor, alpha: Tensor) -> Tensor:
    """Alpha-entmax over the last axis by 50 bisection steps, renormalised, in float32 at least: it needs the digits."""
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
        rows = alpha.to(scores.dtype).expand(*scores.shape[:-1], 1)
        return entmax_bisect(scores, rows, dim=-1, n_iter=50, ensure_sum_one=True)  # type: ignore[no-any-return]
