"""Batches on the device: which images, in which order, augmented how, are functions of (seed, epoch, position).

Global step b of an epoch covers positions b*B .. (b+1)*B-1 of the epoch's order; each worker takes its piece. Two
ways lead to a batch. Small images of one size are decoded once per node and kept as pixels; cropping, flipping and
resizing are done on the device. Other images are decoded when they are needed, by `data.workers` processes.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bootvit.config import Config, DataConfig
from bootvit.data.augment import CROP_NUMBERS, pad_crop_flip
from bootvit.data.cache import decoded, mapped
from bootvit.data.decode import BrokenImage
from bootvit.data.fractions import Subset
from bootvit.data.randomness import permutation, uniforms
from bootvit.data.resize import AREA_NUMBERS, area_crop, centre_crop, enlarge, normalise, resize_batch
from bootvit.data.table import Augment, ImageTable, ParquetImages, PixelImages, Rows
from bootvit.errors import UserError

Pixels = npt.NDArray[np.uint8]


class Batch(NamedTuple):
    """This worker's share of one step."""

    images: Tensor  # (local batch, 3, rows, cols) float32, normalised, on the device
    labels: Tensor  # (local batch,) int64, on the device
    global_size: int  # images of this step over all workers (those broken at loading counted)


class Way(NamedTuple):
    """How images become batches."""

    place: Literal["memory", "workers"]
    augment: Augment


def way_of(table: ImageTable, data: DataConfig) -> Way:
    """The way that `data.augment` and the table's images ask for."""
    augment = table.auto if data.augment == "auto" else data.augment
    small = augment == "crop" or (augment == "none" and table.native is not None)
    return Way("memory" if small else "workers", augment)


class Piece(NamedTuple):
    """The positions that one worker takes of one step."""

    start: int
    stop: int
    global_size: int


def piece(step: int, batch: int, total: int, rank: int, world: int) -> Piece:
    """Rank's part of positions step*batch .. of `total`, split as np.array_split does."""
    first = step * batch
    size = min(batch, total - first)
    small, larger = divmod(size, world)
    start = first + rank * small + min(rank, larger)
    return Piece(start, start + small + (rank < larger), size)


class TrainBatches:
    """The training batches of one worker; `skipped` counts broken images left out so far (data.on_error=skip)."""

    def __init__(
        self, subset: Subset, config: Config, *, rank: int, world: int, device: torch.device | str
    ) -> None:
        self._way = way_of(subset.table, config.data)
        self._loader = _loader(subset, config, self._way, torch.device(device))
        self._seed, self._rank, self._world = config.seed, rank, world
        self._total = len(self._loader)
        self._batch = min(config.data.batch_size, self._total)
        if self._batch < world:
            raise UserError(
                f"ray.num_workers={world}: {self._total} training images are fewer than the workers"
            )
        self.steps_per_epoch = self._total // self._batch

    @property
    def skipped(self) -> int:
        """Broken images left out so far."""
        return self._loader.skipped

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step `start` on."""
        order = permutation(self._seed, epoch, self._total)
        pieces = [
            piece(step, self._batch, self._total, self._rank, self._world)
            for step in range(start, self.steps_per_epoch)
        ]
        yield from self._loader.load(pieces, order, self._numbers(epoch))

    def _numbers(self, epoch: int) -> Callable[[Piece], npt.NDArray[np.float64]]:
        count = AREA_NUMBERS if self._way.augment == "area" else CROP_NUMBERS
        seed = self._seed
        return lambda part: uniforms(seed, epoch, part.start, part.stop, count)


class EvalBatches:
    """Every image of a subset once over all workers, without augmentation or padding."""

    def __init__(
        self, subset: Subset, config: Config, *, rank: int, world: int, device: torch.device | str
    ) -> None:
        way = Way(way_of(subset.table, config.data).place, "none")
        self._loader = _loader(subset, config, way, torch.device(device))
        self._rank, self._world, self._batch = rank, world, config.data.eval_batch_size

    @property
    def skipped(self) -> int:
        """Broken images left out so far."""
        return self._loader.skipped

    def __iter__(self) -> Iterator[Batch]:
        total = len(self._loader)
        steps = range(-(-total // self._batch))
        pieces = [piece(step, self._batch, total, self._rank, self._world) for step in steps]
        mine = [part for part in pieces if part.stop > part.start]
        yield from self._loader.load(mine, np.arange(total), None)


# -------------------------------------------------------------------------------------------------- loaders

Numbers = Callable[[Piece], npt.NDArray[np.float64]] | None


def _loader(subset: Subset, config: Config, way: Way, device: torch.device) -> MemoryLoader | WorkerLoader:
    kind = MemoryLoader if way.place == "memory" else WorkerLoader
    return kind(subset, config, way, device)


class MemoryLoader:
    """Small images of one size: gathered from memory; everything else happens on the device."""

    def __init__(self, subset: Subset, config: Config, way: Way, device: torch.device) -> None:
        self._config, self._way, self._device, self._table = config, way, device, subset.table
        if isinstance(subset.table.images, PixelImages):
            self._pixels, self._rows, broken = subset.table.images.pixels, subset.indices, []
            self._labels = subset.labels
        else:
            self._pixels, places, broken = decoded(subset)
            self._rows, self._labels = np.arange(len(places)), subset.labels[places]
        self.skipped = len(broken)
        if broken:
            place, reason = broken[0]
            _report(f"{subset.table.where(int(subset.indices[place]))}: {reason}", config.data)
        if not len(self._rows):
            raise UserError(f"{subset.table.where(0)}: none of the {len(subset)} images can be read")

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, pieces: Sequence[Piece], order: Rows, numbers: Numbers) -> Iterator[Batch]:
        """One batch per piece; on a GPU the next one is under way while the caller works on the last."""
        batches = (self._batch(part, order[part.start : part.stop], numbers) for part in pieces)
        return _one_ahead(batches) if self._device.type == "cuda" else batches

    def _batch(self, part: Piece, places: Rows, numbers: Numbers) -> Batch:
        raw = torch.from_numpy(np.ascontiguousarray(self._pixels[self._rows[places]]))
        on_device = self._config.data.resize == "device"
        images = (_to(raw, self._device) if on_device else raw).permute(0, 3, 1, 2)
        if self._way.augment == "crop" and numbers is not None:
            data = self._config.data
            images = pad_crop_flip(images, numbers(part), data.crop_padding, flip=data.flip)
        size = self._config.image_size
        images = (
            resize_batch(images, size) if on_device else _to(_resize_with_pil(images, size), self._device)
        )
        labels = _to(torch.from_numpy(self._labels[places]), self._device)
        return Batch(normalise(images, self._table.mean, self._table.std), labels, part.global_size)


class WorkerLoader:
    """Images of any size: read, cut and resized by other processes, one whole batch at a time."""

    def __init__(self, subset: Subset, config: Config, way: Way, device: torch.device) -> None:
        self._subset, self._config, self._way, self._device = subset, config, way, device
        self._source = _by_place(subset)
        self._skipped: set[int] = set()

    @property
    def skipped(self) -> int:
        """Different broken images met so far."""
        return len(self._skipped)

    def __len__(self) -> int:
        return len(self._subset)

    def load(self, pieces: Sequence[Piece], order: Rows, numbers: Numbers) -> Iterator[Batch]:
        """One batch per piece."""
        data, cuda = self._config.data, self._device.type == "cuda"
        cut = Cut(self._config.image_size, self._way.augment if numbers is not None else "none", data.flip)
        steps = _Steps(self._source, self._subset.labels, pieces, order, numbers, cut)
        workers = min(data.workers, len(pieces))
        loader: DataLoader[Loaded] = DataLoader(
            steps,
            batch_size=None,
            num_workers=workers,
            pin_memory=cuda,
            multiprocessing_context=multiprocessing.get_context("fork") if workers else None,
        )
        batches = (self._batch(part, loaded) for part, loaded in zip(pieces, loader, strict=True))
        return _one_ahead(batches) if cuda else batches

    def _batch(self, part: Piece, loaded: Loaded) -> Batch:
        for place, reason in loaded.broken:
            if place not in self._skipped:
                if not self._skipped:
                    _report(
                        f"{self._subset.table.where(int(self._subset.indices[place]))}: {reason}",
                        self._config.data,
                    )
                self._skipped.add(place)
        images = _to(loaded.images, self._device).permute(0, 3, 1, 2)
        table = self._subset.table
        return Batch(
            normalise(images, table.mean, table.std), _to(loaded.labels, self._device), part.global_size
        )


class Loaded(NamedTuple):
    """What a loading process hands over."""

    images: Tensor  # (n, rows, cols, 3) uint8
    labels: Tensor  # (n,) int64
    broken: list[tuple[int, str]]  # place in the subset, reason


@dataclass(frozen=True)
class Cut:
    """How one image of any size becomes one of the size wanted."""

    size: tuple[int, int]
    augment: Augment
    flip: bool

    def __call__(self, image: Image.Image, numbers: Sequence[float]) -> Pixels:
        """(rows, cols, 3)."""
        if self.augment == "area":
            return np.asarray(area_crop(image, self.size, numbers, flip=self.flip))
        return np.asarray(centre_crop(image, self.size))


@dataclass(frozen=True)
class _Steps(Dataset[Loaded]):
    """Item i is the batch of the i-th piece; a broken image is reported as data, since errors lose their type."""

    source: Callable[[int], Image.Image]
    labels: Rows
    pieces: Sequence[Piece]
    order: Rows
    numbers: Numbers
    cut: Cut

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, step: int) -> Loaded:
        part = self.pieces[step]
        places = self.order[part.start : part.stop]
        numbers = self.numbers(part).tolist() if self.numbers else [[]] * len(places)
        images, kept, broken = [], [], []
        for place, own in zip(places.tolist(), numbers, strict=True):
            try:
                images.append(self.cut(self.source(place), own))
                kept.append(place)
            except BrokenImage as err:
                broken.append((place, str(err)))
        pixels = np.stack(images) if images else np.zeros((0, *self.cut.size, 3), np.uint8)
        return Loaded(torch.from_numpy(pixels), torch.from_numpy(self.labels[kept]), broken)


def _by_place(subset: Subset) -> Callable[[int], Image.Image]:
    """Opens the subset's i-th image."""
    images = subset.table.images
    if isinstance(images, ParquetImages):
        return mapped(subset).open
    return lambda place: images.open(int(subset.indices[place]))


def _report(what: str, data: DataConfig) -> None:
    """A broken image ends the run, or is said once."""
    if data.on_error == "raise":
        raise UserError(f"{what} (data.on_error=skip leaves broken images out)")
    warnings.warn(f"left out: {what}; further broken images are only counted", stacklevel=3)


def _resize_with_pil(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(batch, 3, *size) uint8."""
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    out = [np.asarray(enlarge(Image.fromarray(pixels), size)) for pixels in arrays]
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """On a GPU without waiting, which needs pinned memory."""
    if device.type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def _one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each begun before the one before it is handed out."""
    last = next(batches, None)
    for batch in batches:
        assert last is not None  # a batch follows it
        yield last
        last = batch
    if last is not None:
        yield last


def preprocess(
    images: Sequence[Image.Image], config: Config, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Evaluation preprocessing of images of any mode and size: (n, 3, rows, cols) float32.

    Sources of small images, and images of at most 96 px under `data.augment: auto | none`, are resized as they are;
    `crop` says small, `area` says large.
    """
    from bootvit.data.decode import to_rgb

    pixels = [np.asarray(_evaluated(to_rgb(image), config)) for image in images]
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return normalise(stacked, mean, std)


def _evaluated(image: Image.Image, config: Config) -> Image.Image:
    small = config.data.source in ("digits", "cifar10", "cifar100") or max(image.size) <= 96
    if config.data.augment == "crop" or (config.data.augment != "area" and small):
        return enlarge(image, config.image_size)
    return centre_crop(image, config.image_size)
