"""The network sections of the reference's settings (`model`, `input_proj`) as our `model` section."""

from __future__ import annotations

from typing import Any, NamedTuple

from bootvit.errors import UserError
from bootvit.reference.files import Node

CNNS = {"resnet50": "resnet50", "efficientnet_b2": "efficientnet_b2"}  # lower-case name there: name in timm


class ReadViT(NamedTuple):
    """A Transformer as the reference describes it."""

    section: dict[str, Any]  # our model.vit
    image_size: list[int]  # [rows, columns]
    prefix_tokens: int

    @property
    def width(self) -> int:
        """Width of a token."""
        return int(self.section["width"])

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return int(self.section["depth"])


class ReadAgent(NamedTuple):
    """A CNN as the reference describes it."""

    section: dict[str, Any]  # our model.agent
    width: int | None  # None: a CNN of timm
    depth: int | None


def read_vit(model: Node) -> ReadViT:
    """A `model` section with `name: vit` or `deit`."""
    deit = model.only("name", ("vit", "deit")) == "deit"
    inner, patches, places = (model.section(key) for key in ("transformer", "patch_embed", "pos_encoding"))
    inner.only("activation", ("gelu",), default="relu")
    inner.only("final_norm", (True,), default=True)
    inner.only("pre_norm", (True,), default=True)
    sparse = inner.only("use_entmax", (True, False), default=False)
    learned = inner.only("learnable_entmax_alpha", (True, False), default=False)
    patches.only("name", ("vit_like",))
    patches.only("image_channels", (3,), default=3)
    places.only("name", ("learnable",))
    section = {
        "name": f"bootvit_small{'_distilled' if deit else ''}_patch16_224",
        "width": inner.whole("embed_dim"),
        "depth": inner.whole("num_encoder_layers", 12),
        "heads": inner.whole("num_heads", 8),
        "mlp_width": inner.whole("dim_feedforward", 2048),
        "patch": patches.size("patch_size", 16),
        "norm_eps": inner.number("norm_eps", 1e-5),
        "attention": ("entmax" if learned else "entmax_fixed") if sparse else "softmax",
        "dropout": inner.number("dropout", 0.0),
        "pos_dropout": places.number("dropout", 0.0),
    }
    image_size = patches.size("img_size", 224)
    for node in (inner, patches, places, model):
        node.done()
    return ReadViT(section, image_size, 2 if deit else 1)


def read_agent(model: Node) -> ReadAgent:
    """A `model` section with `name: cnn` or `official_models`."""
    if model.only("name", ("cnn", "official_models")) == "official_models":
        name = str(model.take("model_name"))
        if name.lower() not in CNNS:
            raise UserError(f"{model.where('model_name')}={name!r} is not supported, only {' or '.join(CNNS)}")
        model.done()
        return ReadAgent({"name": CNNS[name.lower()]}, None, None)
    model.only("cnn_name", ("cnn_block",))
    model.only("activation", ("gelu",))
    _read_norm(model)
    depth = model.whole("num_layers")
    section = _read_stem(model.section("input_proj")) | _read_conv(model.section("conv_block"))
    mlp = model.section("mlp_block")
    mlp.only("name", ("mlp_cnn",))
    section |= {
        "norm": "pre" if model.only("pre_norm", (True, False), default=True) else "post",
        "downsample": _pools(model, depth),
        "mlp_width": mlp.whole("dim_feedforward"),
        "dropout": mlp.number("dropout", 0.0),
        "residual_dropout": model.number("dropout", 0.0),
    }
    width = model.whole("embed_dim")
    mlp.done()
    model.done()
    return ReadAgent(section, width, depth)


def read_shared_agent(cnn: Node, vit: ReadViT) -> ReadAgent:
    """The `cnn` section of shared training; activation and dropout come from the Transformer."""
    _read_norm(cnn)
    section = _read_stem(cnn.section("input_proj")) | {
        "name": "agent_base",
        "taps": "row_major",
        "norm": "pre" if cnn.only("pre_norm", (True, False)) else "post",
        "downsample": _pools(cnn, vit.depth),
        "value_bias": False,
    }
    cnn.done()
    return ReadAgent(section, vit.width, vit.depth)


def _read_norm(model: Node) -> None:
    norm = model.section("norm")
    norm.only("name", ("bn",))
    norm.done()


def _read_stem(stem: Node) -> dict[str, Any]:
    stem.only("image_channels", (3,))
    if stem.only("name", ("vit_like", "resnet_like")) == "vit_like":
        section: dict[str, Any] = {"stem": "patch", "patch": stem.size("patch_size", 16)}
    else:
        stem.only("activation", ("gelu",))
        section = {"stem": "resnet", "stem_width": stem.whole("mid_channel", 64)}
    stem.done()
    return section


def _read_conv(conv: Node) -> dict[str, Any]:
    conv.only("bias", (True,), default=True)
    heads = conv.whole("num_heads", 6)
    small = conv.only("name", ("conv_sl", "conv_manyhead")) == "conv_sl"
    conv.done()
    return {"name": "agent_small"} if small else {"name": "agent_base", "heads": heads, "taps": "row_major"}


def _pools(model: Node, depth: int) -> list[int]:
    """Blocks followed by a pool; the reference looks up each block in the list, so others in it mean nothing."""
    listed = model.listing("down_sample_layers", int, [])
    return [i for i in range(depth) if i in listed]
