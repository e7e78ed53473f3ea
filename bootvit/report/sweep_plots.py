"""Plots of a sweep: parallel coordinates of its trials, and the importance of its keys."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from bootvit.report.importance import Importances, is_number
from bootvit.report.plots import COLOURS, MANY_LINES, colour, fraction_axis, legend, panels, save
from bootvit.report.sweep_data import Sweep, Trial, setting_names
from bootvit.tracking.tags import param_text

UNSET = -0.12  # where a key that a trial does not have is drawn, below its axis
LOG_FROM = 20.0  # a range that spans this factor, and is denser at its lower end, is shown on a log scale


class Axis(NamedTuple):
    """One vertical axis: where each trial meets it (0 to 1), and its ticks."""

    name: str
    places: tuple[float, ...]
    ticks: tuple[tuple[float, str], ...]


def plot_parallel(sweep: Sweep, path: Path) -> Path | None:
    """A line per trial through its values to its held-out accuracy. None without a searched key or a score.

    The colour is the rank within the trial's own group; winners are drawn on top, stopped trials dotted below.
    """
    scored = [(trial, score) for trial in sweep.trials if (score := _finite(sweep.score(trial))) is not None]
    if not sweep.searched() or not scored:
        return None
    trials = [trial for trial, _ in scored]
    names = setting_names(sweep)
    axes = [make_axis(names[key], [trial.overrides.get(key) for trial in trials]) for key in sweep.searched()]
    axes.append(make_axis(f"{sweep.metric} (%)", [score for _, score in scored]))
    ranks = _ranks(sweep, scored)
    winners = {trial.id for winner in sweep.winners for trial in winner.trials}
    figure, panel = _parallel_canvas(len(axes))
    spread = [spread_out(axis.places) for axis in axes]
    for index, trial in enumerate(trials):
        places = [own[index] for own in spread]
        panel.plot(range(len(axes)), places, **_line_look(trial, ranks.get(trial.id), trial.id in winners))
    for position, axis in enumerate(axes):
        _draw_axis(panel, position, axis)
    _parallel_legend(figure, panel, {t.method for t in trials if t.id in winners})
    return save(figure, path)


def _parallel_canvas(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.5, 1.9 * count), 4.8), dpi=130, layout="constrained")
    panel = figure.subplots()
    panel.set_xlim(-0.25, count - 1 + 0.35)
    panel.set_ylim(UNSET - 0.06, 1.06)
    panel.axis("off")
    return figure, panel


def _line_look(trial: Trial, rank: float | None, winner: bool) -> dict[str, Any]:
    from matplotlib import colormaps

    if rank is None:  # stopped or failed: its accuracy is of an earlier epoch
        return {"color": "#9AA5B5", "linewidth": 0.8, "linestyle": ":", "zorder": 1}
    if winner:
        return {"color": colour(trial.method), "linewidth": 2.2, "zorder": 4, "solid_capstyle": "round"}
    return {"color": colormaps["cividis"](0.95 * rank), "linewidth": 1.2, "alpha": 0.9, "zorder": 2 + rank}


def _draw_axis(panel: Any, position: int, axis: Axis) -> None:
    panel.plot([position, position], [0, 1], color="#3C4654", linewidth=1.2, zorder=5)
    panel.text(position, 1.04, axis.name, ha="center", va="bottom", fontsize=9, weight="bold")
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.2}
    for place, label in axis.ticks:
        panel.text(position + 0.03, place, label, ha="left", va="center", fontsize=8.5, zorder=6, bbox=box)


def _parallel_legend(figure: Any, panel: Any, methods: set[str]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour(m), linewidth=2.2, label=f"winner, {m}") for m in COLOURS if m in methods]
    handles.append(Line2D([], [], color="#9AA5B5", linestyle=":", label="stopped or failed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    bar = figure.colorbar(ScalarMappable(cmap=colormaps["cividis"]), ax=panel, fraction=0.025, pad=0.02)
    bar.set_label("rank within its group", fontsize=9)
    bar.set_ticks([0, 1], labels=["worst", "best"], fontsize=8.5)
    bar.outline.set_visible(False)


def _ranks(sweep: Sweep, scored: Sequence[tuple[Trial, float]]) -> dict[str, float]:
    """0 for the worst and 1 for the best finished trial of each group."""
    groups: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for trial, score in scored:
        if trial.status == "finished":
            groups[trial.group].append((score if sweep.maximise else -score, trial.id))
    return {
        trial: place / max(1, len(members) - 1)
        for members in groups.values()
        for place, (_, trial) in enumerate(sorted(members))
    }


def spread_out(places: Sequence[float]) -> list[float]:
    """Trials that meet an axis in one place side by side, a little apart, so that each line is seen."""
    there: dict[float, list[int]] = defaultdict(list)
    for index, place in enumerate(places):
        there[place].append(index)
    out = list(places)
    gap = min((b - a for a, b in pairwise(sorted(there))), default=1.0)
    width = min(0.1, 0.5 * gap)
    for place, members in there.items():
        for order, index in enumerate(members):
            out[index] = place + width * ((order + 0.5) / len(members) - 0.5)
    return out


def make_axis(name: str, values: Sequence[Any]) -> Axis:
    """Numbers on a linear or log scale, anything else evenly spaced; what is not set lies below the axis."""
    given = [value for value in values if value is not None]
    if given and all(is_number(value) for value in given) and len(set(given)) > 1:
        places, ticks = _number_axis([float(value) for value in given])
    else:
        texts = sorted({param_text(value) for value in given})
        spots = {text: (i + 0.5) / len(texts) for i, text in enumerate(texts)}
        places, ticks = {param_text(v): spots[param_text(v)] for v in given}, [(p, t) for t, p in spots.items()]
    if len(given) < len(values):
        ticks.append((UNSET, "not set"))
    found = tuple(UNSET if value is None else _place(places, value) for value in values)
    return Axis(name, found, tuple(ticks))


def _place(places: Mapping[Any, float], value: Any) -> float:
    return places[float(value)] if is_number(value) and float(value) in places else places[param_text(value)]


def _number_axis(values: Sequence[float]) -> tuple[dict[Any, float], list[tuple[float, str]]]:
    low, high = min(values), max(values)
    dense_below = (statistics.median(values) - low) / (high - low) < 0.25
    logarithmic = low > 0 and high / low >= LOG_FROM and dense_below

    def scale(value: float) -> float:
        if logarithmic:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    distinct = sorted(set(values))
    middle = [low * (high / low) ** f if logarithmic else low + (high - low) * f for f in (0.25, 0.5, 0.75)]
    marked = distinct if len(distinct) <= 6 else [low, *middle, high]
    return {value: scale(value) for value in values}, [(scale(mark), f"{mark:.3g}") for mark in marked]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def plot_curves(sweep: Sweep, path: Path) -> Path | None:
    """Held-out accuracy over fractions by line, with the power law and its prediction for all images."""
    if not sweep.curves:
        return None
    names = setting_names(sweep)
    figure, (axis,) = panels(1, height=4.0)
    figure.set_figwidth(7.2)
    handles: dict[str, Any] = {}
    marked = {1.0}
    for place, curve in enumerate(sweep.curves[:MANY_LINES]):
        x = [point["fraction"] for point in curve["points"]]
        y = [point["top1"] for point in curve["points"]]
        own = line_colour(str(curve["line"]), place)
        name = line_text(str(curve["line"]), names)
        handles[name] = axis.plot(x, y, color=own, marker="o", markersize=4, linewidth=1.6)[0]
        marked |= set(x)
        guess = curve.get("all_images")
        if guess:
            _draw_guess(axis, (x[-1], y[-1]), guess, own, 1 + 0.03 * (place - len(sweep.curves) / 2))
    fraction_axis(axis, sorted(marked))
    axis.set_ylabel("held-out top-1 accuracy (%)", fontsize=9)
    legend(figure, handles)
    return save(figure, path)


def _draw_guess(axis: Any, last: tuple[float, float], guess: Mapping[str, Any], own: str, dodge: float) -> None:
    axis.plot([last[0], dodge], [last[1], guess["top1"]], color=own, linestyle=":", linewidth=1.4)
    low, high = (guess["top1"] if guess.get(end) is None else guess[end] for end in ("low", "high"))
    errors = [[max(guess["top1"] - low, 0)], [max(high - guess["top1"], 0)]]
    look = {"capsize": 4, "elinewidth": 1.2, "markersize": 5, "markerfacecolor": "white"}
    axis.errorbar([dodge], [guess["top1"]], yerr=errors, color=own, marker="D", **look)


def line_colour(line: str, place: int) -> str:
    """A method's own; without a method one after the other."""
    method = next((part.removeprefix("method=") for part in line.split() if part.startswith("method=")), None)
    return colour(method) if method in COLOURS else list(COLOURS.values())[place % len(COLOURS)]


def line_text(line: str, names: Mapping[str, str]) -> str:
    """A curve's name with short keys; a method stands for itself."""
    parts = [part.partition("=") for part in line.split()]
    return ", ".join(value if key == "method" else f"{names.get(key, key)}{sign}{value}" for key, sign, value in parts)


def plot_importance(found: Importances, path: Path) -> Path | None:
    """A bar per key with its spread over the folds. None where there is nothing to show."""
    if not found.keys:
        return None
    figure, (axis,) = panels(1, height=0.8 + 0.42 * len(found.keys))
    figure.set_figwidth(7.2)
    names = [each.key for each in reversed(found.keys)]
    means = [each.mean for each in reversed(found.keys)]
    sds = [each.sd for each in reversed(found.keys)]
    axis.barh(names, means, xerr=sds, color="#0072B2", height=0.55, error_kw={"capsize": 3, "elinewidth": 1.2})
    axis.axvline(0, color="#3C4654", linewidth=1)
    axis.grid(False, axis="y")
    axis.set_xlabel("points of accuracy by which the prediction gets worse when the key is shuffled", fontsize=9)
    axis.set_title(f"{found.trials} finished trials; R² on unseen ones {found.r2:.2f}", fontsize=10, loc="left")
    return save(figure, path)
