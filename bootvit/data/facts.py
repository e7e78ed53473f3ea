"""What a run knows of its data: class names, fingerprint, and how an evaluation image is prepared.

Kept in every checkpoint; `eval`, `predict`, `--resume`, warm starts and exports take it from there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from bootvit.errors import UserError

RGB = tuple[float, ...]  # a number for each channel


@dataclass(frozen=True)
class Preparation:
    """How an evaluation image of any size becomes what the networks see; always bilinear, as Pillow does it."""

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

    def check_same(self, other: DataFacts, what: str) -> None:
        """Raise `UserError` unless these are the images and classes of `other`; anything fits data never seen."""
        if not self.fingerprint:
            if len(self.classes) != len(other.classes):
                raise UserError(f"{what}: the run has {len(self.classes)} classes, the data has {len(other.classes)}")
            return
        if self.classes != other.classes:
            raise UserError(f"{what}: its classes are {named(self.classes)}, those of data.root {named(other.classes)}")
        if self.fingerprint != other.fingerprint:
            raise UserError(
                f"{what}: data.root holds other images than those it was trained on (fingerprint "
                f"{other.fingerprint}, the run has {self.fingerprint}); name=... starts another run"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; a `UserError` for a checkpoint from before runs knew how they prepare images."""
        if "preparation" not in data:
            raise UserError("the checkpoint was written by an earlier version of bootvit: train the run again")
        own = data["preparation"]
        rows, cols = own["size"]
        preparation = Preparation(own["kind"], (rows, cols), _rgb(own["mean"]), _rgb(own["std"]))
        return cls(tuple(data["classes"]), data["fingerprint"], preparation)


def named(classes: Sequence[str]) -> str:
    """The first few class names, for a message."""
    more = f" ... ({len(classes)})" if len(classes) > 5 else ""
    return ", ".join(classes[:5]) + more


def _rgb(values: Any) -> RGB:
    return tuple(map(float, values))
