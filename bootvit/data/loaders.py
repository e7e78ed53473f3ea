"""The two ways from stored images to batches on the device.

Small images of one size are decoded once per node and kept as pixels; cropping, flipping and resizing are done on
the device. Others are read, cut and resized when they are needed, by `data.workers` processes.
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
from bootvit.data.augment import pad_crop_flip
from bootvit.data.cache import decoded, mapped
from bootvit.data.decode import BrokenImage
from bootvit.data.fractions import Subset
from bootvit.data.resize import area_crop, centre_crop, enlarge, normalise, resize_batch
from bootvit.data.table import Augment, ParquetImages, PixelImages, Rows
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


class Piece(NamedTuple):
    """The positions that one worker takes of one step."""

    start: int
    stop: int
    global_size: int


Numbers = Callable[[Piece], npt.NDArray[np.float64]] | None  # the uniform numbers of a piece; None: evaluation


class MemoryLoader:
    """Small images of one size: gathered from memory; everything else happens on the device."""

    def __init__(self, subset: Subset, config: Config, way: Way, device: torch.device) -> None:
        self._config, self._way, self._device, self._table = config, way, device, subset.table
        if isinstance(subset.table.images, PixelImages):
            self._pixels, self._rows, self._labels = subset.table.images.pixels, subset.indices, subset.labels
            broken: list[tuple[int, str]] = []
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
        images = resize_batch(images, size) if on_device else _to(_resize_with_pil(images, size), self._device)
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
            generator=torch.Generator(),  # else the loader would draw from torch's own
        )
        batches = self._batches(pieces, loader)
        return _one_ahead(batches) if cuda else batches

    def _batches(self, pieces: Sequence[Piece], loader: DataLoader[Loaded]) -> Iterator[Batch]:
        iterator = iter(loader)
        try:
            for part in pieces:
                yield self._batch(part, next(iterator))
        finally:
            del iterator  # ends the processes now, and not when an error's traceback is collected

    def _batch(self, part: Piece, loaded: Loaded) -> Batch:
        for place, reason in loaded.broken:
            if place not in self._skipped:
                if not self._skipped:
                    _report(
                        f"{self._subset.table.where(int(self._subset.indices[place]))}: {reason}",
                        self._config.data,
                    )
                self._skipped.add(place)
        if not len(loaded.labels) and part.stop > part.start:
            raise UserError(f"{self._subset.table.where(0)}: every image of a worker's part of a step is broken")
        images = _to(loaded.images, self._device).permute(0, 3, 1, 2)
        table = self._subset.table
        return Batch(normalise(images, table.mean, table.std), _to(loaded.labels, self._device), part.global_size)


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
