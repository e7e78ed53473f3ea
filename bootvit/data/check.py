"""Reading every image once, in all processors: what `bootvit data check` does, and `data pack` before it writes."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from bootvit.config import DataConfig
from bootvit.data import open_splits, way_of
from bootvit.data.cache import mapped
from bootvit.data.decode import BrokenImage, decode
from bootvit.data.fractions import whole
from bootvit.data.table import ImageTable, ParquetImages, PixelImages, Rows

CHUNK = 64  # images that a process is given at a time

_table: ImageTable | None = None  # in a reading process: inherited, because a table is no small message

Size = tuple[int, int]  # (rows, columns) of an image
T = TypeVar("T")


class Checked(NamedTuple):
    """Images that were read."""

    images: int
    broken: dict[int, str]  # row: reason
    sizes: Counter[Size]  # of the sound ones
    examples: dict[Size, int]  # the first row of each size


def check(table: ImageTable, what: str, processes: int | None = None) -> Checked:
    """Decode every image of a table, with a progress bar named `what` on a terminal."""
    if isinstance(table.images, PixelImages):
        rows, cols = table.images.pixels.shape[1:3]
        return Checked(len(table), {}, Counter({(rows, cols): len(table)}), {(rows, cols): 0})
    if isinstance(table.images, ParquetImages) and table.images.stored:
        table = copied(table)
    return merged(bar(_read_all(table, processes or os.cpu_count() or 1), lambda part: part.images, len(table), what))


def copied(table: ImageTable) -> ImageTable:
    """A table of Parquet images with their bytes in the node's cache, where they can be read one by one."""
    subset = whole(table)
    images = mapped(subset)
    order = np.empty(len(table), np.int64)
    order[subset.indices] = images.order
    return replace(table, images=replace(images, order=order))


def merged(parts: Iterator[Checked]) -> Checked:
    """Several parts of a table as one."""
    images, broken, sizes, examples = 0, dict[int, str](), Counter[Size](), dict[Size, int]()
    for part in parts:
        images += part.images
        broken |= part.broken
        sizes += part.sizes
        examples = part.examples | examples
    return Checked(images, broken, sizes, examples)


def _read_all(table: ImageTable, processes: int) -> Iterator[Checked]:
    """The table's chunks, in order; one whose process dies is read again by itself."""
    global _table  # noqa: PLW0603
    _table = table
    chunks = _chunks(table, processes)
    try:
        while chunks:
            done = 0
            pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"))
            futures = [pool.submit(_read, rows) for rows in chunks]
            try:
                for future in futures:
                    yield future.result()
                    done += 1
            except BrokenProcessPool:
                pass  # what follows is about this chunk
            finally:
                pool.shutdown(cancel_futures=True)
            if done < len(chunks):
                yield _read_alone(chunks[done])
            chunks = chunks[done + 1 :]
    finally:
        _table = None


def _chunks(table: ImageTable, processes: int) -> list[Rows]:
    """Rows that lie together; of Parquet files none beyond a row group, which is read as a whole."""
    starts = [first for first, _, _ in table.images.groups] if isinstance(table.images, ParquetImages) else [0]
    chunks = []
    for first, end in zip(starts, [*starts[1:], len(table)], strict=True):
        parts = -(-(end - first) // CHUNK)
        if isinstance(table.images, ParquetImages):
            parts = min(parts, processes)
        chunks += np.array_split(np.arange(first, end), parts) if parts else []
    return chunks


def _read_alone(rows: Rows) -> Checked:
    """A chunk in a process of its own, halved until the image is found that kills it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(_read, rows).result()
        except BrokenProcessPool:
            if len(rows) == 1:
                return Checked(1, {int(rows[0]): "the process that reads it dies: out of memory?"}, Counter(), {})
    return merged(_read_alone(half) for half in np.array_split(rows, 2))


def _read(rows: Rows) -> Checked:
    """In a reading process: one chunk."""
    assert _table is not None
    found = Checked(len(rows), {}, Counter(), {})
    for place, data in _table.images.scan(rows):
        row = int(rows[place])
        try:
            image = decode(data, _table.images.reading)
        except BrokenImage as err:
            found.broken[row] = str(err)
            continue
        size = (image.height, image.width)
        found.sizes[size] += 1
        found.examples.setdefault(size, row)
    return found


def bar(parts: Iterable[T], images: Callable[[T], int], total: int, what: str) -> Iterator[T]:
    """The same, with a bar on stderr where that is a terminal; `images` says how many are in a part."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=total)
        for part in parts:
            progress.advance(task, images(part))
            yield part


# ------------------------------------------------------------------------------------------------ the report


def report(data: DataConfig) -> dict[str, Any]:
    """What is wrong with a data set: {"images": {split: count}, "problems": [{"split", "image", "reason"}], ...}."""
    begin = time.monotonic()
    splits = open_splits(data)
    tables = {"train": splits.train.table} | ({"test": splits.test.table} if splits.test else {})
    one_size = way_of(splits.train.table, data).place == "memory"
    found = {split: check(table, split) for split, table in tables.items()}
    problems = []
    for split, table in tables.items():
        wrong = found[split].broken | (odd_sizes(found[split]) if one_size else {})
        problems += [{"split": split, "image": table.where(row), "reason": why} for row, why in sorted(wrong.items())]
    images = {split: one.images for split, one in found.items()}
    seconds = time.monotonic() - begin
    return {
        "source": data.source,
        "root": data.root,
        "images": images,
        "problems": problems,
        "notes": list(splits.notes),
        "seconds": round(seconds, 2),
        "images_per_second": round(sum(images.values()) / seconds, 1),
    }


def odd_sizes(found: Checked) -> dict[int, str]:
    """{row: reason}: an example of every size but the commonest, for images that must all have one."""
    if len(found.sizes) < 2:
        return {}
    (common, _), *others = found.sizes.most_common()
    return {
        found.examples[size]: f"{size[0]}x{size[1]} pixels, as {count} of {found.images} images, but most have "
        f"{common[0]}x{common[1]}: images of several sizes need data.augment=area"
        for size, count in others
    }
