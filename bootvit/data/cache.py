"""Decoded or mapped images, made once per node and shared by all its processes.

The folder is BOOTVIT_CACHE, else `bootvit-<uid>` in the platform's temporary folder; it may be deleted at any time.
Each entry is a folder named by what it was made from, built under a lock and renamed when it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from bootvit.data.decode import BrokenImage, decode
from bootvit.data.fractions import Subset
from bootvit.data.table import ArrowImages
from bootvit.errors import UserError

CHUNK = 64 << 20  # bytes of encoded images per record batch


class Decoded(NamedTuple):
    """The readable images of a subset."""

    pixels: npt.NDArray[np.uint8]  # (n, rows, columns, 3), mapped
    places: npt.NDArray[np.int64]  # (n,) their places in the subset
    broken: list[tuple[int, str]]  # place in the subset, and what is wrong with it


def cache_folder() -> Path:
    """The node's cache folder; it is made if needed, for this user alone."""
    given = os.environ.get("BOOTVIT_CACHE")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"bootvit-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not given and folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user: set BOOTVIT_CACHE to a folder of your own")
    return folder


def decoded(subset: Subset) -> Decoded:
    """All images of a subset as pixels of one size; images of several sizes are a `UserError`."""
    folder = _entry("pixels", subset, lambda place: _decode_all(subset, place))
    broken = json.loads((folder / "broken.json").read_text(encoding="utf-8"))
    return Decoded(
        np.load(folder / "pixels.npy", mmap_mode="r"),
        np.load(folder / "places.npy"),
        [(place, reason) for place, reason in broken],
    )


def mapped(subset: Subset) -> ArrowImages:
    """The encoded images of a subset in an Arrow file that is mapped into memory; image i is the subset's i-th."""
    folder = _entry("arrow", subset, lambda place: _write_arrow(subset, place))
    table = pa.ipc.open_file(pa.memory_map(str(folder / "images.arrow"))).read_all()
    order = np.load(folder / "order.npy")
    return ArrowImages(table["image"], order)


def _entry(kind: str, subset: Subset, build: Callable[[Path], None]) -> Path:
    folder = cache_folder()
    made_from = hashlib.sha256(f"{kind} {subset.table.fingerprint} {subset.digest} ".encode())
    made_from.update(subset.table.images.stamp(subset.indices))
    target = folder / f"{kind}-{made_from.hexdigest()[:32]}"
    if target.is_dir():
        return target
    with _locked(folder / f"{target.name}.lock"):
        if not target.is_dir():
            place = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=folder))
            try:
                build(place)
                place.rename(target)
            finally:
                shutil.rmtree(place, ignore_errors=True)  # gone if it was renamed
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _decode_all(subset: Subset, folder: Path) -> None:
    """Write pixels.npy, places.npy (place in the subset of each image) and broken.json."""
    store: npt.NDArray[np.uint8] | None = None
    broken: dict[int, str] = {}
    example = 0
    for place, data in subset.table.images.scan(subset.indices):
        try:
            pixels = np.asarray(decode(data))
        except BrokenImage as err:
            broken[place] = str(err)
            continue
        if store is None:
            shape = (len(subset), *pixels.shape)
            store, example = np.lib.format.open_memmap(folder / "all.npy", "w+", np.uint8, shape), place
        if pixels.shape != store.shape[1:]:
            raise UserError(
                f"{_sized(subset, place, pixels)}, but {_sized(subset, example, store[example])}: "
                "images of several sizes need data.augment=area"
            )
        store[place] = pixels
    places = np.array([place for place in range(len(subset)) if place not in broken], np.int64)
    if store is None:
        store = np.zeros((0, 1, 1, 3), np.uint8)
    if broken:
        np.save(folder / "pixels.npy", store[places])
        (folder / "all.npy").unlink(missing_ok=True)
    else:
        (folder / "all.npy").rename(folder / "pixels.npy")
    np.save(folder / "places.npy", places)
    (folder / "broken.json").write_text(json.dumps(sorted(broken.items())), encoding="utf-8")


def _sized(subset: Subset, place: int, pixels: npt.NDArray[np.uint8]) -> str:
    return f"{subset.table.where(int(subset.indices[place]))} has {pixels.shape[0]}x{pixels.shape[1]} pixels"


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
