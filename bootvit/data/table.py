"""`ImageTable`: one data set's split as rows of (image, label, key), whatever the images are stored in.

Labels and keys are Arrow columns in memory; the images stay where they are (an array, files, an Arrow file that is
mapped into memory, Parquet row groups) and are read when they are needed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from bootvit.data.decode import RGB_READING, BrokenImage, Picture, Planes, Reading, decode, encode_png
from bootvit.data.stores import AHEAD, AHEAD_BYTES, StorePath, ahead
from bootvit.errors import OF_THE_MACHINE, UserError

Rows = npt.NDArray[np.int64]
RGB = tuple[float, ...]  # a number for each channel
Augment = Literal["crop", "area", "none"]
Place = Path | StorePath
T = TypeVar("T")

_CONTROL = re.compile("[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class PixelImages:
    """Raw images in memory: (N, rows, columns, channels) uint8."""

    pixels: npt.NDArray[np.uint8]

    @property
    def reading(self) -> Reading:
        """Nothing is converted."""
        return Reading(self.pixels.shape[3])

    def open(self, row: int) -> Picture:
        """One image."""
        pixels = self.pixels[row]
        return Image.fromarray(pixels) if pixels.shape[2] == 3 else Planes(pixels)

    def scan(self, rows: Rows) -> Iterator[tuple[int, bytes]]:
        """(place in `rows`, image as PNG)."""
        for place, row in enumerate(rows):
            yield place, encode_png(self.pixels[row])

    def where(self, row: int) -> str:
        """For messages."""
        return f"image {row}"

    def stamp(self, rows: Rows) -> bytes:
        """Changes when the images do: see `FileImages.stamp`."""
        return self.pixels[rows].tobytes()


@dataclass(frozen=True)
class FileImages:
    """One file an image, below `root`."""

    root: Path
    paths: pa.Array | pa.ChunkedArray  # binary: names are bytes to the file system, and need not be UTF-8
    reading: Reading = RGB_READING

    def open(self, row: int) -> Picture:
        """Read and decode one image."""
        return decode(self._read(row), self.reading)

    def scan(self, rows: Rows) -> Iterator[tuple[int, bytes]]:
        """(place in `rows`, the file's bytes)."""
        for place, row in enumerate(rows):
            try:
                yield place, self._read(row)
            except BrokenImage:
                yield place, b""  # decoding it is the error

    def where(self, row: int) -> str:
        """The file."""
        return printable(self.path(row))

    def stamp(self, rows: Rows) -> bytes:
        """Sizes and times of the files: a cache made from other files of the same names must not be used."""
        return repr([_stamp(self.path(row)) for row in rows]).encode()

    def path(self, row: int) -> Path:
        """Where it lies."""
        return self.root / os.fsdecode(self.paths[int(row)].as_py())

    def _read(self, row: int) -> bytes:
        try:
            return self.path(row).read_bytes()
        except OSError as err:
            raise BrokenImage(err.strerror or str(err)) from err


def _stamp(path: Place) -> tuple[int, int] | tuple[str, int, int | None] | None:
    """None for a file that is gone, such as behind a link that leads nowhere: that is found when it is read."""
    if isinstance(path, StorePath):
        return path.stamp
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def printable(name: str | Place) -> str:
    """A file's name or path as one line of text, for any terminal, log and data base.

    Bytes that are not UTF-8 become `\\xe9`, control characters `\\x0a`.
    """
    text = os.fsencode(str(name)).decode("utf-8", "backslashreplace")
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


@dataclass(frozen=True)
class ArrowImages:
    """Encoded images in an Arrow column, usually mapped from a file; image i is in its row order[i]."""

    column: pa.ChunkedArray
    order: Rows
    reading: Reading = RGB_READING

    def open(self, row: int) -> Picture:
        """Decode one image."""
        return decode(self._bytes(row), self.reading)

    def scan(self, rows: Rows) -> Iterator[tuple[int, bytes]]:
        """(place in `rows`, encoded image)."""
        for place, row in enumerate(rows):
            yield place, self._bytes(row)

    def where(self, row: int) -> str:
        """For messages."""
        return f"image {row}"

    def stamp(self, rows: Rows) -> bytes:
        """The images themselves."""
        return hashlib.sha256(b"".join(data for _, data in self.scan(rows))).digest()

    def _bytes(self, row: int) -> bytes:
        return self.column[int(self.order[row])].as_py() or b""


@dataclass(frozen=True)
class ParquetImages:
    """Encoded images in Parquet files, read by row group and only for the rows asked for."""

    files: tuple[Place, ...]
    column: str  # a binary column, or `image.bytes` inside a struct
    reading: Reading = RGB_READING

    @cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """(first row, file, row group in the file) of every row group."""
        out, first = [], 0
        for number, path in enumerate(self.files):
            meta = footer_of(path)
            for group in range(meta.num_row_groups):
                out.append((first, number, group))
                first += meta.row_group(group).num_rows
        return out

    @cached_property
    def _starts(self) -> Rows:
        return np.array([first for first, _, _ in self.groups], np.int64)

    def scan(self, rows: Rows) -> Iterator[tuple[int, bytes]]:
        """(place in `rows`, encoded image), in the order of the files; each row group is read once."""
        order = np.argsort(rows, kind="stable")
        group_of = np.searchsorted(self._starts, rows[order], side="right") - 1
        groups = np.unique(group_of).tolist()
        columns = ahead(self._read, groups, self._window(groups)) if self.stored else map(self._read, groups)
        for group, column in zip(groups, columns, strict=True):
            for place in order[group_of == group]:
                value = column[int(rows[place] - self._starts[group])].as_py()
                yield int(place), value if value is not None else b""

    def first(self, count: int) -> list[bytes]:
        """The first images of the first file, without reading more than they need."""
        return read_parquet(self.files[0], lambda file: self._first(file, count), whole=False)

    def _first(self, file: pq.ParquetFile, count: int) -> list[bytes]:
        for batch in file.iter_batches(count, columns=[self.column], use_threads=False):
            column = batch.column(0)
            values = (column.field(0) if "." in self.column else column).to_pylist()
            return [value or b"" for value in values]
        return []

    def where(self, row: int) -> str:
        """The file that holds the row."""
        return str(self.files[self.groups[self._group(row)][1]])

    def stamp(self, rows: Rows) -> bytes:
        """Sizes and times of the files: see `FileImages.stamp`."""
        return repr([_stamp(path) for path in self.files]).encode()

    @property
    def stored(self) -> bool:
        """Whether they lie in an object store."""
        return isinstance(self.files[0], StorePath)

    def _window(self, groups: list[int]) -> int:
        """How many row groups may be on their way at once."""
        places = (self.groups[group] for group in groups)
        largest = max((footer_of(self.files[n]).row_group(index).total_byte_size for _, n, index in places), default=1)
        return max(1, min(AHEAD, AHEAD_BYTES // max(largest, 1)))

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _read(self, group: int) -> pa.ChunkedArray:
        _, number, index = self.groups[group]
        column = read_parquet(
            self.files[number],
            lambda file: file.read_row_group(index, columns=[self.column], use_threads=False).column(0),
        )
        return pa.chunked_array([chunk.field(0) for chunk in column.chunks]) if "." in self.column else column


@contextmanager
def reading(path: Place) -> Iterator[None]:
    """Whatever pyarrow raises inside becomes one line that names the file; a sick machine stays an `OSError`."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as err:
        if isinstance(err, OSError) and err.errno in OF_THE_MACHINE:
            raise
        reason = " ".join(str(err).split())[:200] or type(err).__name__
        raise UserError(f"{printable(path)}: not a readable Parquet file: {reason}") from err


def read_parquet(path: Place, act: Callable[[pq.ParquetFile], T], *, whole: bool = True) -> T:
    """What `act` makes of a Parquet file; `whole` as in `StorePath.parquet`."""
    with reading(path):
        if isinstance(path, StorePath):
            return path.parquet(act, whole=whole)
        with pq.ParquetFile(path) as file:
            return act(file)


def footer_of(path: Place) -> pq.FileMetaData:
    """What the end of a Parquet file says."""
    if isinstance(path, StorePath) and path.footer is not None:
        return path.footer
    return read_parquet(path, lambda file: file.metadata)


Images = PixelImages | FileImages | ArrowImages | ParquetImages


@dataclass(frozen=True)
class ImageTable:
    """One split of a data set."""

    rows: pa.Table = field(repr=False)  # columns `label` (int64) and `key` (string, unique)
    order: Rows = field(repr=False)  # row numbers in the order of the keys' hashes
    images: Images = field(repr=False)
    classes: tuple[str, ...]
    mean: RGB
    std: RGB
    fingerprint: str  # 32 hex digits: the same for the same images however they are stored
    native: tuple[int, int] | None  # (rows, columns) if the images are small and of one size
    auto: Augment  # what `data.augment: auto` means here

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @cached_property
    def labels(self) -> Rows:
        """(N,) int64."""
        out: Rows = self.rows["label"].to_numpy()
        return out

    def where(self, row: int) -> str:
        """Which image this is, for messages: its file, or its container and key."""
        place = self.images.where(row)
        return place if isinstance(self.images, FileImages) else f"{place}, key {self.rows['key'][row].as_py()!r}"
