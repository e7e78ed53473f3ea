"""The paper's ViTs, registered with timm: imported as soon as timm is (`bootvit.timm_names`)."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from bootvit.models.shapes import OURS

default_cfgs = generate_default_cfgs(  # timm looks here for what it knows of our models: no weights on a hub
    {
        name: {
            "input_size": (3, 224, 224),
            "num_classes": 1000,
            "first_conv": "patch_embed.proj",
            "classifier": ("head", "head_dist") if "distilled" in name else "head",
        }
        for name in OURS
    }
)


def _create(
    cls: type[VisionTransformer], name: str, norm_eps: float, pretrained: bool, given: dict[str, Any]
) -> VisionTransformer:
    own = {
        "patch_size": OURS[name].patch[0],
        "embed_dim": OURS[name].width,
        "depth": OURS[name].depth,
        "num_heads": OURS[name].heads,
        "norm_layer": partial(nn.LayerNorm, eps=norm_eps),
    }
    return build_model_with_cfg(cls, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **own | given)


@register_model  # type: ignore[untyped-decorator]
def bootvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-S of the paper: 288 wide, 6 blocks, 9 heads."""
    return _create(VisionTransformer, "bootvit_small_patch16_224", 1e-5, pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def bootvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-B of the paper: 384 wide, 12 blocks, 6 heads."""
    return _create(VisionTransformer, "bootvit_base_patch16_224", 1e-6, pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def bootvit_small_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformerDistilled:
    """ViT-S with DeiT's distillation token and head."""
    return _create(VisionTransformerDistilled, "bootvit_small_distilled_patch16_224", 1e-5, pretrained, kwargs)


@register_model  # type: ignore[untyped-decorator]
def bootvit_base_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformerDistilled:
    """ViT-B with DeiT's distillation token and head."""
    return _create(VisionTransformerDistilled, "bootvit_base_distilled_patch16_224", 1e-6, pretrained, kwargs)
