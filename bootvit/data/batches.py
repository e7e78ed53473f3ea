"""Batches on the device: which images, in which order, augmented how: a function of (seed, epoch, position).

Global step b of an epoch covers positions b*B .. (b+1)*B-1 of the epoch's order; each worker takes its piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bootvit.config import Config, DataConfig
from bootvit.data.areas import AREA_NUMBERS
from bootvit.data.augment import CROP_NUMBERS
from bootvit.data.decode import to_rgb
from bootvit.data.facts import Preparation
from bootvit.data.fractions import Subset
from bootvit.data.loaders import Batch, Cut, MemoryLoader, Numbers, Piece, WorkerLoader
from bootvit.data.randomness import Purpose, balanced, permutation, repeated, uniforms
from bootvit.data.resize import normalise
from bootvit.data.table import Rows
from bootvit.data.vary import MIX_NUMBERS, Mixing, Variation
from bootvit.data.way import Way, preparation_of, way_of
from bootvit.errors import UserError

__all__ = ["Batch", "EvalBatches", "TrainBatches", "piece", "preprocess"]


def piece(step: int, batch: int, total: int, rank: int, world: int) -> Piece:
    """Rank's part of positions step*batch .. of `total`, split as np.array_split does."""
    first = step * batch
    size = min(batch, total - first)
    small, larger = divmod(size, world)
    start = first + rank * small + min(rank, larger)
    return Piece(start, start + small + (rank < larger), size)


def with_partners(part: Piece) -> Piece:
    """The same with the partner of each of its positions: 2k and 2k+1 are mixed with one another."""
    return Piece(part.start // 2 * 2, -(-part.stop // 2) * 2, part.global_size)


class TrainBatches:
    """The training batches of one worker; `preparation` is the run's, or what the subset's own table gives."""

    def __init__(
        self,
        subset: Subset,
        config: Config,
        preparation: Preparation | None = None,
        *,
        rank: int,
        world: int,
        device: torch.device | str,
    ) -> None:
        self._way = way_of(subset.table, config.data)
        prepared = preparation or preparation_of(subset.table, config)
        self._loader = _loader(subset, config.data, prepared, self._way, torch.device(device))
        self._data, self._classes = config.data, len(subset.table.classes)
        self._varies = Variation.of(config.data).needs
        self._mixing = Mixing(config.data.mixup, config.data.cutmix)
        self._seed, self._rank, self._world = config.seed, rank, world
        self._total = len(self._loader)
        self._batch = min(config.data.batch_size, self._total)
        if self._batch < world:
            raise UserError(f"ray.num_workers={world}: {self._total} training images are fewer than the workers")
        self.steps_per_epoch = self._total // self._batch

    @property
    def broken(self) -> dict[str, str]:
        """{image: reason} of those left out so far (data.on_error=skip); loading processes meet them as they go."""
        return self._loader.broken

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step `start` on."""
        order = self._order(epoch)
        pieces = [
            piece(step, self._batch, self._total, self._rank, self._world)
            for step in range(start, self.steps_per_epoch)
        ]
        if not any(self._mixing):
            yield from self._loader.load(pieces, order, self._numbers(epoch))
            return
        wide = [with_partners(part) for part in pieces]
        batches = self._loader.load(wide, np.append(order, order[:1]), self._numbers(epoch))
        for part, around, batch in zip(pieces, wide, batches, strict=True):
            yield self._mixed(part, around, batch, epoch)

    def _order(self, epoch: int) -> Rows:
        order = (
            balanced(self._seed, epoch, self._loader.labels)
            if self._data.sampling == "balanced"
            else permutation(self._seed, epoch, self._total)
        )
        return order if self._data.repeats == 1 else repeated(order, self._batch, self._data.repeats)

    def _numbers(self, epoch: int) -> Numbers:
        count = AREA_NUMBERS if self._way.augment == "area" else CROP_NUMBERS
        seed, more = self._seed, self._varies

        def numbers(part: Piece) -> npt.NDArray[np.float64]:
            found = uniforms(seed, epoch, part.start, part.stop, count)
            if not more:
                return found
            return np.hstack([found, uniforms(seed, epoch, part.start, part.stop, more, Purpose.VARY)])

        return numbers

    def _mixed(self, part: Piece, around: Piece, batch: Batch, epoch: int) -> Batch:
        """Of a batch with its images' partners, positions 2k and 2k+1, the images of `part`, mixed with theirs.

        One whose partner is broken is mixed with itself, and so stays as it is.
        """
        places = np.arange(around.start, around.stop) if batch.at is None else around.start + batch.at
        row_of = {place: row for row, place in enumerate(places.tolist())}
        mine = [place for place in places.tolist() if part.start <= place < part.stop] or places[:1].tolist()
        own = torch.tensor([row_of[place] for place in mine])
        other = torch.tensor([row_of.get(place ^ 1, row_of[place]) for place in mine])
        own, other = (rows.to(batch.images.device, non_blocking=True) for rows in (own, other))
        numbers = uniforms(self._seed, epoch, around.start, around.stop, MIX_NUMBERS, Purpose.MIX)
        numbers = numbers[np.array(mine) - around.start]
        images, shares = self._mixing.mixed(batch.images[own], batch.images[other], numbers)
        labels = F.one_hot(batch.labels, self._classes).to(shares.dtype)
        return Batch(images, labels[own] * shares + labels[other] * (1 - shares), part.global_size)


class EvalBatches:
    """Every image of a subset once over all workers, without augmentation or padding; arguments as `TrainBatches`."""

    def __init__(
        self,
        subset: Subset,
        config: Config,
        preparation: Preparation | None = None,
        *,
        rank: int,
        world: int,
        device: torch.device | str,
    ) -> None:
        prepared = preparation or preparation_of(subset.table, config)
        in_memory = prepared.kind == "resize" and subset.table.native is not None
        way = Way("memory" if in_memory else "workers", "none")
        self._loader = _loader(subset, config.data, prepared, way, torch.device(device))
        self._rank, self._world, self._batch = rank, world, config.data.eval_batch_size

    @property
    def broken(self) -> dict[str, str]:
        """{image: reason} of those left out so far (data.on_error=skip); loading processes meet them as they go."""
        return self._loader.broken

    def __iter__(self) -> Iterator[Batch]:
        total = len(self._loader)
        steps = range(-(-total // self._batch))
        pieces = [piece(step, self._batch, total, self._rank, self._world) for step in steps]
        mine = [part for part in pieces if part.stop > part.start]
        for batch in self._loader.load(mine, np.arange(total), None):
            if len(batch.labels):  # all of a batch's images may be broken
                yield batch


def _loader(
    subset: Subset, data: DataConfig, preparation: Preparation, way: Way, device: torch.device
) -> MemoryLoader | WorkerLoader:
    kind = MemoryLoader if way.place == "memory" else WorkerLoader
    return kind(subset, data, preparation, way.augment, device)


def preprocess(images: Sequence[Image.Image], preparation: Preparation) -> Tensor:
    """Evaluation images of any mode and size: (n, 3, rows, cols) float32."""
    cut = Cut(preparation.size, preparation.kind, flip=False)
    pixels = torch.from_numpy(np.stack([cut(to_rgb(image), ()) for image in images]))
    return normalise(pixels.permute(0, 3, 1, 2), preparation.mean, preparation.std)
