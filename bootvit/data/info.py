"""What `bootvit data info` and `bootvit data fraction` say."""

from __future__ import annotations

from typing import Any

import numpy as np

from bootvit.config import DataConfig
from bootvit.data import open_splits, way_of


def describe(data: DataConfig) -> dict[str, Any]:
    """The data set and the subset in use."""
    splits = open_splits(data)
    table = splits.train.table
    way = way_of(table, data)
    return {
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
        "notes": list(splits.notes),
    }


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
