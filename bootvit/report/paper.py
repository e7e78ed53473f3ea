"""The paper's numbers, and which of a run's networks each belongs to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

PAPER = Path(__file__).resolve().parent.parent / "paper.json"
UNCHANGED = ("width", "depth", "heads", "mlp_width", "patch")  # null: as the model's name says


@cache
def paper() -> dict[str, Any]:
    """The shipped table: {"cifar": {"columns", "rows"}, "imagenet": …}, top-1 in percent."""
    return dict(json.loads(PAPER.read_text(encoding="utf-8")))


def paper_points(method: str, network: str, config: Mapping[str, str], data: str) -> dict[float, float]:
    """{fraction: top-1} of the paper's row for this network on this data set; empty if it has none.

    CIFAR is given for all images, ImageNet for 5, 10 and 50%.
    """
    row = paper_row(method, network, config)
    if row is None:
        return {}
    if data == "imagenet":
        numbers = paper()["imagenet"]["rows"].get(_imagenet_row(row))
        return dict(zip(paper()["imagenet"]["columns"], numbers, strict=True)) if numbers else {}
    columns = paper()["cifar"]["columns"]
    numbers = paper()["cifar"]["rows"].get(row)
    return {1.0: numbers[columns.index(data)]} if numbers and data in columns else {}


def _imagenet_row(row: str) -> str:
    """For ImageNet the paper gives one number a method: the ViT's."""
    return row.removesuffix(".vit")


def paper_row(method: str, network: str, config: Mapping[str, str]) -> str | None:
    """What the paper's tables call this network, such as `joint_small.vit`; None for any other model."""
    if not _is_papers_size(config):
        return None
    agent_from_scratch = config.get("model.agent.weights", "null") == "null"  # as all of the paper's
    vit, agent = _vit(config), _agent(config) if agent_from_scratch else None
    if method == "vit":
        return _single_vit(vit, config)
    if method == "agent":
        return agent
    plain = config.get("optim.sam_rho", "null") == "null" and config.get("model.vit.attention") == "softmax"
    if not plain or vit is None or agent is None or config.get("model.vit.weights", "null") != "null":
        return None
    if method == "joint" and agent != f"agent_{vit}":
        return None
    return f"{method}_{vit}.{network}"


def _single_vit(vit: str | None, config: Mapping[str, str]) -> str | None:
    if config.get("model.vit.weights", "null") != "null":
        size = re.match(r"(?:vit|deit)_(small|base)_patch16", config.get("model.vit.name", ""))
        return f"pretrained_vit_{size[1]}" if size else None
    sam = config.get("optim.sam_rho", "null") != "null"
    sparse = config.get("model.vit.attention") == "entmax"
    if vit is None or (sam and sparse):
        return None
    return f"vit_{vit}" + ("_sam" if sam else "_sparse" if sparse else "")


def _is_papers_size(config: Mapping[str, str]) -> bool:
    unchanged = all(config.get(f"model.vit.{key}", "null") == "null" for key in UNCHANGED)
    return unchanged and config.get("data.image_size") in ("224", "[224, 224]")


def _vit(config: Mapping[str, str]) -> str | None:
    size = re.fullmatch(r"bootvit_(small|base)_patch16_224", config.get("model.vit.name", ""))
    return size[1] if size else None


def _agent(config: Mapping[str, str]) -> str | None:
    name = config.get("model.agent.name", "").split(".")[0]
    return name if name in ("agent_small", "agent_base", "resnet50", "efficientnet_b2") else None
