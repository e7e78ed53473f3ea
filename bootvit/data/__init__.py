"""From a data set on disk to batches on the device.

What is here opens a data set and chooses from it, without importing torch; `batches` loads what was chosen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from bootvit.config import Config, DataConfig
from bootvit.data.facts import DataFacts, Preparation
from bootvit.data.fractions import Subset, select, whole
from bootvit.data.sources import open_table
from bootvit.data.table import RGB, ImageTable
from bootvit.data.way import preparation_of, way_of
from bootvit.errors import UserError

__all__ = [
    "DataFacts",
    "DataSplits",
    "ImageTable",
    "Preparation",
    "Subset",
    "facts_of",
    "open_splits",
    "open_table",
    "select",
    "way_of",
]


@dataclass(frozen=True)
class DataSplits:
    """A data set as a run uses it."""

    train: Subset
    held_out: Subset | None
    test: Subset | None  # the source's test or val split
    classes: tuple[str, ...]
    mean: RGB
    std: RGB
    fingerprint: str  # 32 hex digits of the whole data set, whatever the fraction
    notes: tuple[str, ...] = ()  # what was assumed about the data


def open_splits(data: DataConfig, classes: tuple[str, ...] | None = None) -> DataSplits:
    """Open the source and choose the images to train on, to select with and to test on.

    With `classes`, those of a run, the data set's labels count in them, by name; a class with images that is not among
    them is a `UserError`.
    """
    notes: list[str] = []
    table = open_table(data, "train", classes=classes, notes=notes)
    if table is None:
        raise UserError(f"data.root={data.root}: no training split")
    splits = select(table, data)
    test = open_table(data, "test", like=table, notes=notes)
    prints = table.fingerprint + (test.fingerprint if test else "")
    return DataSplits(
        train=splits.train,
        held_out=splits.held_out,
        test=whole(test) if test else None,
        classes=table.classes,
        mean=table.mean,
        std=table.std,
        fingerprint=hashlib.sha256(prints.encode()).hexdigest()[:32],
        notes=tuple(notes),
    )


def facts_of(splits: DataSplits, config: Config) -> DataFacts:
    """What a run that begins on this data will know of it."""
    return DataFacts(splits.classes, splits.fingerprint, preparation_of(splits.train.table, config))
