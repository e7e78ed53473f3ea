"""`bootvit data pack`: any source as Parquet files in which every fraction is a prefix.

Rows are sorted by rank in the class's hash order over the size of the class, so that a run on 5% of the images reads
5% of the bytes. The images' bytes are kept as they are (raw sources become PNG, without loss). The layout is Hugging
Face's, so `datasets` reads the files too: `image{bytes, path}`, `label` with its class names, and `key`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bootvit.config import DataConfig
from bootvit.data.cache import mapped
from bootvit.data.check import bar, check
from bootvit.data.fractions import hash_ranks, subset, whole
from bootvit.data.keys import by_hash, fingerprint_of
from bootvit.data.parquet import METADATA
from bootvit.data.sources import open_table
from bootvit.data.stores import ahead
from bootvit.data.table import ArrowImages, FileImages, Images, ImageTable, ParquetImages, PixelImages, Rows
from bootvit.errors import UserError

GROUP_BYTES = 4 << 20  # image bytes in a row group, the least that is read at once
GROUP_ROWS = 500
READ_ROWS = 64  # images that a thread reads at a time
COMPRESSED = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF")  # how JPEG, PNG, GIF and WebP begin
HUGGING_FACE = b"huggingface"
FILE_BYTES = 1 << 30  # image bytes in a file


def pack(
    data: DataConfig,
    out: Path,
    *,
    group_bytes: int = GROUP_BYTES,
    file_bytes: int = FILE_BYTES,
    threads: int | None = None,
) -> dict[str, int | str]:
    """Write `out`/train-00000.parquet ... (and test-...), complete or not at all; returns what was written.

    `threads` read and encode ahead of the writing (by default two a processor); the files do not depend on it.
    """
    _check(data, out)
    train = open_table(data, "train")
    tables = {"train": train, "test": open_table(data, "test", like=train)}
    sound = {split: _readable(table, split, data) for split, table in tables.items() if table is not None}
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        files = 0
        for split, table in sound.items():
            parts = bar(_encoded(table, threads or 2 * (os.cpu_count() or 1)), len, len(table), f"writing {split}")
            files += _write_split(table, parts, place / split, group_bytes, file_bytes)
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


Part = list[tuple[int, bytes]]  # (row, encoded image)


def _encoded(table: ImageTable, threads: int) -> Iterator[Part]:
    """The images in the order of packing, a few at a time; the next ones are read meanwhile."""
    order = packing_order(table)
    images, places = table.images, order
    if isinstance(images, ParquetImages):  # copied first, because its rows cannot be read one by one
        every = whole(table)
        at = np.empty(len(table), np.int64)
        at[every.indices] = np.arange(len(table))
        images, places = mapped(every), at[order]

    def read(start: int) -> Part:
        some = slice(start, start + READ_ROWS)
        return list(zip(order[some].tolist(), (data for _, data in images.scan(places[some])), strict=True))

    return ahead(read, range(0, len(order), READ_ROWS), threads)


def _write_split(table: ImageTable, parts: Iterable[Part], target: Path, group_bytes: int, file_bytes: int) -> int:
    """Write one split's files, `target`-00000.parquet ...; returns their number."""
    schema = _schema(table)
    writer: pq.ParquetWriter | None = None
    files = room = 0
    try:
        for group in _groups(parts, group_bytes):
            if writer is None or room <= 0:
                if writer is not None:
                    writer.close()
                writer, room = _writer(Path(f"{target}-{files:05d}.parquet"), schema, group), file_bytes
                files += 1
            writer.write_table(_columns(table, group, schema))
            room -= sum(len(data) for _, data in group)
    finally:
        if writer is not None:
            writer.close()
    return files


def _groups(parts: Iterable[Part], group_bytes: int) -> Iterator[Part]:
    """The same in row groups."""
    group: Part = []
    size = 0
    for row, data in (one for part in parts for one in part):
        group.append((row, data))
        size += len(data)
        if size >= group_bytes or len(group) >= GROUP_ROWS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _writer(path: Path, schema: pa.Schema, first: Part) -> pq.ParquetWriter:
    """Images are compressed only if the file's first row group has some that are not so by their format."""
    plain = any(not data.startswith(COMPRESSED) for _, data in first)
    return pq.ParquetWriter(
        path,
        schema,
        compression={
            "image.bytes": "zstd" if plain else "none",
            **dict.fromkeys(("image.path", "label", "key"), "zstd"),
        },
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
    features = {
        "image": {"_type": "Image"},
        "label": {"names": table.classes, "_type": "ClassLabel"},
        "key": {"dtype": "string", "_type": "Value"},
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {METADATA: json.dumps(facts), HUGGING_FACE: json.dumps({"info": {"features": features}})}
    return pa.schema([("image", image), ("label", pa.int64()), ("key", pa.string())], metadata)


def _columns(table: ImageTable, group: Part, schema: pa.Schema) -> pa.Table:
    rows = pa.array([row for row, _ in group])
    keys = table.rows["key"].take(rows).combine_chunks()
    paths = pc.replace_substring_regex(keys, "^.*/", "")  # a file's name, as `datasets` writes it
    images = pa.StructArray.from_arrays([pa.array([data for _, data in group], pa.binary()), paths], ["bytes", "path"])
    return pa.table([images, table.rows["label"].take(rows), keys], schema=schema)


def packing_order(table: ImageTable) -> Rows:
    """Row numbers by the fraction at which `fractions.select` begins to take each of them.

    That is (rank + 1/2) / class size, because sizes are rounded; at a tie Python rounds to even, so odd ranks come
    first. Every class gives at least one image, so rank 0 comes before everything.
    """
    rank, size = hash_ranks(table)
    enters: npt.NDArray[np.float64] = np.where(rank == 0, 0.0, (rank + 0.5) / size)
    order: Rows = np.lexsort((table.labels, rank % 2 == 0, enters)).astype(np.int64)
    return order
