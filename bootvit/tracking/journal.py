"""The journal: one JSON object a line, appended by rank 0 of the loop, cut back when a run resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bootvit.errors import UserError, naming
from bootvit.files import replacing


class Record(NamedTuple):
    """One measured value."""

    step: int  # optimiser steps since the start of training
    epoch: int  # 0-based; a record made after epoch e carries e
    name: str  # such as test/vit/top1
    value: float  # may be nan or infinite
    time: float  # seconds since 1970


class Journal:
    """Appends records to a file; one writer at a time (the run's lease sees to that)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)

    def write(self, records: Sequence[Record]) -> None:
        """Append and flush; a crash can tear only the last line."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{_to_json(record)}\n" for record in records))

    def cut(self, step: int, *, evaluated: bool = True) -> None:
        """Drop what lies beyond `step`, and a torn last line, in one atomic replacement of the file.

        What an evaluation at `step` has left is dropped too if it was not `evaluated` to its end.
        """

        def stays(record: Record) -> bool:
            return record.step < step or (record.step == step and (evaluated or record.name.startswith("train/")))

        if not self.path.exists():
            return
        with self.path.open("rb") as old, replacing(self.path) as new:
            new.writelines(line for line in old if line.endswith(b"\n") and stays(parse_record(line, self.path, 0)))


def read_journal(path: Path, offset: int = 0) -> tuple[list[Record], int]:
    """The complete records from byte `offset` on, and the offset behind the last of them.

    A missing file has no records; a broken line is a `UserError` that names the file and the byte.
    """
    records = list(iter_journal(path, offset))
    return [record for record, _ in records], records[-1][1] if records else offset


def iter_journal(path: Path, offset: int = 0) -> Iterator[tuple[Record, int]]:
    """(record, offset behind it) for each complete line, without holding them all in memory."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):  # torn, or being written just now
                return
            offset += len(line)
            yield parse_record(line, path, offset), offset


def parse_record(line: bytes, path: Path, offset: int) -> Record:
    """One line of the journal; `path` and `offset` are for the error only."""
    try:
        data = json.loads(line)
        return Record(
            int(data["step"]),
            int(data["epoch"]),
            str(data["name"]),
            float(data["value"]),
            float(data["time"]),
        )
    except (ValueError, KeyError, TypeError) as err:
        raise UserError(f"{path}: no journal record in the line that ends at byte {offset}: {err!r}") from err


def json_number(value: float) -> float | str:
    """JSON has no words for nan and the infinities: they are written as strings, which `float` reads back."""
    return value if math.isfinite(value) else str(value)


def _to_json(record: Record) -> str:
    row: dict[str, Any] = record._asdict()
    return json.dumps(row | {"value": json_number(record.value)}, allow_nan=False)


def _drop_torn_line(path: Path) -> None:
    """Without this the first record after a crash would be glued to half a line."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        tail_start = max(0, size - 65536)
        file.seek(tail_start)
        tail = file.read()
        if not tail.endswith(b"\n"):
            file.truncate(tail_start + tail.rfind(b"\n") + 1)
