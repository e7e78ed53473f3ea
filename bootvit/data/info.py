"""What `bootvit data info` and `bootvit data fraction` say."""

from __future__ import annotations

from typing import Any

import numpy as np

from bootvit.config import DataConfig
from bootvit.data import open_splits, way_of
from bootvit.data.decode import BrokenImage, decode
from bootvit.data.fractions import Subset
from bootvit.data.table import PixelImages


def describe(data: DataConfig, *, check: bool = False) -> dict[str, Any]:
    """The data set and the subset in use; with `check`, every image is decoded and the broken ones are counted."""
    splits = open_splits(data)
    table = splits.train.table
    way = way_of(table, data)
    facts: dict[str, Any] = {
        "source": data.source,
        "root": data.root,
        "train": len(splits.train),
        "train_of": len(table),
        "held_out": len(splits.held_out) if splits.held_out else 0,
        "test": len(splits.test) if splits.test else 0,
        "num_classes": len(splits.classes),
        "classes": list(splits.classes),
        "image_size": list(table.native) if table.native else None,
        "kept": "decoded in memory" if way.place == "memory" else "decoded by data.workers",
        "augment": way.augment,
        "mean": list(splits.mean),
        "std": list(splits.std),
        "fingerprint": splits.fingerprint,
        "digest": splits.train.digest,
    }
    if check:
        parts = [part for part in (splits.train, splits.held_out, splits.test) if part is not None]
        facts["broken"] = [where for part in parts for where in broken_images(part)]
    return facts


def broken_images(subset: Subset) -> list[str]:
    """Which images cannot be decoded, and why."""
    images = subset.table.images
    if isinstance(images, PixelImages):
        return []
    out = []
    for place, data in images.scan(subset.indices):
        try:
            decode(data)
        except BrokenImage as err:
            out.append(f"{subset.table.where(int(subset.indices[place]))}: {err}")
    return sorted(out)


def fraction_report(data: DataConfig) -> dict[str, Any]:
    """{"digest", "size", "classes": {label: count}} of the training images that `data.fraction` takes."""
    subset = open_splits(data).train
    counts = np.bincount(subset.labels, minlength=len(subset.table.classes))
    return {
        "digest": subset.digest,
        "size": len(subset),
        "classes": {str(label): int(count) for label, count in enumerate(counts)},
    }


def fraction_keys(data: DataConfig) -> list[str]:
    """The keys of the same images, in the order of their hashes: the keys of a smaller fraction are among them."""
    return open_splits(data).train.keys
