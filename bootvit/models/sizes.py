"""Parameters and forward GFLOPs of every row of the paper's tables, at 224 px; nothing is computed, only shapes.

One multiply-add is 2 FLOPs; matrix products, convolutions and attention products count, norms, activations and
pooling do not. A shared agent executes less than the convolution that it equals: both numbers are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bootvit.config import Config, merge, override, validate
from bootvit.learner import Networks
from bootvit.models.shapes import vit_shape
from bootvit.models.vit import vit_features

CLASSES = (10, 100, 1000)

Sections = dict[str, Any]


def _vit(size: str, **given: Any) -> Sections:
    return {"vit": {"name": f"bootvit_{size}_patch16_224", **given}}


def _agent(size: str, *, resnet: bool = False, **given: Any) -> Sections:
    pools = {"small": [0, 1], "base": [2, 8]}[size]
    stem = {"stem": "resnet", "downsample": pools} if resnet else {}
    return _vit(size) | {"agent": {"name": f"agent_{size}", **stem, **given}}


SMALL_SPARSE = _vit("small", attention="entmax")
SHARED = {"name": "agent_base", "norm": "pre"}  # as the small settings of the reference: many-head, pre-norm

# name: (method, model section); "as shipped" is the reference's own setting where it differs from the paper
ROWS: dict[str, tuple[str, Sections]] = {
    "resnet50": ("agent", {"agent": {"name": "resnet50"}}),
    "efficientnet_b2": ("agent", {"agent": {"name": "efficientnet_b2"}}),
    "agent-small": ("agent", _agent("small")),
    "agent-small-resnet": ("agent", _agent("small", resnet=True)),
    "agent-base": ("agent", _agent("base")),
    "agent-base-resnet": ("agent", _agent("base", resnet=True)),
    "vit-small": ("vit", _vit("small")),
    "vit-base": ("vit", _vit("base")),
    "vit-small-sam": ("vit", _vit("small")),
    "vit-base-sam": ("vit", _vit("base")),
    "vit-small-sparse": ("vit", SMALL_SPARSE),
    "vit-base-sparse": ("vit", _vit("base", attention="entmax")),
    "vit-base-sparse (as shipped)": ("vit", SMALL_SPARSE),
    "deit-small": ("vit", _vit("small_distilled")),
    "deit-base": ("vit", _vit("base_distilled")),
    "joint-small": ("joint", _agent("small")),
    "joint-small-resnet": ("joint", _agent("small", resnet=True)),
    "joint-base-resnet": ("joint", _agent("base", resnet=True)),
    "shared-small": ("shared", merge(_agent("small"), {"agent": SHARED})),
    "shared-small-resnet": ("shared", merge(_agent("small", resnet=True), {"agent": SHARED})),
    "shared-base-resnet": ("shared", _agent("base", resnet=True)),
}


class Size(NamedTuple):
    """One row's size. GFLOPs are of one image at 224 px and 100 classes, by network."""

    name: str
    method: str
    parameters: dict[str, int]  # by number of classes; what both networks use counts once
    own_parameters: dict[str, int]  # by network, at 100 classes; what both use counts in each
    gflops: dict[str, float]  # as executed here
    gflops_plain_convolution: dict[str, float]  # a shared agent as the convolution that it equals


def row_config(name: str) -> Config:
    """The config of a row: what decides its size, and defaults for the rest."""
    method, model = ROWS[name]
    return validate(Config, {"method": method, "model": model, "objective": {"vit": {"hint": 0.0}}}, name)


def sizes() -> list[Size]:
    """Every row's size."""
    return [size_of(name, row_config(name)) for name in ROWS]


def size_of(name: str, config: Config) -> Size:
    """One config's size."""
    networks = _on_meta(config, 100)
    at_100 = _count(list(networks.parameters()))
    a_class = at_100 - _count(list(_on_meta(config, 99).parameters()))
    dense = networks
    if config.model.vit.attention != "softmax":
        # entmax is not counted, and torch cannot run its autocast guard on shapes alone
        dense = _on_meta(override(config, {"model": {"vit": {"attention": "softmax"}}}), 100)
    executed: dict[str, float] = {net: _gflops(dense, net) for net in config.networks}
    plain = dict(executed)
    if config.method == "shared":
        plain["agent"] = _plain_gflops(config)
    return Size(
        name,
        config.method,
        {str(classes): at_100 + a_class * (classes - 100) for classes in CLASSES},
        {net: _count(_used(networks, net)) for net in config.networks},
        executed,
        plain,
    )


def cost_of(config: Config, classes: int) -> tuple[int, float]:
    """(parameters, forward GFLOPs of one image) of all networks of a run; what both networks use counts once."""
    softmax = override(config, {"model": {"vit": {"attention": "softmax"}}})  # as in `size_of`
    dense = _on_meta(softmax, classes)
    return _count(list(_on_meta(config, classes).parameters())), sum(_gflops(dense, net) for net in config.networks)


def _on_meta(config: Config, classes: int) -> Networks:
    with torch.device("meta"):
        return Networks(config, classes).eval()


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad)


def _used(networks: Networks, net: str) -> list[nn.Parameter]:
    """The parameters of one network; a shared agent uses those of the ViT's attention and MLP too."""
    if net == "vit" or networks.config.method != "shared":
        return networks.own_parameters("vit" if net == "vit" else "agent")
    assert networks.vit is not None
    borrowed = [p for block in networks.vit.blocks for part in (block.attn, block.mlp) for p in part.parameters()]
    return networks.own_parameters("agent") + borrowed


def _gflops(networks: Networks, net: str) -> float:
    vit, agent = networks.vit, networks.agent
    forward: Callable[[Tensor], object]
    if net == "vit":
        assert vit is not None
        forward = lambda images: vit_features(vit, images)  # noqa: E731
    else:
        assert agent is not None
        forward = agent
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(torch.empty(1, networks.config.data.channels, *networks.config.image_size, device="meta"))
    return float(counter.get_total_flops()) / 1e9


def _plain_gflops(config: Config) -> float:
    """A shared agent with one merged matrix per head, and the merging of value and output projections once."""
    own = override(config, {"method": "agent", "model": {"agent": {"name": "agent_base"}}})
    shape = vit_shape(config.model.vit)
    merging = 2 * shape.depth * shape.width**3 / 1e9
    return _gflops(_on_meta(own, 100), "agent") + merging


def document() -> list[dict[str, Any]]:
    """`bootvit models --json`."""
    return [size._asdict() for size in sizes()]


def table() -> str:
    """`bootvit models`."""
    lines = [f"{'model':28} {'method':7} {'parameters at 10':>17} {'100':>11} {'1000 classes':>13}  GFLOPs at 224 px"]
    for row in sizes():
        counts = [f"{row.parameters[str(classes)]:,}" for classes in CLASSES]
        lines.append(
            f"{row.name:28} {row.method:7} {counts[0]:>17} {counts[1]:>11} {counts[2]:>13}  {_flops_text(row)}"
        )
    return "\n".join(lines)


def _flops_text(row: Size) -> str:
    parts = [f"{sum(row.gflops.values()):.4f}"]
    if len(row.gflops) == 2:
        parts.append(" (" + ", ".join(f"{net} {value:.4f}" for net, value in row.gflops.items()) + ")")
    if row.gflops != row.gflops_plain_convolution:
        parts.append(f"; as a plain convolution {sum(row.gflops_plain_convolution.values()):.4f}")
    return "".join(parts)
