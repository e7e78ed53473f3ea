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
    VARY = 2
    MIX = 3
    CLASS = 4


def permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits `size` images."""
    words = _philox(seed, epoch, Purpose.ORDER, 0).random_raw(size)
    order: npt.NDArray[np.int64] = np.argsort(words, kind="stable").astype(np.int64)
    return order


def balanced(seed: int, epoch: int, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """An order as long as the images are many, in which all classes are equally frequent, and all images of a class.

    Where it does not go evenly, some, chosen anew each epoch, come once more.
    """
    turn = permutation(seed, epoch, len(labels))
    classes = np.unique(labels)
    words = _philox(seed, epoch, Purpose.CLASS, 0).random_raw(len(classes))
    each, more = divmod(len(labels), len(classes))
    quotas = np.full(len(classes), each)
    quotas[np.argsort(words, kind="stable")[:more]] += 1
    mine = [turn[labels[turn] == label] for label in classes]
    chosen = np.concatenate([np.resize(own, quota) for own, quota in zip(mine, quotas.tolist(), strict=True)])
    again = _philox(seed, epoch, Purpose.CLASS, len(classes)).random_raw(len(chosen))
    order: npt.NDArray[np.int64] = chosen[np.argsort(again, kind="stable")]
    return order


def repeated(order: npt.NDArray[np.int64], batch: int, repeats: int) -> npt.NDArray[np.int64]:
    """An epoch's order in which every batch holds 1/repeats of the images, each so often, far apart."""
    images = -(-batch // repeats)
    steps = range(len(order) // batch)
    return np.concatenate([np.resize(order[step * images : (step + 1) * images], batch) for step in steps])


def uniforms(
    seed: int, epoch: int, start: int, stop: int, count: int, purpose: Purpose = Purpose.AUGMENT
) -> npt.NDArray[np.float64]:
    """(stop - start, count) numbers in [0, 1) of the positions start..stop-1; `count` is a multiple of 4."""
    if count % 4:
        raise ValueError(f"count={count}: one Philox step yields 4 numbers")
    words = _philox(seed, epoch, purpose, start * count // 4).random_raw((stop - start) * count)
    out: npt.NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return out.reshape(stop - start, count)


def _philox(seed: int, epoch: int, purpose: Purpose, counter: int) -> np.random.Philox:
    key = np.array([seed, epoch * 256 + purpose], np.uint64)
    return np.random.Philox(key=key, counter=counter)
