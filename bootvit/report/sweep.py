"""The report of a sweep: best weights per group, method x fraction, what mattered, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bootvit.report.importance import Importances, importances
from bootvit.report.page import Block, Grid, Heading, Picture, Text, write_page
from bootvit.report.plots import percent, plot_fractions, require_matplotlib
from bootvit.report.sweep_data import Sweep, Winner, costs, read_sweep, winners_table, write_ledger
from bootvit.report.sweep_plots import plot_importance, plot_parallel
from bootvit.report.write import FINAL, HELD_OUT, PAPER, cell_text, grid, print_block, seconds_text
from bootvit.tracking.tags import param_text

TRUSTED_R2 = 0.2  # below this the forest knows too little for its order of keys to mean anything


def write_sweep_report(sweep_dir: Path, out: Path) -> list[Path]:
    """Write report.md, report.html, the plots and ledger.csv into `out`; the files written, the page first."""
    require_matplotlib()
    sweep = read_sweep(sweep_dir)
    out.mkdir(parents=True, exist_ok=True)
    found = importances(sweep)
    fractions = plot_fractions(winners_table(sweep), out / "accuracy-over-fraction.png")
    parallel = plot_parallel(sweep, out / "parallel-coordinates.png")
    bars = plot_importance(found, out / "importance.png")
    blocks: list[Block] = list(summary_blocks(sweep))
    if fractions:
        caption = "The winners over the share of the training images; bars: one sd over seeds; stars: the paper"
        blocks += [Heading("Accuracy over fraction"), Picture(fractions, caption)]
    if parallel:
        caption = "Every trial, from its values to its held-out accuracy; bright lines are the best of their group"
        blocks += [Heading("Trials"), Picture(parallel, caption)]
    blocks += [Heading("Importance"), *importance_blocks(found, bars), *trial_blocks(sweep)]
    ledger = write_ledger(sweep, out / "ledger.csv")
    pages = write_page(f"Sweep {sweep.name}", blocks, out)
    return [*pages, *(path for path in (fractions, parallel, bars) if path), ledger]


def print_sweep(sweep_dir: Path) -> None:
    """The summary on the terminal."""
    for block in summary_blocks(read_sweep(sweep_dir)):
        print_block(block)


def summary_blocks(sweep: Sweep) -> list[Block]:
    """State, winners, method x fraction, cost."""
    counts = {s: sum(trial.status == s for trial in sweep.trials) for s in sorted({t.status for t in sweep.trials})}
    state = f"{sweep.status}: {len(sweep.trials)} trials, " + ", ".join(f"{n} {s}" for s, n in counts.items())
    blocks: list[Block] = [Text(f"{state}. Selected by {sweep.metric}, on images held out of the training set.")]
    if not sweep.winners:
        return [*blocks, Text("No group has a winner yet."), *cost_blocks(sweep)]
    return [*blocks, *winner_blocks(sweep), *fraction_blocks(sweep), *curve_blocks(sweep), *cost_blocks(sweep)]


def winner_blocks(sweep: Sweep) -> list[Block]:
    """The best overrides of every group, without what the group's own name says."""
    header = ["group", "trial", "best overrides", "held out", "test"]
    rows = [[w.group, w.trial, overrides_text(w), *_winner_scores(sweep, w)] for w in sweep.winners]
    return [Heading("Best of every group"), Grid(header, rows)]


def overrides_text(winner: Winner) -> str:
    """`objective.vit.kd=0.5, …`; method and fraction have columns of their own."""
    shown = {k: v for k, v in winner.overrides.items() if k not in ("method", "data.fraction")}
    return ", ".join(f"{key}={number_text(value)}" for key, value in shown.items()) or "–"


def number_text(value: Any) -> str:
    """Drawn values have 16 digits, of which four say enough."""
    return f"{value:.4g}" if isinstance(value, float) else param_text(value)


def _winner_scores(sweep: Sweep, winner: Winner) -> list[str]:
    """Held-out and test accuracy of the network that the group was selected by, over the winner's seeds."""
    single = Sweep(sweep.name, sweep.status, sweep.metric, sweep.maximise, sweep.trials, (winner,))
    network = sweep.metric.split(".")[1] if sweep.metric.count(".") == 2 else "vit"
    texts = []
    for held_out in (True, False):
        cells = winners_table(single, held_out=held_out).cells
        own = [cell for (line, _), cell in cells.items() if line.network == network] or list(cells.values())
        judged = "held_out" if held_out else "test"
        text = next((cell_text(cell._replace(paper=None)) for cell in own if cell.split == judged), "–")
        texts.append(text.replace("†", ""))
    return texts


def fraction_blocks(sweep: Sweep) -> list[Block]:
    """Method x fraction with the winners' weights."""
    found = winners_table(sweep)
    notes = [FINAL, "Each cell has the winner's weights of its own group."]
    if any(cell.paper is not None for cell in found.cells.values()):
        notes.append(PAPER)
    if any(cell.split == "held_out" for cell in found.cells.values()):
        notes.append(f"{HELD_OUT}; it is the number that the winner was selected by, so it is too good.")
    return [Heading("Method x fraction"), Grid(*grid(found)), Text(" ".join(notes))]


def curve_blocks(sweep: Sweep) -> list[Block]:
    """Accuracy over fractions as the sweep extrapolates it, and how far off that is where the truth is known."""
    rows = [
        [
            str(curve["line"]),
            ", ".join(f"{percent(point['fraction'])}: {point['top1']:.1f}" for point in curve["points"]),
            predicted_text(curve.get("check")),
            predicted_text(curve.get("all_images")),
        ]
        for curve in sweep.curves
    ]
    if not rows:
        return []
    header = ["line", "held out", "largest fraction, predicted from the smaller ones", "all images, predicted"]
    note = "Power laws of the error over the fraction; in brackets their interval."
    return [Heading("Extrapolation over fractions"), Grid(header, rows), Text(note)]


def predicted_text(guess: Mapping[str, Any] | None) -> str:
    """`50%: 71.2 [68.0, 74.1], truth 70.5, off by +0.7`."""
    if not guess:
        return "–"
    known = guess.get("low") is not None
    interval = f" [{guess['low']:z.1f}, {guess['high']:z.1f}]" if known else " (two points: no interval)"
    truth = f", truth {guess['truth']:.1f}, off by {guess['error']:+z.1f}" if "truth" in guess else ""
    return f"{percent(guess['fraction'])}: {guess['top1']:z.1f}{interval}{truth}"


def cost_blocks(sweep: Sweep) -> list[Block]:
    """Seconds per method and fraction, trials that were stopped or failed included."""
    header = ["method", "data", "trials", "how they ended", "wall", "CPU s", "GPU s"]
    found = costs(sweep)
    rows = [
        [
            cost.method,
            f"{cost.column.data} {percent(cost.column.fraction)}",
            str(cost.trials),
            ", ".join(f"{count} {status}" for status, count in cost.statuses.items()),
            seconds_text(cost.seconds),
            f"{cost.cpu_seconds:.0f}",
            f"{cost.gpu_seconds:.0f}",
        ]
        for cost in found
    ]
    sums = [sum(getattr(cost, name) for cost in found) for name in ("seconds", "cpu_seconds", "gpu_seconds")]
    total = ["all", "", str(len(sweep.trials)), "", seconds_text(sums[0]), f"{sums[1]:.0f}", f"{sums[2]:.0f}"]
    note = "Stopped and failed trials are included. CPU seconds: a trial's time times the CPUs that it held."
    return [Heading("Cost per point"), Grid(header, [*rows, total]), Text(note)]


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
    """Every trial and how it ended."""
    header = ["trial", "group", "seed", "status", "epochs", "held out", "time", "reason"]
    rows = [
        [
            trial.id,
            trial.group,
            str(trial.seed),
            trial.status,
            str(trial.epochs),
            "–" if (score := sweep.score(trial)) is None else f"{score:.2f}",
            seconds_text(trial.seconds),
            trial.reason,
        ]
        for trial in sweep.trials
    ]
    return [Heading("All trials"), Grid(header, rows)]


# ----------------------------------------------------------------------------------------------------- JSON


def sweep_json(sweep_dir: Path) -> dict[str, Any]:
    """The report as one document; numbers that are not finite are null."""
    sweep = read_sweep(sweep_dir)
    found = importances(sweep)
    table = winners_table(sweep)
    return {
        "name": sweep.name,
        "status": sweep.status,
        "metric": sweep.metric,
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
            for (line, column), cell in table.cells.items()
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
