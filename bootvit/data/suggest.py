"""A config for people's own images: size, patch, width and length of training from their sizes and their number.

The rules are ours, from the digits and from CIFAR-10 (`configs/presets`): small networks and short runs to begin with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bootvit.config import DataConfig
from bootvit.data import DataSplits, open_splits
from bootvit.data.areas import least_area_side
from bootvit.data.decode import BrokenImage, header_size
from bootvit.data.table import ImageTable
from bootvit.errors import UserError
from bootvit.load import load_config, make_config

MEASURED = 256  # images whose size is looked at
SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224)
HELD_OUT = 0.1  # where nothing else could be evaluated
STEPS = 3000  # of a first run
EPOCHS = (20, 240)  # the fewest, and the paper's
HEADS = 9  # one for every place of a 3x3 kernel
# images from which on: (width, blocks); the last is the paper's ViT-S
SIZES = ((0, 72, 4), (5_000, 144, 6), (50_000, 288, 6))


class Seen(NamedTuple):
    """What is known of the images."""

    data: DataConfig
    splits: DataSplits
    sides: list[int]  # shorter sides in pixels, of some of them, sorted


def suggest(place: str, overrides: Sequence[str] = ()) -> str:
    """The text of a config for a folder of images, or for the data of a config; comments say why.

    Raises `UserError` for a folder that is no data set.
    """
    data = _data_of(place, overrides)
    try:
        splits = open_splits(data)
    except UserError:
        if data.held_out:
            raise
        splits = open_splits(data.model_copy(update={"held_out": HELD_OUT}))
    if splits.test is None and not data.held_out:
        data = data.model_copy(update={"held_out": HELD_OUT})
        splits = open_splits(data)
    return _text(Seen(data, splits, _short_sides(splits.train.table)), _name(place))


def _data_of(place: str, overrides: Sequence[str]) -> DataConfig:
    folder = Path(place)
    if not folder.is_dir():
        return load_config(place, overrides).data
    source = "parquet" if next(folder.rglob("*.parquet"), None) else "imagefolder"
    config = make_config({"data": {"source": source, "root": str(folder.resolve())}}, place)
    if overrides:
        raise UserError(f"{place}: KEY=VALUE goes with a config; for a folder change what is printed")
    return config.data


def _name(place: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(place).resolve().name).strip("-._")[:100] or "run"


def _short_sides(table: ImageTable) -> list[int]:
    """The shorter sides of up to `MEASURED` images, spread over the table."""
    if table.native:
        return [min(table.native)]
    rows = np.unique(np.linspace(0, len(table) - 1, MEASURED).astype(np.int64))
    sides = []
    for _, data in table.images.scan(rows):
        try:
            sides.append(min(header_size(data)))
        except BrokenImage:
            continue
    if not sides:
        raise UserError(f"{table.where(0)}: none of the first images can be read")
    return sorted(sides)


def _text(seen: Seen, name: str) -> str:
    """The config."""
    images, classes = len(seen.splits.train), len(seen.splits.classes)
    median = seen.sides[len(seen.sides) // 2]
    side = max((side for side in SIDES if side <= median), default=SIDES[0])
    patch = _patch(side)
    width, depth = next((width, depth) for least, width, depth in reversed(SIZES) if images >= least)
    batch = min(64 if images >= SIZES[1][0] else 32, max(2, images // 2))
    epochs = min(max(ceil(STEPS * batch / images), EPOCHS[0]), EPOCHS[1])
    steps = epochs * ceil(images / batch)
    range_ = f"{seen.sides[0]} to {seen.sides[-1]} pixels, half of them at least {median}"
    grid = side // patch
    held = seen.data.held_out
    rows: list[tuple[str, str]] = [
        ("extends: imagefolder/joint", "or imagefolder/shared, imagefolder/vit, imagefolder/agent"),
        (f"name: {json.dumps(name)}", ""),
        ("data:", ""),
        (f"  source: {seen.data.source}", ""),
        *([(f"  root: {json.dumps(seen.data.root, ensure_ascii=False)}", "")] if seen.data.root else []),
        (f"  image_size: {side}", f"shorter sides: {range_}"),
        (f"  batch_size: {batch}", f"{images} training images of {classes} classes"),
        *([(f"  held_out: {held:g}", _why_held_out(seen))] if held else []),
        *(
            [("  dct_scaling: true", "JPEGs of such sizes are decoded smaller, which is quicker")]
            if _reducible(median, side)
            else []
        ),
        ("model:", ""),
        ("  vit:", ""),
        (f"    patch: {patch}", f"{grid} x {grid} = {grid * grid} tokens an image"),
        (f"    width: {width}", _why_width(images)),
        (f"    depth: {depth}", ""),
        (f"    heads: {HEADS}", "the agent has one for every place of its 3x3 kernels"),
        (f"    mlp_width: {4 * width}", ""),
        ("schedule:", ""),
        (f"  epochs: {epochs}", f"{steps} steps; the paper trains for {EPOCHS[1]} epochs"),
        (f"  warmup_epochs: {max(1, epochs // 20)}", ""),
        (f"  eval_every: {max(1, epochs // 10)}", ""),
        ("tracking:", ""),
        (f"  experiment: {json.dumps(name)}", ""),
    ]
    return "".join(f"{line:26}  # {why}\n" if why else f"{line}\n" for line, why in rows)


def _reducible(median: int, side: int) -> bool:
    """Whether half of the images, were they square, would be decoded at half their size or less."""
    return least_area_side(median, median) >= 2 * side


def _patch(side: int) -> int:
    """Patches that cut the image into 8 x 8 tokens, of 16 pixels at most; tiny images into fewer."""
    return 2 if side <= 16 else min(16, side // 8)


def _why_width(images: int) -> str:
    if images < SIZES[1][0]:
        return f"under {SIZES[1][0]:,} images a small ViT is quick and enough to compare methods"
    if images < SIZES[2][0]:
        return f"{SIZES[1][0]:,} images and more"
    return f"{SIZES[2][0]:,} images and more: the paper's ViT-S"


def _why_held_out(seen: Seen) -> str:
    return "there is no test folder: these are evaluated" if seen.splits.test is None else "for selection in sweeps"
