"""Parquet files: the Hugging Face layout (`image{bytes, path}`, label) and our own packed one.

Labels and keys are read at once, images only when they are needed (see `ParquetImages`).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bootvit.data import parquet_labels
from bootvit.data.cache import remembered
from bootvit.data.found import Found, listed
from bootvit.data.keys import LARGE, Keys, column, repeated
from bootvit.data.listing import entries, is_dropping, is_folder
from bootvit.data.parquet_columns import (
    METADATA,
    Shard,
    footers,
    image_column,
    label_column,
    metadata_of,
    preload,
    read_column,
)
from bootvit.data.splits import EVALUATION, Kind, split_of_file, split_of_folder
from bootvit.data.stores import StorePath
from bootvit.data.table import ParquetImages, Place, Rows, printable
from bootvit.errors import UserError

__all__ = ["METADATA", "read"]

Files = dict[Kind, list[Place]]


def read(root: Place, split: Literal["train", "test"], *, held_out: bool, notes: list[str]) -> Found | None:
    """One split; a test split without labels counts as none, and is an error if nothing else is there to test on."""
    files = _files(root, notes if split == "train" else [])
    train = _shards(files["train"])
    if split == "train":
        return _read(train, notes)
    unlabelled: list[str] = []
    found = None
    for kind in EVALUATION:
        if kind in files and found is not None:
            notes.append(f"{printable(files[kind][0])}: not used, because {found.place} is there")
        elif kind in files:
            found = _labelled(_shards(files[kind]), train, unlabelled, notes)
    notes += unlabelled
    if found is None and unlabelled and not held_out:
        raise UserError(f"{unlabelled[0]}: set data.held_out, such as 0.1, to evaluate on training images")
    return found


# --------------------------------------------------------------------------------------------------- files


def _files(root: Place, notes: list[str]) -> Files:
    """The files of each split, in the root or in its one sub-folder that has some, such as Hugging Face's `data`."""
    here, others = _home(root)
    if not here:
        below = {sub: found for sub in _folders(root) if (found := _home(sub)[0])}
        if len(below) > 1:
            raise UserError(
                f"data.root={root}: no train*.parquet there, but in {listed(sub.name for sub in below)}: "
                "set data.root to one of these folders"
            )
        here = next(iter(below.values()), {})
    if "train" not in here:
        names = [_below(path, root) for files in here.values() for path in files] + others
        there = listed(map(printable, names)) or "none"
        raise UserError(
            f"data.root={root}: no train*.parquet there (Parquet files found: {there}): a file's name begins with its "
            "split, such as train-0.parquet and test-0.parquet, or it lies in train/ or test/"
        )
    if others:
        notes.append(f"{printable(root)}: files passed over, because they name no split: {listed(others)}")
    return here


def _home(folder: Place) -> tuple[Files, list[str]]:
    """The files of each split, by their names or by that of their folder; and the names of other Parquet files."""
    found: Files = {}
    others = []
    for path in _parquet_in(folder):
        if kind := split_of_file(path.name):
            found.setdefault(kind, []).append(path)
        else:
            others.append(path.name)
    for sub in _folders(folder):
        kind = split_of_folder(sub.name.removesuffix(".parquet"))
        inside = _parquet_in(sub) if kind else []
        if kind and inside:
            if kind in found:
                first = _below(found[kind][0], folder)
                raise UserError(f"{printable(folder)}: both {first!r} and {sub.name + '/'!r} hold one split: keep one")
            found[kind] = inside
    return found, others


def _below(path: Place, folder: Place) -> str:
    return os.path.relpath(str(path), str(folder))


def _parquet_in(folder: Place) -> list[Place]:
    if isinstance(folder, StorePath):
        files = [path for path in folder.children if not path.is_folder and path.name.lower().endswith(".parquet")]
        return [path for path in files if not is_dropping(path.name)]
    listed_ = [entry for entry in entries(folder) if entry.name.lower().endswith(".parquet")]
    return [folder / entry.name for entry in listed_ if not is_dropping(entry.name) and not is_folder(entry)]


def _folders(folder: Place) -> list[Place]:
    if isinstance(folder, StorePath):
        return [path for path in folder.children if path.is_folder and not is_dropping(path.name)]
    return [folder / entry.name for entry in entries(folder) if not is_dropping(entry.name) and is_folder(entry)]


def _shards(files: list[Place]) -> list[Shard]:
    """The files with rows; if there are none, the first file."""
    shards = footers(files)
    return [shard for shard in shards if shard.rows] or shards[:1]


# -------------------------------------------------------------------------------------------------- one split


def _labelled(shards: list[Shard], train: list[Shard], unlabelled: list[str], notes: list[str]) -> Found | None:
    """A test split; None, with a note, if it has no labels."""
    column, _ = label_column(shards, optional=True)
    if column:
        preload(shards, _small_columns(shards, column))
    if column and not parquet_labels.are_missing(shards, column):
        return _read(shards, notes, train=parquet_labels.meaning(train, label_column(train)[0]))
    what = "its images have no labels" if column else "it has no label column"
    what = what if shards[0].rows else "it has no rows"
    unlabelled.append(f"{printable(shards[0].path)}: passed over, because {what}")
    return None


def _read(shards: list[Shard], notes: list[str], train: parquet_labels.Meaning | None = None) -> Found:
    """One split; `train` is what the training split's labels mean, for a test split."""
    first = shards[0]
    images = ParquetImages(tuple(shard.path for shard in shards), image_column(shards))
    column, guessed = label_column(shards)
    preload(shards, _small_columns(shards, column))
    labels, names = parquet_labels.read(shards, column, train)
    if guessed:
        _check_guess(shards, column, labels)
        notes.append(f"{printable(first.path)}: column {column!r} is taken for the label, as the only one of integers")
    keys = _keys(shards, images, labels, notes)
    found = Found(images, labels, keys, names, place=printable(first.path), column=column)
    packed = metadata_of(first, METADATA)
    if not packed:
        return found
    try:
        return replace(
            found,
            constants=(_triple(packed["mean"]), _triple(packed["std"])),
            auto=packed["auto"],
            packed=True,
            native=tuple(packed["native"]) if packed["native"] else None,
            fingerprint=packed["fingerprint"],
        )
    except (KeyError, TypeError, ValueError) as err:
        raise UserError(f"{found.place}: its metadata 'bootvit' are not those of `bootvit data pack`: {err}") from err


def _small_columns(shards: list[Shard], label: str) -> list[str]:
    """What opening reads of every file: labels and keys."""
    names = shards[0].schema.names
    if "key" in names:
        return [label, "key"]
    struct = image_column(shards).removesuffix(".bytes")
    kind = shards[0].schema.field(struct).type
    return [label, f"{struct}.path"] if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 else [label]


def _triple(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _check_guess(shards: list[Shard], column: str, labels: Rows) -> None:
    """A number that no two rows share is no label."""
    if len(labels) > 1 and len(np.unique(labels)) == len(labels):
        raise UserError(
            f"{printable(shards[0].path)}: no label column: the only column of integers, {column!r}, has another value "
            f"in each row; rename the right one to 'label' (found {', '.join(shards[0].schema.names)})"
        )


# ------------------------------------------------------------------------------------------------------ keys


def _keys(shards: list[Shard], images: ParquetImages, labels: Rows, notes: list[str]) -> Keys:
    """The column `key`, else `image.path` where it is there and unique, else the SHA-256 of the bytes."""
    with_key = [shard for shard in shards if "key" in shard.schema.names]
    if with_key:
        if len(with_key) < len(shards):
            without = next(shard for shard in shards if "key" not in shard.schema.names)
            raise UserError(f"{printable(without.path)}: no column 'key', which {with_key[0].path.name} has")
        return _key_column(shards, images)
    struct = images.column.removesuffix(".bytes")
    if struct == images.column or any(shard.schema.field(struct).type.get_field_index("path") < 0 for shard in shards):
        return _numbered(images, labels)
    paths = pa.chunked_array(
        [chunk for shard in shards for chunk in _texts(shard, f"{struct}.path").chunks], pa.string()
    )
    keys = paths.filter(_given(paths))
    twice = _repeated(keys, images)
    if twice is None and len(keys) == len(paths):
        return keys
    if twice is not None:
        notes.append(
            f"{printable(shards[0].path)}: {struct}.path is not unique ({twice!r}): keys are hashes of the images"
        )
    return _numbered(images, labels)


def _repeated(keys: Keys, images: ParquetImages) -> str | None:
    """`repeated`, of many keys once per node."""
    if len(keys) <= LARGE:
        return repeated(keys)
    (twice,) = remembered("repeated", images.stamp(np.arange(0)), pa.large_string(), lambda: [repeated(keys)])
    return twice


def _key_column(shards: list[Shard], images: ParquetImages) -> Keys:
    """The column `key` of every file: unique, and there in every row."""
    chunks: list[pa.Array] = []
    ends = []
    for shard in shards:
        texts = _texts(shard, "key")
        if not pc.all(_given(texts)).as_py():
            raise _wrong_key(shard)
        chunks += texts.chunks
        ends.append(sum(map(len, chunks)))
    keys = pa.chunked_array(chunks, pa.string())
    if _repeated(keys, images) is not None:
        seen = (len(keys.slice(0, end).unique()) for end in ends)
        raise _wrong_key(next(shard for shard, end, count in zip(shards, ends, seen, strict=True) if count < end))
    return keys


def _given(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether each is there and not empty."""
    return pc.fill_null(pc.not_equal(texts, ""), False)


def _wrong_key(shard: Shard) -> UserError:
    return UserError(f"{printable(shard.path)}: the column 'key' must be there in every row and unique")


def _texts(shard: Shard, column: str) -> pa.ChunkedArray:
    """A column of text or integers, or a text child of a struct, as text."""
    values = read_column(shard.path, column)
    type_ = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if pa.types.is_null(type_):
        return values.cast(pa.string())
    if not (parquet_labels.is_text(type_) or pa.types.is_integer(type_)):
        raise UserError(f"{printable(shard.path)}: column {column!r} is of type {type_}, not text or integers")
    try:
        texts = values.cast(type_).cast(pa.string())
        texts.validate(full=True)
        return texts
    except pa.ArrowInvalid:  # bytes that are not UTF-8
        return pa.chunked_array([pa.array(parquet_labels.texts_of(values), pa.string())])


def _numbered(images: ParquetImages, labels: Rows) -> Keys:
    """SHA-256 of each image's bytes; equal images get a number, by label, so that the order of rows is irrelevant."""
    every = np.arange(len(labels))
    digests = remembered("digests", images.stamp(every), pa.large_string(), lambda: _digests(images, every))
    seen: dict[str, int] = {}
    out = list(digests)
    for row in np.lexsort((labels, np.array(digests))):
        digest = digests[row]
        seen[digest] = seen.get(digest, 0) + 1
        if seen[digest] > 1:
            out[row] = f"{digest}-{seen[digest]}"
    return column(out)


def _digests(images: ParquetImages, rows: Rows) -> list[str]:
    digests = [""] * len(rows)
    for place, data in images.scan(rows):
        digests[place] = hashlib.sha256(data).hexdigest()
    return digests
