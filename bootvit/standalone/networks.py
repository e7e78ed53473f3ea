"""Networks from the folder that bootvit wrote them to, and what they say of images.

    from bootvit_networks.networks import load
    network = load("FOLDER")
    network.classify([open("cat.jpg", "rb").read()])    # [{"cat": 0.93, "dog": 0.05, ...}]
    network.module                                      # normalised (batch, 3, rows, cols) -> logits (batch, classes)

A folder has `config.json` (what the network is, its class names, how an image is prepared) and `model.safetensors`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .convolutions import ConvolutionalAgent
from .images import centre_crop, decode, enlarge

DIGITS = 6  # of a probability


class Loaded(NamedTuple):
    """A network in evaluation mode, and the content of its config.json."""

    module: nn.Module
    about: dict[str, Any]

    @torch.no_grad()
    def classify(self, images: Sequence[bytes | np.ndarray], top: int = 5) -> list[dict[str, float]]:
        """For each image {class: probability}, the `top` most probable first.

        An image is the bytes of a file, or an array (rows, columns, 3) of uint8, RGB, of any size.
        """
        if not len(images):
            return []
        device = next(self.module.parameters()).device
        pixels = torch.stack([prepare(image, self.about) for image in images])
        chances = self.module(pixels.to(device)).softmax(1).cpu()
        values, orders = chances.topk(min(top, chances.shape[1]), dim=1)
        names: list[str] = self.about["classes"]
        return [
            {names[label]: round(value, DIGITS) for label, value in zip(order, row, strict=True)}
            for order, row in zip(orders.tolist(), values.tolist(), strict=True)
        ]


def prepare(image: bytes | np.ndarray, about: dict[str, Any]) -> Tensor:
    """What the network sees of an image of any size: (3, rows, cols), normalised."""
    from PIL import Image

    whole = decode(image) if isinstance(image, bytes) else Image.fromarray(image)
    rows, cols = about["image_size"]
    made = enlarge(whole, (rows, cols)) if about["kind"] == "resize" else centre_crop(whole, (rows, cols))
    scaled = torch.from_numpy(np.array(made)).permute(2, 0, 1).float().div_(255)
    mean, std = (torch.tensor(about[key], dtype=torch.float32).view(3, 1, 1) for key in ("mean", "std"))
    return (scaled - mean).div_(std)


def load(folder: str | Path) -> Loaded:
    """The network of a folder, on the CPU."""
    place = Path(folder)
    about = json.loads((place / "config.json").read_text(encoding="utf-8"))
    module = build(about["architecture"], len(about["classes"]), place)
    module.load_state_dict(safetensors.torch.load_file(place / "model.safetensors"))
    return Loaded(module.eval(), about)


def build(architecture: dict[str, Any], num_classes: int, place: Path) -> nn.Module:
    """The network that a config.json describes, with random weights; `place` has the modules that it `imports`."""
    for name in architecture.get("imports", ()):
        if str(place) not in sys.path:
            sys.path.insert(0, str(place))
        import_module(name)
    kind, sizes = architecture["kind"], dict(architecture["sizes"])
    if kind == "agent":
        return ConvolutionalAgent(num_classes=num_classes, **sizes)
    if "norm_eps" in sizes:
        sizes["norm_layer"] = partial(nn.LayerNorm, eps=sizes.pop("norm_eps"))
    attention = sizes.pop("attention", "softmax")
    if attention != "softmax":
        from .sparse import EntmaxAttention, FixedEntmaxAttention  # needs the package entmax

        sizes["attn_layer"] = EntmaxAttention if attention == "entmax" else FixedEntmaxAttention
    if kind == "timm":
        return timm.create_model(architecture["name"], num_classes=num_classes, **sizes)  # type: ignore[no-any-return]
    model = VisionTransformerDistilled if kind == "distilled_vit" else VisionTransformer
    return model(num_classes=num_classes, **sizes)  # type: ignore[no-any-return]
