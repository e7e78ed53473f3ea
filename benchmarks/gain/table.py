"""The table and the figure of the cells that have finished."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.gain.cells import FRACTIONS, INITS, METHODS, RECIPES, SEEN, Cell, cells
from bootvit.files import read_json
from bootvit.tracking import source_version

Found = dict[Cell, dict[str, Any]]  # a cell's result
MOST_SEEDS = 10
COLUMNS = ("vit", "joint", "shared", "agent")


def found_in(runs: Path) -> Found:
    """The results of the cells that have finished."""
    out: Found = {}
    for cell in cells(MOST_SEEDS):
        path = runs / cell.name / "result.json"
        if path.exists() and (result := read_json(path))["status"] == "finished":
            out[cell] = result
    return out


def tops(found: Found, method: str, **where: Any) -> list[float]:
    """Top-1 of a method's first network over the seeds of a cell: the ViT's, or the agent's where it is alone."""
    network = "agent" if method == "agent" else "vit"
    chosen = [cell for cell in found if cell.method == method and all(getattr(cell, k) == v for k, v in where.items())]
    return [found[cell]["final"][network]["top1"] for cell in chosen]


def text(values: list[float]) -> str:
    """Mean, standard deviation and number."""
    if not values:
        return "not measured"
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread} ({len(values)})"


def gain(found: Found, method: str, **where: Any) -> str:
    """The mean difference to the ViT alone, seed by seed, with its standard error."""
    pairs = []
    for cell, result in found.items():
        if cell.method == method and all(getattr(cell, k) == v for k, v in where.items()):
            alone = found.get(cell._replace(method="vit"))
            if alone is not None:
                pairs.append(result["final"]["vit"]["top1"] - alone["final"]["vit"]["top1"])
    if not pairs:
        return "not measured"
    error = f" ± {stdev(pairs) / len(pairs) ** 0.5:.1f}" if len(pairs) > 1 else ""
    return f"{fmean(pairs):+.1f}{error}"


def rows(found: Found) -> Iterable[str]:
    """The table in Markdown: top-1 in percent, mean ± standard deviation (seeds)."""
    heads = ["init", "images seen", "fraction", "recipe", "ViT alone", "joint", "shared", "agent alone"]
    heads += ["joint gains", "shared gains", "s a run"]
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join(['---'] * len(heads))} |"
    for init in INITS:
        for schedule, seen in SEEN.items():
            for fraction in sorted(FRACTIONS):
                for recipe in RECIPES:
                    where = {"init": init, "schedule": schedule, "fraction": fraction, "recipe": recipe}
                    own = [cell for cell in found if all(getattr(cell, k) == v for k, v in where.items())]
                    if not own:
                        continue
                    cost = fmean(found[cell]["seconds"] for cell in own)
                    scores = [text(tops(found, method, **where)) for method in COLUMNS]
                    gains = [gain(found, method, **where) for method in ("joint", "shared")]
                    first = [init, f"{seen:,}", f"{100 * fraction:g}%", recipe]
                    yield f"| {' | '.join([*first, *scores, *gains, f'{cost:.0f}'])} |"


def figure(found: Found, path: Path) -> None:
    """Accuracy over the fraction: a panel for each recipe and length, timm's initial values."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(len(SEEN), len(RECIPES), figsize=(9, 7), sharex=True, sharey=True, squeeze=False)
    for row, schedule in enumerate(SEEN):
        for column, recipe in enumerate(RECIPES):
            axis = axes[row][column]
            for method in METHODS:
                where = {"schedule": schedule, "recipe": recipe, "init": "timm", "method": method}
                points = [(f, tops(found, **where, fraction=f)) for f in sorted(FRACTIONS)]
                kept = [(100 * f, values) for f, values in points if values]
                means = [fmean(values) for _, values in kept]
                errors = [stdev(values) if len(values) > 1 else 0.0 for _, values in kept]
                if kept:
                    axis.errorbar([f for f, _ in kept], means, errors, marker="o", capsize=3, label=method)
            axis.set(title=f"{recipe}, {SEEN[schedule]:,} images seen", xscale="log")
            axis.set_xlabel("training images used, %")
            axis.set_ylabel("top-1, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        axes[0][0].legend(handles, labels)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def write(runs: Path, out: Path) -> str:
    """Write gain.md and gain.png; returns the table."""
    found = found_in(runs)
    table = "\n".join(rows(found)) if found else "no cell has finished"
    lines = [
        "# The map of the gain",
        f"CIFAR-10 at 32 px, ViT of 72 x 4; {len(found)} runs finished; commit {source_version()}.",
        "Top-1 on the test set after the last epoch, mean ± sd (seeds); gains over the same seed's ViT alone, ± s.e.",
        table,
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "gain.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    if found:
        figure(found, out / "gain.png")
    return table
