"""Keys as Arrow columns, never as lists: their hash order, and digests of (label, key) pairs.

Millions of Python strings would cost a process a gigabyte, and every process forked from it too, whose pages are
copied as soon as it counts references.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bootvit.data.table import Images, PixelImages, Rows

SLICE = 1 << 16  # keys that are Python objects, or copies, at a time
FINGERPRINTED = 16  # images whose bytes enter the fingerprint
LARGE = 1 << 16  # keys of Parquet files that are ordered, compared and hashed once per node: seconds for each million

Keys: TypeAlias = pa.Array | pa.ChunkedArray  # of text


def column(keys: Iterable[str]) -> pa.ChunkedArray:
    """A few keys as a column."""
    return pa.chunked_array([pa.array(keys, pa.string())])


def repeated(keys: Keys) -> str | None:
    """The key that is there most often, if one is there more than once."""
    counts = keys.value_counts()
    if len(counts) == len(keys):
        return None
    most = pc.index(counts.field("counts"), pc.max(counts.field("counts")))
    text: str = counts.field("values")[most.as_py()].as_py()
    return text


def by_hash(keys: Keys) -> Rows:
    """Row numbers in the order of the first 128 bits of each key's SHA-256."""
    words = np.frombuffer(b"".join(_digests(keys)), ">u8").reshape(-1, 4)[:, :2].astype(np.uint64)
    order: Rows = np.argsort(words[:, 0])
    first = words[order, 0]
    if (first[1:] == first[:-1]).any():  # two keys share 64 bits, or are equal
        order = np.lexsort((words[:, 1], words[:, 0]))
    return order


def _digests(keys: Keys) -> Iterator[bytes]:
    """32 bytes of each key, slice by slice."""
    for start in range(0, len(keys), SLICE):
        texts = keys.slice(start, SLICE).cast(pa.binary()).to_numpy(zero_copy_only=False)
        yield b"".join([state.digest() for state in map(hashlib.sha256, texts)])


def digest_of(keys: Keys, labels: Rows, rows: Rows) -> str:
    """32 hex digits of a set of (label, key) pairs, those of some rows, whatever their order.

    SHA-256 of the sorted lines `label key`: class by class, because a label's text sorts before what follows it.
    """
    rows = rows[np.lexsort((rows, labels[rows]))]  # files lie in their folders by name, so most is sorted already
    found, starts = np.unique(labels[rows], return_index=True)
    ends = [*starts[1:].tolist(), len(rows)]
    parts = {str(label): (start, end) for label, start, end in zip(found, starts.tolist(), ends, strict=True)}
    chosen = keys.take(pa.array(rows))
    state = hashlib.sha256()
    for label, (start, end) in sorted(parts.items()):
        texts = sorted(chosen.slice(start, end - start).to_numpy(zero_copy_only=False))
        state.update("".join(f"{label} {key}\n" for key in texts).encode())
    return state.hexdigest()[:32]


def fingerprint_of(images: Images, labels: Rows, keys: Keys, order: Rows) -> str:
    """32 hex digits from all labels and keys, and the bytes of 16 images, whatever the order of the rows.

    `order` is that of the keys' hashes.
    """
    state = hashlib.sha256()
    texts = pc.binary_join_element_wise(pa.array(labels, pa.int64()).cast(keys.type), keys, " ")
    lines = pc.binary_join_element_wise(texts, "", "\n")
    for start in range(0, len(order), SLICE):
        some = lines.take(pa.array(order[start : start + SLICE]))
        for chunk in some.chunks if isinstance(some, pa.ChunkedArray) else [some]:
            state.update(_text_of(chunk))
    sampled = sampled_rows(order)
    if isinstance(images, PixelImages):
        state.update(images.pixels[sampled].tobytes())
    else:
        state.update(b"".join(data for _, data in sorted(images.scan(sampled))))
    return state.hexdigest()[:32]


def sampled_rows(order: Rows) -> Rows:
    """The rows whose images' bytes enter the fingerprint, from the hash order of all."""
    return order[np.linspace(0, len(order) - 1, min(FINGERPRINTED, len(order))).astype(np.int64)]


def _text_of(texts: pa.StringArray) -> memoryview:
    """The bytes of an array's texts, one after the other."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return memoryview(data)[ends[0] : ends[-1]] if data is not None else memoryview(b"")
