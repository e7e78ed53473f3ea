"""From a config to networks: any plain ViT of timm, ours included, and the agent that mirrors it."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from bootvit.config import AgentConfig, Config, Network
from bootvit.models.agent import (
    Agent,
    AgentBlock,
    ConvMLP,
    HeadTapConv,
    SameConv,
    TimmCNN,
    init_agent,
)
from bootvit.models.shapes import Tap, ViTShape, agent_patch, agent_taps, mirrors, vit_shape
from bootvit.models.shared import SharedMixer, SharedMLP
from bootvit.models.vit import init_as_reference
from bootvit.standalone.convolutions import patch_stem, resnet_stem
from bootvit.standalone.sparse import EntmaxAttention, FixedEntmaxAttention


def build_vit(config: Config, num_classes: int) -> VisionTransformer:
    """The student, freshly initialised; `bootvit.weights` loads the weights that the config names."""
    model = timm.create_model(config.model.vit.name, num_classes=num_classes, **vit_arguments(config))
    if isinstance(model, VisionTransformerDistilled):
        model.set_distilled_training(True)
    if config.model.init == "reference":
        init_as_reference(model)
    model.set_grad_checkpointing(config.model.checkpoint_blocks)
    return model


def vit_arguments(config: Config) -> dict[str, Any]:
    """What differs from the named model, as `timm.create_model` takes it."""
    vit, shape = config.model.vit, vit_shape(config.model.vit)
    sizes: dict[str, Any] = {"img_size": config.image_size}
    if config.data.channels != 3:
        sizes["in_chans"] = config.data.channels
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
    if vit.drop_path:
        sizes["drop_path_rate"] = vit.drop_path
    if vit.pos_dropout:
        sizes["pos_drop_rate"] = vit.pos_dropout
    return sizes


def pretrained(config: Config, network: Network) -> nn.Module:
    """timm's own model with the weights of its hub, head included, in the config's sizes."""
    if network == "agent":
        return timm.create_model(config.model.agent.name, pretrained=True, in_chans=config.data.channels)  # type: ignore[no-any-return]
    return timm.create_model(config.model.vit.name, pretrained=True, **vit_arguments(config))  # type: ignore[no-any-return]


def build_agent(config: Config, num_classes: int, vit: VisionTransformer | None) -> Agent | TimmCNN:
    """The agent: on its own weights, on those of `vit` (method `shared`), or a CNN of timm in its place."""
    cfg = config.model.agent
    if not mirrors(cfg):
        return TimmCNN(timm.create_model(cfg.name, num_classes=num_classes, in_chans=config.data.channels))
    shape = vit_shape(config.model.vit)
    if config.method == "shared":
        assert vit is not None
        blocks = _shared_blocks(config, vit, agent_taps(config))
    else:
        blocks = _own_blocks(config, shape)
    channels = config.data.channels
    stem = (
        patch_stem(shape.width, agent_patch(cfg, shape), channels)
        if cfg.stem == "patch"
        else resnet_stem(shape.width, cfg.stem_width, channels)
    )
    agent = Agent(stem, blocks, cfg.downsample, shape.width, num_classes)
    init_agent(agent, config.model.init)
    agent.recompute = config.model.checkpoint_blocks
    return agent


def _norm(agent: AgentConfig) -> Any:
    return agent.norm or ("pre" if agent.name == "agent_small" else "post")


def _own_blocks(config: Config, shape: ViTShape) -> list[AgentBlock]:
    cfg = config.model.agent

    def mixer() -> nn.Module:
        if cfg.name == "agent_small":
            return SameConv(shape.width)
        return HeadTapConv(shape.width, agent_taps(config))

    def mlp() -> nn.Module:
        return ConvMLP(shape.width, cfg.mlp_width or shape.mlp_width, cfg.dropout or 0.0)

    rate = cfg.residual_dropout or 0.0
    paths = path_rates(cfg.drop_path or 0.0, shape.depth)
    return [AgentBlock(mixer(), mlp(), shape.width, _norm(cfg), rate, path) for path in paths]


def _shared_blocks(config: Config, vit: VisionTransformer, taps: tuple[Tap, ...]) -> list[AgentBlock]:
    cfg, inherited = config.model.agent, config.model.vit.dropout
    dropout = inherited if cfg.dropout is None else cfg.dropout
    residual = inherited if cfg.residual_dropout is None else cfg.residual_dropout
    path = config.model.vit.drop_path if cfg.drop_path is None else cfg.drop_path
    return [
        AgentBlock(
            SharedMixer(block.attn, taps, cfg.value_bias),
            SharedMLP(block.mlp, dropout),
            vit.embed_dim,
            _norm(cfg),
            residual,
            own,
        )
        for block, own in zip(vit.blocks, path_rates(path, len(vit.blocks)), strict=True)
    ]


def path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth by block, from 0 at the first to `last`, as timm's."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]
