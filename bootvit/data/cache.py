"""Decoded or mapped images, listed folders, and what was read of other files: once per node, for all its processes.

The folder is BOOTVIT_CACHE, else `bootvit-<uid>` in the platform's temporary folder; it may be deleted at any time.
Each entry is a folder named by what it was made from, built under a lock and renamed when it is complete. Its
`sizes.json` lists its files: an entry that has lost one, to a cleaner of temporary folders, is made again. So is an
index of files when a folder that was looked at has changed: see `indexed`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bootvit.data.decode import RGB_READING, BrokenImage, decode
from bootvit.data.fractions import Subset
from bootvit.data.table import ArrowImages, Rows
from bootvit.errors import RunFailed, UserError

CHUNK = 64 << 20  # bytes of encoded images per record batch
T = TypeVar("T")
SIZES = "sizes.json"  # in each entry, written last
STAMPS = "stamps.json"  # in an index
SETTLED_NS = 2 * 10**9  # a folder may change again within the tick of its clock in which it was listed

Stamp = list[int] | None  # device, inode, size, times of a file or folder; None: nothing there


class Decoded(NamedTuple):
    """The readable images of a subset."""

    pixels: npt.NDArray[np.uint8]  # (n, rows, columns, channels), mapped
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
    reading = subset.table.images.reading
    kind = "pixels" if reading == RGB_READING else f"pixels {reading.channels} {reading.values}"
    return _entry("pixels", _made_from(subset, kind), lambda place: _decode_all(subset, place), _read_pixels)


def _read_pixels(entry: Path) -> Decoded:
    broken = json.loads((entry / "broken.json").read_text(encoding="utf-8"))
    return Decoded(
        np.load(entry / "pixels.npy", mmap_mode="r"),
        np.load(entry / "places.npy"),
        [(place, reason) for place, reason in broken],
    )


def mapped(subset: Subset) -> ArrowImages:
    """The encoded images of a subset in an Arrow file that is mapped into memory; image i is the subset's i-th."""
    return _entry(
        "arrow",
        _made_from(subset, "arrow"),
        lambda place: _write_arrow(subset, place),
        lambda entry: ArrowImages(
            _map(entry / "images.arrow")["image"], np.load(entry / "order.npy"), subset.table.images.reading
        ),
    )


def remembered(what: str, stamp: bytes, kind: pa.DataType, make: Callable[[], Sequence[T]]) -> list[T]:
    """A list of values of one Arrow type that is long in the making; `stamp` changes when it would be another."""
    values: list[T] = _values(what, stamp, lambda: pa.array(make(), kind)).to_pylist()
    return values


def remembered_rows(what: str, stamp: bytes, make: Callable[[], Rows]) -> Rows:
    """The same of row numbers, mapped."""
    rows: Rows = _values(what, stamp, lambda: pa.array(make(), pa.int64())).chunk(0).to_numpy()
    return rows


def _values(what: str, stamp: bytes, make: Callable[[], pa.Array]) -> pa.ChunkedArray:
    def build(place: Path) -> None:
        _write_table(place / "values.arrow", pa.table({"value": pa.chunked_array([make()])}))

    made_from = hashlib.sha256(f"{what} ".encode() + stamp).hexdigest()[:32]
    return _entry("read", made_from, build, lambda entry: _map(entry / "values.arrow"))["value"]


def indexed(what: str, make: Callable[[dict[str, Stamp]], pa.Table]) -> pa.Table:
    """A table about files, mapped; `make` gets a dict to which it adds the stamp of all that it looks at, before that.

    It is made again when one of these has changed since, or had changed in the last two seconds before it was made:
    then another change might have left the same times.
    """

    def build(place: Path) -> None:
        began, stamps = time.time_ns(), dict[str, Stamp]()
        _write_table(place / "rows.arrow", make(stamps))
        (place / STAMPS).write_text(json.dumps({"began": began, "stamps": stamps}), encoding="utf-8")

    made_from = hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return _entry("index", made_from, build, lambda entry: _map(entry / "rows.arrow"), _is_current)


def stamp_of(path: str | Path) -> Stamp:
    """Links are followed."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _is_current(entry: Path) -> bool:
    """Whether an index is of files and folders as they are now."""
    made = json.loads((entry / STAMPS).read_text(encoding="utf-8"))
    changed = max((max(stamp[3:]) for stamp in made["stamps"].values() if stamp), default=0)
    return changed < made["began"] - SETTLED_NS and all(
        stamp_of(path) == stamp for path, stamp in made["stamps"].items()
    )


def _write_table(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _map(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _made_from(subset: Subset, kind: str) -> str:
    """32 hex digits."""
    made_from = hashlib.sha256(f"{kind} {subset.table.fingerprint} {subset.digest} ".encode())
    made_from.update(subset.table.images.stamp(subset.indices))
    return made_from.hexdigest()[:32]


def _entry(
    kind: str,
    made_from: str,
    build: Callable[[Path], None],
    read: Callable[[Path], T],
    current: Callable[[Path], bool] = lambda _: True,
) -> T:
    """What `read` makes of an entry, which is built if it is not there, not whole, or not `current`."""
    folder = cache_folder()
    target = folder / f"{kind}-{made_from}"
    with suppress(FileNotFoundError):  # another process may just be making it anew
        if is_whole(target) and current(target):
            return read(target)
    with not_written_named(folder), _locked(folder / f"{target.name}.lock"):
        if not (is_whole(target) and current(target)):
            _build(target, build)
        return read(target)


def _build(target: Path, build: Callable[[Path], None]) -> None:
    shutil.rmtree(target, ignore_errors=True)
    place = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        build(place)
        sizes = {path.name: path.stat().st_size for path in place.iterdir()}
        (place / SIZES).write_text(json.dumps(sizes), encoding="utf-8")
        place.rename(target)
    finally:
        shutil.rmtree(place, ignore_errors=True)  # gone if it was renamed


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
        free = f"; {shutil.disk_usage(folder).free >> 20} MiB are free there" if os.path.isdir(folder) else ""
        raise RunFailed(
            f"{folder}: the cache cannot be written ({err.strerror or err}{free}): "
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
                pixels = np.asarray(decode(data, subset.table.images.reading))
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
