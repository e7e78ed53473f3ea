"""How a table's images become batches, and how a run prepares those of its evaluation."""

from __future__ import annotations

from typing import Literal, NamedTuple

from bootvit.config import Config, DataConfig
from bootvit.data.facts import Preparation
from bootvit.data.table import Augment, ImageTable


class Way(NamedTuple):
    """How images become batches."""

    place: Literal["memory", "workers"]
    augment: Augment


def way_of(table: ImageTable, data: DataConfig) -> Way:
    """The way that `data.augment` and the table's images ask for."""
    augment = table.auto if data.augment == "auto" else data.augment
    small = augment == "crop" or (augment == "none" and table.native is not None)
    return Way("memory" if small else "workers", augment)


def preparation_of(table: ImageTable, config: Config) -> Preparation:
    """How a run that is trained on this table prepares its evaluation images."""
    whole = way_of(table, config.data).place == "memory"
    return Preparation("resize" if whole else "centre_crop", config.image_size, table.mean, table.std)
