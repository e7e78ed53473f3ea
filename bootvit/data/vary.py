"""How training images vary beyond crops and flips: colours, policies, erasing, mixing.

The operations are torchvision's; which ones, and how strong, is drawn here from uniform numbers of each position of the
epoch, because torchvision draws from one generator, whose state would depend on what a process did before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from bootvit.config import DataConfig

Uniforms = npt.NDArray[np.float64]
Picture = TypeVar("Picture", Image.Image, Tensor)  # a tensor is (..., channels, rows, cols) uint8

BINS = 31  # of strength
# torchvision's order; those after the sixth work on colours, and need 1 or 3 channels
OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast"),
    *("Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
GEOMETRY = 6
UNSIGNED = {"Identity", "Posterize", "Solarize", "AutoContrast", "Equalize"}
ORDERS = tuple(permutations(range(3)))  # of brightness, contrast and saturation

# where each finds its numbers
JITTER = slice(0, 4)  # three strengths, their order
ERASE = slice(4, 28)  # whether, area and aspect of 10 tries, place, 1 to spare
POLICY = 28  # and on: operation, strength and sign of each layer
MIX_NUMBERS = 8  # of another stream: mixup or cutmix, share, row, column, 4 to spare


class Variation(NamedTuple):
    """What `data.color_jitter`, `data.policy` and `data.erase` ask for."""

    jitter: float
    policy: str
    layers: int
    strength: int  # of RandAugment, in `BINS`
    erase: float

    @classmethod
    def of(cls, data: DataConfig) -> Self:
        """A config's."""
        layers = {"none": 0, "rand": data.policy_layers, "trivial": 1}[data.policy]
        return cls(data.color_jitter, data.policy, layers, data.policy_strength, data.erase)

    @property
    def needs(self) -> int:
        """How many uniform numbers an image takes, a multiple of 4; 0: it stays as it is."""
        if not (self.jitter or self.layers or self.erase):
            return 0
        return -(-(POLICY + 3 * self.layers) // 4) * 4

    def one(self, image: Picture, numbers: Sequence[float]) -> Picture:
        """Jitter and policy of one image, PIL's or a tensor (channels, rows, cols) uint8."""
        if self.jitter:
            image = jittered(image, self.jitter, numbers[JITTER])
        for layer in range(self.layers):
            image = apply(image, *self._drawn(layer, numbers, *shape_of(image)))
        return image

    def batch(self, images: Tensor, numbers: Uniforms) -> Tensor:
        """The same of images (batch, channels, rows, cols) uint8; those with one operation go through it together."""
        if not self.jitter and not self.layers:
            return images
        images = images.contiguous().clone()
        if self.jitter:
            images = torch.stack(
                [jittered(image, self.jitter, own[JITTER]) for image, own in zip(images, numbers.tolist(), strict=True)]
            )
        for layer in range(self.layers):
            together: dict[tuple[str, float], list[int]] = {}
            for row, own in enumerate(numbers.tolist()):
                together.setdefault(self._drawn(layer, own, *shape_of(images)), []).append(row)
            for (name, strength), rows in together.items():
                if name != "Identity":
                    places = torch.tensor(rows).to(images.device, non_blocking=True)
                    images[places] = apply(images[places], name, strength)
        return images

    def erased(self, images: Tensor, numbers: Uniforms) -> Tensor:
        """Normalised images (batch, channels, rows, cols), some with a rectangle set to zero, which is the mean."""
        if not self.erase:
            return images
        boxes = [erased_box(own[ERASE], self.erase, images.shape[2], images.shape[3]) for own in numbers.tolist()]
        return images.masked_fill(inside(boxes, images), 0.0)

    def _drawn(self, layer: int, numbers: Sequence[float], channels: int, rows: int, cols: int) -> tuple[str, float]:
        """The operation of a layer, and its signed strength."""
        operation, strength, sign = numbers[POLICY + 3 * layer : POLICY + 3 * layer + 3]
        names = OPERATIONS if channels in (1, 3) else OPERATIONS[:GEOMETRY]
        name = names[int(operation * len(names))]
        place = self.strength if self.policy == "rand" else int(strength * BINS)
        size = strengths(self.policy, name, rows, cols)[place]
        return name, -size if name not in UNSIGNED and sign < 0.5 else size


def shape_of(image: Picture) -> tuple[int, int, int]:
    """(channels, rows, cols)."""
    if isinstance(image, Image.Image):
        return len(image.getbands()), image.height, image.width
    return image.shape[-3], image.shape[-2], image.shape[-1]


# ------------------------------------------------------------------------------------------------- operations


@lru_cache(maxsize=256)
def strengths(policy: str, name: str, rows: int, cols: int) -> tuple[float, ...]:
    """An operation's 31 strengths: those of RandAugment (rand), or the wide ones of TrivialAugment (trivial)."""
    rand = policy == "rand"
    if name in ("Identity", "AutoContrast", "Equalize"):
        return (0.0,) * BINS
    if name == "Posterize":
        return tuple(float(round(8 - place / ((BINS - 1) / (4 if rand else 6)))) for place in range(BINS))
    if name == "Solarize":
        return tuple(torch.linspace(1.0, 0.0, BINS).tolist())
    largest = {
        "ShearX": 0.3 if rand else 0.99,
        "ShearY": 0.3 if rand else 0.99,
        "TranslateX": 150 / 331 * cols if rand else 32.0,
        "TranslateY": 150 / 331 * rows if rand else 32.0,
        "Rotate": 30.0 if rand else 135.0,
    }.get(name, 0.9 if rand else 0.99)
    return tuple(torch.linspace(0.0, largest, BINS).tolist())


def apply(image: Picture, name: str, strength: float) -> Picture:
    """One operation by torchvision's name; what moves in is black."""
    changed: Any = (moved if name in OPERATIONS[:GEOMETRY] else coloured)(image, name, strength)
    return changed  # type: ignore[no-any-return]


def moved(image: Any, name: str, strength: float) -> Any:
    """`apply` of those that move pixels."""
    from torchvision.transforms.v2 import functional as tv

    still: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    tilt = math.degrees(math.atan(strength))
    match name:
        case "ShearX":
            return tv.affine(image, **still | {"shear": [tilt, 0.0]}, center=[0, 0])
        case "ShearY":
            return tv.affine(image, **still | {"shear": [0.0, tilt]}, center=[0, 0])
        case "TranslateX":
            return tv.affine(image, **still | {"translate": [int(strength), 0]})
        case "TranslateY":
            return tv.affine(image, **still | {"translate": [0, int(strength)]})
        case "Rotate":
            return tv.rotate(image, angle=strength)
    return image  # Identity


def coloured(image: Any, name: str, strength: float) -> Any:
    """`apply` of those that change colours."""
    from torchvision.transforms.v2 import functional as tv

    factors = {
        "Brightness": tv.adjust_brightness,
        "Color": tv.adjust_saturation,
        "Contrast": tv.adjust_contrast,
        "Sharpness": tv.adjust_sharpness,
    }
    if name in factors:
        return factors[name](image, 1.0 + strength)
    if name == "Posterize":
        return tv.posterize(image, int(strength))
    if name == "Solarize":
        return tv.solarize(image, 255.0 * strength)
    return tv.autocontrast(image) if name == "AutoContrast" else tv.equalize(image)


def jittered(image: Picture, jitter: float, numbers: Sequence[float]) -> Picture:
    """Brightness, contrast and saturation times 1 - jitter to 1 + jitter, in random order, as torchvision's
    ColorJitter; images that are neither grey nor RGB stay as they are."""
    from torchvision.transforms.v2 import functional as tv

    if shape_of(image)[0] not in (1, 3):
        return image
    changes = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    low, high = max(0.0, 1 - jitter), 1 + jitter
    for which in ORDERS[int(numbers[3] * len(ORDERS))]:
        image = changes[which](image, low + (high - low) * numbers[which])
    return image


# -------------------------------------------------------------------------------------------------- rectangles


class Cover(NamedTuple):
    """A rectangle from (top, left) to below (bottom, right); empty where nothing is covered."""

    top: int
    bottom: int
    left: int
    right: int


NOTHING = Cover(0, 0, 0, 0)


def inside(boxes: Sequence[Cover], images: Tensor) -> Tensor:
    """(batch, 1, rows, cols) bool: the pixels of each image that lie in its rectangle."""
    edges = torch.tensor(boxes).to(images.device, non_blocking=True)[:, :, None]  # (batch, 4, 1)
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    rows, cols = (y >= edges[:, 0]) & (y < edges[:, 1]), (x >= edges[:, 2]) & (x < edges[:, 3])
    return (rows[:, :, None] & cols[:, None, :])[:, None]


def erased_box(numbers: Sequence[float], probability: float, rows: int, cols: int) -> Cover:
    """The rectangle that torchvision's RandomErasing would choose: 2 to 33% of the area, aspects of 0.3 to 3.3."""
    if numbers[0] >= probability:
        return NOTHING
    low, high = math.log(0.3), math.log(3.3)
    for attempt in range(10):
        area = rows * cols * (0.02 + (0.33 - 0.02) * numbers[1 + 2 * attempt])
        aspect = math.exp(low + (high - low) * numbers[2 + 2 * attempt])
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < rows and width < cols:
            top, left = int(numbers[21] * (rows - height + 1)), int(numbers[22] * (cols - width + 1))
            return Cover(top, top + height, left, left + width)
    return NOTHING


# ------------------------------------------------------------------------------------------------------ mixing


class Mixing(NamedTuple):
    """What `data.mixup` and `data.cutmix` ask for: Beta parameters, 0 for off."""

    mixup: float
    cutmix: float

    def mixed(self, images: Tensor, partners: Tensor, numbers: Uniforms) -> tuple[Tensor, Tensor]:
        """(images, shares): each image blended with its partner, or with a rectangle of it, as timm's Mixup.

        Both are (batch, channels, rows, cols), normalised; the shares (batch, 1) are what is left of the first ones.
        Where both ways are on, each takes half of the images.
        """
        drawn = [self._drawn(own, images.shape[2], images.shape[3]) for own in numbers.tolist()]
        shares = torch.tensor([share for share, _ in drawn]).to(images.device, non_blocking=True)[:, None]
        blend = torch.tensor([share if box is NOTHING else 1.0 for share, box in drawn])
        blend = blend.to(images.device, images.dtype, non_blocking=True)[:, None, None, None]
        out = images * blend + partners * (1 - blend)
        if self.cutmix:
            out = torch.where(inside([box for _, box in drawn], images), partners, out)
        return out, shares

    def _drawn(self, numbers: Sequence[float], rows: int, cols: int) -> tuple[float, Cover]:
        """What is left of an image, and the rectangle of its partner."""
        from scipy.special import betaincinv

        cut = self.cutmix > 0 and (self.mixup == 0 or numbers[0] < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = float(betaincinv(alpha, alpha, numbers[1]))
        if not cut:
            return share, NOTHING
        height, width = int(rows * math.sqrt(1 - share)), int(cols * math.sqrt(1 - share))
        y, x = int(numbers[2] * rows), int(numbers[3] * cols)  # its middle; it is cut at the image's edges
        box = Cover(
            max(y - height // 2, 0),
            min(y + (height + 1) // 2, rows),
            max(x - width // 2, 0),
            min(x + (width + 1) // 2, cols),
        )
        return 1 - (box.bottom - box.top) * (box.right - box.left) / (rows * cols), box
