"""Batches on the device: which images, in which order, augmented how: a function of (seed, epoch, position).

Global step b of an epoch covers positions b*B .. (b+1)*B-1 of the epoch's order; each worker takes its piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bootvit.config import Config, DataConfig
from bootvit.data.augment import CROP_NUMBERS
from bootvit.data.decode import to_rgb
from bootvit.data.fractions import Subset
from bootvit.data.loaders import Batch, MemoryLoader, Numbers, Piece, Way, WorkerLoader
from bootvit.data.randomness import permutation, uniforms
from bootvit.data.resize import AREA_NUMBERS, centre_crop, enlarge, normalise
from bootvit.data.table import ImageTable
from bootvit.errors import UserError

__all__ = ["Batch", "EvalBatches", "TrainBatches", "piece", "preprocess", "way_of"]


def way_of(table: ImageTable, data: DataConfig) -> Way:
    """The way that `data.augment` and the table's images ask for."""
    augment = table.auto if data.augment == "auto" else data.augment
    small = augment == "crop" or (augment == "none" and table.native is not None)
    return Way("memory" if small else "workers", augment)


def piece(step: int, batch: int, total: int, rank: int, world: int) -> Piece:
    """Rank's part of positions step*batch .. of `total`, split as np.array_split does."""
    first = step * batch
    size = min(batch, total - first)
    small, larger = divmod(size, world)
    start = first + rank * small + min(rank, larger)
    return Piece(start, start + small + (rank < larger), size)


class TrainBatches:
    """The training batches of one worker."""

    def __init__(self, subset: Subset, config: Config, *, rank: int, world: int, device: torch.device | str) -> None:
        self._way = way_of(subset.table, config.data)
        self._loader = _loader(subset, config, self._way, torch.device(device))
        self._seed, self._rank, self._world = config.seed, rank, world
        self._total = len(self._loader)
        self._batch = min(config.data.batch_size, self._total)
        if self._batch < world:
            raise UserError(f"ray.num_workers={world}: {self._total} training images are fewer than the workers")
        self.steps_per_epoch = self._total // self._batch

    @property
    def skipped(self) -> int:
        """Broken images left out so far (data.on_error=skip); loading processes meet them as they go."""
        return self._loader.skipped

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step `start` on."""
        order = permutation(self._seed, epoch, self._total)
        pieces = [
            piece(step, self._batch, self._total, self._rank, self._world)
            for step in range(start, self.steps_per_epoch)
        ]
        yield from self._loader.load(pieces, order, self._numbers(epoch))

    def _numbers(self, epoch: int) -> Numbers:
        count = AREA_NUMBERS if self._way.augment == "area" else CROP_NUMBERS
        seed = self._seed
        return lambda part: uniforms(seed, epoch, part.start, part.stop, count)


class EvalBatches:
    """Every image of a subset once over all workers, without augmentation or padding."""

    def __init__(self, subset: Subset, config: Config, *, rank: int, world: int, device: torch.device | str) -> None:
        way = Way(way_of(subset.table, config.data).place, "none")
        self._loader = _loader(subset, config, way, torch.device(device))
        self._rank, self._world, self._batch = rank, world, config.data.eval_batch_size

    @property
    def skipped(self) -> int:
        """Broken images left out so far (data.on_error=skip); loading processes meet them as they go."""
        return self._loader.skipped

    def __iter__(self) -> Iterator[Batch]:
        total = len(self._loader)
        steps = range(-(-total // self._batch))
        pieces = [piece(step, self._batch, total, self._rank, self._world) for step in steps]
        mine = [part for part in pieces if part.stop > part.start]
        yield from self._loader.load(mine, np.arange(total), None)


def _loader(subset: Subset, config: Config, way: Way, device: torch.device) -> MemoryLoader | WorkerLoader:
    kind = MemoryLoader if way.place == "memory" else WorkerLoader
    return kind(subset, config, way, device)


def preprocess(images: Sequence[Image.Image], config: Config, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Evaluation preprocessing of images of any mode and size: (n, 3, rows, cols) float32.

    Sources of small images, and images of at most 96 px under `data.augment: auto | none`, are resized as they are;
    `crop` says small, `area` says large.
    """
    pixels = [np.asarray(_evaluated(to_rgb(image), config)) for image in images]
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return normalise(stacked, mean, std)


def _evaluated(image: Image.Image, config: Config) -> Image.Image:
    small = config.data.source in ("digits", "cifar10", "cifar100") or max(image.size) <= 96
    if config.data.augment == "crop" or (config.data.augment != "area" and small):
        return enlarge(image, config.image_size)
    return centre_crop(image, config.image_size)
