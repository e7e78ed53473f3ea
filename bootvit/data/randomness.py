"""Random numbers as a function of (seed, epoch, position); any slice can be drawn directly.

Only raw words of the counter-based Philox are used: NumPy keeps its bit streams fixed, but not its distributions.
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
    order: npt.NDArray[np.int64] = np.argsort(words, kind="stable").astype(np.int64)
    return order


def uniforms(seed: int, epoch: int, start: int, stop: int, count: int) -> npt.NDArray[np.float64]:
    """(stop - start, count) numbers in [0, 1) of the positions start..stop-1; `count` is a multiple of 4."""
    if count % 4:
        raise ValueError(f"count={count}: one Philox step yields 4 numbers")
    words = _philox(seed, epoch, Purpose.AUGMENT, start * count // 4).random_raw((stop - start) * count)
    out: npt.NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return out.reshape(stop - start, count)


def _philox(seed: int, epoch: int, purpose: Purpose, counter: int) -> np.random.Philox:
    key = np.array([seed, epoch * 256 + purpose], np.uint64)
    return np.random.Philox(key=key, counter=counter)
