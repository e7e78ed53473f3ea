"""`bootvit explain`: measures a run's networks on a few images, and writes figures and data."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bootvit import checkpoint
from bootvit.config import Config
from bootvit.data import DataFacts, Subset
from bootvit.data.decode import Picture, for_the_eye
from bootvit.data.facts import Preparation
from bootvit.data.sources import reading_of
from bootvit.driver import pick_device
from bootvit.evaluate import open_for, read_checkpoint
from bootvit.explain.figures import Figure, draw
from bootvit.explain.measure import (
    Array,
    Explained,
    batches_of,
    check_explainable,
    few,
    look_inside,
    pixels_of,
    vit_taps,
)
from bootvit.files import write_json
from bootvit.learner import Networks
from bootvit.models.shapes import mirrors, vit_grid, vit_shape
from bootvit.predict import files_of, of_files, of_images
from bootvit.report.plots import require_matplotlib
from bootvit.runs import RunFolder
from bootvit.tracking import read_journal

IMAGES = 32  # of the evaluation set, where none are given
DATA = "explain.json"


def explain(
    config: Config,
    folder: RunFolder,
    images: Sequence[Path] | Sequence[Picture] = (),
    *,
    count: int = IMAGES,
    best: bool = False,
) -> Explained:
    """Look inside the newest checkpoint's networks, or the best's, and over all checkpoints that the run has kept.

    On the given images, files and folders of them or pictures in memory; or on the first `count` of the evaluation
    set, always the same. Raises `UserError` for a run without a ViT, and for an image that cannot be read.
    """
    check_explainable(config)
    state = read_checkpoint(folder.path, best=best)
    facts = DataFacts.from_dict(state["data"])
    subset, labelled = chosen(config, facts, images, count)
    pixels, labels, keys = pixels_of(config, subset, facts.preparation)
    device = pick_device(config.ray.use_gpu)
    networks = Networks(config, len(facts.classes)).float().to(device)
    networks.load_state_dict(state["learner"]["networks"])
    inside = look_inside(networks, batches_of(pixels.to(device)))
    with torch.no_grad():
        logits = torch.cat([networks.features(part.to(device))["vit"].logits for part in batches_of(pixels)])
    taps, why = vit_taps(config)
    grid, prefix = vit_grid(config), vit_shape(config.model.vit).prefix_tokens
    found = Explained(
        name=config.name,
        keys=keys,
        labels=tuple(facts.classes[label] if labelled else None for label in labels.tolist()),
        guesses=tuple(facts.classes[guess] for guess in logits.argmax(1).tolist()),
        pictures=as_pictures(pixels, facts.preparation),
        patch=vit_shape(config.model.vit).patch,
        tokens=grid[0] * grid[1] + prefix,
        taps=taps,
        inside=inside,
        notes=tuple(left_out(config, why)),
    )
    return replace(found, over_epochs=over_epochs(folder, networks, pixels.to(device)))


def chosen(
    config: Config, facts: DataFacts, images: Sequence[Path] | Sequence[Picture], count: int
) -> tuple[Subset, bool]:
    """The images as a data set, and whether their labels are known."""
    if not images:
        return few(open_for(config, facts), count), True
    reading = reading_of(config.data)
    if not any(isinstance(image, Path) for image in images):
        return of_images(images, facts, reading), False  # type: ignore[arg-type]
    paths = [path for given in images for path in files_of(Path(given))]  # type: ignore[arg-type]
    return of_files(paths, facts, reading), False


def as_pictures(pixels: Tensor, preparation: Preparation) -> Any:
    """Normalised images as uint8, (images, rows, cols, 3), as they are shown."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preparation.mean, preparation.std))
    return for_the_eye(((pixels * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())


def left_out(config: Config, no_taps: str) -> list[str]:
    """What cannot be measured of this run, and why."""
    notes = []
    if "agent" not in config.networks:
        notes.append("CKA and the hint's distance are left out: method=vit has no agent to compare with.")
    elif not mirrors(config.model.agent):
        notes.append(f"CKA and the hint's distance are left out: {config.model.agent.name} does not mirror the ViT.")
    if no_taps:
        notes.append(f"Shares on taps are left out: {no_taps}")
    return notes


def over_epochs(folder: RunFolder, networks: Networks, pixels: Tensor) -> dict[float, dict[str, Array]]:
    """One number a block: of every checkpoint that is there, and what the journal has of the epochs between."""
    found = recorded(folder)
    for saved in checkpoint.described(folder.checkpoints):
        if saved.path.exists() and saved.batch == 0:
            networks.load_state_dict(checkpoint.load(saved)["learner"]["networks"])
            found[float(saved.epoch)] = look_inside(networks, batches_of(pixels)).by_block()
    return dict(sorted(found.items()))


def recorded(folder: RunFolder) -> dict[float, dict[str, Array]]:
    """What a run with `tracking.explain_images` has noted at its evaluations."""
    found: dict[float, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in read_journal(folder.journal)[0]:
        if record.name.startswith("explain/"):
            found[float(record.epoch + 1)][record.name.split("/")[1]].append(record.value)
    return {epoch: {what: np.array(values) for what, values in own.items()} for epoch, own in found.items()}


# -------------------------------------------------------------------------------------------------- writing


def write(found: Explained, out: Path) -> list[Path]:
    """Figures, `explain.json` with everything, `heads.csv` and `blocks.csv`; the files written."""
    require_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    figures = draw(found, out)
    heads = write_rows(out / "heads.csv", head_rows(found))
    blocks = write_rows(out / "blocks.csv", block_rows(found))
    write_json(out / DATA, document(found, figures))
    return [out / DATA, heads, blocks, *(figure.path for figure in figures)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A CSV file; what a run does not have has no column."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def head_rows(found: Explained) -> list[dict[str, Any]]:
    """A row a head."""
    rows = []
    for (block, head), distance in np.ndenumerate(found.inside.distance):
        row: dict[str, Any] = {"block": block + 1, "head": head + 1, "distance_px": round(float(distance), 4)}
        if found.taps is not None and found.inside.tap_share is not None:
            down, right = found.taps[head]
            share = round(float(found.inside.tap_share[block, head]), 6)
            row |= {"tap_down": down, "tap_right": right, "tap_share": share}
        rows.append(row)
    return rows


def block_rows(found: Explained) -> list[dict[str, Any]]:
    """A row a block and epoch."""
    moments = found.over_epochs or {float("nan"): found.inside.by_block()}
    return [
        {"epoch": epoch, "block": block + 1} | {what: round(float(own[block]), 6) for what, own in values.items()}
        for epoch, values in moments.items()
        for block in range(len(values["distance"]))
    ]


def document(found: Explained, figures: Sequence[Figure] = ()) -> dict[str, Any]:
    """Everything but the pictures, as JSON has it."""
    inside = found.inside
    return {
        "name": found.name,
        "images": [
            {"key": key, "label": label, "vit": guess, "rollout": rounded(seen)}
            for key, label, guess, seen in zip(found.keys, found.labels, found.guesses, inside.rollout, strict=True)
        ],
        "patch": list(found.patch),
        "chance": 1 / found.tokens,
        "taps": None if found.taps is None else [list(tap) for tap in found.taps],
        "distance_px": rounded(inside.distance),
        "tap_share": rounded(inside.tap_share),
        "cka": rounded(inside.cka),
        "hint": rounded(inside.hint),
        "over_epochs": [
            {"epoch": epoch, **{what: rounded(own) for what, own in values.items()}}
            for epoch, values in found.over_epochs.items()
        ],
        "notes": list(found.notes),
        "figures": [{"file": figure.path.name, "caption": figure.caption} for figure in figures],
    }


def rounded(values: Array | None) -> Any:
    """Nested lists of numbers with six digits; what is not finite is null."""
    if values is None:
        return None
    if values.ndim > 1:
        return [rounded(row) for row in values]
    return [round(float(value), 6) if np.isfinite(value) else None for value in values]


def in_words(found: Explained) -> str:
    """A line a block, for the terminal."""
    inside = found.inside
    names = {"distance": "distance (px)", "tap": "on own tap", "cka": "CKA", "hint": "hint"}
    values = inside.by_block()
    rows = [["block", *(names[what] for what in values)]]
    for block in range(len(inside.distance)):
        rows.append([str(block + 1), *(f"{own[block]:.3f}" for own in values.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    chance = f"; chance on a tap is {1 / found.tokens:.3f}" if "tap" in values else ""
    return "\n".join([*lines, f"on {len(found.keys)} images{chance}", *found.notes])
