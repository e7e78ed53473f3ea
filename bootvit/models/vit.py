"""The student: timm's `VisionTransformer`, its block outputs and the reference's initial values."""

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bootvit.models import Features
from bootvit.standalone.sparse import EntmaxAttention, scores_and_values, sparse_weights


def vit_features(vit: VisionTransformer, images: Tensor) -> Features:
    """Logits and block maps of `images` (batch, 3, rows, cols), through timm's own `forward_intermediates`."""
    tokens, blocks = vit.forward_intermediates(images, output_fmt="NLC")  # blocks come without prefix tokens
    logits = vit.forward_head(tokens)
    grid = vit.patch_embed.grid_size
    maps = tuple(block.unflatten(1, grid) for block in blocks)  # (batch, N, D) -> (batch, rows, cols, D)
    if isinstance(logits, tuple):  # a DeiT in training: class head, distillation head
        return Features(logits[0], logits[1], maps)
    return Features(logits, logits, maps)


def attention_weights(attention: Attention, x: Tensor) -> Tensor:
    """The weights that every head computes from `x` (batch, N, D): (batch, H, N, N), each row sums to one."""
    scores, _ = scores_and_values(attention, x)
    return sparse_weights(scores, attention.alpha) if isinstance(attention, EntmaxAttention) else scores.softmax(-1)


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
