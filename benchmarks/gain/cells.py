"""The cells of the map, in the order in which they are worth knowing, and what each is called."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

IMAGES = 50_000  # of CIFAR-10
SEEN = {"short": 100_000, "long": 400_000}  # images that a run sees: the same at every fraction
METHODS = ("vit", "agent", "joint", "shared")
FRACTIONS = (0.1, 0.02, 0.2)
RECIPES = ("plain", "strong")
INITS = ("timm", "reference")


class Cell(NamedTuple):
    """One run."""

    fraction: float
    schedule: str
    recipe: str
    init: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder's."""
        return f"{self.method}-{self.fraction:g}-{self.schedule}-{self.recipe}-{self.init}-{self.seed}"

    @property
    def epochs(self) -> int:
        """Passes over its images."""
        return round(SEEN[self.schedule] / (IMAGES * self.fraction))

    def overrides(self) -> list[str]:
        """What its config says beside its recipe's file; it is evaluated once, at its end."""
        return [
            f"name={self.name}",
            f"method={self.method}",
            f"seed={self.seed}",
            f"data.fraction={self.fraction:g}",
            f"model.init={self.init}",
            f"schedule.epochs={self.epochs}",
            f"schedule.warmup_epochs={self.epochs / 15:g}",
            f"schedule.eval_every={self.epochs}",
        ]


def cells(seeds: int) -> Iterator[Cell]:
    """Every cell: first the recipes on a tenth, with all seeds; then other fractions, long runs, initial values."""
    for init, schedule, fraction in product(INITS, SEEN, FRACTIONS):
        for seed, recipe, method in product(range(seeds), RECIPES, METHODS):
            yield Cell(fraction, schedule, recipe, init, method, seed)
