"""The report of a set of runs: on the terminal, as JSON, and as a page with plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bootvit.errors import UserError
from bootvit.report.page import Block, Grid, Heading, Picture, Text, write_page
from bootvit.report.plots import percent, plot_epochs, plot_fractions, require_matplotlib
from bootvit.report.rows import RunRow
from bootvit.report.tables import Cell, Column, Line, Table, table

HELD_OUT = "† on images held out of the training set: there is no test split, or it was not used"
FINAL = "Top-1 accuracy in percent after the final epoch (not the best one), mean ± sample sd over n seeds."
PAPER = "In brackets: the paper's number for that network, data set and fraction (240 epochs)."


def write_report(rows: Sequence[RunRow], out: Path) -> list[Path]:
    """Write report.md, report.html and the plots into `out`; the files written, the page first."""
    require_matplotlib()
    found = _filled(rows)
    out.mkdir(parents=True, exist_ok=True)
    epochs = plot_epochs(found, out / "accuracy-over-epochs.png")
    fractions = plot_fractions(found, out / "accuracy-over-fraction.png")
    blocks: list[Block] = [Heading("Method x fraction"), *table_blocks(found)]
    if fractions:
        caption = "Accuracy over the share of the training images; bars: one sd over seeds; stars: the paper"
        blocks += [Heading("Accuracy over fraction"), Picture(fractions, caption)]
    if epochs:
        caption = "Accuracy over epochs, mean over seeds; band: one sd"
        blocks += [Heading("Accuracy over epochs"), Picture(epochs, caption)]
    blocks += [*apart_blocks(found), *run_blocks(found)]
    return [*write_page("bootvit report", blocks, out), *(path for path in (fractions, epochs) if path)]


def _filled(rows: Sequence[RunRow]) -> Table:
    if not rows:
        raise UserError("no runs to report; train first, such as: bootvit train digits/joint")
    return table(rows)


def table_blocks(found: Table) -> list[Block]:
    """The table and what its signs mean."""
    if not found.cells:
        return [Text("No run has finished yet.")]
    notes = [FINAL]
    if any(cell.paper is not None for cell in found.cells.values()):
        notes.append(PAPER)
    if any(cell.split == "held_out" for cell in found.cells.values()):
        notes.append(f"{HELD_OUT}.")
    if any(line.variant for line in found.lines):
        notes.append("Runs that differ in more than the seed are never averaged: what differs is in the line.")
    return [Grid(*grid(found)), Text(" ".join(notes))]


def grid(found: Table) -> tuple[list[str], list[list[str]]]:
    """The table as text: header and rows."""
    header = ["method", *(f"{column.data} {percent(column.fraction)}" for column in found.columns)]
    rows = [
        [line_text(line), *(cell_text(found.cells.get((line, column))) for column in found.columns)]
        for line in found.lines
    ]
    return header, rows


def line_text(line: Line) -> str:
    """`joint.vit`, and what sets the variant apart."""
    return f"{line.title} ({line.variant})" if line.variant else line.title


def cell_text(cell: Cell | None) -> str:
    """`61.30 ± 0.82 (n=3) [95.14]`."""
    if cell is None:
        return "–"
    sd = "" if cell.sd is None else f" ± {cell.sd:.2f}"
    mark = "†" if cell.split == "held_out" else ""
    paper = "" if cell.paper is None else f" [{cell.paper:.2f}]"
    return f"{cell.mean:.2f}{mark}{sd} (n={len(cell.values)}){paper}"


def apart_blocks(found: Table) -> list[Block]:
    """The runs that are in no average."""
    if not found.apart:
        return []
    rows = [[a.row.name, a.row.method, a.row.data, percent(a.row.fraction), a.reason] for a in found.apart]
    return [Heading("Not in the table"), Grid(["run", "method", "data", "fraction", "why"], rows)]


def run_blocks(found: Table) -> list[Block]:
    """Every run behind the table, once."""
    runs = {row.place: row for rows in found.used.values() for row in rows}
    rows = [
        [
            row.name,
            row.method,
            row.data,
            percent(row.fraction),
            str(row.seed),
            str(row.epochs),
            *(f"{row.scores[net]:.2f}" if net in row.scores else "–" for net in ("vit", "agent")),
            seconds_text(row.seconds),
        ]
        for row in runs.values()
    ]
    header = ["run", "method", "data", "fraction", "seed", "epochs", "vit", "agent", "time"]
    return [Heading("Runs"), Grid(header, rows)] if rows else []


def seconds_text(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
        case Grid(header, rows):
            shown = RichTable(box=None, pad_edge=False, header_style="bold")
            for index, name in enumerate(header):
                shown.add_column(name, justify="right" if index else "left", no_wrap=True)
            for row in rows:
                shown.add_row(*(RichText(cell) for cell in row))
            widest = Measurement.get(console, console.options.update(max_width=10_000), shown).maximum
            console.width = max(console.width, widest)  # numbers are never cut short; a terminal may wrap the line
            console.print(shown)


# ----------------------------------------------------------------------------------------------------- JSON


def report_json(rows: Sequence[RunRow]) -> dict[str, Any]:
    """The report as one document; numbers that are not finite are null."""
    found = _filled(rows)
    return {
        "columns": [column._asdict() for column in found.columns],
        "rows": [
            {
                "method": line.method,
                "network": line.network,
                "title": line.title,
                "variant": line.variant,
                "cells": [
                    _cell_json(column, found.cells[line, column])
                    for column in found.columns
                    if (line, column) in found.cells
                ],
            }
            for line in found.lines
        ],
        "apart": [
            {"name": a.row.name, "place": a.row.place, "status": a.row.status, "reason": a.reason} for a in found.apart
        ],
    }


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
