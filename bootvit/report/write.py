"""The report of a set of runs: on the terminal, as JSON, and as a page with plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bootvit.errors import UserError
from bootvit.report.answers import answer_blocks
from bootvit.report.explained import explained_blocks
from bootvit.report.page import Block, Gallery, Grid, Heading, Picture, Sized, Text, text_of, write_page
from bootvit.report.page import Cell as Shown
from bootvit.report.plots import SPLIT_NAMES, percent, plot_epochs, plot_fractions, plot_losses, require_matplotlib
from bootvit.report.rows import RunRow
from bootvit.report.tables import NETWORKS, Cell, Column, Line, Table, Tables, tables

FINAL = "Top-1 accuracy in percent after the final epoch (not the best one), mean ± sample sd over n seeds."
PAPER = "In brackets: the paper's number for that network, data set and fraction (240 epochs)."
NO_TEST = "On images held out of the training set, which the weights were not trained on."


def write_report(rows: Sequence[RunRow], out: Path) -> list[Path]:
    """Write report.md, report.html and the plots into `out`; the files written, the page first."""
    require_matplotlib()
    found = _filled(rows)
    out.mkdir(parents=True, exist_ok=True)
    blocks: list[Block] = [*table_blocks(found), *picture_blocks(found.parts, out)]
    blocks += [*explained_blocks(found.runs, out), *run_blocks(found.runs), *apart_blocks(found)]
    return [*write_page("bootvit report", blocks, out), *pictures_of(blocks)]


def pictures_of(blocks: Sequence[Block]) -> list[Path]:
    """The plots of a page."""
    return [block.path for block in blocks if isinstance(block, Picture)]


def _filled(rows: Sequence[RunRow]) -> Tables:
    if not rows:
        raise UserError("no runs to report; train first, such as: bootvit train digits/joint")
    return tables(rows)


def picture_blocks(parts: Sequence[Table], out: Path) -> list[Block]:
    """Accuracy over fractions and epochs, losses and rates, and what was answered, of all tables."""
    blocks: list[Block] = []
    if fractions := plot_fractions(parts, out / "accuracy-over-fraction.png"):
        caption = "Accuracy over the share of the training images; bars: one sd over seeds; stars: the paper"
        blocks += [Heading("Accuracy over fraction"), Picture(fractions, caption)]
    if epochs := plot_epochs(parts, out / "accuracy-over-epochs.png"):
        caption = "Accuracy over epochs, mean over seeds; band: one sd"
        blocks += [Heading("Accuracy over epochs"), Picture(epochs, caption)]
    if losses := plot_losses(parts, out / "losses.png"):
        caption = (
            "Losses and the learning rate over epochs, mean over seeds; band: one sd. The training loss has all "
            "weighted terms, so that of two methods is not one scale"
        )
        blocks += [Heading("Losses and learning rate"), Picture(losses, caption)]
    return [*blocks, *answer_blocks(parts, out)]


def table_blocks(found: Tables) -> list[Block]:
    """A table for every split, and what its signs mean."""
    if not found.parts:
        return [Text("No run has finished yet.")]
    blocks: list[Block] = []
    for part in found.parts:
        notes = [NO_TEST] if part.split == "held_out" else []
        notes.append(FINAL)
        if any(cell.paper is not None for cell in part.cells.values()):
            notes.append(PAPER)
        name = SPLIT_NAMES[part.split]
        blocks += [Heading(f"Method x fraction: {name}"), Grid(*grid(part)), Text(" ".join(notes))]
    if found.legend:
        blocks += [Heading("What sets the rows apart"), legend_grid(found.legend)]
        blocks.append(Text("Runs that differ in more than the seed are never averaged."))
    return blocks


def legend_grid(legend: Mapping[str, str]) -> Grid:
    """What short names stand for."""
    return Grid(["row", "what differs"], [[name, whole] for name, whole in legend.items()])


def grid(part: Table) -> tuple[list[str], list[list[Shown]]]:
    """The table as text: header and rows."""
    header = ["method", *(f"{column.data} {percent(column.fraction)}" for column in part.columns)]
    rows: list[list[Shown]] = [
        [line.name, *(cell_text(part.cells.get((line, column))) for column in part.columns)] for line in part.lines
    ]
    return header, rows


def cell_text(cell: Cell | None) -> str:
    """`61.30 ± 0.82 (n=3) [95.14]`."""
    if cell is None:
        return "–"
    sd = "" if cell.sd is None else f" ± {cell.sd:.2f}"
    paper = "" if cell.paper is None else f" [{cell.paper:.2f}]"
    return f"{cell.mean:.2f}{sd} (n={len(cell.values)}){paper}"


def apart_blocks(found: Tables) -> list[Block]:
    """The runs that are in no average."""
    if not found.apart:
        return []
    rows = [[a.row.name, a.row.method, a.row.data, percent(a.row.fraction), a.reason] for a in found.apart]
    return [Heading("Not in the tables"), Grid(["run", "method", "data", "fraction", "why"], rows)]


def run_blocks(runs: Sequence[RunRow]) -> list[Block]:
    """Every run behind the tables: its accuracies, a row a split; and on what, where, when and how long it trained."""
    if not runs:
        return []
    scores: list[list[Shown]] = [
        [row.name, SPLIT_NAMES[split], *(_score(row.scores(split), net) for net in NETWORKS)]
        for row in runs
        for split in SPLIT_NAMES
        if row.scores(split)
    ]
    facts: list[list[Shown]] = [
        [
            row.name,
            row.method,
            f"{row.data} {percent(row.fraction)}",
            str(row.seed),
            str(row.epochs),
            *(str(row.images.get(part, "–")) for part in ("train", "held_out", "test")),
            seconds_cell(row.seconds),
            seconds_cell(row.gpu_seconds),
            row.machine or "–",
            short_commit(row.commit),
            date_text(row.ended),
        ]
        for row in runs
    ]
    counts = ["training images", "held-out images", "test images"]
    header = ["run", "method", "data", "seed", "epochs", *counts, "time", "GPU time", "machine", "commit", "ended"]
    total: list[Shown] = ["all", *[""] * 7, seconds_cell(_sum(row.seconds for row in runs))]
    total += [seconds_cell(_sum(row.gpu_seconds for row in runs)), "", "", ""]
    return [
        *(Heading("Every run"), Grid(["run", "on", *NETWORKS], scores)),
        *(Heading("Images, machine and cost"), Grid(header, facts, total)),
    ]


def _score(scores: Mapping[str, float], net: str) -> str:
    return f"{scores[net]:.2f}" if net in scores else "–"


def _sum(values: Any) -> float:
    return math.fsum(value for value in values if value is not None and math.isfinite(value))


def short_commit(commit: str) -> str:
    """`04d6f10a`, `04d6f10a-dirty`; a version stays what it is."""
    name, dash, rest = commit.partition("-")
    return f"{name[:8]}{dash}{rest}" if len(name) == 40 else commit or "–"


def date_text(seconds: float | None) -> str:
    """A moment in universal time."""
    return "–" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def seconds_cell(seconds: float | None) -> Shown:
    """A duration for people, in its own order."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 120:
        return Sized(f"{seconds:.0f} s", seconds)
    return Sized(f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h", seconds)


def seconds_text(seconds: float | None) -> str:
    """The same as text."""
    return text_of(seconds_cell(seconds))


# ------------------------------------------------------------------------------------------------- terminal


def print_table(rows: Sequence[RunRow]) -> None:
    """Print method x fraction, and below it what is left out."""
    found = _filled(rows)
    for block in (*table_blocks(found), *apart_blocks(found)):
        print_block(block)


def print_block(block: Block) -> None:
    """One block of a page on the terminal."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    console = Console(soft_wrap=True)
    match block:
        case Heading(text):
            console.print(RichText(f"\n{text}", style="bold"))
        case Text(text):
            console.print(RichText(text, style="dim"))
        case Picture(path):
            console.print(RichText(str(path)))
        case Gallery(title):
            console.print(RichText(title))
        case Grid(header, rows, foot):
            shown = RichTable(box=None, pad_edge=False, header_style="bold")
            for index, name in enumerate(header):
                shown.add_column(name, justify="right" if index else "left", no_wrap=True)
            for row in (*rows, *([foot] if foot else [])):
                shown.add_row(*(RichText(text_of(cell)) for cell in row))
            widest = Measurement.get(console, console.options.update(max_width=10_000), shown).maximum
            console.width = max(console.width, widest)  # numbers are never cut short; a terminal may wrap the line
            console.print(shown)


# ----------------------------------------------------------------------------------------------------- JSON


def report_json(rows: Sequence[RunRow]) -> dict[str, Any]:
    """The report as one document; numbers that are not finite are null."""
    found = _filled(rows)
    return {
        "columns": [c._asdict() for c in sorted({column for part in found.parts for column in part.columns})],
        "rows": [_line_json(part, line) for part in found.parts for line in part.lines],
        "legend": dict(found.legend),
        "apart": [
            {"name": a.row.name, "place": a.row.place, "status": a.row.status, "reason": a.reason} for a in found.apart
        ],
    }


def _line_json(part: Table, line: Line) -> dict[str, Any]:
    cells = [_cell_json(column, cell) for (own, column), cell in sorted(part.cells.items()) if own == line]
    about = {"method": line.method, "network": line.network, "title": line.title, "variant": line.variant}
    return {"split": part.split, **about, "cells": cells}


def _cell_json(column: Column, cell: Cell) -> dict[str, Any]:
    return {
        **column._asdict(),
        "mean": cell.mean,
        "sd": cell.sd,
        "n": len(cell.values),
        "values": list(cell.values),
        "seeds": list(cell.seeds),
        "split": cell.split,
        "paper": cell.paper,
    }
