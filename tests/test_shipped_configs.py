"""Every shipped config is loaded and its networks are built; every row of the paper's tables trains on digits."""

from pathlib import Path

import pytest
import torch
from helpers import ONE

from bootvit.config import SHIPPED
from bootvit.learner import Networks
from bootvit.load import load_config
from bootvit.loop import fit
from bootvit.runs import claim

RUNS = sorted(p for p in SHIPPED.rglob("*.yaml") if not {"presets", "sweeps"} & set(p.parts))
FROM_SCRATCH = ["model.vit.weights=null", "model.agent.weights=null"]  # there is no hub in a test
SMOKE = [
    "data={source: digits, root: null, image_size: 32, batch_size: 4, fraction: 0.05, eval_batch_size: 64}",
    "schedule.max_steps=4",
    "precision=fp32",
    "tracking.enabled=false",
]


def shipped(path: Path) -> str:
    return str(path.relative_to(SHIPPED).with_suffix(""))


@pytest.mark.parametrize("path", RUNS, ids=shipped)
def test_networks_build(path: Path) -> None:
    config = load_config(str(path), FROM_SCRATCH)
    with torch.device("meta"):
        networks = Networks(config, 10)
    assert {n for n in ("vit", "agent") if getattr(networks, n) is not None} == set(config.networks)
    assert set(config.name.split("-")) == set(shipped(path).replace("/", "-").split("-"))


ROWS = [p for p in RUNS if p.parent.name == "cifar10" and not p.stem.endswith("tiny")]
LARGE = [pytest.param(path, marks=pytest.mark.slow) if "-base" in path.stem else path for path in ROWS]


@pytest.mark.parametrize("path", LARGE, ids=shipped)
def test_every_row_of_the_paper_trains(path: Path, tmp_path: Path) -> None:
    config = load_config(str(path), [*FROM_SCRATCH, *SMOKE, f"ray.storage_path={tmp_path}"])
    folder, _ = claim(config, resume=False, overwrite=False)
    result = fit(config, ONE, folder, test="never" if config.data.held_out else "auto")
    assert result["status"] == "finished"
    assert set(result["final"]) == set(config.networks)
    assert result["steps"] == 4
