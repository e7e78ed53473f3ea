"""The two ways from stored images to batches on the device.

Small images of one size are decoded once per node and kept as pixels, on a GPU if they fit there; cropping, flipping
and resizing are done on the device. Others are read, cut and resized when they are needed, by `data.workers` processes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from bootvit.config import DataConfig
from bootvit.data.augment import pad_crop_flip
from bootvit.data.cache import decoded, mapped
from bootvit.data.decode import BrokenImage, Picture, Planes, failing_as_broken
from bootvit.data.facts import Preparation
from bootvit.data.fractions import Subset
from bootvit.data.resize import area_crop, normalise, resize_batch
from bootvit.data.table import Augment, FileImages, ParquetImages, PixelImages, Rows
from bootvit.data.transfer import fits, to_device
from bootvit.data.vary import Variation
from bootvit.errors import RunFailed, UserError
from bootvit.standalone.images import centre_crop, enlarge

Pixels = npt.NDArray[np.uint8]

LONGEST_TMPDIR = 70  # bytes: Python's socket for sharing memory lies in it, and its whole path has at most 107


class Batch(NamedTuple):
    """This worker's share of one step."""

    images: Tensor  # (local batch, channels, rows, cols) float32, normalised, on the device
    labels: Tensor  # (local batch,) int64, or (local batch, classes) shares of mixed images, on the device
    global_size: int  # images of this step over all workers (those broken at loading counted)
    places: Rows | None = None  # (local batch,) where each image stands in its subset
    at: Rows | None = None  # which of its piece's images these are; None: all


class Piece(NamedTuple):
    """The positions that one worker takes of one step."""

    start: int
    stop: int
    global_size: int


Numbers = Callable[[Piece], npt.NDArray[np.float64]] | None  # the uniform numbers of a piece; None: evaluation


class MemoryLoader:
    """Small images of one size: gathered from memory; everything else happens on the device."""

    def __init__(
        self, subset: Subset, data: DataConfig, preparation: Preparation, augment: Augment, device: torch.device
    ) -> None:
        self._data, self._preparation, self._augment, self._device = data, preparation, augment, device
        self._variation = Variation.of(data)
        self.broken: dict[str, str] = {}  # {image: reason}
        if isinstance(subset.table.images, PixelImages):
            self._pixels, self._rows, self._labels = subset.table.images.pixels, subset.indices, subset.labels
            self._places = np.arange(len(subset))
        else:
            self._pixels, places, broken = decoded(subset)
            self._rows, self._labels, self._places = np.arange(len(places)), subset.labels[places], places
            for place, reason in broken:
                leave_out(subset, place, reason, data, self.broken)
            if not len(places):
                raise none_readable(subset, self.broken)
        size = len(self._rows) * self._pixels[0].nbytes
        self._resident = self._upload() if data.resize == "device" and fits(size, device) else None

    def _upload(self) -> tuple[Tensor, Tensor]:
        """All images (n, rows, cols, 3) uint8 and labels (n,) on the device, where batches are gathered then."""
        pixels = torch.from_numpy(np.ascontiguousarray(self._pixels[self._rows]))
        return pixels.to(self._device), torch.from_numpy(np.array(self._labels)).to(self._device)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> Rows:
        """(n,) of the readable images."""
        return self._labels

    def load(self, pieces: Sequence[Piece], order: Rows, numbers: Numbers) -> Iterator[Batch]:
        """One batch per piece; on a GPU the next one is under way while the caller works on the last."""
        batches = (self._batch(part, order[part.start : part.stop], numbers) for part in pieces)
        return _one_ahead(batches) if self._device.type == "cuda" else batches

    def _batch(self, part: Piece, places: Rows, numbers: Numbers) -> Batch:
        on_device = self._data.resize == "device"
        raw, labels = self._gathered(places, on_device=on_device)
        images = raw.permute(0, 3, 1, 2)
        own = None if numbers is None else numbers(part)
        if self._augment == "crop" and own is not None:
            images = pad_crop_flip(images, own, self._data.crop_padding, flip=self._data.flip)
        varied = own[:, own.shape[1] - self._variation.needs :] if own is not None else None
        if varied is not None:
            images = self._variation.batch(images, varied)
        size, mean, std = self._preparation.size, self._preparation.mean, self._preparation.std
        images = resize_batch(images, size) if on_device else to_device(_resize_with_pil(images, size), self._device)
        images = normalise(images, mean, std)
        if varied is not None:
            images = self._variation.erased(images, varied)
        return Batch(images, labels, part.global_size, self._places[places])

    def _gathered(self, places: Rows, *, on_device: bool) -> tuple[Tensor, Tensor]:
        """Images (batch, rows, cols, channels), where they are to be resized, and labels (batch,) on the device."""
        if self._resident is not None:
            chosen = to_device(torch.from_numpy(places), self._device)
            return self._resident[0][chosen], self._resident[1][chosen]
        raw = torch.from_numpy(np.ascontiguousarray(self._pixels[self._rows[places]]))
        labels = to_device(torch.from_numpy(self._labels[places]), self._device)
        return to_device(raw, self._device) if on_device else raw, labels


class WorkerLoader:
    """Images of any size: read, cut and resized by other processes, one whole batch at a time."""

    def __init__(
        self, subset: Subset, data: DataConfig, preparation: Preparation, augment: Augment, device: torch.device
    ) -> None:
        self._subset, self._data, self._preparation, self._device = subset, data, preparation, device
        self._augment = augment
        crops = preparation.size if data.dct_scaling and augment == "area" else None
        self._source, self._reduced = opened_by_place(subset), opened_by_place(subset, crops)
        self._variation = Variation.of(data)
        self._through_pipes = False
        self.broken: dict[str, str] = {}  # {image: reason}

    def __len__(self) -> int:
        return len(self._subset)

    @property
    def labels(self) -> Rows:
        """(n,) of all images."""
        return self._subset.labels

    def load(self, pieces: Sequence[Piece], order: Rows, numbers: Numbers) -> Iterator[Batch]:
        """One batch per piece."""
        cuda = self._device.type == "cuda"
        area = self._augment == "area" and numbers is not None
        vary = self._variation if numbers is not None and self._variation.needs else None
        if vary is not None:
            import torchvision.transforms.v2.functional  # noqa: F401  here once, and not in every process
        cut = Cut(self._preparation.size, "area" if area else self._preparation.kind, self._data.flip, vary)
        steps = _Steps(self._reduced if area else self._source, pieces, order, numbers, cut, self._data.channels)
        workers = min(self._data.workers, len(pieces))
        loader: DataLoader[Loaded] = DataLoader(
            steps,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=cuda,
            multiprocessing_context=multiprocessing.get_context("fork") if workers else None,
            generator=torch.Generator(),  # else the loader would draw from torch's own
        )
        batches = self._batches(pieces, loader, numbers)
        return _one_ahead(batches) if cuda else batches

    def _batches(self, pieces: Sequence[Piece], loader: DataLoader[Loaded], numbers: Numbers) -> Iterator[Batch]:
        iterator = None
        try:
            for part in pieces:
                try:
                    iterator = iterator or iter(loader)
                    loaded = next(iterator)
                except (RuntimeError, OSError) as err:
                    if isinstance(err, RuntimeError) and not str(err).startswith("DataLoader worker"):
                        raise
                    raise self._died(err) from err
                batch = self._batch(part, loaded, numbers)
                if numbers is not None and not len(batch.labels):
                    raise none_readable(self._subset, self.broken)
                yield batch
        finally:
            del iterator  # ends the processes now, and not when an error's traceback is collected

    def _died(self, err: Exception) -> RunFailed:
        """The one line for a loading process that has died or could not be started."""
        text = str(err).splitlines()[0] if str(err) else type(err).__name__
        return RunFailed(
            f"data.workers={self._data.workers}: a process that loads images has died or could not be started "
            f"({text.split(' It is possible')[0]}): the machine may be out of memory; use fewer data.workers"
        )

    def _batch(self, part: Piece, loaded: Loaded, numbers: Numbers) -> Batch:
        for place, reason in loaded.broken:
            leave_out(self._subset, place, reason, self._data, self.broken)
        pixels = loaded.images
        if not isinstance(pixels, Tensor):
            self._say_pipes()
            pixels = torch.from_numpy(pixels)
        images = to_device(pixels, self._device).permute(0, 3, 1, 2)
        labels = to_device(torch.from_numpy(self._subset.labels[loaded.places]), self._device)
        images = normalise(images, self._preparation.mean, self._preparation.std)
        if numbers is not None and self._variation.erase:
            images = self._variation.erased(images, numbers(part)[loaded.at, -self._variation.needs :])
        return Batch(images, labels, part.global_size, loaded.places, loaded.at)

    def _say_pipes(self) -> None:
        if not self._through_pipes:
            self._through_pipes = True
            print(
                "bootvit: warning: the images of data.workers come through pipes, slower, because /dev/shm has no room "
                "for them (docker run --shm-size=2g) or TMPDIR is too long for a socket "
                f"(over {LONGEST_TMPDIR} characters)",
                file=sys.stderr,
                flush=True,
            )


def leave_out(subset: Subset, place: int, reason: str, data: DataConfig, broken: dict[str, str]) -> None:
    """Note a broken image in `broken`; a `UserError` that names it with `data.on_error=raise`."""
    where = subset.table.where(int(subset.indices[place]))
    if data.on_error == "raise":
        raise UserError(f"{where}: {reason} (data.on_error=skip leaves broken images out)")
    broken.setdefault(where, reason)


def none_readable(subset: Subset, broken: dict[str, str]) -> UserError:
    """The error of a subset that is wholly broken."""
    where, reason = next(iter(broken.items()))
    return UserError(f"none of the {len(subset)} images can be read; the first: {where}: {reason}")


class Loaded(NamedTuple):
    """What a loading process hands over."""

    images: Tensor | Pixels  # (n, rows, cols, channels) uint8, a tensor if it is in shared memory
    places: Rows  # (n,) in the subset
    at: Rows  # (n,) which of the piece's images these are
    broken: list[tuple[int, str]]  # place in the subset, reason


@dataclass(frozen=True)
class Cut:
    """How one image of any size becomes one of the size wanted."""

    size: tuple[int, int]
    kind: Literal["area", "centre_crop", "resize"]
    flip: bool
    vary: Variation | None = None

    def __call__(self, image: Picture, numbers: Sequence[float]) -> Pixels:
        """(rows, cols, channels); the first numbers are for `area`, the last for `vary`."""
        part = self._cut(image, numbers)
        if self.vary is None:
            return np.asarray(part)
        own = numbers[-self.vary.needs :]
        if isinstance(part, Image.Image):
            return np.asarray(self.vary.one(part, own))
        channels_first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(part.pixels, 2, 0)))
        return np.ascontiguousarray(np.moveaxis(self.vary.one(channels_first, own).numpy(), 0, 2))

    def _cut(self, image: Picture, numbers: Sequence[float]) -> Picture:
        if self.kind == "area":
            return area_crop(image, self.size, numbers, flip=self.flip)
        return centre_crop(image, self.size) if self.kind == "centre_crop" else enlarge(image, self.size)


@dataclass(frozen=True)
class _Steps(Dataset[Loaded]):
    """Item i is the batch of the i-th piece; a broken image is reported as data, since errors lose their type."""

    source: Callable[[int], Picture]
    pieces: Sequence[Piece]
    order: Rows
    numbers: Numbers
    cut: Cut
    channels: int

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, step: int) -> Loaded:
        part = self.pieces[step]
        places = self.order[part.start : part.stop].tolist()
        numbers = self.numbers(part).tolist() if self.numbers else [[]] * len(places)
        images: list[Pixels] = []
        kept: list[int] = []
        broken: list[tuple[int, str]] = []
        at: list[int] = []
        for offset, (place, own) in enumerate(zip(places, numbers, strict=True)):
            if self._read(place, own, images, kept, broken):
                at.append(offset)
        if self.numbers and places and not kept:  # all workers must take this step: with the epoch's next sound image
            for place in np.roll(self.order, -part.stop)[: len(self.order) - len(places)].tolist():
                if self._read(place, numbers[0], images, kept, broken):
                    at.append(0)
                    break
        pixels = np.stack(images) if images else np.zeros((0, *self.cut.size, self.channels), np.uint8)
        return Loaded(_shared(pixels), np.array(kept, np.int64), np.array(at, np.int64), broken)

    def _read(
        self, place: int, numbers: list[float], images: list[Pixels], kept: list[int], broken: list[tuple[int, str]]
    ) -> bool:
        try:
            with failing_as_broken():
                images.append(self.cut(self.source(place), numbers))
        except BrokenImage as err:
            broken.append((place, str(err)))
            return False
        kept.append(place)
        return True


def _shared(pixels: Pixels) -> Tensor | Pixels:
    """In a loading process in shared memory, which spares copies; as it is where there is no room for it.

    An error of sharing would be raised in the queue's own thread and lost, and the batch with it.
    """
    if get_worker_info() is None:
        return torch.from_numpy(pixels)
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR:
        return pixels
    try:
        tensor = torch.from_numpy(pixels)
        tensor.share_memory_()  # type: ignore[no-untyped-call]
        return tensor
    except RuntimeError:  # torch's own for a full /dev/shm
        return pixels


def _as_it_is(loaded: Any) -> Any:
    """In the place of torch's conversion, which would make tensors of the arrays."""
    return loaded


def opened_by_place(subset: Subset, crops: tuple[int, int] | None = None) -> Callable[[int], Picture]:
    """Opens the subset's i-th image; with `crops` at a size whose random areas still have so many (rows, columns)."""
    images = subset.table.images
    if isinstance(images, ParquetImages):
        arrow = mapped(subset)
        return replace(arrow, reading=arrow.reading._replace(crops=crops)).open
    if isinstance(images, FileImages):
        images = replace(images, reading=images.reading._replace(crops=crops))
    return lambda place: images.open(int(subset.indices[place]))


def _resize_with_pil(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(batch, channels, *size) uint8."""
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    out = [np.asarray(enlarge(Planes(pixels), size)) for pixels in arrays]
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def _one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each begun before the one before it is handed out."""
    last = next(batches, None)
    for batch in batches:
        assert last is not None  # a batch follows it
        yield last
        last = batch
    if last is not None:
        yield last
