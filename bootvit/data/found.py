"""What a source hands over before constants and fingerprint are completed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bootvit.data.table import RGB, Augment, Images, Rows


@dataclass(frozen=True)
class Found:
    """One split as it was found; None: not known there."""

    images: Images
    labels: Rows
    keys: Sequence[str]
    classes: tuple[str, ...] | None
    constants: tuple[RGB, RGB] | None = None  # mean, deviation
    auto: Augment | None = None
    packed: bool = False  # by us: then `native` and `fingerprint` are known
    native: tuple[int, int] | None = None
    fingerprint: str | None = None
