"""Which columns of a Parquet file hold the images and the labels, from its footer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bootvit.data.cache import remembered
from bootvit.data.found import listed
from bootvit.data.stores import StorePath, ahead
from bootvit.data.table import Place, footer_of, printable, read_parquet
from bootvit.errors import UserError

LABELS = ("label", "labels", "fine_label", "class", "target", "cls")
IMAGES = ("image", "img", "jpg", "jpeg", "png")
NO_LABELS = ("key", "index", "idx", "width", "height", "size", "__index_level_0__")  # integers that are never labels
METADATA = b"bootvit"  # key in the schema of packed files


class Shard(NamedTuple):
    """One file of a split."""

    path: Place
    schema: pa.Schema
    rows: int


def footers(paths: Sequence[Place]) -> list[Shard]:
    """What the ends of files say; those in a store are read at once, and by one process of a node."""
    stored = [path for path in paths if isinstance(path, StorePath) and path.footer is None]
    if stored:
        found = remembered("footers", _stamp(stored), pa.large_binary(), lambda: list(ahead(_footer, stored)))
        for path, data in zip(stored, found, strict=True):
            path.footer = pq.read_metadata(pa.BufferReader(data))
    return [_shard(path) for path in paths]


def _shard(path: Place) -> Shard:
    if isinstance(path, StorePath):
        metadata = footer_of(path)
        return Shard(path, metadata.schema.to_arrow_schema(), metadata.num_rows)
    return read_parquet(path, lambda file: Shard(path, file.schema_arrow, file.metadata.num_rows))


def _footer(path: StorePath) -> bytes:
    out = pa.BufferOutputStream()
    footer_of(path).write_metadata_file(out)
    data: bytes = out.getvalue().to_pybytes()
    return data


def preload(shards: Sequence[Shard], columns: Sequence[str]) -> None:
    """Read these columns of the files in a store that have them at once, and by one process of a node."""
    stored = [shard.path for shard in shards if isinstance(shard.path, StorePath)]
    stored = [path for path in stored if not all(column in path.columns for column in columns)]
    if not stored:
        return

    def read(path: StorePath) -> bytes:
        table = read_parquet(path, lambda file: file.read(columns=list(columns), use_threads=False))
        out = pa.BufferOutputStream()
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
        data: bytes = out.getvalue().to_pybytes()
        return data

    what = json.dumps(["columns", *columns])
    found = remembered(what, _stamp(stored), pa.large_binary(), lambda: list(ahead(read, stored)))
    for path, data in zip(stored, found, strict=True):
        table = pa.ipc.open_stream(data).read_all()
        for column in columns:
            name = column if column in table.column_names else column.rpartition(".")[0]
            if name in table.column_names:
                path.columns[column] = table[name]


def _stamp(paths: Sequence[StorePath]) -> bytes:
    return repr([path.stamp for path in paths]).encode()


def read_column(path: Place, column: str) -> pa.ChunkedArray:
    """A column, or (as `parent.child`) a child of a struct."""
    values = path.columns.get(column) if isinstance(path, StorePath) else None
    if values is None:
        values = read_parquet(path, lambda file: file.read(columns=[column], use_threads=False).column(0))
    if pa.types.is_struct(values.type):
        child = values.type.field(0).type
        return pa.chunked_array([chunk.flatten()[0] for chunk in values.chunks], child)
    return values


def metadata_of(shard: Shard, key: bytes) -> dict[str, Any]:
    """A JSON object in the schema's metadata; empty if there is none."""
    text = (shard.schema.metadata or {}).get(key, b"{}")
    try:
        content = json.loads(text)
    except ValueError as err:
        raise UserError(f"{printable(shard.path)}: its metadata {key.decode()!r} are damaged: {err}") from err
    return content if isinstance(content, dict) else {}


def features(shard: Shard) -> dict[str, Any]:
    """Hugging Face's description of the columns."""
    info = metadata_of(shard, b"huggingface").get("info")
    found = info.get("features") if isinstance(info, dict) else None
    return {name: value for name, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else {}


def class_names(shard: Shard, label: str) -> tuple[str, ...] | None:
    """What the file itself says its labels mean."""
    packed = metadata_of(shard, METADATA).get("classes")
    names = packed or features(shard).get(label, {}).get("names")
    if not names or not isinstance(names, list):
        return None
    if len(set(map(str, names))) < len(names):
        raise UserError(f"{printable(shard.path)}: its metadata name a class twice: {listed(names)}")
    return tuple(str(name) for name in names)


def image_column(shards: list[Shard]) -> str:
    """`image.bytes`, or the name of a binary column; the same in every file."""
    first = _image_column(shards[0])
    for shard in shards[1:]:
        if _image_column(shard) != first:
            raise UserError(f"{printable(shard.path)}: no image column {first!r}, which {shards[0].path.name} has")
    return first


def _image_column(shard: Shard) -> str:
    structs = [f.name for f in shard.schema if pa.types.is_struct(f.type) and _has_bytes(f.type)]
    binaries = [f.name for f in shard.schema if _is_binary(f.type) and f.name.lower() in IMAGES]
    named = [name for wanted in IMAGES for name in structs + binaries if name.lower() == wanted]
    if not named and len(structs) > 1:
        raise UserError(
            f"{printable(shard.path)}: several image columns, {listed(structs)}: rename the right one 'image'"
        )
    for name in named or structs:
        return f"{name}.bytes" if name in structs else str(name)
    raise UserError(
        f"{printable(shard.path)}: no image column: expected a struct image{{bytes, path}} or a binary column 'image', "
        f"found {', '.join(shard.schema.names)}"
    )


def _has_bytes(struct: pa.DataType) -> bool:
    return any(child.name == "bytes" and (_is_binary(child.type) or pa.types.is_null(child.type)) for child in struct)


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def label_column(shards: list[Shard], *, optional: bool = False) -> tuple[str, bool]:
    """(name, whether it is only a guess); every file must have it. `optional`: an empty name if there is none."""
    name, guessed = _label_column(shards[0])
    if not name and not optional:
        raise UserError(
            f"{printable(shards[0].path)}: no label column: expected one of {', '.join(LABELS)} with integers or "
            f"text, found {', '.join(shards[0].schema.names)}"
        )
    for shard in shards[1:]:
        if name and name not in shard.schema.names:
            raise UserError(f"{printable(shard.path)}: no column {name!r}, which {shards[0].path.name} has")
    return name, guessed


def _label_column(shard: Shard) -> tuple[str, bool]:
    """By name; else by Hugging Face's metadata; else the only column of integers that can be one."""
    names = [str(name) for name in shard.schema.names]
    for wanted in LABELS:
        for name in names:
            if name.lower() == wanted:
                return name, False
    told = [name for name, feature in features(shard).items() if feature.get("_type") == "ClassLabel" and name in names]
    if len(told) == 1:
        return told[0], False
    whole = [str(field.name) for field in shard.schema if pa.types.is_integer(field.type)]
    whole = [name for name in whole if name.lower() not in NO_LABELS and not name.lower().endswith("id")]
    return (whole[0], True) if len(whole) == 1 and not told else ("", False)
