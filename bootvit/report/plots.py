"""Plots of runs: accuracy over epochs and over the fraction of the data. One colour per method, everywhere."""

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
from bootvit.report.rows import RunRow
from bootvit.report.tables import Cell, Column, Line, Table

# Okabe and Ito's palette: told apart with any colour vision
COLOURS = {"vit": "#0072B2", "agent": "#D55E00", "joint": "#009E73", "shared": "#CC79A7"}
OTHER_COLOUR = "#555555"
DASHES: dict[str, Any] = {"vit": "-", "agent": (0, (3, 1.2))}
MARKERS = ("o", "s", "^", "v", "D", "P", "X")  # by variant
MANY_LINES = 12  # more than these cannot be told apart in a legend: then only methods are named
PAPERS = "the paper (same colours)"
GRID = "#E3E7EE"


def require_matplotlib() -> None:
    """Plots are an extra: `UserError` says which."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed: pip install 'bootvit[report]'")


def colour(method: str) -> str:
    """A method's colour."""
    return COLOURS.get(method, OTHER_COLOUR)


def panels(count: int, height: float = 3.3) -> tuple[Any, list[Any]]:
    """A figure with `count` axes in rows of up to three; no global state, no display."""
    from matplotlib.figure import Figure

    across = 2 if count == 4 else min(count, 3)
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
        self._variants = variants
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
        return line.title if self.crowded or not line.variant else f"{line.title} ({line.variant})"


# ------------------------------------------------------------------------------------- accuracy over epochs


def plot_epochs(table: Table, path: Path) -> Path | None:
    """A panel per data set and fraction; the mean over seeds, and a band of one sd. None without any curve."""
    columns = [c for c in table.columns if any(_curves(table, line, c) for line in table.lines)]
    if not columns:
        return None
    figure, axes = panels(len(columns))
    styles, handles = Styles(table.lines), {}
    for axis, column in zip(axes, columns, strict=True):
        for line in table.lines:
            found = _mean_curve(_curves(table, line, column))
            if not found:
                continue
            handles[styles.name(line)] = _draw_curve(axis, found, styles.of(line))
        axis.set_title(title(column), fontsize=10, loc="left")
        axis.set_xlabel("epochs", fontsize=9)
        axis.set_ylabel("top-1 accuracy (%)", fontsize=9)
        axis.set_xlim(left=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
    _share_heights(axes, [column.data for column in columns])
    legend(figure, {name: handles[name] for name in map(styles.name, table.lines) if name in handles})
    return save(figure, path)


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


def _curves(table: Table, line: Line, column: Column) -> list[Mapping[float, float]]:
    rows: tuple[RunRow, ...] = table.used.get((line, column), ())
    return [dict(row.curves[line.network].points) for row in rows if line.network in row.curves]


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


def plot_fractions(table: Table, path: Path) -> Path | None:
    """A panel per data set: mean and sd over seeds, and the paper's points. None for an empty table."""
    names = sorted({column.data for column in table.columns})
    if not names:
        return None
    figure, axes = panels(len(names), height=4.0)
    styles, handles, stars = Styles(table.lines), {}, {}
    for axis, data in zip(axes, names, strict=True):
        marked = {column.fraction for column in table.columns if column.data == data}
        cells = {key: cell for key, cell in table.cells.items() if key[1].data == data}
        lines = [line for line in table.lines if any(key[0] == line for key in cells)]
        for index, line in enumerate(lines):
            own = {column.fraction: cell for (other, column), cell in sorted(cells.items()) if other == line}
            dodge = 1 + 0.015 * (index - (len(lines) - 1) / 2)  # error bars at one fraction stay apart
            handles[styles.name(line)] = _draw_fractions(axis, own, dodge, styles.of(line))
            first = next(rows[0] for key, rows in table.used.items() if key[0] == line and key[1].data == data)
            shown = paper_points(line.method, line.network, first.config, data)
            if shown:
                marked |= set(shown)
                stars[PAPERS] = _draw_paper(axis, shown, dodge, line)
        _fraction_axis(axis, sorted(marked))
        axis.set_title(data, fontsize=10, loc="left")
    legend(figure, {name: handles[name] for name in map(styles.name, table.lines) if name in handles} | stars)
    return save(figure, path)


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


def _fraction_axis(axis: Any, fractions: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(list(fractions)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(list(fractions), [percent(fraction) for fraction in fractions])
    axis.set_xlim(min(fractions) / 1.4, max(fractions) * 1.4)
    axis.set_xlabel("share of the training images", fontsize=9)
    axis.set_ylabel("top-1 accuracy (%)", fontsize=9)
