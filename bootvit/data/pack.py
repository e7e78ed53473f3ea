"""`bootvit data pack`: any source as Parquet files in which every fraction is a prefix.

Rows are sorted by rank in the class's hash order over the size of the class, so that a run on 5% of the images reads
5% of the bytes. The images' bytes are kept as they are (raw sources become PNG, without loss).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bootvit.config import DataConfig
from bootvit.data.cache import mapped
from bootvit.data.check import check
from bootvit.data.fractions import hash_ranks, subset, whole
from bootvit.data.keys import by_hash, fingerprint_of
from bootvit.data.parquet import METADATA
from bootvit.data.sources import open_table
from bootvit.data.table import ArrowImages, FileImages, Images, ImageTable, ParquetImages, PixelImages, Rows
from bootvit.errors import UserError

GROUP_BYTES = 4 << 20  # image bytes in a row group, the least that is read at once
GROUP_ROWS = 500
FILE_BYTES = 1 << 30  # image bytes in a file


def pack(
    data: DataConfig, out: Path, *, group_bytes: int = GROUP_BYTES, file_bytes: int = FILE_BYTES
) -> dict[str, int | str]:
    """Write `out`/train-00000.parquet ... (and test-...), complete or not at all; returns what was written."""
    _check(data, out)
    train = open_table(data, "train")
    tables = {"train": train, "test": open_table(data, "test", like=train)}
    sound = {split: _readable(table, split, data) for split, table in tables.items() if table is not None}
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        files = 0
        for split, table in sound.items():
            files += _write_split(table, place, split, group_bytes, file_bytes)
        place.chmod(0o755)
        place.rename(out)  # fails if `out` has been filled meanwhile
    finally:
        shutil.rmtree(place, ignore_errors=True)  # gone if it was renamed
    return {
        "out": str(out),
        "files": files,
        "train": len(sound["train"]),
        "test": len(sound["test"]) if "test" in sound else 0,
        "left_out": sum(len(table) for table in tables.values() if table) - sum(map(len, sound.values())),
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
    }


def _check(data: DataConfig, out: Path) -> None:
    if data.fraction != 1:
        raise UserError(
            f"data.fraction={data.fraction}: pack writes the whole training split, of which every fraction is a "
            "prefix; leave data.fraction=1"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty folder")


def _readable(table: ImageTable, split: str, data: DataConfig) -> ImageTable:
    """The table without its broken images, all of which are read; with data.on_error=raise they are a `UserError`."""
    broken = check(table, f"reading {split}").broken
    if not broken:
        return table
    row, reason = next(iter(broken.items()))
    if data.on_error == "raise":
        more = f" ({len(broken)} such images)" if len(broken) > 1 else ""
        raise UserError(f"{table.where(row)}: {reason}{more}; data.on_error=skip leaves broken images out")
    kept = np.setdiff1d(np.arange(len(table)), np.array(list(broken), np.int64))
    if not len(kept):
        raise UserError(f"{table.where(row)}: {reason}; none of the {len(table)} images can be read")
    return _only(table, kept)


def _only(table: ImageTable, kept: Rows) -> ImageTable:
    """Some rows of a table as a table."""
    images: Images
    if isinstance(table.images, ParquetImages):
        images = mapped(subset(table, kept))
    elif isinstance(table.images, FileImages):
        images = replace(table.images, paths=table.images.paths.take(pa.array(kept)))
    elif isinstance(table.images, ArrowImages):
        images = replace(table.images, order=table.images.order[kept])
    else:
        images = PixelImages(table.images.pixels[kept])
    rows = table.rows.take(pa.array(kept))
    order = by_hash(rows["key"])
    fingerprint = fingerprint_of(images, table.labels[kept], rows["key"], order)
    return replace(table, rows=rows, order=order, images=images, fingerprint=fingerprint)


def _write_split(table: ImageTable, place: Path, split: str, group_bytes: int, file_bytes: int) -> int:
    """Write one split; returns the number of files."""
    schema = _schema(table)
    writer: pq.ParquetWriter | None = None
    files = room = 0
    try:
        for group in _groups(table, group_bytes):
            if writer is None or room <= 0:
                if writer is not None:
                    writer.close()
                writer, room = _writer(place / f"{split}-{files:05d}.parquet", schema), file_bytes
                files += 1
            writer.write_table(pa.table(group, schema=schema))
            room -= sum(len(image) for image in group["image"])
    finally:
        if writer is not None:
            writer.close()
    return files


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        schema,
        compression={"image": "none", "label": "zstd", "key": "zstd"},  # images are compressed already
        use_dictionary=["label"],
        write_statistics=["label"],
    )


def _schema(table: ImageTable) -> pa.Schema:
    facts = {
        "classes": table.classes,
        "mean": table.mean,
        "std": table.std,
        "native": table.native,
        "auto": table.auto,
        "fingerprint": table.fingerprint,
    }
    columns = [("image", pa.binary()), ("label", pa.int64()), ("key", pa.string())]
    return pa.schema(columns, metadata={METADATA: json.dumps(facts).encode()})


def _groups(table: ImageTable, group_bytes: int) -> Iterator[dict[str, list[Any]]]:
    """Columns of one row group after the other."""
    images: list[Any] = []
    rows: list[int] = []
    size = 0
    for row, data in _in_order(table):
        images.append(data)
        rows.append(row)
        size += len(data)
        if size >= group_bytes or len(rows) >= GROUP_ROWS:
            yield _columns(table, images, rows)
            images, rows, size = [], [], 0
    if rows:
        yield _columns(table, images, rows)


def _columns(table: ImageTable, images: list[Any], rows: list[int]) -> dict[str, list[Any]]:
    return {
        "image": images,
        "label": [int(table.labels[row]) for row in rows],
        "key": table.rows["key"].take(pa.array(rows)),
    }


def _in_order(table: ImageTable) -> Iterator[tuple[int, bytes]]:
    """(row, encoded image) in the order of packing."""
    order = packing_order(table)
    if isinstance(table.images, ParquetImages):  # copied first, because its rows cannot be read one by one
        every = whole(table)
        place = np.empty(len(table), np.int64)
        place[every.indices] = np.arange(len(table))
        scanned = mapped(every).scan(place[order])
    else:
        scanned = table.images.scan(order)
    for at, data in scanned:
        yield int(order[at]), data


def packing_order(table: ImageTable) -> Rows:
    """Row numbers by the fraction at which `fractions.select` begins to take each of them.

    That is (rank + 1/2) / class size, because sizes are rounded; at a tie Python rounds to even, so odd ranks come
    first. Every class gives at least one image, so rank 0 comes before everything.
    """
    rank, size = hash_ranks(table)
    enters: npt.NDArray[np.float64] = np.where(rank == 0, 0.0, (rank + 0.5) / size)
    order: Rows = np.lexsort((table.labels, rank % 2 == 0, enters)).astype(np.int64)
    return order
