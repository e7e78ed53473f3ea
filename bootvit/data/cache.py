"""Decoded or mapped images, and what was read of an object store's files: once per node, for all its processes.

The folder is BOOTVIT_CACHE, else `bootvit-<uid>` in the platform's temporary folder; it may be deleted at any time.
Each entry is a folder named by what it was made from, built under a lock and renamed when it is complete. Its
`sizes.json` lists its files: an entry that has lost one, to a cleaner of temporary folders, is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bootvit.data.decode import BrokenImage, decode
from bootvit.data.fractions import Subset
from bootvit.data.table import ArrowImages
from bootvit.errors import RunFailed, UserError

CHUNK = 64 << 20  # bytes of encoded images per record batch
T = TypeVar("T")
SIZES = "sizes.json"  # in each entry, written last


class Decoded(NamedTuple):
    """The readable images of a subset."""

    pixels: npt.NDArray[np.uint8]  # (n, rows, columns, 3), mapped
    places: npt.NDArray[np.int64]  # (n,) their places in the subset
    broken: list[tuple[int, str]]  # place in the subset, and what is wrong with it


def cache_folder() -> Path:
    """The node's cache folder; it is made if needed, for this user alone."""
    given = os.environ.get("BOOTVIT_CACHE")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"bootvit-{os.getuid()}"
    with not_written_named(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not given and folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: set BOOTVIT_CACHE to a folder of your own")
    return folder


def decoded(subset: Subset) -> Decoded:
    """All images of a subset as pixels of one size; images of several sizes are a `UserError`."""
    folder = _entry("pixels", _made_from(subset, "pixels"), lambda place: _decode_all(subset, place))
    broken = json.loads((folder / "broken.json").read_text(encoding="utf-8"))
    return Decoded(
        np.load(folder / "pixels.npy", mmap_mode="r"),
        np.load(folder / "places.npy"),
        [(place, reason) for place, reason in broken],
    )


def mapped(subset: Subset) -> ArrowImages:
    """The encoded images of a subset in an Arrow file that is mapped into memory; image i is the subset's i-th."""
    folder = _entry("arrow", _made_from(subset, "arrow"), lambda place: _write_arrow(subset, place))
    table = pa.ipc.open_file(pa.memory_map(str(folder / "images.arrow"))).read_all()
    order = np.load(folder / "order.npy")
    return ArrowImages(table["image"], order)


def remembered(what: str, stamp: bytes, kind: pa.DataType, make: Callable[[], Sequence[T]]) -> list[T]:
    """A list of values of one Arrow type that is long in the making; `stamp` changes when it would be another."""

    def build(place: Path) -> None:
        table = pa.table({"value": pa.chunked_array([pa.array(make(), kind)])})
        with pa.OSFile(str(place / "values.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    folder = _entry("read", hashlib.sha256(f"{what} ".encode() + stamp).hexdigest()[:32], build)
    values: list[T] = pa.ipc.open_file(pa.memory_map(str(folder / "values.arrow"))).read_all()["value"].to_pylist()
    return values


def _made_from(subset: Subset, kind: str) -> str:
    """32 hex digits."""
    made_from = hashlib.sha256(f"{kind} {subset.table.fingerprint} {subset.digest} ".encode())
    made_from.update(subset.table.images.stamp(subset.indices))
    return made_from.hexdigest()[:32]


def _entry(kind: str, made_from: str, build: Callable[[Path], None]) -> Path:
    folder = cache_folder()
    target = folder / f"{kind}-{made_from}"
    if is_whole(target):
        return target
    with not_written_named(folder), _locked(folder / f"{target.name}.lock"):
        if is_whole(target):
            return target
        shutil.rmtree(target, ignore_errors=True)
        place = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=folder))
        try:
            build(place)
            sizes = {path.name: path.stat().st_size for path in place.iterdir()}
            (place / SIZES).write_text(json.dumps(sizes), encoding="utf-8")
            place.rename(target)
        finally:
            shutil.rmtree(place, ignore_errors=True)  # gone if it was renamed
    return target


def is_whole(entry: Path) -> bool:
    """Whether an entry is there with all its files in their sizes."""
    try:
        sizes: dict[str, int] = json.loads((entry / SIZES).read_text(encoding="utf-8"))
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


@contextmanager
def not_written_named(folder: Path) -> Iterator[None]:
    """An `OSError` inside, such as of a full disk, becomes one line that names the cache and what to set."""
    try:
        yield
    except OSError as err:
        free = f"; {shutil.disk_usage(folder).free >> 20} MiB are free there" if folder.is_dir() else ""
        raise RunFailed(
            f"{folder}: the cache of decoded images cannot be written ({err.strerror or err}{free}): "
            "make room, or set BOOTVIT_CACHE to another folder"
        ) from err


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _decode_all(subset: Subset, folder: Path) -> None:
    """Write pixels.npy, places.npy (place in the subset of each image) and broken.json.

    By ordinary writes: one into a mapped file on a full disk would kill the process.
    """
    broken: dict[int, str] = {}
    shape: tuple[int, ...] | None = None
    start = example = 0
    with (folder / "all.npy").open("wb") as file:
        for place, data in subset.table.images.scan(subset.indices):
            try:
                pixels = np.asarray(decode(data))
            except BrokenImage as err:
                broken[place] = str(err)
                continue
            if shape is None:
                shape, example = pixels.shape, place
                start = _begin_array(file, (len(subset), *shape))
            if pixels.shape != shape:
                raise UserError(
                    f"{_sized(subset, place, pixels.shape)}, but {_sized(subset, example, shape)}: "
                    "images of several sizes need data.augment=area"
                )
            file.seek(start + place * pixels.nbytes)
            file.write(pixels.tobytes())
        if shape is not None:
            file.truncate(start + len(subset) * math.prod(shape))
    places = np.array([place for place in range(len(subset)) if place not in broken], np.int64)
    if not broken:
        (folder / "all.npy").rename(folder / "pixels.npy")
    else:
        whole = np.load(folder / "all.npy", mmap_mode="r") if len(places) else np.zeros((0, 1, 1, 3), np.uint8)
        np.save(folder / "pixels.npy", whole[places])
        (folder / "all.npy").unlink()
    np.save(folder / "places.npy", places)
    (folder / "broken.json").write_text(json.dumps(sorted(broken.items())), encoding="utf-8")


def _begin_array(file: BinaryIO, shape: tuple[int, ...]) -> int:
    """Begin NumPy's file of a uint8 array; returns where its numbers start."""
    np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def _sized(subset: Subset, place: int, shape: tuple[int, ...]) -> str:
    return f"{subset.table.where(int(subset.indices[place]))} has {shape[0]}x{shape[1]} pixels"


def _write_arrow(subset: Subset, folder: Path) -> None:
    """Write images.arrow in the order of reading, and order.npy: where in it each image of the subset is."""
    schema = pa.schema([("image", pa.binary())])
    order = np.zeros(len(subset), np.int64)
    chunk: list[bytes] = []
    size = written = 0
    with pa.OSFile(str(folder / "images.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for place, data in subset.table.images.scan(subset.indices):
            if size > CHUNK:
                writer.write_batch(pa.record_batch([pa.array(chunk, pa.binary())], schema=schema))
                chunk, size = [], 0
            order[place] = written
            written += 1
            size += len(data)
            chunk.append(data)
        writer.write_batch(pa.record_batch([pa.array(chunk, pa.binary())], schema=schema))
    np.save(folder / "order.npy", order)
