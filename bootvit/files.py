"""Files that are replaced as a whole, and JSON: the only place that does it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from bootvit.errors import UserError, naming

PREDICTIONS = "predictions.parquet"  # in a run's folder: see bootvit.predictions


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, so that a reader, or a crash, sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_parts(folder: Path, before: float) -> None:
    """Remove what killed processes have left of `replacing`, if it is older than `before` by the storage's clock."""
    for part in folder.rglob(".*.part"):
        with suppress(FileNotFoundError):  # its writer lives, and has just replaced the file
            if part.stat().st_mtime < before:
                part.unlink()


def write_atomic(path: Path, data: bytes) -> None:
    """The same for what is there as a whole."""
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """A JSON document, atomically."""
    write_atomic(path, f"{json.dumps(value, indent=2, allow_nan=False)}\n".encode())


def read_json(path: Path) -> Any:
    """A JSON document; a broken file is a `UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise UserError(f"{path}: not readable as JSON: {err}") from err
