"""Prediction with a run's newest checkpoint: images are read and prepared by the very code of the evaluation."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from bootvit.config import Config, override
from bootvit.data import DataFacts, ImageTable, Subset
from bootvit.data.batches import EvalBatches
from bootvit.data.decode import Picture, Planes, Reading, encode_png
from bootvit.data.keys import by_hash
from bootvit.data.listing import Passed, images_below
from bootvit.data.sources import reading_of
from bootvit.data.table import ArrowImages, FileImages, Images, printable
from bootvit.driver import pick_device
from bootvit.errors import RunFailed, UserError
from bootvit.evaluate import read_checkpoint
from bootvit.learner import Learner, World

Row = dict[str, Any]
STDIN = "-"
HELD = "bootvit-image-of-stdin"  # the file that holds one


def predict(
    config: Config, run_dir: Path, images: Sequence[Path], top: int = 5, *, best: bool = False, ema: bool = False
) -> Iterator[Row]:
    """The most probable classes of image files and of all images below folders, a batch in memory at a time.

    Yields for every image in order one row a network, {"image", "network", "classes": {name: probability}}, or
    {"image", "error"} for one that cannot be read. Raises `UserError` for a path that is not there.
    """
    paths = [path for given in images for path in files_of(given)]
    names = [STDIN if path.name == HELD else printable(path) for path in paths]
    yield from answers(
        config, run_dir, lambda facts: of_files(paths, facts, reading_of(config.data)), names, top, best=best, ema=ema
    )


@contextmanager
def from_stdin(images: Sequence[Path], stdin: BinaryIO) -> Iterator[list[Path]]:
    """The same images, `-` replaced: by the image that stdin is, or by the files and folders that its lines name."""
    if Path(STDIN) not in images:
        yield list(images)
        return
    data = stdin.read()
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / HELD
        if is_image(data):
            held.write_bytes(data)
            read = [held]
        else:
            read = [Path(os.fsdecode(line)) for line in data.splitlines() if line.strip()]
        if not read:
            raise UserError("-: neither an image nor names of images are on standard input")
        at = list(images).index(Path(STDIN))
        yield [*images[:at], *read, *images[at + 1 :]]


def is_image(data: bytes) -> bool:
    """Whether Pillow knows the format."""
    try:
        with Image.open(io.BytesIO(data)):
            return True
    except Exception:  # its formats raise errors of any kind
        return False


def as_line(row: Row) -> str:
    """One row for people."""
    chances = "  ".join(f"{name} {100 * p:.1f}%" for name, p in row["classes"].items())
    return f"{row['image']}  {row['network']}: {chances}"


def csv_lines(row: Row) -> str:
    """One row as lines of image, network, rank, class, probability, error."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if "error" in row:
        writer.writerow([row["image"], "", "", "", "", row["error"]])
    else:
        for rank, (name, chance) in enumerate(row["classes"].items(), 1):
            writer.writerow([row["image"], row["network"], rank, name, chance, ""])
    return out.getvalue()


def predict_images(
    config: Config,
    run_dir: Path,
    images: Sequence[Picture],
    top: int = 5,
    *,
    best: bool = False,
    ema: bool = False,
) -> Iterator[Row]:
    """The same of images in memory, prepared as if they were read from files; their names are their numbers."""
    names = [str(number) for number in range(len(images))]
    yield from answers(
        config, run_dir, lambda facts: of_images(images, facts, reading_of(config.data)), names, top, best=best, ema=ema
    )


def answers(
    config: Config,
    run_dir: Path,
    subset_of: Callable[[DataFacts], Subset],
    names: Sequence[str],
    top: int,
    *,
    best: bool,
    ema: bool,
) -> Iterator[Row]:
    """The rows of the images of a subset, each under its name."""
    state = read_checkpoint(run_dir, best=best, ema=ema)
    facts = DataFacts.from_dict(state["data"])
    world = World(0, 1, pick_device(config.ray.use_gpu))
    learner = Learner(config, len(facts.classes), world)
    learner.networks.load_state_dict(state["learner"]["networks"])
    learner.networks.eval()
    subset = subset_of(facts)
    skipping = override(config, {"data": {"on_error": "skip"}})
    batches = EvalBatches(subset, skipping, facts.preparation, rank=0, world=1, device=world.device)
    done = 0
    for batch in batches:
        places = batch.labels.tolist()
        rows = dict(zip(places, guesses(learner, batch.images, facts, top), strict=True))
        for place in range(done, places[-1] + 1):
            yield from told(names[place], rows.get(place), batches.broken)
        done = places[-1] + 1
    for name in names[done:]:
        yield from told(name, None, batches.broken)


def files_of(path: Path) -> list[Path]:
    """A file itself, or the images below a folder."""
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        return [path]
    found = [path / name for name in images_below(path, ".", Passed())]
    if not found:
        raise UserError(f"{path}: no images in this folder")
    return found


def of_files(paths: Sequence[Path], facts: DataFacts, reading: Reading) -> Subset:
    """Files as a data set; an image's label is its place."""
    files = FileImages(Path(), pa.array([os.fsencode(path) for path in paths], pa.binary()), reading)
    return _as_subset(files, [printable(path) for path in paths], facts)


def of_images(images: Sequence[Picture], facts: DataFacts, reading: Reading) -> Subset:
    """Images in memory as a data set; an image's label is its place."""
    column = pa.chunked_array([pa.array([_encoded(image) for image in images], pa.binary())])
    encoded = ArrowImages(column, np.arange(len(images), dtype=np.int64), reading)
    return _as_subset(encoded, [str(number) for number in range(len(images))], facts)


def _as_subset(images: Images, keys: Sequence[str], facts: DataFacts) -> Subset:
    places = np.arange(len(keys), dtype=np.int64)
    rows = pa.table({"label": places, "key": pa.array(keys, pa.string())})
    mean, std = facts.preparation.mean, facts.preparation.std
    return Subset(
        ImageTable(rows, by_hash(rows["key"]), images, facts.classes, mean, std, "", native=None, auto="area"), places
    )


def _encoded(image: Picture) -> bytes:
    if isinstance(image, Planes):
        return encode_png(image.pixels)
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


@torch.no_grad()
def guesses(learner: Learner, pixels: torch.Tensor, facts: DataFacts, top: int) -> list[dict[str, dict[str, float]]]:
    """For each image {network: {class: probability}}, the most probable first."""
    out: list[dict[str, dict[str, float]]] = [{} for _ in pixels]
    for net, own in learner.networks.features(pixels).items():
        chances = own.logits.softmax(1).cpu()
        if not chances.isfinite().all():
            raise RunFailed(f"the {net}'s predictions are not finite numbers: its weights are broken")
        values, orders = chances.topk(min(top, chances.shape[1]), dim=1)
        for row, value, order in zip(out, values.tolist(), orders.tolist(), strict=True):
            row[net] = {facts.classes[label]: round(one, 6) for label, one in zip(order, value, strict=True)}
    return out


def told(name: str, found: dict[str, dict[str, float]] | None, broken: dict[str, str]) -> Iterator[Row]:
    """The rows of one image."""
    if found is None:
        yield {"image": name, "error": broken[name]}
        return
    for net, classes in found.items():
        yield {"image": name, "network": net, "classes": classes}
