"""The report of a sweep: what to do, best weights per group, method x fraction, what mattered, and what it cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bootvit.report.advice import Choice, advice, choices, what
from bootvit.report.explained import explained_blocks
from bootvit.report.importance import Importances, importances
from bootvit.report.page import MISSING, Block, Grid, Heading, Picture, Text, write_page
from bootvit.report.page import Cell as Shown
from bootvit.report.plots import SPLIT_NAMES, percent, require_matplotlib
from bootvit.report.rows import RunRow
from bootvit.report.sweep_data import (
    AXES,
    Sweep,
    Winner,
    costs,
    group_text,
    number_text,
    read_sweep,
    setting_names,
    settings_text,
    trial_name,
    winners_tables,
    write_ledger,
)
from bootvit.report.sweep_plots import line_text, plot_curves, plot_importance, plot_parallel
from bootvit.report.tables import Table
from bootvit.report.write import (
    FINAL,
    PAPER,
    grid,
    picture_blocks,
    pictures_of,
    print_block,
    run_blocks,
    seconds_cell,
)

TRUSTED_R2 = 0.2  # below this the forest knows too little for its order of keys to mean anything


def write_sweep_report(sweep_dir: Path, out: Path) -> list[Path]:
    """Write report.md, report.html, the plots and ledger.csv into `out`; the files written, the page first."""
    require_matplotlib()
    sweep = read_sweep(sweep_dir)
    out.mkdir(parents=True, exist_ok=True)
    found = importances(sweep)
    parts = winners_tables(sweep)
    blocks: list[Block] = list(summary_blocks(sweep))
    if curve := plot_curves(sweep, out / "fraction-curve.png"):
        caption = (
            "Held-out accuracy of the winners over the share of the training images; lines: the power law that is "
            "fitted to them; at 100% its prediction for all images with the 95% interval"
        )
        blocks += [Heading("What more data would give"), Picture(curve, caption), *curve_blocks(sweep)]
    blocks += picture_blocks(parts, out)
    if parallel := plot_parallel(sweep, out / "parallel-coordinates.png"):
        caption = (
            "Every trial, from its values to its held-out accuracy; the thick lines are the winners of their groups"
        )
        blocks += [Heading("Trials"), Picture(parallel, caption)]
    bars = plot_importance(found, out / "importance.png")
    blocks += [Heading("Importance"), *importance_blocks(found, bars), *trial_blocks(sweep)]
    winners = _runs(parts)
    blocks += [*explained_blocks(winners, out), *run_blocks(winners)]
    ledger = write_ledger(sweep, out / "ledger.csv")
    return [*write_page(f"Sweep {sweep.name}", blocks, out), *pictures_of(blocks), ledger]


def _runs(parts: Sequence[Table]) -> list[RunRow]:
    """The winners, each once, with what is known of their tests."""
    found: dict[str, RunRow] = {}
    for part in parts:  # test first
        for rows in part.used.values():
            for row in rows:
                found.setdefault(row.place, row)
    return list(found.values())


def print_sweep(sweep_dir: Path) -> None:
    """The summary on the terminal."""
    for block in summary_blocks(read_sweep(sweep_dir)):
        print_block(block)


def summary_blocks(sweep: Sweep) -> list[Block]:
    """What to do, state, winners, method x fraction, cost."""
    counts = {s: sum(trial.status == s for trial in sweep.trials) for s in sorted({t.status for t in sweep.trials})}
    state = f"{sweep.status}: {len(sweep.trials)} trials, " + ", ".join(f"{n} {s}" for s, n in counts.items())
    blocks: list[Block] = [Text(said, stands_out=True)] if (said := advice(sweep)) else []
    blocks.append(Text(f"{state}. Selected by {sweep.metric}, on images held out of the training set."))
    if not sweep.winners:
        return [*blocks, Text("No group has a winner yet."), *cost_blocks(sweep)]
    blocks += [*choice_blocks(sweep), *winner_blocks(sweep), *legend_blocks(sweep)]
    for part in winners_tables(sweep):
        blocks += fraction_blocks(part)
    return [*blocks, *cost_blocks(sweep)]


def choice_blocks(sweep: Sweep) -> list[Block]:
    """What to do at every fraction."""

    def lead_text(choice: Choice, name: str) -> str:
        found = getattr(choice, name)
        return MISSING if found is None else str(found.text())

    rows: list[list[Shown]] = [
        [
            percent(fraction),
            what(sweep, choice),
            mean_text(choice.scores),
            lead_text(choice, "over_methods"),
            lead_text(choice, "over_settings"),
        ]
        for fraction, choice in choices(sweep).items()
    ]
    header = ["fraction", "train", "held out", "ahead of the next group", "ahead of the next weights"]
    note = (
        "Held-out top-1 in percent, mean ± sd over n seeds. What is chosen as the best of many is a little too good "
        "on the images that it was chosen by."
    )
    return [Heading("What to do at each fraction"), Grid(header, rows), Text(note)] if rows else []


def winner_blocks(sweep: Sweep) -> list[Block]:
    """The best settings of every group, and the held-out accuracy that they were chosen by."""
    names = setting_names(sweep)
    rows: list[list[Shown]] = []
    for winner in sweep.winners:
        scores = [score for trial in winner.trials if (score := sweep.score(trial)) is not None]
        rows.append([*_axes(winner, names), settings_text(winner.overrides, names), mean_text(scores)])
    header = ["group", "fraction", "best settings", "held out"]
    return [Heading("Best of every group"), Grid(header, rows)]


def _axes(winner: Winner, names: Mapping[str, str]) -> list[Shown]:
    """A group by its method, or what else it is told apart by; and its fraction."""
    if not winner.trials:
        return [group_text(winner.group, names), MISSING]
    other = [part for part in winner.group.split(",") if part.partition("=")[0] not in AXES and "=" in part]
    first = winner.trials[0]
    name = ", ".join([first.method, *(group_text(part, names) for part in other)])
    return [name, f"{first.column.data} {percent(first.column.fraction)}"]


def mean_text(scores: Sequence[float]) -> str:
    """`61.30 ± 0.82 (n=3)`."""
    if not scores:
        return MISSING
    sd = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.2f}{sd} (n={len(scores)})"


def legend_blocks(sweep: Sweep) -> list[Block]:
    """What the short names of keys stand for."""
    shown = {name: key for key, name in setting_names(sweep).items() if key not in AXES and name != key}
    if not shown:
        return []
    return [Text("Keys: " + ", ".join(f"{name} is {key}" for name, key in sorted(shown.items())) + ".")]


def fraction_blocks(part: Table) -> list[Block]:
    """Method x fraction with the winners' weights, on one split."""
    notes = [FINAL, "Each cell has the winner's weights of its own group."]
    if any(cell.paper is not None for cell in part.cells.values()):
        notes.append(PAPER)
    if part.split == "held_out":
        notes.append("It is the number that the winner was selected by, so it is a little too good.")
    heading = Heading(f"Method x fraction: {SPLIT_NAMES[part.split]}")
    return [heading, Grid(*grid(part)), Text(" ".join(notes))]


def curve_blocks(sweep: Sweep) -> list[Block]:
    """Accuracy over fractions as the sweep extrapolates it, and how far off that is where the truth is known."""
    rows = [
        [
            line_text(str(curve["line"]), setting_names(sweep)),
            ", ".join(f"{percent(point['fraction'])}: {point['top1']:.1f}" for point in curve["points"]),
            predicted_text(curve.get("check")),
            predicted_text(curve.get("all_images")),
        ]
        for curve in sweep.curves
    ]
    if not rows:
        return []
    header = ["line", "held out", "largest fraction, predicted from the smaller ones", "all images, predicted"]
    return [Grid(header, rows), Text("Power laws of the error over the fraction; in brackets their 95% interval.")]


def predicted_text(guess: Mapping[str, Any] | None) -> str:
    """`50%: 71.2 [68.0, 74.1], truth 70.5, off by +0.7`."""
    if not guess:
        return "–"
    known = guess.get("low") is not None
    interval = f" [{guess['low']:z.1f}, {guess['high']:z.1f}]" if known else " (two points: no interval)"
    truth = f", truth {guess['truth']:.1f}, off by {guess['error']:+z.1f}" if "truth" in guess else ""
    return f"{percent(guess['fraction'])}: {guess['top1']:z.1f}{interval}{truth}"


def cost_blocks(sweep: Sweep) -> list[Block]:
    """Time per method and fraction, trials that were stopped or failed included."""
    header = ["method", "data", "trials", "how they ended", "wall", "CPU time", "GPU time"]
    found = costs(sweep)
    rows: list[list[Shown]] = [
        [
            cost.method,
            f"{cost.column.data} {percent(cost.column.fraction)}",
            str(cost.trials),
            ", ".join(f"{count} {status}" for status, count in cost.statuses.items()),
            *map(seconds_cell, (cost.seconds, cost.cpu_seconds, cost.gpu_seconds)),
        ]
        for cost in found
    ]
    sums = [sum(getattr(cost, name) for cost in found) for name in ("seconds", "cpu_seconds", "gpu_seconds")]
    total: list[Shown] = ["all", "", str(len(sweep.trials)), "", *map(seconds_cell, sums)]
    note = "Stopped and failed trials are included. CPU time: a trial's time, times the CPUs that it held."
    return [Heading("Cost per point"), Grid(header, rows, total), Text(note)]


def importance_blocks(found: Importances, bars: Path | None) -> list[Block]:
    """The plot with how far to trust it, or why there is none."""
    if bars is None:
        return [Text(f"Not computed: {found.refusal}.")]
    trust = (
        f"The forest predicts trials that it has not seen with R² = {found.r2:.2f}"
        + (": too little; do not read an order into these bars." if found.r2 < TRUSTED_R2 else ".")
        + " Accuracies are relative to the mean of their own group; stopped trials are left out."
    )
    return [Picture(bars, "Permutation importance of the searched keys (random forest, 5 folds)"), Text(trust)]


def trial_blocks(sweep: Sweep) -> list[Block]:
    """Every trial, with a column for each key that was searched, and how it ended."""
    names = setting_names(sweep)
    keys = [key for key in sweep.searched() if key not in AXES]
    columns = [names[key] for key in keys]
    header = ["trial", "method", "fraction", *columns, "seed", "status", "epochs", "held out", "time", "reason"]
    rows: list[list[Shown]] = [
        [
            trial_name(trial.id),
            trial.method,
            percent(trial.column.fraction),
            *(number_text(trial.overrides[key]) if key in trial.overrides else MISSING for key in keys),
            str(trial.seed),
            trial.status,
            str(trial.epochs),
            MISSING if (score := sweep.score(trial)) is None else f"{score:.2f}",
            seconds_cell(trial.seconds),
            trial.reason,
        ]
        for trial in sweep.trials
    ]
    if not any(trial.reason for trial in sweep.trials):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return [Heading("All trials"), Grid(header, rows)]


# ----------------------------------------------------------------------------------------------------- JSON


def sweep_json(sweep_dir: Path) -> dict[str, Any]:
    """The report as one document; numbers that are not finite are null."""
    sweep = read_sweep(sweep_dir)
    found = importances(sweep)
    return {
        "name": sweep.name,
        "status": sweep.status,
        "metric": sweep.metric,
        "advice": advice(sweep) or None,
        "best": [
            {"group": w.group, "trial": w.trial, "overrides": dict(w.overrides), "n": len(w.trials)}
            for w in sweep.winners
        ],
        "cells": [
            {
                "title": line.title,
                "variant": line.variant,
                **column._asdict(),
                "mean": _json(cell.mean),
                "sd": _json(cell.sd),
                "n": len(cell.values),
                "split": cell.split,
                "paper": cell.paper,
            }
            for part in winners_tables(sweep)
            for (line, column), cell in part.cells.items()
        ],
        "curves": [dict(curve) for curve in sweep.curves],
        "cost": [
            {"method": c.method, **c.column._asdict(), "trials": dict(c.statuses), **_seconds(vars(c))}
            for c in costs(sweep)
        ],
        "importance": {
            "refusal": found.refusal or None,
            "r2": _json(found.r2),
            "trials": found.trials,
            "keys": [each._asdict() for each in found.keys],
        },
    }


def _seconds(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: values[name] for name in ("seconds", "cpu_seconds", "gpu_seconds")}


def _json(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
