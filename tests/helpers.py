"""Small configs and batches that several tests use."""

from pathlib import Path
from typing import Any

import torch

from bootvit.config import Config, merge, nest
from bootvit.data.batches import Batch
from bootvit.learner import World
from bootvit.load import make_config

ONE = World(0, 1, torch.device("cpu"))

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"vit": {"width": 18, "depth": 2, "heads": 9, "mlp_width": 24, "patch": 2}},
    "data": {"source": "digits", "image_size": 8, "batch_size": 32, "eval_batch_size": 200, "fraction": 0.1},
    "objective": {"vit": {"ce": 1, "kd": 1, "hint": 1}},
    "optim": {"lr": 2e-3, "clip_norm": 1.0},
    "schedule": {"epochs": 3},
    "tracking": {"enabled": False, "log_every": 2},
}


def tiny(**changes: Any) -> Config:
    """A config trained in a second; keys with `__` are nested: `data__fraction=0.2`."""
    data = TINY
    for key, value in changes.items():
        data = merge(data, nest(key.replace("__", "."), value))
    return make_config(data, "test")


def batch(size: int = 6, classes: int = 10, side: int = 8, seed: int = 0) -> Batch:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, side, side, generator=generator)
    return Batch(images, torch.randint(classes, (size,), generator=generator), size)


def write(path: Path, text: str) -> Path:
    """A text file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
