"""Damaged images, and damaged or odd Parquet files: each must be read, or end in our own errors.

`python -m benchmarks.fuzz_data --out FILE` writes the counts by outcome; status 1 if one of them was anything else.
Every input is a function of (seed, number), so `--only images --first N --count 1` repeats one. The work is done in
processes with a limited memory, whose death is an outcome too. Configs and sweep files: benchmarks/fuzz_configs.py.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from bootvit.config import DataConfig
from bootvit.data import open_splits
from bootvit.data.decode import BrokenImage, decode, failing_as_broken, header_size
from bootvit.data.loaders import Cut
from bootvit.errors import UserError

MEMORY = 12 << 30  # bytes of address space of a process
CHUNK = {"images": 2500, "parquet": 50}
COUNTS = {"images": 100_000, "parquet": 1_000}

Rng = np.random.Generator

FORMS: tuple[tuple[str, str, dict[str, Any]], ...] = (  # Pillow's format, mode, options
    *(
        ("JPEG", mode, {"quality": 80, "progressive": progressive})
        for mode in ("L", "RGB", "CMYK")
        for progressive in (False, True)
    ),
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(("GIF", mode, {}) for mode in ("L", "P")),
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
    *(
        ("TIFF", mode, {"compression": how})
        for mode in ("1", "L", "RGB", "CMYK", "I;16", "F")
        for how in ("raw", "tiff_lzw", "tiff_adobe_deflate")
    ),
    ("TIFF", "RGB", {"compression": "jpeg"}),
    *(("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (False, True)),
    *(("PPM", mode, {}) for mode in ("1", "L", "RGB", "I;16")),
)


# ------------------------------------------------------------------------------------------------------- images


def encoded(rng: Rng) -> bytes:
    """A sound file of any format and mode that the image folders take."""
    form, mode, options = FORMS[rng.integers(len(FORMS))]
    rows, cols = rng.integers(1, 80, 2)
    grey = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(np.stack([grey, grey.T.reshape(rows, cols), grey[::-1]], 2)).convert(mode)
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def damaged(data: bytes, rng: Rng) -> bytes:
    """One to three faults: flipped, cut, zeroed, repeated, inserted, or another file's bytes."""
    for _ in range(rng.integers(1, 4)):
        if not data:
            return data
        raw = bytearray(data)
        reach = len(raw) if rng.random() < 0.6 else min(64, len(raw))
        at = int(rng.integers(reach))
        size = int(rng.integers(1, 1 + max(1, len(raw) // 4)))
        kind = rng.integers(7)
        if kind == 0:
            for place in rng.integers(0, reach, rng.integers(1, 9)):
                raw[place] = int(rng.integers(256))
        elif kind == 1:
            del raw[at:]
        elif kind == 2:
            raw[at : at + size] = bytes(len(raw[at : at + size]))
        elif kind == 3:
            raw[at:at] = raw[at : at + size]
        elif kind == 4:
            raw[at:at] = rng.bytes(size)
        elif kind == 5:
            del raw[at : at + size]
        else:
            other = encoded(rng)
            raw[at:] = other[at:]
        data = bytes(raw)
    return data


def one_image(rng: Rng) -> str:
    """Header, pixels, and the three ways to cut."""
    data = damaged(encoded(rng), rng)
    try:
        header_size(data)
        image = decode(data)
        numbers = rng.random(24).tolist()
        for kind in ("area", "centre_crop", "resize"):
            with failing_as_broken():
                pixels = Cut((32, 32), kind, flip=True)(image, numbers)
            if pixels.shape != (32, 32, 3) or pixels.dtype != np.uint8:
                return f"wrong pixels: {pixels.shape} {pixels.dtype}"
    except BrokenImage:
        return "BrokenImage"
    return "decoded"


# ------------------------------------------------------------------------------------------------------ Parquet

LABEL_TYPES: tuple[Callable[[Rng, int], pa.Array], ...] = (
    lambda rng, n: pa.array(rng.integers(0, 3, n)),
    lambda rng, n: pa.array(rng.integers(0, 3, n), pa.uint8()),
    lambda rng, n: pa.array(rng.integers(-2, 4, n), pa.int32()),
    lambda rng, n: pa.array(rng.integers(0, 2**63, n).astype(np.uint64) * 2 + 1),
    lambda rng, n: pa.array(rng.integers(10**10, 10**11, n)),
    lambda rng, n: pa.array(rng.random(n)),
    lambda rng, n: pa.array(rng.integers(0, 3, n).astype(np.float64)),
    lambda rng, n: pa.array(
        [["cat", "dog", "emu", "\udcff".encode("utf-8", "replace").decode()][i] for i in rng.integers(0, 4, n)]
    ),
    lambda rng, n: pa.array([["cat", "dog"][i] for i in rng.integers(0, 2, n)]).dictionary_encode(),
    lambda rng, n: pa.array([bool(i) for i in rng.integers(0, 2, n)]),
    lambda rng, n: pa.array([None if i == 0 else int(i) for i in rng.integers(0, 4, n)], pa.int64()),
    lambda rng, n: pa.nulls(n),
    lambda rng, n: pa.array([[1, 2]] * n),
    lambda rng, n: pa.array([date(2024, 1, 1)] * n),
    lambda rng, n: pa.array([b"\xff\xfe"] * n, pa.binary()),
)
NAMES = ("label", "labels", "fine_label", "Label", "class", "target", "y", "image_id", "id", "key")
IMAGE_NAMES = ("image", "img", "picture", "jpg", "bytes")


def odd_table(rng: Rng) -> pa.Table:
    """Images in some layout, a label of some type under some name, and further columns."""
    n = int(rng.choice([0, 1, 2, 7, 40]))
    cells = [damaged(encoded(rng), rng) if rng.random() < 0.1 else encoded(rng) for _ in range(n)]
    paths = [f"{i if rng.random() < 0.9 else 0}.png" for i in range(n)]
    layouts: tuple[Callable[[], pa.Array], ...] = (
        lambda: pa.array(
            [{"bytes": c, "path": p} for c, p in zip(cells, paths, strict=True)],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        lambda: pa.array(
            [{"bytes": c} if i % 5 else None for i, c in enumerate(cells)], pa.struct([("bytes", pa.binary())])
        ),
        lambda: pa.array(cells, pa.binary()),
        lambda: pa.array(cells, pa.large_binary()),
        lambda: pa.array([None if i == 1 else c for i, c in enumerate(cells)], pa.binary()),
        lambda: pa.array([c.hex() for c in cells]),
        lambda: pa.nulls(n),
        lambda: pa.array([[c] for c in cells], pa.list_(pa.binary())),
    )
    columns = {str(rng.choice(IMAGE_NAMES, p=[0.7, 0.1, 0.1, 0.05, 0.05])): layouts[int(rng.integers(len(layouts)))]()}
    columns[str(rng.choice(NAMES))] = LABEL_TYPES[int(rng.integers(len(LABEL_TYPES)))](rng, n)
    for _ in range(rng.integers(3)):
        columns.setdefault(str(rng.choice(NAMES)), LABEL_TYPES[int(rng.integers(len(LABEL_TYPES)))](rng, n))
    table = pa.table(columns)
    if rng.random() < 0.4:
        table = table.replace_schema_metadata({b"huggingface": odd_metadata(list(columns), rng)})
    return table


def odd_metadata(columns: list[str], rng: Rng) -> bytes:
    """Names of the classes as Hugging Face keeps them, or something else."""
    names = [str(name) for name in rng.permutation(["cat", "dog", "emu"])]
    features: Any = {name: {"_type": "ClassLabel", "names": names} for name in columns}
    choice = rng.integers(6)
    odd: Any = (
        {"info": {"features": features}},
        {"info": {"features": []}},
        {"info": None},
        [],
        {"info": {"features": {columns[-1]: {"names": [1, None]}}}},
    )
    return b"{broken" if choice == 5 else json.dumps(odd[choice]).encode()


def one_parquet(rng: Rng) -> str:
    """A data set of one to three files, one of which is often damaged: opened, and all its images read."""
    with tempfile.TemporaryDirectory() as folder:
        names = ["train-0.parquet", "test-0.parquet", "train-1.parquet"][: rng.integers(1, 4)]
        table = odd_table(rng)
        for name in names:
            other = odd_table(rng) if rng.random() < 0.2 else table
            pq.write_table(other, Path(folder, name), row_group_size=int(rng.choice([1, 5, 1000])))
        if rng.random() < 0.6:
            path = Path(folder, str(rng.choice(names)))
            path.write_bytes(damaged(path.read_bytes(), rng))
        try:
            splits = open_splits(DataConfig(source="parquet", root=folder))
            for part in (splits.train, splits.test):
                for _, data in part.table.images.scan(part.indices) if part else ():
                    try:
                        decode(data)
                    except BrokenImage:
                        continue
        except UserError as err:
            return one_line(err)
    return "opened"


def one_line(err: UserError) -> str:
    """Our error's outcome: it must be one line, and not a very long one."""
    text = str(err)
    return "UserError" if text and "\n" not in text and len(text) < 2000 else f"no short line: {text[:200]!r}"


# ---------------------------------------------------------------------------------------------------- the driver

KINDS: dict[str, Callable[[Rng], str]] = {
    "images": one_image,
    "parquet": one_parquet,
}
OURS = ("decoded", "BrokenImage", "opened", "UserError")


def chunk(kind: str, seed: int, first: int, count: int) -> list[tuple[int, str]]:
    """(number, outcome) of some inputs."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes its own warnings
    out = []
    for number in range(first, first + count):
        rng = np.random.default_rng([seed, list(KINDS).index(kind), number])
        try:
            out.append((number, KINDS[kind](rng)))
        except Exception as err:  # every kind of it is what this program is there to find
            out.append((number, f"{type(err).__name__}: {str(err).splitlines()[0][:200] if str(err) else ''}"))
    return out


def run(kind: str, seed: int, first: int, count: int) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Counts by outcome, and the inputs whose outcome is not one of ours."""
    step = CHUNK[kind]
    starts = range(first, first + count, step)
    counts: Counter[str] = Counter()
    wrong: list[tuple[int, str]] = []
    context = multiprocessing.get_context("forkserver")
    for begin in (starts[i : i + 2] for i in range(0, len(starts), 2)):
        with ProcessPoolExecutor(2, context) as pool:
            jobs = [(s, pool.submit(chunk, kind, seed, s, min(step, first + count - s))) for s in begin]
            for start, job in jobs:
                try:
                    found = job.result()
                except Exception as err:  # the process is dead
                    found = [(start, f"a process died: {type(err).__name__}")]
                counts.update(outcome for _, outcome in found)
                wrong += [(number, outcome) for number, outcome in found if outcome not in OURS]
    return counts, wrong


def main() -> int:
    """Run all kinds and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    document: dict[str, Any] = {"date": date.today().isoformat(), "commit": commit(), "seed": given.seed}
    failed = False
    for kind in [given.only] if given.only else list(KINDS):
        begin = time.monotonic()
        counts, wrong = run(kind, given.seed, given.first, given.count or COUNTS[kind])
        document[kind] = {"outcomes": dict(counts.most_common()), "seconds": round(time.monotonic() - begin, 1)}
        print(kind, json.dumps(document[kind]), flush=True)
        for number, outcome in wrong[:20]:
            print(f"  {kind} {number}: {outcome}", flush=True)
        failed = failed or bool(wrong)
    if given.out:
        given.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return int(failed)


def commit() -> str:
    """The checked-out commit."""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
