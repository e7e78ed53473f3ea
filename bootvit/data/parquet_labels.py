"""A label column of any type as numbers of classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from bootvit.data.found import relabel
from bootvit.data.parquet_columns import Shard, class_names, read_column
from bootvit.data.table import Rows, printable
from bootvit.errors import UserError

BOOLEAN = ("false", "true")
LARGEST = 2**63 - 1

Names = tuple[str, ...] | None


class Labels(NamedTuple):
    """Labels as numbers, and what they are called; text is numbered by its sorted values."""

    numbers: Rows
    names: Names


class Meaning(NamedTuple):
    """What the footers of a split's files say of its labels."""

    text: bool
    names: Names


def meaning(shards: list[Shard], column: str) -> Meaning:
    """Text names its classes itself; numbers are named by the first file that does; every file must be alike."""
    text = is_text(_type(shards[0], column))
    for shard in shards[1:]:
        if is_text(_type(shard, column)) != text:
            kinds = ("numbers", "text") if text else ("text", "numbers")
            raise UserError(
                f"{printable(shard.path)}: column {column!r} holds {kinds[0]}, but {kinds[1]} in {shards[0].path.name}"
            )
    return Meaning(text, None if text else next((names for s in shards if (names := _names(s, column))), None))


def read(shards: list[Shard], column: str, train: Meaning | None = None) -> Labels:
    """The labels of a split, counted alike in all its files; `train` is the training split's meaning.

    Where training has names and these files have none, the numbers are the training split's; where training has none,
    names here mean nothing.
    """
    own = meaning(shards, column)
    if train and train.text != own.text:
        raise UserError(
            f"{printable(shards[0].path)}: column {column!r} holds {'text' if own.text else 'numbers'}, but that of "
            f"the training files holds {'text' if train.text else 'numbers'}"
        )
    if own.text:
        return _by_name([_texts(shard, column) for shard in shards])
    names = own.names if train is None else (own.names or train.names) if train.names else None
    parts = []
    for shard in shards:
        labels, here = _numbers(shard, column), _names(shard, column)
        where = f"{printable(shard.path)}: column {column!r}"
        parts.append(relabel(labels, here, names, where) if here and names else labels)
    return Labels(np.concatenate(parts), names)


def are_missing(shards: list[Shard], column: str) -> bool:
    """Whether all labels are null, or negative numbers, as in test sets whose labels are kept secret."""
    for shard in shards:
        values = read_column(shard.path, column)
        kind = _value_type(values.type)
        signed = pa.types.is_signed_integer(kind) or pa.types.is_floating(kind)
        known = values.cast(kind).drop_null() if signed else values.drop_null()
        if len(known) and not (signed and (known.to_numpy() < 0).all()):
            return False
    return True


def _by_name(parts: list[list[str]]) -> Labels:
    names = tuple(sorted({text for part in parts for text in part}))
    number = {name: label for label, name in enumerate(names)}
    return Labels(np.array([number[text] for part in parts for text in part], np.int64), names)


def _texts(shard: Shard, column: str) -> list[str]:
    texts = texts_of(_complete(shard, column))
    return [text for text in texts if text is not None]  # all of them


def texts_of(values: pa.ChunkedArray) -> list[str | None]:
    """As text; bytes that are not UTF-8, which Arrow lets pass, become `\\xe9`."""
    try:
        return [None if value is None else str(value) for value in values.to_pylist()]
    except UnicodeDecodeError:
        raw = values.cast(pa.large_binary() if pa.types.is_large_string(values.type) else pa.binary())
        return [None if value is None else value.decode("utf-8", "backslashreplace") for value in raw.to_pylist()]


def _complete(shard: Shard, column: str) -> pa.ChunkedArray:
    """The column; a row without a label is an error."""
    values = read_column(shard.path, column)
    if values.null_count:
        raise UserError(f"{printable(shard.path)}: column {column!r} has {values.null_count} rows without a label")
    return values


def _numbers(shard: Shard, column: str) -> Rows:
    values = _complete(shard, column)
    kind = _value_type(values.type)
    raw = values.cast(kind).to_numpy()
    where = f"{printable(shard.path)}: column {column!r}"
    if pa.types.is_integer(kind):
        wrong = raw > LARGEST if pa.types.is_uint64(kind) else np.zeros(len(raw), bool)
    elif pa.types.is_floating(kind):
        wrong = ~(np.abs(raw) < 2**53) | (raw != np.round(raw))  # the first for what is no number, too
    elif pa.types.is_boolean(kind):
        wrong = np.zeros(len(raw), bool)
    else:
        raise UserError(f"{where} is of type {kind}: labels are integers or text")
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(f"{where} has {raw[row]} in row {row}: labels are whole numbers of classes, from 0")
    out: Rows = raw.astype(np.int64)
    return out


def _names(shard: Shard, column: str) -> Names:
    return BOOLEAN if pa.types.is_boolean(_type(shard, column)) else class_names(shard, column)


def _type(shard: Shard, column: str) -> pa.DataType:
    return _value_type(shard.schema.field(column).type)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Any of Arrow's types of text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
