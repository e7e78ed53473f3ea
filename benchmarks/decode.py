"""What `data.dct_scaling` saves: random areas of JPEGs, decoded whole and decoded smaller, side by side.

    python -m benchmarks.decode --images FOLDER [--count 60] [--repeats 3] [--out benchmarks/results]

FOLDER's images as they are, and enlarged to a screenshot's and a camera's size; milliseconds an image, one thread.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from pathlib import Path

import torch
from PIL import Image

from benchmarks.measure import provenance, result_path
from bootvit.data.areas import AREA_NUMBERS
from bootvit.data.decode import Reading, decode
from bootvit.data.randomness import uniforms
from bootvit.data.resize import area_crop
from bootvit.files import write_json

# (columns, rows) that the images are brought to, or None; side of the crops; the share of --count that is enough
CASES = ((None, 224, 1.0), (None, 112, 1.0), (None, 64, 1.0), ((1280, 960), 224, 0.5), ((4000, 3000), 224, 0.2))


def as_jpeg(path: Path, size: tuple[int, int] | None) -> bytes:
    """The file's bytes, or an enlarged copy's."""
    if size is None:
        return path.read_bytes()
    data = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", quality=92)
    return data.getvalue()


def milliseconds(images: list[bytes], reading: Reading, side: int) -> float:
    """For one image: decoded, cut and resized."""
    began = time.perf_counter()
    for place, data in enumerate(images):
        numbers = uniforms(0, 0, place, place + 1, AREA_NUMBERS)[0].tolist()
        area_crop(decode(data, reading), (side, side), numbers, flip=True)
    return (time.perf_counter() - began) / len(images) * 1e3


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    paths = sorted(path for path in given.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[: given.count]
    rows = []
    for size, side, share in CASES:
        images = [as_jpeg(path, size) for path in paths[: max(1, round(len(paths) * share))]]
        readings = (Reading(), Reading(crops=(side, side)))
        found = [[milliseconds(images, reading, side) for reading in readings] for _ in range(given.repeats)]
        whole, smaller = (round(statistics.median(column), 2) for column in zip(*found, strict=True))
        ratio = round(statistics.median(one / other for one, other in found), 2)
        rows.append({"size": size or "as they are", "image_size": side, "whole": whole, "smaller": smaller, "÷": ratio})
        print(rows[-1], flush=True)
    if given.out:
        cpu = torch.device("cpu")
        document = provenance("benchmarks.decode", cpu, what="ms an image", images=len(paths), rows=rows)
        write_json(result_path(given.out, "decode", cpu), document)


if __name__ == "__main__":
    main()
