"""Random numbers as a function of (seed, epoch, position): counter-based, so any slice can be drawn directly.

Only raw Philox words are used: NumPy keeps the bit streams of its generators fixed, but not its distributions.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Purpose(IntEnum):
    """What a stream is for: streams of different purposes are independent."""

    ORDER = 0
    AUGMENT = 1


def permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits `size` images."""
    words = _philox(seed, epoch, Purpose.ORDER, 0).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64)


def uniforms(seed: int, epoch: int, start: int, stop: int, count: int) -> npt.NDArray[np.float64]:
    """(stop - start, count) numbers in [0, 1): those of the positions start..stop-1, `count` (a multiple of 4) each."""
    if count % 4:
        raise ValueError(f"count={count}: one Philox step yields 4 numbers")
    words = _philox(seed, epoch, Purpose.AUGMENT, start * count // 4).random_raw((stop - start) * count)
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(stop - start, count)


def _philox(seed: int, epoch: int, purpose: Purpose, counter: int) -> np.random.Philox:
    key = np.array([seed, epoch * 256 + purpose], np.uint64)
    return np.random.Philox(key=key, counter=counter)
