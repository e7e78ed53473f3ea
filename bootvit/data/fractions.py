"""Which images are used: stratified fractions that nest, and a held-out part, decided by a hash of each key.

Within a class images are ordered by the SHA-256 of their key. A fraction takes images from the front, the held-out
part from the back; so 5% lies inside 10%, the held-out part is the same for every fraction, and neither depends on
the seed, the machine or the order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bootvit.config import DataConfig
from bootvit.data.keys import digest_of
from bootvit.data.table import ImageTable, Rows
from bootvit.errors import UserError


@dataclass(frozen=True)
class Subset:
    """Some rows of a table, in the order of their keys' hashes (so the order of the files does not matter)."""

    table: ImageTable
    indices: Rows = field(repr=False)
    digest: str = ""  # 32 hex digits of the (label, key) pairs

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Rows:
        """(len(self),) int64."""
        return self.table.labels[self.indices]

    @property
    def keys(self) -> list[str]:
        """The images' keys, in order, for printing: a list that is large where the subset is."""
        keys: list[str] = self.table.rows["key"].take(pa.array(self.indices)).to_pylist()
        return keys


class Splits(NamedTuple):
    """The images to train on, and those kept back for selection."""

    train: Subset
    held_out: Subset | None


def select(table: ImageTable, data: DataConfig) -> Splits:
    """Apply `data.fraction`, `data.fraction_rule` and `data.held_out` to a training table."""
    order = table.order
    classes = by_class(table, order)
    held_sizes = largest_remainder([len(rows) for rows in classes], data.held_out)
    held = [rows[len(rows) - size :] for rows, size in zip(classes, held_sizes, strict=True)]
    taken = np.zeros(len(table), bool)
    for label, rows in enumerate(classes):
        taken[_front(table, rows, label, data)] = True
    taken[np.concatenate(held)] = False  # where both meet, the fraction gives way
    if not taken.any():
        raise UserError(
            f"data.fraction={data.fraction} with data.held_out={data.held_out} leaves no training image "
            f"of {len(table)}: use a larger fraction or a smaller held-out part"
        )
    if data.held_out and not sum(held_sizes):
        raise UserError(f"data.held_out={data.held_out} of {len(table)} images is none: use a larger share")
    train = subset(table, order[taken[order]])
    kept = np.zeros(len(table), bool)
    kept[np.concatenate(held)] = True
    return Splits(train, subset(table, order[kept[order]]) if data.held_out else None)


def whole(table: ImageTable) -> Subset:
    """Every image of a table."""
    return subset(table, table.order)


def _front(table: ImageTable, rows: Rows, label: int, data: DataConfig) -> Rows:
    """The rows of one class (given in hash order) that the fraction takes."""
    if data.fraction == 1 or not len(rows):
        return rows
    if data.fraction_rule == "nested":
        return rows[: max(1, round(data.fraction * len(rows)))]
    by_name: Rows = rows[pc.sort_indices(table.rows["key"].take(pa.array(rows))).to_numpy()]
    picks = reference_picks(len(rows), label, data.fraction)
    if not len(picks):
        raise UserError(
            f"data.fraction={data.fraction} leaves class {table.classes[label]!r} ({len(rows)} images) without a "
            "training image: use a larger fraction, or data.fraction_rule=nested, which keeps at least one"
        )
    return by_name[picks]


def reference_picks(class_size: int, class_index: int, fraction: float) -> Rows:
    """The reference's rule: places in a class's files sorted by name, in the order in which it keeps them.

    NumPy's shuffle seeded with the class's index among the sorted class names; the size is rounded with ties to even,
    so it can be zero.
    """
    shuffled: Rows = np.random.default_rng(class_index).permutation(class_size)
    return shuffled[: round(class_size * fraction)]


def by_class(table: ImageTable, order: Rows) -> list[Rows]:
    """`order` (row numbers) class by class; within a class it stays as it is."""
    labels = table.labels[order]
    sizes = np.bincount(labels, minlength=len(table.classes))
    return np.split(order[np.argsort(labels, kind="stable")], np.cumsum(sizes)[:-1])


def largest_remainder(sizes: Sequence[int], share: float) -> list[int]:
    """Split round(share x total) over classes in proportion to their sizes, each within one of its exact part.

    What is left after rounding down goes to the largest remainders; among equal ones, to the lower label.
    """
    exact = [share * size for size in sizes]
    out = [int(part) for part in exact]
    left = round(share * sum(sizes)) - sum(out)
    for label in sorted(range(len(sizes)), key=lambda c: out[c] - exact[c])[: max(left, 0)]:
        out[label] += 1
    return out


def hash_ranks(table: ImageTable) -> tuple[Rows, Rows]:
    """(N,) each row's place in its class's hash order, and (N,) the size of that class."""
    ranks, sizes = np.zeros(len(table), np.int64), np.zeros(len(table), np.int64)
    for rows in by_class(table, table.order):
        ranks[rows], sizes[rows] = np.arange(len(rows)), len(rows)
    return ranks, sizes


def subset(table: ImageTable, indices: Rows) -> Subset:
    """These rows of a table, in this order."""
    return Subset(table, indices, digest_of(table.rows["key"], table.labels, indices))
