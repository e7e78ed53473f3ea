"""What the sizes of a config mean, without building anything: shapes of ViTs, places of heads, sides of maps.

torch and timm are imported only where a name of timm asks for them, so that a config can be checked without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, sqrt
from typing import Literal, NamedTuple

from bootvit.config import AgentConfig, Config, ViTConfig, pair
from bootvit.errors import UserError

Tap = tuple[int, int]  # (rows down, columns right) from the pixel in the middle
TapRule = Literal["row_major", "centred"]


def head_taps(heads: int, rule: TapRule) -> tuple[Tap, ...]:
    """The place of every head in the smallest odd square window that has one for each.

    row_major: head h at place h, as the reference; its own window, of side ceil(sqrt(heads)), must be odd.
    centred: nearest to the middle first, ties in row-major order; any number of heads.
    """
    side = ceil(sqrt(heads))
    if rule == "row_major" and side % 2 == 0:
        raise UserError(
            f"model.agent.taps=row_major cannot place {heads} heads: their {side}x{side} window has no middle; "
            "use taps=centred, or 1, 5-9, 17-25 or 37-49 heads"
        )
    reach = side // 2
    places = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    if rule == "centred":
        places.sort(key=lambda tap: tap[0] ** 2 + tap[1] ** 2)  # stable: ties stay row-major
    return tuple(places[:heads])


class ViTShape(NamedTuple):
    """What an agent needs to know of a ViT."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: tuple[int, int]
    prefix_tokens: int


SMALL, BASE = (288, 6, 9, 1152, (16, 16)), (384, 12, 6, 1536, (16, 16))
OURS = {  # the paper's ViTs; those with DeiT's distillation have a second prefix token
    "bootvit_small_patch16_224": ViTShape(*SMALL, prefix_tokens=1),
    "bootvit_base_patch16_224": ViTShape(*BASE, prefix_tokens=1),
    "bootvit_small_distilled_patch16_224": ViTShape(*SMALL, prefix_tokens=2),
    "bootvit_base_distilled_patch16_224": ViTShape(*BASE, prefix_tokens=2),
}


@lru_cache
def named_shape(name: str) -> ViTShape:
    """The shape that a timm name stands for; raises `UserError` if it is not a plain ViT."""
    if name in OURS:
        return OURS[name]
    import timm
    import torch
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(name):
        near = [m for m in timm.list_models("*vit*") if m.startswith(name.split("_patch", maxsplit=1)[0])][:1]
        raise UserError(
            f"model.vit.name={name!r} is not a model of timm" + (f"; the nearest is {near[0]!r}" if near else "")
        )
    check_tag("model.vit.name", name)
    with torch.device("meta"):
        model = timm.create_model(name)
    if not isinstance(model, VisionTransformer) or not hasattr(model.blocks[0], "attn"):
        raise UserError(f"model.vit.name={name!r} is a {type(model).__name__}, not a plain timm VisionTransformer")
    block = model.blocks[0]
    hidden = block.mlp.fc1.out_features if hasattr(block.mlp, "fc1") else 4 * model.embed_dim
    patch = model.patch_embed.patch_size
    heads = block.attn.num_heads
    return ViTShape(model.embed_dim, len(model.blocks), heads, hidden, (patch[0], patch[1]), model.num_prefix_tokens)


def vit_shape(vit: ViTConfig) -> ViTShape:
    """The named shape with the config's own sizes in it; raises `UserError` where heads do not divide the width."""
    named = named_shape(vit.name)
    shape = ViTShape(
        width=vit.width or named.width,
        depth=vit.depth or named.depth,
        heads=vit.heads or named.heads,
        mlp_width=vit.mlp_width or (named.mlp_width * (vit.width or named.width)) // named.width,
        patch=pair(vit.patch) if vit.patch else named.patch,
        prefix_tokens=named.prefix_tokens,
    )
    if shape.width % shape.heads:
        raise UserError(f"model.vit.heads={shape.heads} does not divide the width of {shape.width}")
    return shape


def check_tag(key: str, name: str) -> None:
    """Refuse the name of a model of timm with a tag, after its dot, that timm has no weights for."""
    model, dot, tag = name.partition(".")
    if not dot:
        return
    import timm

    known = [whole.partition(".")[2] for whole in timm.list_models(f"{model}.*", pretrained=True)]
    if tag not in known:
        raise UserError(
            f"{key}={name!r}: timm knows no weights {tag!r} of {model}; known: {', '.join(known) or 'none'}"
        )


def tap_rule(agent: AgentConfig, vit_name: str) -> TapRule:
    """The rule that places heads: `auto` is the reference's for the paper's ViTs and centred for all others."""
    if agent.taps != "auto":
        return agent.taps
    return "row_major" if vit_name.startswith("bootvit_") else "centred"


def agent_taps(config: Config) -> tuple[Tap, ...]:
    """The places of the heads of an agent that has one matrix per head; `UserError` where its rule has none."""
    agent = config.model.agent
    heads = agent.heads or vit_shape(config.model.vit).heads
    return head_taps(heads, tap_rule(agent, config.model.vit.name))


def mirrors(agent: AgentConfig) -> bool:
    """Whether the agent mirrors the ViT (else it is a CNN of timm)."""
    return agent.name in ("agent_small", "agent_base")


def agent_maps(config: Config) -> list[tuple[int, int]]:
    """(rows, cols) of the mirroring agent's map at every block."""
    shape, cfg = vit_shape(config.model.vit), config.model.agent
    rows, cols = agent_patch(cfg, shape)
    grid = config.image_size[0] // rows, config.image_size[1] // cols
    return map_sides(cfg.stem, grid, config.image_size, shape.depth, cfg.downsample)


def agent_patch(cfg: AgentConfig, shape: ViTShape) -> tuple[int, int]:
    """(rows, cols) of the patch stem's patches."""
    return pair(cfg.patch) if cfg.patch else shape.patch


def vit_grid(config: Config) -> tuple[int, int]:
    """(rows, cols) of the ViT's patches."""
    patch = vit_shape(config.model.vit).patch
    return config.image_size[0] // patch[0], config.image_size[1] // patch[1]


def map_sides(
    stem: Literal["patch", "resnet"],
    grid: tuple[int, int],
    image: tuple[int, int],
    depth: int,
    downsample: Sequence[int],
) -> list[tuple[int, int]]:
    """(rows, cols) of the agent's map at every block, before that block's pool."""
    sides = grid if stem == "patch" else (ceil(image[0] / 8), ceil(image[1] / 8))
    out = []
    for i in range(depth):
        out.append(sides)
        if i in downsample:
            sides = (sides[0] // 2, sides[1] // 2)
    return out


def poolable(a: tuple[int, int], b: tuple[int, int], rule: str) -> bool:
    """Whether mean pooling can bring the larger of two maps to the size of the smaller."""
    if rule == "raster":
        small, large = sorted((a[0] * a[1], b[0] * b[1]))
        return small > 0 and large % small == 0
    small2, large2 = sorted((a, b), key=lambda m: m[0] * m[1])
    return min(small2) > 0 and large2[0] % small2[0] == 0 and large2[1] % small2[1] == 0
