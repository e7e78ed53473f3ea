"""Every shipped config is loaded, and its networks are built, on the meta device."""

from pathlib import Path

import pytest
import torch

from bootvit.config import SHIPPED, load_config
from bootvit.learner import Networks

PATHS = sorted(p for p in SHIPPED.rglob("*.yaml") if p.parent.name not in ("presets", "sweeps"))


@pytest.mark.parametrize("path", PATHS, ids=lambda p: str(p.relative_to(SHIPPED)))
def test_networks_build(path: Path) -> None:
    config = load_config(str(path))
    if config.model.vit.weights or config.model.agent.weights:
        config = load_config(str(path), ["model.vit.weights=null", "model.agent.weights=null"])
    with torch.device("meta"):
        networks = Networks(config, 10)
    assert (networks.vit is not None, networks.agent is not None) == (
        "vit" in config.networks,
        "agent" in config.networks,
    )
    assert config.name.replace("-", "/", 1) == str(path.relative_to(SHIPPED).with_suffix("")).replace("/", "-", 0) or (
        set(config.name.split("-")) == set(path.stem.split("-")) | {path.parent.name}
    )
