"""What a run knows of its data: class names, fingerprint, and how an evaluation image is prepared.

Kept in every checkpoint; `eval`, `predict`, `--resume`, warm starts and exports take it from there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Preparation:
    """How an evaluation image, RGB of any size, becomes what the networks see; always bilinear, as Pillow does it."""

    kind: Literal["resize", "centre_crop"]  # the whole image; or shrunk to cover 256/224 of `size`, the centre cut out
    size: tuple[int, int]  # (rows, columns)
    mean: RGB  # of RGB in [0, 1]
    std: RGB


@dataclass(frozen=True)
class DataFacts:
    """The data that a run was trained on."""

    classes: tuple[str, ...]  # the name of each label
    fingerprint: str  # of all images, training and test; empty if they were never seen (an imported run)
    preparation: Preparation

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, texts and numbers, as JSON has them."""
        made = asdict(self)
        own = made["preparation"]
        lists = {key: list(own[key]) for key in ("size", "mean", "std")}
        return made | {"classes": list(self.classes), "preparation": own | lists}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        own = data["preparation"]
        rows, cols = own["size"]
        preparation = Preparation(own["kind"], (rows, cols), _rgb(own["mean"]), _rgb(own["std"]))
        return cls(tuple(data["classes"]), data["fingerprint"], preparation)


def _rgb(values: Any) -> RGB:
    red, green, blue = values
    return float(red), float(green), float(blue)
