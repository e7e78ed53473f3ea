"""What runs have answered, image by image: accuracy by class, confusion, and the images that were most wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bootvit.files import PREDICTIONS
from bootvit.report.page import Block, Gallery, Grid, Heading, Picture, Text, Thumbnail
from bootvit.report.plots import SPLIT_NAMES, panels, save, title
from bootvit.report.rows import RunRow, Split
from bootvit.report.tables import Column, Line, Table

WRITTEN_UPTO = 12  # classes: with more, the cells of a confusion matrix have no room for a number
DRAWN_UPTO = 40  # classes: with more, the most frequent confusions are listed in the matrix's place
LISTED = 30  # classes of a table, those with the lowest accuracy, and confusions of a list
PICTURES = 8
LINES = 6  # galleries, and panels of a figure

Matrix = npt.NDArray[np.int64]


class Confusion(NamedTuple):
    """How often each class was taken for which, over the seeds of one line."""

    classes: tuple[str, ...]
    counts: Matrix  # (classes, classes): label, prediction
    seeds: int  # whose counts are summed

    @property
    def accuracy(self) -> npt.NDArray[np.float64]:
        """(classes,) in percent; nan for a class without images."""
        totals = self.counts.sum(1)
        return np.where(totals > 0, 100 * self.counts.diagonal() / np.maximum(totals, 1), np.nan)


class Wrong(NamedTuple):
    """One image that a network was wrong about."""

    key: str
    label: str
    guess: str
    probability: float  # of the guess
    of_label: float
    picture: bytes | None


def read_predictions(folder: Path | None, split: Split) -> tuple[pa.Table, tuple[str, ...]] | None:
    """A run's answers on a split, and the names of the classes; None where it has left none."""
    path = None if folder is None else folder / PREDICTIONS
    if path is None or not path.exists():
        return None
    with pq.ParquetFile(path) as file:
        found = file.read()
    rows = found.filter(pc.equal(found["split"].cast(pa.string()), split))
    return (rows, tuple(json.loads(found.schema.metadata[b"classes"]))) if rows.num_rows else None


def confusion(rows: Sequence[RunRow], network: str, split: Split) -> Confusion | None:
    """The counts of all seeds that have left their answers; None if none has."""
    found = None
    for row in rows:
        there = read_predictions(row.folder, split)
        if there is None or f"{network}_class" not in there[0].column_names:
            continue
        answers, classes = there
        size = len(classes)
        places = answers["label"].to_numpy().astype(np.int64) * size + answers[f"{network}_class"].to_numpy()
        counts = np.bincount(places, minlength=size * size).reshape(size, size)
        if found is None:
            found = Confusion(classes, counts, 1)
        elif found.classes == classes:
            found = Confusion(classes, found.counts + counts, found.seeds + 1)
    return found


def most_wrong(row: RunRow, network: str, split: Split, count: int = PICTURES) -> list[Wrong]:
    """The images whose label got the least probability, of those that were wrong; with their pictures, if kept."""
    there = read_predictions(row.folder, split)
    if there is None or f"{network}_class" not in there[0].column_names:
        return []
    answers, classes = there
    wrong = answers.filter(pc.not_equal(answers["label"], answers[f"{network}_class"]))
    wrong = wrong.sort_by(f"{network}_label_probability").slice(0, count)
    return [
        Wrong(
            one["key"],
            classes[one["label"]],
            classes[one[f"{network}_class"]],
            one[f"{network}_probability"],
            one[f"{network}_label_probability"],
            one["thumbnail"],
        )
        for one in wrong.to_pylist()
    ]


# --------------------------------------------------------------------------------------------------- blocks


def answer_blocks(parts: Sequence[Table], out: Path) -> list[Block]:
    """By class, confusion and most wrong images, at the largest fraction of every data set; pictures go to `out`."""
    blocks: list[Block] = []
    done: set[str] = set()
    for part in parts:  # test first: a data set without a test split is told of by its held-out images
        for column in reversed(part.columns):
            if column.data in done:
                continue
            lines = [line for line in part.lines if (line, column) in part.used]
            found = {line: c for line in lines if (c := confusion(part.used[line, column], line.network, part.split))}
            if found:
                done.add(column.data)
                blocks += _of_column(part, column, found, out)
    return blocks


def _of_column(part: Table, column: Column, found: dict[Line, Confusion], out: Path) -> list[Block]:
    where = f"{title(column)}, {SPLIT_NAMES[part.split]}"
    classes = next(iter(found.values())).classes
    same = {line: own for line, own in found.items() if own.classes == classes}
    blocks: list[Block] = [Heading(f"By class ({where})"), class_grid(same)]
    if len(classes) > LISTED:
        blocks.append(Text(f"The {LISTED} of {len(classes)} classes with the lowest accuracy."))
    shown = dict(list(same.items())[:LINES])
    if len(classes) <= DRAWN_UPTO:
        name = f"confusion-{_safe(column.data)}.png"
        caption = f"Confusion: rows are labels, columns predictions, in percent of the label's images ({where})"
        blocks.append(Picture(plot_confusion(shown, out / name), caption))
    else:
        blocks += [Heading(f"Most frequent confusions ({where})"), confused_grid(shown)]
    blocks.append(Heading(f"Most wrong ({where})"))
    note = "Of the images that were wrong those whose label got the least probability, with the first seed"
    blocks.append(Text(f"{note}: label → prediction with its probability, and the image's key."))
    for line in shown:
        pictures = _pictures(part, column, line, out)
        if pictures:
            blocks.append(Gallery(line.name, pictures))
    return blocks


def class_grid(found: dict[Line, Confusion]) -> Grid:
    """A row per class: how many images it has, and its accuracy by line."""
    first = next(iter(found.values()))
    scores = np.stack([own.accuracy for own in found.values()])  # (lines, classes)
    order = np.argsort(np.nan_to_num(scores, nan=101.0).mean(0), kind="stable")[:LISTED]
    shown = order if len(first.classes) > LISTED else range(len(first.classes))
    rows = [
        [
            first.classes[i],
            str(first.counts[i].sum() // first.seeds),
            *("–" if np.isnan(score) else f"{score:.1f}" for score in scores[:, i]),
        ]
        for i in shown
    ]
    return Grid(["class", "images", *(line.name for line in found)], rows)


def confused_grid(found: dict[Line, Confusion]) -> Grid:
    """The pairs that are confused most often, over all lines."""
    rows = []
    for line, own in found.items():
        off = own.counts - np.diag(own.counts.diagonal())
        for place in np.argsort(-off, axis=None, kind="stable")[:LISTED]:
            label, guess = np.unravel_index(place, off.shape)
            if off[label, guess]:
                share = 100 * off[label, guess] / own.counts[label].sum()
                pair = [own.classes[label], own.classes[guess]]
                rows.append((share, [line.name, *pair, str(off[label, guess]), f"{share:.1f}%"]))
    rows.sort(key=lambda row: -row[0])
    return Grid(["line", "label", "taken for", "times", "of the label's"], [row for _, row in rows[:LISTED]])


def plot_confusion(found: dict[Line, Confusion], path: Path) -> Path:
    """A panel per line."""
    size = len(next(iter(found.values())).classes)
    figure, axes = panels(len(found), height=3.9)
    for axis, (line, own) in zip(axes, found.items(), strict=True):
        share = 100 * own.counts / np.maximum(own.counts.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
        axis.grid(False)
        axis.set_title(line.name, fontsize=10, loc="left")
        step = 1 if size <= 20 else 2
        names = [name if len(name) <= 12 else f"{name[:11]}…" for name in own.classes]
        axis.set_xticks(range(0, size, step), names[::step], rotation=90, fontsize=7)
        axis.set_yticks(range(0, size, step), names[::step], fontsize=7)
        if size <= WRITTEN_UPTO:
            _write_numbers(axis, share)
    return save(figure, path)


def _write_numbers(axis: Any, share: npt.NDArray[np.float64]) -> None:
    for (row, col), value in np.ndenumerate(share):
        if value >= 0.5:
            colour = "white" if value > 55 else "#1c2430"
            axis.text(col, row, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color=colour)


def _pictures(part: Table, column: Column, line: Line, out: Path) -> list[Thumbnail]:
    row = part.used[line, column][0]
    shown = []
    for place, one in enumerate(most_wrong(row, line.network, part.split)):
        if one.picture is None:
            continue
        ending = "png" if one.picture.startswith(b"\x89PNG") else "jpg"
        path = out / "most-wrong" / f"{_safe(column.data)}-{_safe(line.name)}-{place + 1}.{ending}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(one.picture)
        shown.append(Thumbnail(path, f"{one.label} → {one.guess} {100 * one.probability:.0f}% ({one.key})"))
    return shown


def _safe(name: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "-." else "_" for sign in name)
