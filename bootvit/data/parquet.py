"""Parquet files: the Hugging Face layout (`image{bytes, path}`, integer label) and our own packed one.

Labels and keys are read at once, images only when they are needed (see `ParquetImages`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bootvit.data.found import Found
from bootvit.data.table import ParquetImages, Rows
from bootvit.errors import UserError

PREFIXES: dict[str, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}
LABELS = ("label", "labels", "fine_label")
IMAGES = ("image", "img")
METADATA = b"bootvit"  # key in the schema of packed files


def read(root: Path, split: Literal["train", "test"]) -> Found | None:
    """The split whose files' names begin with its name; a test split without labels counts as none."""
    everything = sorted(root.glob("*.parquet"))
    for prefix in PREFIXES[split]:
        files = tuple(path for path in everything if path.name.startswith(prefix))
        if files:
            found = _read(files)
            if split == "train" or not len(found.labels) or found.labels.max() >= 0:
                return found
    if split == "train":
        names = ", ".join(path.name for path in everything[:3]) or "none"
        raise UserError(f"data.root={root}: no train*.parquet there (Parquet files found: {names})")
    return None


def _read(files: tuple[Path, ...]) -> Found:
    schemas = [_schema(path) for path in files]
    schema, first = schemas[0], files[0]
    for path, other in zip(files[1:], schemas[1:], strict=True):
        if not other.equals(schema):
            raise UserError(f"{path}: its columns differ from those of {first.name}: {other.names} and {schema.names}")
    image, label = _image_column(schema, first), _label_column(schema, first)
    images = ParquetImages(files, image)
    labels = _labels(files, label)
    keys = _keys(files, schema, images, labels)
    packed = json.loads((schema.metadata or {}).get(METADATA, b"{}"))
    if not packed:
        return Found(images, labels, keys, _names(schema, label))
    return Found(
        images,
        labels,
        keys,
        tuple(packed["classes"]),
        constants=(_triple(packed["mean"]), _triple(packed["std"])),
        auto=packed["auto"],
        packed=True,
        native=tuple(packed["native"]) if packed["native"] else None,
        fingerprint=packed["fingerprint"],
    )


def _triple(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as err:
        raise UserError(f"{path}: not a readable Parquet file: {err}") from err


def _image_column(schema: pa.Schema, path: Path) -> str:
    for field in sorted(schema, key=lambda field: field.name not in IMAGES):
        if pa.types.is_struct(field.type) and "bytes" in [child.name for child in field.type]:
            return f"{field.name}.bytes"
        if field.name in IMAGES and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)):
            return str(field.name)
    raise UserError(
        f"{path}: no image column: expected a struct image{{bytes, path}} or a binary column 'image', "
        f"found {', '.join(schema.names)}"
    )


def _label_column(schema: pa.Schema, path: Path) -> str:
    integers = [field.name for field in schema if pa.types.is_integer(field.type)]
    for name in (*LABELS, *(integers if len(integers) == 1 else ())):
        if name in integers:
            return str(name)
    raise UserError(
        f"{path}: no integer label column: expected one of {', '.join(LABELS)}, found {', '.join(schema.names)}"
    )


def _labels(files: tuple[Path, ...], column: str) -> Rows:
    values = pa.concat_tables([_columns(path, [column]) for path in files])[column]
    if values.null_count:
        raise UserError(f"{files[0]}: column {column!r} has {values.null_count} rows without a label")
    out: Rows = values.cast(pa.int64()).to_numpy()
    return out


def _columns(path: Path, columns: list[str]) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read(columns=columns, use_threads=False)


def _names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """The class names in the Hugging Face metadata."""
    info: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = info.get("info", {}).get("features", {}).get(label, {})
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(str(name) for name in names) if names else None


def _keys(files: tuple[Path, ...], schema: pa.Schema, images: ParquetImages, labels: Rows) -> list[str]:
    """The column `key`, else `image.path` where it is there and unique, else the SHA-256 of the bytes."""
    struct = images.column.removesuffix(".bytes")
    if "key" in schema.names:
        keys: list[Any] = _texts(files, "key")
    elif struct != images.column and "path" in [child.name for child in schema.field(struct).type]:
        keys = _texts(files, f"{struct}.path")
    else:
        keys = []
    if keys and None not in keys and len(set(keys)) == len(keys):
        return keys
    if "key" in schema.names:
        raise UserError(f"{files[0]}: the column 'key' must be there in every row and unique")
    return _numbered(images, labels)


def _texts(files: tuple[Path, ...], column: str) -> list[Any]:
    tables = [_columns(path, [column]) for path in files]
    if "." not in column:
        return [value for table in tables for value in table[column].to_pylist()]
    parent, child = column.split(".")
    return [row[child] if row else None for table in tables for row in table[parent].to_pylist()]


def _numbered(images: ParquetImages, labels: Rows) -> list[str]:
    """SHA-256 of each image's bytes; equal images get a number, by label, so that the order of rows is irrelevant."""
    digests = [""] * len(labels)
    for place, data in images.scan(np.arange(len(labels))):
        digests[place] = hashlib.sha256(data).hexdigest()
    seen: dict[str, int] = {}
    out = list(digests)
    for row in np.lexsort((labels, np.array(digests))):
        digest = digests[row]
        seen[digest] = seen.get(digest, 0) + 1
        if seen[digest] > 1:
            out[row] = f"{digest}-{seen[digest]}"
    return out
