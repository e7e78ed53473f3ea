"""A run's networks as `bootvit.standalone` knows them: what they are, in plain values, and the agent as Conv2d layers.

D width, H heads, K = D / H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from bootvit.config import Config
from bootvit.errors import UserError
from bootvit.extensions import module_name
from bootvit.models.agent import Agent, AgentBlock, ConvMLP, HeadTapConv, TimmCNN
from bootvit.models.shapes import OURS, Tap, vit_shape
from bootvit.models.shared import SharedMixer, SharedMLP
from bootvit.models.zoo import vit_arguments
from bootvit.standalone.convolutions import ACTIVATIONS, ConvolutionalAgent

PLAIN_SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "in_chans")
Architecture = dict[str, Any]  # {"kind", "name", "sizes"}, as `bootvit.standalone.networks.build` takes it


def plain(config: Config, network: nn.Module) -> tuple[nn.Module, Architecture]:
    """(the network as an ordinary module, what it is) of a run's ViT or agent."""
    carried = {"imports": [module_name(one) for one in config.imports]} if config.imports else {}
    if isinstance(network, TimmCNN):
        return network.cnn, {"kind": "timm", "name": config.model.agent.name, "sizes": {}, **carried}
    if isinstance(network, Agent):
        sizes, weights = convolutions(network)
        module = ConvolutionalAgent(num_classes=network.head.out_features, **sizes).to(network.head.weight.dtype)
        module.load_state_dict(weights)
        return module.eval(), {"kind": "agent", "sizes": sizes}
    vit, sizes = config.model.vit, vit_arguments(config)
    named = {key: list(v) if isinstance(v, tuple) else v for key, v in sizes.items() if key in PLAIN_SIZES}
    if vit.name not in OURS:
        return network, {"kind": "timm", "name": vit.name, "sizes": named | _beside(config, network), **carried}
    shape = vit_shape(vit)
    whole = {
        "patch_size": list(shape.patch),
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
    }
    kind = "distilled_vit" if isinstance(network, VisionTransformerDistilled) else "vit"
    return network, {"kind": kind, "sizes": whole | named | _beside(config, network)}


def _beside(config: Config, vit: nn.Module) -> dict[str, Any]:
    """What is no plain value among timm's arguments."""
    attention = config.model.vit.attention
    own = config.model.vit.norm_eps is not None or config.model.vit.name in OURS
    return ({"norm_eps": vit.norm.eps} if own else {}) | ({"attention": attention} if attention != "softmax" else {})  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------- the agent as Conv2d layers


@torch.no_grad()
def convolutions(agent: Agent) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(sizes, weights) of the `ConvolutionalAgent` that computes what an agent does.

    A shared agent's value projection, shift and output projection are one convolution, whose D x D matrix at head h's
    tap is W_o^h W_v^h; it is multiplied out in float64.
    """
    blocks = [block for block in agent.blocks if isinstance(block, AgentBlock)]
    mixers = [kernel_of(block.mixer) for block in blocks]
    mlps = [mlp_of(block.mlp) for block in blocks]
    stem = agent.stem
    about: dict[str, Any] = (
        {"patch": list(stem.kernel_size)} if isinstance(stem, nn.Conv2d) else {"stem_width": stem[0].out_channels}  # type: ignore[index]
    )
    first = stem if isinstance(stem, nn.Conv2d) else stem[0]  # type: ignore[index]
    if first.in_channels != 3:
        about["channels"] = first.in_channels
    sizes = about | {
        "width": agent.norm.num_features,
        "depth": len(blocks),
        "kernel": mixers[0][0].shape[-1],
        "hidden": mlps[0][0].shape[0],
        "pre_norm": blocks[0].pre_norm,
        "activation": activation_of(blocks[0].mlp),
        "downsample": sorted(agent.downsample),
    }
    weights = {name: value.clone() for name, value in agent.state_dict().items() if not name.startswith("blocks.")}
    for number, (block, (kernel, bias), mlp) in enumerate(zip(blocks, mixers, mlps, strict=True)):
        names = ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias")
        own = {"mixer.weight": kernel, "mixer.bias": bias, **dict(zip(names, mlp, strict=True))}
        for norm in ("norm1", "norm2"):
            own |= {f"{norm}.{name}": value.clone() for name, value in getattr(block, norm).state_dict().items()}
        weights |= {f"blocks.{number}.{name}": value for name, value in own.items()}
    return sizes, weights


def kernel_of(mixer: nn.Module) -> tuple[Tensor, Tensor]:
    """(D, D, side, side) and bias (D,) of a mixer as one convolution with an odd window."""
    if isinstance(mixer, SharedMixer):
        value, proj, bias = mixer.weights()
        heads, width = len(mixer.taps), len(proj)
        outer = proj.double().reshape(width, heads, -1)  # (D, H, K)
        inner = value.double().reshape(heads, -1, width)  # (H, K, D)
        per_head = torch.einsum("ohk,hki->hoi", outer, inner)
        return placed(per_head.to(value.dtype), mixer.taps), _or_zeros(bias, proj)
    if isinstance(mixer, HeadTapConv):
        return placed(mixer.weight.permute(2, 0, 1), taps_of(mixer)), mixer.bias.clone()
    assert isinstance(mixer, nn.Conv2d)
    return mixer.weight.contiguous().clone(), _or_zeros(mixer.bias, mixer.weight)


def placed(matrices: Tensor, taps: Sequence[Tap]) -> Tensor:
    """(H, D, D), one matrix a tap, as a kernel (D, D, side, side) with zeros elsewhere."""
    reach = max(max(abs(dy), abs(dx)) for dy, dx in taps)
    kernel = matrices.new_zeros(*matrices.shape[1:], 2 * reach + 1, 2 * reach + 1)
    for matrix, (dy, dx) in zip(matrices, taps, strict=True):
        kernel[:, :, dy + reach, dx + reach] = matrix
    return kernel


def taps_of(mixer: HeadTapConv) -> list[Tap]:
    """(rows down, columns right) of every head."""
    left, top = mixer.pad[0], mixer.pad[2]
    return [(place // mixer.window[1] - top, place % mixer.window[1] - left) for place in mixer.places.tolist()]


def mlp_of(mlp: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and biases of an MLP's two 1x1 convolutions."""
    first, second = (mlp.mlp.fc1, mlp.mlp.fc2) if isinstance(mlp, SharedMLP) else (mlp[0], mlp[3])  # type: ignore[index]
    shaped = [layer.weight.reshape(*layer.weight.shape[:2], 1, 1).contiguous().clone() for layer in (first, second)]
    return shaped[0], _or_zeros(first.bias, first.weight), shaped[1], _or_zeros(second.bias, second.weight)


def activation_of(mlp: nn.Module) -> str:
    """Its name; `UserError` for one that has none here."""
    if isinstance(mlp, ConvMLP):
        return "gelu"
    assert isinstance(mlp, SharedMLP)
    names = {kind.__name__.lower().replace("_", ""): name for name, kind in ACTIVATIONS.items()}
    name = names.get(type(mlp.mlp.act).__name__.lower())
    if name is None:
        raise UserError(f"the activation {type(mlp.mlp.act).__name__} has no place in an agent of Conv2d layers")
    return name


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().clone()
