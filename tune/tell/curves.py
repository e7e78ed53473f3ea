"""Learning curves over fractions: a power law, extrapolated with an interval, and compared with the truth.

The error of a setting trained on n images falls about as b * n^-c, so log(error) is a line in log(fraction). The line
is fitted to every finished trial (all fractions but the largest, all seeds) by least squares; the interval is the 95%
prediction interval of that fit for the mean of as many seeds as the largest fraction has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from tune.decide.log import Trial, Trials
from tune.decide.select import scores
from tune.spec.schema import Sweep
from tune.spec.space import canonical, get_value

FRACTION = "data.fraction"
SMALLEST_ERROR = 0.01  # percent: a setting that made no error still has a logarithm


class Point(NamedTuple):
    """One trial."""

    fraction: float
    top1: float  # percent


class PowerLaw(NamedTuple):
    """log(100 - top1) = intercept + slope * log(fraction)."""

    intercept: float
    slope: float
    residual: float | None  # standard deviation in logarithms; None for two points
    size: int  # number of points
    centre: float  # mean of log(fraction)
    spread: float  # sum of squared distances from it

    def top1(self, fraction: float) -> float:
        """The accuracy that the law predicts, percent."""
        return 100 - math.exp(self.intercept + self.slope * math.log(fraction))

    def interval(self, fraction: float, seeds: int = 1) -> tuple[float, float] | None:
        """95% prediction interval of the mean of so many seeds, percent; None if two points fix the law."""
        if self.residual is None:
            return None
        from scipy.stats import t as student

        t = float(student.ppf(0.975, self.size - 2))
        distance = (math.log(fraction) - self.centre) ** 2 / self.spread
        half = t * self.residual * math.sqrt(1 / seeds + 1 / self.size + distance)
        middle = self.intercept + self.slope * math.log(fraction)
        return 100 - min(math.exp(min(middle + half, 700)), 100.0), 100 - math.exp(middle - half)


def fit(points: Sequence[Point]) -> PowerLaw | None:
    """Least squares in logarithms; None for fewer than two fractions."""
    x = [math.log(point.fraction) for point in points]
    y = [math.log(max(100 - point.top1, SMALLEST_ERROR)) for point in points]
    if len(set(x)) < 2:
        return None
    centre, middle = fmean(x), fmean(y)
    spread = sum((a - centre) ** 2 for a in x)
    slope = sum((a - centre) * (b - middle) for a, b in zip(x, y, strict=True)) / spread
    intercept = middle - slope * centre
    rest = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    residual = math.sqrt(rest / (len(x) - 2)) if len(x) > 2 else None
    return PowerLaw(intercept, slope, residual, len(x), centre, spread)


def curves(sweep: Sweep, trials: Trials) -> list[dict[str, Any]]:
    """A curve for each line of trials that differ only in fraction and seed, over at least two fractions.

    Where groups choose their own weights at each fraction, a line is made of the winners.
    """
    if FRACTION not in sweep.file.space or not sweep.file.select.metric.endswith("top1"):
        return []
    out = []
    for name, line in lines(sweep, trials).items():
        points = [Point(fraction_of(sweep, t), t.value) for t in line if t.value is not None]
        curve = describe(points)
        if curve is not None:
            out.append({"line": name, **curve})
    return out


def lines(sweep: Sweep, trials: Trials) -> dict[str, list[Trial]]:
    """The finished trials of each curve."""
    out: dict[str, list[Trial]] = {}
    if sweep.file.fidelity:
        for trial in trials.values():
            if trial.status == "finished":
                rest = {key: value for key, value in trial.overrides.items() if key != FRACTION}
                out.setdefault(f"{trial.spec.group} {canonical(rest)}", []).append(trial)
        return out
    groups: dict[tuple[str, float], list[Trial]] = {}
    for trial in trials.values():
        groups.setdefault((line_name(sweep, trial), fraction_of(sweep, trial)), []).append(trial)
    for (line, _), members in groups.items():
        found = scores(sweep, members)
        if found:
            out.setdefault(line, []).extend(found[0].trials)
    return out


def line_name(sweep: Sweep, trial: Trial) -> str:
    """A trial's group without its fraction."""
    keys = [key for key in sweep.group_by if key not in (FRACTION, "seed")]
    return " ".join(f"{key}={get_value(sweep, trial.overrides, key)}" for key in keys) or "all"


def fraction_of(sweep: Sweep, trial: Trial) -> float:
    """The fraction of a trial."""
    return float(get_value(sweep, trial.overrides, FRACTION))


def describe(points: Sequence[Point]) -> dict[str, Any] | None:
    """The curve, what the smaller fractions predict for the largest, and how far off that is; then for all images."""
    fractions = sorted({point.fraction for point in points})
    if len(fractions) < 2:
        return None
    out: dict[str, Any] = {"points": [mean_at(points, fraction) for fraction in fractions]}
    law = fit(points)
    if law is not None and fractions[-1] < 1:
        out["all_images"] = predicted(law, 1.0, 1)
    smaller = fit([point for point in points if point.fraction < fractions[-1]])
    if smaller is not None:
        truth = out["points"][-1]
        guess = predicted(smaller, fractions[-1], truth["seeds"])
        out["check"] = guess | {"truth": truth["top1"], "error": round(guess["top1"] - truth["top1"], 4)}
    return out


def mean_at(points: Sequence[Point], fraction: float) -> dict[str, Any]:
    """The mean over the seeds at one fraction."""
    values = [point.top1 for point in points if point.fraction == fraction]
    return {"fraction": fraction, "top1": round(fmean(values), 4), "seeds": len(values)}


def predicted(law: PowerLaw, fraction: float, seeds: int) -> dict[str, Any]:
    """A prediction with its interval (None where two points fix the law)."""
    interval = law.interval(fraction, seeds)
    low, high = (None, None) if interval is None else (round(interval[0], 4), round(interval[1], 4))
    return {"fraction": fraction, "top1": round(law.top1(fraction), 4), "low": low, "high": high}
