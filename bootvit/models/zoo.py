"""From a config to networks: our sizes registered with timm, any timm ViT's shape, and the agent that mirrors it."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from bootvit.config import AgentConfig, Config, Network, ViTConfig, pair
from bootvit.errors import UserError
from bootvit.models.agent import (
    Agent,
    AgentBlock,
    ConvMLP,
    HeadTapConv,
    Tap,
    TapRule,
    TimmCNN,
    head_taps,
    init_agent,
    map_sides,
    patch_stem,
    resnet_stem,
)
from bootvit.models.shared import SharedMixer, SharedMLP
from bootvit.models.vit import EntmaxAttention, FixedEntmaxAttention, init_as_reference

__all__ = [
    "ViTShape",
    "agent_maps",
    "build_agent",
    "build_vit",
    "check_batches",
    "check_models",
    "mirrors",
    "named_shape",
    "pretrained",
    "tap_rule",
    "vit_grid",
    "vit_shape",
]

default_cfgs = generate_default_cfgs(  # timm looks here for what it knows of our models: no weights on a hub
    {
        f"bootvit_{name}_patch16_224": {
            "input_size": (3, 224, 224),
            "num_classes": 1000,
            "first_conv": "patch_embed.proj",
            "classifier": ("head", "head_dist") if "distilled" in name else "head",
        }
        for name in ("small", "base", "small_distilled", "base_distilled")
    }
)

SMALL = {
    "patch_size": 16,
    "embed_dim": 288,
    "depth": 6,
    "num_heads": 9,
    "norm_layer": partial(nn.LayerNorm, eps=1e-5),
}
BASE = {
    "patch_size": 16,
    "embed_dim": 384,
    "depth": 12,
    "num_heads": 6,
    "norm_layer": partial(nn.LayerNorm, eps=1e-6),
}


def _create(cls: type[VisionTransformer], name: str, pretrained: bool, given: dict[str, Any]) -> VisionTransformer:
    return build_model_with_cfg(cls, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **given)


@register_model  # type: ignore[untyped-decorator]
def bootvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-S of the paper: 288 wide, 6 blocks, 9 heads."""
    return _create(VisionTransformer, "bootvit_small_patch16_224", pretrained, SMALL | kwargs)


@register_model  # type: ignore[untyped-decorator]
def bootvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-B of the paper: 384 wide, 12 blocks, 6 heads."""
    return _create(VisionTransformer, "bootvit_base_patch16_224", pretrained, BASE | kwargs)


@register_model  # type: ignore[untyped-decorator]
def bootvit_small_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformerDistilled:
    """ViT-S with DeiT's distillation token and head."""
    return _create(VisionTransformerDistilled, "bootvit_small_distilled_patch16_224", pretrained, SMALL | kwargs)


@register_model  # type: ignore[untyped-decorator]
def bootvit_base_distilled_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformerDistilled:
    """ViT-B with DeiT's distillation token and head."""
    return _create(VisionTransformerDistilled, "bootvit_base_distilled_patch16_224", pretrained, BASE | kwargs)


class ViTShape(NamedTuple):
    """What an agent needs to know of a ViT."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: tuple[int, int]
    prefix_tokens: int


@lru_cache
def named_shape(name: str) -> ViTShape:
    """The shape that a timm name stands for; raises `UserError` if it is not a plain ViT."""
    if not timm.is_model(name):
        near = [m for m in timm.list_models("*vit*") if m.startswith(name.split("_patch", maxsplit=1)[0])][:1]
        raise UserError(
            f"model.vit.name={name!r} is not a model of timm" + (f"; the nearest is {near[0]!r}" if near else "")
        )
    _check_tag("model.vit.name", name)
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


def build_vit(config: Config, num_classes: int) -> VisionTransformer:
    """The student, freshly initialised; `bootvit.weights` loads the weights that the config names."""
    model = timm.create_model(config.model.vit.name, num_classes=num_classes, **_vit_arguments(config))
    if isinstance(model, VisionTransformerDistilled):
        model.set_distilled_training(True)
    if config.model.init == "reference":
        init_as_reference(model)
    return model


def _vit_arguments(config: Config) -> dict[str, Any]:
    """What differs from the named model, as `timm.create_model` takes it."""
    vit, shape = config.model.vit, vit_shape(config.model.vit)
    sizes: dict[str, Any] = {"img_size": config.image_size}
    if vit.width is not None or vit.depth is not None or vit.heads is not None or vit.mlp_width is not None:
        # timm takes a ratio and truncates: half a unit more keeps the product from falling below the integer
        ratio = (shape.mlp_width + 0.5) / shape.width
        sizes |= {"embed_dim": shape.width, "depth": shape.depth, "num_heads": shape.heads, "mlp_ratio": ratio}
    if vit.patch is not None:
        sizes["patch_size"] = shape.patch
    if vit.norm_eps is not None:
        sizes["norm_layer"] = partial(nn.LayerNorm, eps=vit.norm_eps)
    if vit.attention != "softmax":
        sizes["attn_layer"] = EntmaxAttention if vit.attention == "entmax" else FixedEntmaxAttention
    if vit.dropout:
        sizes |= {"proj_drop_rate": vit.dropout, "attn_drop_rate": vit.dropout}
    if vit.pos_dropout:
        sizes["pos_drop_rate"] = vit.pos_dropout
    return sizes


def pretrained(config: Config, network: Network) -> nn.Module:
    """timm's own model with the weights of its hub, head included, in the config's sizes."""
    if network == "agent":
        return timm.create_model(config.model.agent.name, pretrained=True)  # type: ignore[no-any-return]
    return timm.create_model(config.model.vit.name, pretrained=True, **_vit_arguments(config))  # type: ignore[no-any-return]


def tap_rule(agent: AgentConfig, vit_name: str) -> TapRule:
    """The rule that places heads: `auto` is the reference's for the paper's ViTs and centred for all others."""
    if agent.taps != "auto":
        return agent.taps
    return "row_major" if vit_name.startswith("bootvit_") else "centred"


def build_agent(config: Config, num_classes: int, vit: VisionTransformer | None) -> Agent | TimmCNN:
    """The agent: on its own weights, on those of `vit` (method `shared`), or a CNN of timm in its place."""
    cfg = config.model.agent
    if not mirrors(cfg):
        return TimmCNN(timm.create_model(cfg.name, num_classes=num_classes))
    shape = vit_shape(config.model.vit)
    if config.method == "shared":
        assert vit is not None
        blocks = _shared_blocks(config, vit, agent_taps(config))
    else:
        blocks = _own_blocks(config, shape)
    stem = (
        patch_stem(shape.width, agent_patch(cfg, shape))
        if cfg.stem == "patch"
        else resnet_stem(shape.width, cfg.stem_width)
    )
    agent = Agent(stem, blocks, cfg.downsample, shape.width, num_classes)
    init_agent(agent, config.model.init)
    return agent


def agent_taps(config: Config) -> tuple[Tap, ...]:
    """The places of the heads of an agent that has one matrix per head; `UserError` where its rule has none."""
    agent = config.model.agent
    heads = agent.heads or vit_shape(config.model.vit).heads
    return head_taps(heads, tap_rule(agent, config.model.vit.name))


def mirrors(agent: AgentConfig) -> bool:
    """Whether the agent mirrors the ViT (else it is a CNN of timm)."""
    return agent.name in ("agent_small", "agent_base")


def _norm(agent: AgentConfig) -> Any:
    return agent.norm or ("pre" if agent.name == "agent_small" else "post")


def _own_blocks(config: Config, shape: ViTShape) -> list[AgentBlock]:
    cfg = config.model.agent

    def mixer() -> nn.Module:
        if cfg.name == "agent_small":
            return nn.Conv2d(shape.width, shape.width, 3, padding=1)
        return HeadTapConv(shape.width, agent_taps(config))

    def mlp() -> nn.Module:
        return ConvMLP(shape.width, cfg.mlp_width or shape.mlp_width, cfg.dropout or 0.0)

    rate = cfg.residual_dropout or 0.0
    return [AgentBlock(mixer(), mlp(), shape.width, _norm(cfg), rate) for _ in range(shape.depth)]


def _shared_blocks(config: Config, vit: VisionTransformer, taps: tuple[Tap, ...]) -> list[AgentBlock]:
    cfg, inherited = config.model.agent, config.model.vit.dropout
    dropout = inherited if cfg.dropout is None else cfg.dropout
    residual = inherited if cfg.residual_dropout is None else cfg.residual_dropout
    return [
        AgentBlock(
            SharedMixer(block.attn, taps, cfg.value_bias),
            SharedMLP(block.mlp, dropout),
            vit.embed_dim,
            _norm(cfg),
            residual,
        )
        for block in vit.blocks
    ]


# ------------------------------------------------------------------------------------------------ checks


def check_models(config: Config) -> None:
    """Refuse, before anything starts, models that cannot be built or paired: one line that names the key."""
    if "vit" in config.networks:
        _check_patch("model.vit.patch", vit_shape(config.model.vit).patch, config)
    if "agent" in config.networks:
        _check_agent(config)
    if len(config.networks) == 2:
        _check_pair(config)


def _check_patch(key: str, patch: tuple[int, int], config: Config) -> None:
    rows, cols = config.image_size
    if rows % patch[0] or cols % patch[1]:
        raise UserError(f"{key}={patch[0]}x{patch[1]} does not divide data.image_size={rows}x{cols}")


def _check_agent(config: Config) -> None:
    cfg = config.model.agent
    if not mirrors(cfg):
        if not timm.is_model(cfg.name):
            raise UserError(f"model.agent.name={cfg.name!r}: expected agent_small, agent_base or a CNN of timm")
        _check_tag("model.agent.name", cfg.name)
        if config.method == "shared":
            raise UserError(
                f"model.agent.name={cfg.name!r} cannot share the ViT's weights: use agent_small or agent_base"
            )
        return
    if cfg.weights == "timm":
        raise UserError(f"model.agent.weights=timm: {cfg.name} is no model of timm; it starts from a run that has one")
    shape = vit_shape(config.model.vit)
    if cfg.stem == "patch":
        _check_patch("model.agent.patch", agent_patch(cfg, shape), config)
    heads = cfg.heads or shape.heads
    if config.method == "shared" and heads != shape.heads:
        raise UserError(f"model.agent.heads={heads}: a shared agent has the ViT's {shape.heads} heads")
    if config.method == "shared" or cfg.name == "agent_base":
        agent_taps(config)
    beyond = [i for i in cfg.downsample if i >= shape.depth]
    if beyond:
        raise UserError(
            f"model.agent.downsample={list(cfg.downsample)}: there is no block {beyond[0]} of {shape.depth}"
        )
    if min(agent_maps(config)[-1]) < 1:
        raise UserError(f"model.agent.downsample={list(cfg.downsample)}: the map is too small to be halved so often")


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


def _check_pair(config: Config) -> None:
    hints = {net: getattr(config.objective, net).hint for net in config.networks}
    wanted = next((net for net, weight in hints.items() if weight), None)
    if config.method == "shared":
        _check_sharable(config)
    if wanted is None:
        return
    key = f"objective.{wanted}.hint={hints[wanted]}"
    if not mirrors(config.model.agent):
        raise UserError(f"{key}: {config.model.agent.name} has no blocks that mirror the ViT's; set the hint to 0")
    grid = vit_grid(config)
    for i, sides in enumerate(agent_maps(config)):
        if not poolable(grid, sides, config.objective.hint_pool):
            raise UserError(
                f"{key}: block {i}'s maps, {grid[0]}x{grid[1]} (ViT) and {sides[0]}x{sides[1]} (agent), "
                f"are not whole multiples for hint_pool={config.objective.hint_pool}"
            )


def poolable(a: tuple[int, int], b: tuple[int, int], rule: str) -> bool:
    """Whether mean pooling can bring the larger of two maps to the size of the smaller."""
    if rule == "raster":
        small, large = sorted((a[0] * a[1], b[0] * b[1]))
        return small > 0 and large % small == 0
    small2, large2 = sorted((a, b), key=lambda m: m[0] * m[1])
    return min(small2) > 0 and large2[0] % small2[0] == 0 and large2[1] % small2[1] == 0


def _check_sharable(config: Config) -> None:
    with torch.device("meta"):
        vit = timm.create_model(config.model.vit.name)
    attn, mlp = vit.blocks[0].attn, vit.blocks[0].mlp
    plain = (
        hasattr(attn, "qkv") and hasattr(mlp, "fc1") and isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity)
    )
    if not plain or not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity) or getattr(attn, "gate", None):
        raise UserError(
            f"model.vit.name={config.model.vit.name!r}: method=shared needs fused q, k, v and a two-layer MLP; "
            "use method=joint"
        )


def _check_tag(key: str, name: str) -> None:
    """Refuse the name of a model of timm with a tag, after its dot, that timm has no weights for."""
    model, dot, tag = name.partition(".")
    known = [whole.partition(".")[2] for whole in timm.list_models(f"{model}.*", pretrained=True)] if dot else []
    if dot and tag not in known:
        raise UserError(
            f"{key}={name!r}: timm knows no weights {tag!r} of {model}; known: {', '.join(known) or 'none'}"
        )


def check_batches(config: Config, train_images: int) -> None:
    """Refuse a share of one image where the agent's BatchNorm would see one value per channel, and fail.

    `train_images` is the number of images that the run trains on: a batch is at most so large.
    """
    workers, batch = config.ray.most, min(config.data.batch_size, train_images)
    if "agent" not in config.networks or batch // workers != 1 or (config.model.agent.sync_norm and workers > 1):
        return  # with sync_norm every BatchNorm sees the shares of all workers
    if _norms_take_one_image(config):
        return
    if config.data.batch_size < 2 * workers:
        given = f"data.batch_size={config.data.batch_size}"
    else:
        given = f"data.batch_size={config.data.batch_size} of {train_images} training images"
    share = f"{given} with ray.num_workers={workers}" if workers > 1 else given
    raise UserError(
        f"{share} leaves a worker one image, and BatchNorm of model.agent.name={config.model.agent.name} then sees "
        "one value per channel, its map being 1x1: it needs two images a worker"
        + (f", such as data.batch_size={2 * workers}" if train_images >= 2 * workers else "")
    )


def _norms_take_one_image(config: Config) -> bool:
    """Whether every BatchNorm of the agent has more than one value per channel in a batch of one image."""
    cfg = config.model.agent
    if mirrors(cfg):
        maps, depth = agent_maps(config), vit_shape(config.model.vit).depth
        rows, cols = maps[-1]
        halved = (rows // 2) * (cols // 2) if depth - 1 in cfg.downsample else rows * cols
        return min(halved, rows * cols) > 1
    with torch.random.fork_rng(), torch.no_grad():  # its maps are known only by asking it
        cnn = timm.create_model(cfg.name, num_classes=2)
        try:
            cnn.train()(torch.zeros(1, 3, *config.image_size))
        except ValueError as err:
            if "more than 1 value per channel" not in str(err):
                raise
            return False
    return True
