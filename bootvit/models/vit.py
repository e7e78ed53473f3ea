"""The student: timm's `VisionTransformer`, its block outputs, sparse attention and the reference's initial values.

D width, H heads, K = D / H width of a head, N tokens.
"""

import torch
from entmax import entmax_bisect
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bootvit.models import Features


def vit_features(vit: VisionTransformer, images: Tensor) -> Features:
    """Logits and block maps of `images` (batch, 3, rows, cols), through timm's own `forward_intermediates`."""
    tokens, blocks = vit.forward_intermediates(images, output_fmt="NLC")  # blocks come without prefix tokens
    logits = vit.forward_head(tokens)
    grid = vit.patch_embed.grid_size
    maps = tuple(block.unflatten(1, grid) for block in blocks)  # (batch, N, D) -> (batch, rows, cols, D)
    if isinstance(logits, tuple):  # a DeiT in training: class head, distillation head
        return Features(logits[0], logits[1], maps)
    return Features(logits, logits, maps)


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


def scores_and_values(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the weights are made of, (batch, H, N, N), and what they mix, (batch, H, N, K); `x` is (batch, N, D)."""
    qkv = attention.qkv(x).unflatten(2, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # (batch, H, N, K) each
    return (attention.q_norm(q) * attention.scale) @ attention.k_norm(k).transpose(-2, -1), v


def attention_weights(attention: Attention, x: Tensor) -> Tensor:
    """The weights that every head computes from `x` (batch, N, D): (batch, H, N, N), each row sums to one."""
    scores, _ = scores_and_values(attention, x)
    return sparse_weights(scores, attention.alpha) if isinstance(attention, EntmaxAttention) else scores.softmax(-1)


class FixedEntmaxAttention(EntmaxAttention):
    """Sparse attention whose alpha is no parameter."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        del self.alpha
        self.register_buffer("alpha", torch.tensor(1.5), persistent=False)


def sparse_weights(scores: Tensor, alpha: Tensor) -> Tensor:
    """Alpha-entmax over the last axis by 50 bisection steps, renormalised, in float32 at least: it needs the digits."""
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
        rows = alpha.to(scores.dtype).expand(*scores.shape[:-1], 1)
        return entmax_bisect(scores, rows, dim=-1, n_iter=50, ensure_sum_one=True)  # type: ignore[no-any-return]


@torch.no_grad()
def init_as_reference(vit: VisionTransformer) -> None:
    """The reference's initial values, quirks 1 and 2 included: patches and MLP biases start at a deviation of one."""
    nn.init.normal_(vit.patch_embed.proj.weight, std=1.0)
    nn.init.zeros_(vit.patch_embed.proj.bias)
    for name in ("cls_token", "dist_token", "pos_embed"):
        if getattr(vit, name, None) is not None:
            nn.init.normal_(getattr(vit, name), std=0.02)
    for block in vit.blocks:
        for linear in (block.attn.qkv, block.attn.proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (block.mlp.fc1, block.mlp.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, mean=1e-6, std=1.0)
    for head in (vit.head, getattr(vit, "head_dist", None)):
        if isinstance(head, nn.Linear):
            head.reset_parameters()
