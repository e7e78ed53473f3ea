"""A data set of ImageNet's size: what it costs to choose 5% of its images, and what a loading process holds.

    python -m benchmarks.scale [--images 1280000] [--against CHECKOUT] [--out FOLDER]

1,000 class folders of small JPEG files (hard links to one file each), and the same as Parquet files, are made in the
temporary folder and removed at the end. Each measurement is a process of its own with a cache of its own: `first`,
and `again` with the cache that the first one has left. `--against` measures another checkout too, such as an older one.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = 1000
TESTED = 50  # images a class in val/, as ImageNet has them
FRACTION = 0.05
MIB = 1 << 20


# ------------------------------------------------------------------------------------------------- the data


def picture() -> bytes:
    """A JPEG too large to be kept decoded, so that loading processes read it."""
    out = io.BytesIO()
    Image.new("RGB", (128, 128), (90, 120, 150)).save(out, "JPEG")
    return out.getvalue()


def names(label: int, count: int) -> list[str]:
    """File names of one class."""
    return [f"n{label:08d}_{number}.JPEG" for number in range(count)]


def make_folder(root: Path, images: int) -> None:
    """train/ with `images` files, and val/."""
    for split, count in (("train", images // CLASSES), ("val", TESTED)):
        for label in range(CLASSES):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            first, *others = names(label, count)
            (folder / first).write_bytes(picture())
            for name in others:
                os.link(folder / first, folder / name)


def make_parquet(root: Path, images: int) -> None:
    """The same rows in files of 100,000, shuffled, in Hugging Face's layout; equal images are stored once a file."""
    root.mkdir()
    image = picture()
    for split, count in (("train", images // CLASSES), ("test", TESTED)):
        rows = np.random.default_rng(0).permutation(CLASSES * count)
        for number, start in enumerate(range(0, len(rows), 100_000)):
            part = rows[start : start + 100_000]
            paths = [f"n{row // count:08d}/n{row // count:08d}_{row % count}.JPEG" for row in part.tolist()]
            column = pa.StructArray.from_arrays([pa.array([image] * len(part)), pa.array(paths)], ["bytes", "path"])
            table = pa.table({"image": column, "label": part // count})
            pq.write_table(table, root / f"{split}-{number:05d}.parquet", row_group_size=1000)


# ---------------------------------------------------------------------------------------------- one process


def measure(source: str, root: Path) -> dict[str, Any]:
    """In a process of its own: open, choose, and load a few batches in two processes."""
    from bootvit.config import Config
    from bootvit.data import open_splits

    before = peak()
    data = {"source": source, "root": str(root), "fraction": FRACTION, "image_size": 128, "workers": 2}
    config = Config.model_validate({"data": data})
    began, worked = time.perf_counter(), time.process_time()
    splits = open_splits(config.data)
    seconds, processor = time.perf_counter() - began, time.process_time() - worked
    opened = peak()

    import torch

    from bootvit.data.batches import TrainBatches
    from bootvit.tracking import source_version

    batches = iter(TrainBatches(splits.train, config, rank=0, world=1, device=torch.device("cpu")).epoch(0))
    for _ in range(3):
        next(batches)
    loaders = [private_mib(child.pid or 0) for child in multiprocessing.active_children()]
    batches.close()  # type: ignore[attr-defined]
    return {
        "images": len(splits.train.table),
        "chosen": len(splits.train),
        "digest": splits.train.digest,
        "fingerprint": splits.fingerprint,
        "seconds": round(seconds, 2),
        "seconds_of_processor": round(processor, 2),
        "largest_mib": round(opened, 1),
        "of_which_imports_mib": round(before, 1),
        "private_mib_of_a_loader": round(max(loaders), 1),
        "commit": source_version(),
    }


def peak() -> float:
    """The most memory that this process has had, MiB; getrusage would count its parent's, of which it was forked."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def private_mib(pid: int) -> float:
    """What a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


# ------------------------------------------------------------------------------------------------- together


def run(source: str, root: Path, code: Path) -> dict[str, Any]:
    """The first and the second opening on a node, with the code of a checkout."""
    out = {}
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "BOOTVIT_CACHE": cache, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
        for time_ in ("first", "again"):
            command = [sys.executable, __file__, "--child", source, str(root)]
            done = subprocess.run(command, env=env, cwd=code, stdout=subprocess.PIPE, text=True, check=True)
            out[time_] = json.loads(done.stdout.splitlines()[-1])
            print(source, time_, out[time_], file=sys.stderr, flush=True)
    return out


def main() -> None:
    """Measure and write `benchmarks/results/scale_<device>_<date>.json`."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_280_000)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        make = {"imagefolder": make_folder, "parquet": make_parquet}
        for source, make_it in make.items():
            make_it(Path(place) / source, options.images)
        time.sleep(3)  # an index of folders that have just changed is not kept
        for when, code in (("before", options.against), ("now", here)):
            if code is not None:
                found[when] = {source: run(source, Path(place) / source, code.resolve()) for source in make}
    now = datetime.now(UTC).date().isoformat()
    document = {
        "what": f"{FRACTION:.0%} of {options.images:,} training images in {CLASSES} classes; two loading processes",
        "command": "python -m benchmarks.scale" + (" --against CHECKOUT" if options.against else ""),
        "date": now,
        "machine": f"{os.cpu_count()}-core CPU",
        "load_average_at_end": round(os.getloadavg()[0], 1),
        **found,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"scale_{os.cpu_count()}-core-CPU_{now}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
