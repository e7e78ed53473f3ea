"""What a source hands over before constants and fingerprint are completed, and how labels find their classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bootvit.data.keys import Keys
from bootvit.data.table import RGB, Augment, Images, Rows
from bootvit.errors import UserError


@dataclass(frozen=True)
class Found:
    """One split as it was found; None: not known there."""

    images: Images
    labels: Rows
    keys: Keys
    classes: tuple[str, ...] | None
    constants: tuple[RGB, RGB] | None = None  # mean, deviation
    auto: Augment | None = None
    packed: bool = False  # by us: then `native` and `fingerprint` are known
    native: tuple[int, int] | None = None
    fingerprint: str | None = None
    order: Rows | None = None  # of the keys' hashes
    place: str = ""  # the folder or file, for messages
    column: str = "label"  # where the labels were read, for messages


def relabel(labels: Rows, names: Sequence[str], classes: Sequence[str], where: str) -> Rows:
    """Labels that count in `names` as labels that count in `classes`, by name.

    Raises `UserError`, which begins with `where`, for images of a class that `classes` lacks, and for a label without
    a name; but where `classes` begins with `names`, labels are returned as they are.
    """
    if list(names) == list(classes[: len(names)]):
        return labels
    beyond = labels[(labels < 0) | (labels >= len(names))]
    if len(beyond):
        raise UserError(f"{where}: label {beyond[0]}, but {len(names)} class names (0 to {len(names) - 1})")
    number = {name: label for label, name in enumerate(classes)}
    new = np.array([number.get(name, -1) for name in names], np.int64)
    out: Rows = new[labels]
    if len(out) and out.min() < 0:
        counts = np.bincount(labels, minlength=len(names))
        lacking = [names[int(label)] for label in np.flatnonzero((new < 0) & (counts > 0))]
        raise UserError(
            f"{where}: there is no class {listed(lacking)} ({int((out < 0).sum())} images) among {listed(classes)}"
        )
    return out


def listed(names: Iterable[object], limit: int = 4) -> str:
    """For messages: 'a', 'b' and 7 more."""
    shown = [repr(name) if isinstance(name, str) else str(name) for name in names]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more
