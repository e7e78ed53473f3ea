"""Plots of runs: accuracy and losses over epochs, accuracy over fractions. One colour per method, everywhere."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bootvit.errors import UserError
from bootvit.report.paper import paper_points
from bootvit.report.rows import Split
from bootvit.report.tables import Cell, Column, Line, Table, line_order

# Okabe and Ito's palette: told apart with any colour vision
COLOURS = {"vit": "#0072B2", "agent": "#D55E00", "joint": "#009E73", "shared": "#CC79A7"}
OTHER_COLOUR = "#555555"
DASHES: dict[str, Any] = {"vit": "-", "agent": (0, (3, 1.2))}
MARKERS = ("o", "s", "^", "v", "D", "P", "X")  # by variant
MANY_LINES = 12  # more than these cannot be told apart in a legend: then only methods are named
PAPERS = "the paper (same colours)"
GRID = "#E3E7EE"
SPLIT_NAMES: dict[Split, str] = {"test": "test set", "held_out": "held-out images"}


def require_matplotlib() -> None:
    """Plots are an extra: `UserError` says which."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed: pip install 'bootvit[report]'")


def colour(method: str) -> str:
    """A method's colour."""
    return COLOURS.get(method, OTHER_COLOUR)


def panels(count: int, height: float = 3.3, across: int | None = None) -> tuple[Any, list[Any]]:
    """A figure with `count` axes in rows of up to three; no global state, no display."""
    from matplotlib.figure import Figure

    across = min(count, across or (2 if count == 4 else 3))
    down = math.ceil(count / across)
    figure = Figure(figsize=(max(5.2, 4.3 * across), height * down + 0.8), dpi=130, layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    for axis in axes[:count]:
        clean(axis)
    return figure, axes[:count]


def clean(axis: Any) -> None:
    """The look of every plot: light grid, no box."""
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#9AA5B5")
    axis.tick_params(colors="#3C4654", labelsize=9)


def save(figure: Any, path: Path) -> Path:
    """Write the PNG."""
    figure.savefig(path, format="png", bbox_inches="tight")  # a legend may be wider than its figure
    return path


def legend(figure: Any, handles: Mapping[str, Any]) -> None:
    """One legend for all panels, below them."""
    if not handles:
        return
    names = [textwrap.fill(name, 46) for name in handles]
    columns = 2 if max(map(len, names)) > 26 else 4
    look = {"frameon": False, "fontsize": 9, "handlelength": 3.6}
    figure.legend(handles.values(), names, loc="outside lower center", ncols=columns, **look)


def percent(fraction: float) -> str:
    """0.05 -> 5%."""
    return f"{100 * fraction:g}%"


def title(column: Column) -> str:
    """`digits, 5% of the training images`."""
    return f"{column.data}, {percent(column.fraction)}"


class Styles:
    """How each line of a table is drawn: colour by method, dashes by network, marker by variant."""

    def __init__(self, lines: Sequence[Line]) -> None:
        variants: dict[str, list[str]] = defaultdict(list)
        for line in lines:
            if line.variant not in variants[line.method]:
                variants[line.method].append(line.variant)
        self.lines, self._variants = list(lines), variants
        self.crowded = len(lines) > MANY_LINES

    def of(self, line: Line) -> dict[str, Any]:
        """Keyword arguments of matplotlib's line."""
        variant = self._variants[line.method].index(line.variant)
        return {
            "color": colour(line.method),
            "linestyle": DASHES.get(line.network, "-"),
            "marker": MARKERS[variant % len(MARKERS)],
            "markerfacecolor": "white" if line.network == "agent" else colour(line.method),
            "linewidth": 0.8 if self.crowded else 1.8,
            "markersize": 3 if self.crowded else 5,
        }

    def name(self, line: Line) -> str:
        """The line's name in the legend."""
        return line.title if self.crowded else line.name


# ------------------------------------------------------------------------------------- accuracy over epochs


def plot_epochs(parts: Sequence[Table], path: Path) -> Path | None:
    """A panel per split, data set and fraction; the mean over seeds, and a band of one sd. None without any curve."""
    found = [(part, c) for part in parts for c in part.columns if any(_means(part, ln, c, "top1") for ln in part.lines)]
    if not found:
        return None
    figure, axes = panels(len(found))
    styles = Styles(lines_of(parts))
    handles: dict[str, Any] = {}
    for axis, (part, column) in zip(axes, found, strict=True):
        handles |= _draw_lines(axis, part, column, "top1", styles)
        axis.set_title(f"{title(column)}: {SPLIT_NAMES[part.split]}", fontsize=10, loc="left")
        axis.set_ylabel("top-1 accuracy (%)", fontsize=9)
    _share_heights(axes, [f"{column.data} {part.split}" for part, column in found])
    legend(figure, {name: handles[name] for name in map(styles.name, styles.lines) if name in handles})
    return save(figure, path)


def plot_losses(parts: Sequence[Table], path: Path) -> Path | None:
    """A row of panels per data set and fraction: the loss that is trained on, an evaluation's cross entropy, the rate.

    Means over seeds. None where no run has a journal.
    """
    shown: list[tuple[Table, Column, str, str]] = []
    for column in sorted({column for part in parts for column in part.columns}):
        there = [part for part in parts if column in part.columns]
        evaluated = max(
            there, key=lambda part: _points(part, column, "loss")
        )  # the split that was looked at more often
        shown += [
            (evaluated, column, "train", f"{title(column)}: training loss (all terms)"),
            (evaluated, column, "loss", f"{title(column)}: cross entropy, {SPLIT_NAMES[evaluated.split]}"),
            (evaluated, column, "lr", f"{title(column)}: learning rate"),
        ]
    shown = [one for one in shown if any(_means(one[0], line, one[1], one[2]) for line in one[0].lines)]
    if not shown:
        return None
    figure, axes = panels(len(shown), across=3, height=2.8)
    styles = Styles(lines_of(parts))
    handles: dict[str, Any] = {}
    for axis, (part, column, what, heading) in zip(axes, shown, strict=True):
        handles |= _draw_lines(axis, part, column, what, styles)
        axis.set_title(heading, fontsize=9, loc="left")
        axis.set_ylim(bottom=0)
    legend(figure, {name: handles[name] for name in map(styles.name, styles.lines) if name in handles})
    return save(figure, path)


def lines_of(parts: Sequence[Table]) -> list[Line]:
    """The lines of all tables, each once, in their order."""
    return sorted({line for part in parts for line in part.lines}, key=line_order)


def _draw_lines(axis: Any, part: Table, column: Column, what: str, styles: Styles) -> dict[str, Any]:
    """The curves of a panel; {name: what stands for it in the legend}."""
    handles = {}
    for line in part.lines:
        found = _means(part, line, column, what)
        if found:
            handles[styles.name(line)] = _draw_curve(axis, found, styles.of(line))
    axis.set_xlabel("epochs", fontsize=9)
    axis.set_xlim(left=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    return handles


def _points(part: Table, column: Column, what: str) -> int:
    return max(len(_means(part, line, column, what)) for line in part.lines)


def _means(part: Table, line: Line, column: Column, what: str) -> dict[float, tuple[float, float]]:
    """A curve's mean and sd over seeds; of an evaluation there must be more than one."""
    net = line.network
    name = {"train": f"train/{net}/loss", "lr": "train/lr"}.get(what, f"{part.split}/{net}/{what}")
    found = _mean_curve([dict(row.curves[name]) for row in part.used.get((line, column), ()) if row.curves.get(name)])
    return found if len(found) > 1 else {}


def _share_heights(axes: Sequence[Any], names: Sequence[str]) -> None:
    """Panels of one data set have one scale: fractions are there to be compared."""
    for name in set(names):
        own = [axis for axis, other in zip(axes, names, strict=True) if other == name]
        limits = [axis.get_ylim() for axis in own]
        for axis in own:
            axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _draw_curve(axis: Any, found: Mapping[float, tuple[float, float]], style: dict[str, Any]) -> Any:
    epochs = list(found)
    means, sds = zip(*found.values(), strict=True)
    low, high = zip(*((mean - sd, mean + sd) for mean, sd in found.values()), strict=True)
    if any(sds):
        axis.fill_between(epochs, low, high, color=style["color"], alpha=0.13, linewidth=0)
    marker = {"markevery": max(1, len(epochs) // 8), "markersize": 4}
    return axis.plot(epochs, means, **(style | marker))[0]


def _mean_curve(curves: Sequence[Mapping[float, float]]) -> dict[float, tuple[float, float]]:
    """{epoch: (mean, sd)} where every seed has a finite value."""
    if not curves:
        return {}
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    found: dict[float, tuple[float, float]] = {}
    for epoch in shared:
        values = [curve[epoch] for curve in curves]
        if all(map(math.isfinite, values)):
            found[epoch] = (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
    return found


# ----------------------------------------------------------------------------------- accuracy over fraction


def plot_fractions(parts: Sequence[Table], path: Path) -> Path | None:
    """A panel per split and data set: mean and sd over seeds, and the paper's points. None for one fraction."""
    found = [(part, data) for part in parts for data in sorted({column.data for column in part.columns})]
    if not any(_is_curve(part, data) for part, data in found):
        return None
    figure, axes = panels(len(found), height=4.0)
    styles, handles, stars = Styles(lines_of(parts)), {}, {}
    for axis, (part, data) in zip(axes, found, strict=True):
        marked = {column.fraction for column in part.columns if column.data == data}
        lines = [line for line in part.lines if any(key == line and c.data == data for key, c in part.cells)]
        for index, line in enumerate(lines):
            own = {c.fraction: cell for (ln, c), cell in sorted(part.cells.items()) if (ln, c.data) == (line, data)}
            dodge = 1 + 0.015 * (index - (len(lines) - 1) / 2)  # error bars at one fraction stay apart
            handles[styles.name(line)] = _draw_fractions(axis, own, dodge, styles.of(line))
            first = next(rows[0] for (ln, c), rows in part.used.items() if (ln, c.data) == (line, data))
            shown = paper_points(line.method, line.network, first.config, data) if part.split == "test" else {}
            if shown:
                marked |= set(shown)
                stars[PAPERS] = _draw_paper(axis, shown, dodge, line)
        fraction_axis(axis, sorted(marked))
        axis.set_title(f"{data}: {SPLIT_NAMES[part.split]}", fontsize=10, loc="left")
    legend(figure, {name: handles[name] for name in map(styles.name, styles.lines) if name in handles} | stars)
    return save(figure, path)


def _is_curve(part: Table, data: str) -> bool:
    """Whether there is more than one fraction to see, the paper's included."""
    fractions = {column.fraction for column in part.columns if column.data == data}
    papers = any(cell.paper is not None for (_, column), cell in part.cells.items() if column.data == data)
    return len(fractions) > 1 or papers


def _draw_fractions(axis: Any, own: Mapping[float, Cell], dodge: float, style: dict[str, Any]) -> Any:
    x = [fraction * dodge for fraction in own]
    y = [cell.mean for cell in own.values()]
    sd = [cell.sd or 0.0 for cell in own.values()]
    return axis.errorbar(x, y, yerr=sd, capsize=3, elinewidth=1.2, **style)


def _draw_paper(axis: Any, shown: Mapping[float, float], dodge: float, line: Line) -> Any:
    x = [fraction * dodge for fraction in shown]
    face = "white" if line.network == "agent" else colour(line.method)
    look = {"marker": "*", "markersize": 12, "markerfacecolor": face, "linestyle": "none", "zorder": 1.5}
    return axis.plot(x, list(shown.values()), color=colour(line.method), **look)[0]


def fraction_axis(axis: Any, fractions: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(list(fractions)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(list(fractions), [percent(fraction) for fraction in fractions])
    axis.set_xlim(min(fractions) / 1.4, max(fractions) * 1.4)
    axis.set_xlabel("share of the training images", fontsize=9)
    axis.set_ylabel("top-1 accuracy (%)", fontsize=9)
