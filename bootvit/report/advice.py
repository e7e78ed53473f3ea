"""What a sweep says to do: which weights at which fraction, how sure that is, what more data would give, the cost."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bootvit.report.plots import percent
from bootvit.report.sweep_data import Sweep, Trial, Winner, costs, group_text, setting_names, settings_text


class Lead(NamedTuple):
    """By how many points of held-out accuracy one setting is ahead of another, and the 95% interval of that."""

    points: float
    low: float | None  # None where one of them has a single seed
    high: float | None
    behind: str  # the other one

    @property
    def sure(self) -> bool:
        """Whether the interval lies above zero."""
        return self.low is not None and self.low > 0

    def text(self) -> str:
        """`2.1 over joint (95% interval 0.4 to 3.8)`."""
        if self.low is None or self.high is None:
            return f"{self.points:z.1f} over {self.behind} (one seed: no interval)"
        return f"{self.points:z.1f} over {self.behind} (95% interval {self.low:z.1f} to {self.high:z.1f})"


class Choice(NamedTuple):
    """The best method and weights at one fraction."""

    winner: Winner
    scores: tuple[float, ...]  # held-out accuracy by seed
    over_methods: Lead | None  # the best of the other groups at that fraction
    over_settings: Lead | None  # the next weights of its own group that were tried with as many seeds


def choices(sweep: Sweep) -> dict[float, Choice]:
    """{fraction: what was best there by held-out accuracy}, the smallest first; of the first data set."""
    at: dict[float, list[tuple[Winner, tuple[float, ...]]]] = defaultdict(list)
    data = next((winner.trials[0].column.data for winner in sweep.winners if winner.trials), None)
    for winner in sweep.winners:
        scores = _scores(sweep, winner.trials)
        if scores and winner.trials[0].column.data == data:
            at[winner.trials[0].column.fraction].append((winner, scores))
    return {fraction: _choice(sweep, at[fraction]) for fraction in sorted(at)}


def _choice(sweep: Sweep, there: Sequence[tuple[Winner, tuple[float, ...]]]) -> Choice:
    names = setting_names(sweep)
    first, *others = sorted(there, key=lambda one: -statistics.fmean(one[1]))
    winner, scores = first
    second = others[0] if others else None
    behind = None if second is None else lead(scores, second[1], _apart_from(winner, second[0], names))
    settings: dict[str, list[Trial]] = defaultdict(list)
    for trial in sweep.trials:
        if trial.group == winner.group and trial.status == "finished" and trial.overrides != winner.overrides:
            settings[settings_text(trial.overrides, names)].append(trial)
    rest = [(text, own) for text, trials in settings.items() if len(own := _scores(sweep, trials)) >= len(scores)]
    rest.sort(key=lambda one: -statistics.fmean(one[1]))
    return Choice(winner, scores, behind, lead(scores, rest[0][1], rest[0][0]) if rest else None)


def _apart_from(winner: Winner, other: Winner, names: Mapping[str, str]) -> str:
    """What the other group is told apart by: its method, if that differs."""
    method = other.trials[0].method
    return method if method != winner.trials[0].method else group_text(other.group, names)


def _scores(sweep: Sweep, trials: Sequence[Trial]) -> tuple[float, ...]:
    found = [sweep.score(trial) for trial in trials]
    return tuple(score for score in found if score is not None and math.isfinite(score))


def lead(ours: Sequence[float], theirs: Sequence[float], behind: str) -> Lead:
    """The difference of two means with Welch's interval."""
    points = statistics.fmean(ours) - statistics.fmean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return Lead(points, None, None, behind)
    from scipy.stats import t as student

    parts = [statistics.variance(own) / len(own) for own in (ours, theirs)]
    error = sum(parts)
    if error == 0:
        return Lead(points, points, points, behind)
    freedom = error**2 / sum(p**2 / (len(own) - 1) for p, own in zip(parts, (ours, theirs), strict=True))
    half = float(student.ppf(0.975, freedom)) * math.sqrt(error)
    return Lead(points, points - half, points + half, behind)


def advice(sweep: Sweep) -> str:
    """One sentence; empty as long as there is no winner."""
    found = choices(sweep)
    if not found:
        return ""
    fraction, best = list(found.items())[-1]
    parts = [f"On {percent(fraction)} of the training images train {what(sweep, best)}: {how_sure(best)}"]
    parts += [more for more in (more_data(sweep, best),) if more]
    parts.append(f"the sweep cost {cost_text(sweep)}")
    return "; ".join(parts) + "."


def what(sweep: Sweep, choice: Choice) -> str:
    """`joint with hint=1, kd=0.3`."""
    text = settings_text(choice.winner.overrides, setting_names(sweep))
    method = choice.winner.trials[0].method
    return method if text == "–" else f"{method} with {text}"


def how_sure(choice: Choice) -> str:
    """How far it is ahead in held-out accuracy, and whether that can be chance."""
    leads = [one for one in (choice.over_methods, choice.over_settings) if one is not None]
    if not leads:
        return "it is the only one that was tried there"
    texts = [one.text() for one in leads]
    if all(one.sure for one in leads):
        end = "more than seeds explain"
    elif any(one.low is None for one in leads):
        end = "how sure that is takes more seeds to say"
    else:
        doubtful = " and ".join(one.behind for one in leads if not one.sure)
        end = f"the lead over {doubtful} may be chance"
    return f"its lead in held-out accuracy is {' and '.join(texts)}, {end}"


def more_data(sweep: Sweep, choice: Choice) -> str:
    """What the fraction curve of the best method predicts for all images."""
    method = choice.winner.trials[0].method
    curve = curve_of(sweep.curves, method)
    guess = (curve or {}).get("all_images")
    if guess is None:
        return ""
    interval = "" if guess.get("low") is None else f" (95% interval {guess['low']:z.1f} to {guess['high']:z.1f})"
    now = statistics.fmean(choice.scores)
    return f"with all images its fraction curve predicts {guess['top1']:z.1f}%{interval} held out instead of {now:.1f}%"


def curve_of(curves: Sequence[Mapping[str, Any]], method: str) -> Mapping[str, Any] | None:
    """A method's curve over fractions; the only one there is where no method was searched."""
    named = [curve for curve in curves if f"method={method}" in str(curve["line"]).split()]
    return named[0] if named else curves[0] if len(curves) == 1 else None


def cost_text(sweep: Sweep) -> str:
    """`31 trials, 0.8 CPU hours and 0 GPU hours`."""
    found = costs(sweep)
    cpu, gpu = sum(one.cpu_seconds for one in found) / 3600, sum(one.gpu_seconds for one in found) / 3600
    text = f"{len(sweep.trials)} trials, {cpu:.2g} CPU hours"
    return f"{text} and {gpu:.2g} GPU hours" if gpu else text
