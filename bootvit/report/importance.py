"""Which searched keys mattered: permutation importance of a random forest, or an honest refusal."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from bootvit.errors import UserError
from bootvit.report.sweep_data import Sweep, Trial
from bootvit.tracking.tags import param_text

LEAST_TRIALS = 16  # and at least five a key: fewer say nothing about a key
FOLDS = 5


class Importance(NamedTuple):
    """By how many points of accuracy the prediction gets worse when a key is shuffled."""

    key: str
    mean: float
    sd: float  # over the folds


class Importances(NamedTuple):
    """The keys, most important first, and how far they can be trusted; or why there are none."""

    keys: tuple[Importance, ...]
    r2: float  # of predictions for trials that the forest has not seen; 1 is perfect, 0 no better than the mean
    trials: int
    refusal: str  # empty if there are keys


def importances(sweep: Sweep) -> Importances:
    """Explain how finished trials differ from the mean of their own group.

    Groups are compared with themselves only: a 50% trial is better than a 5% one whatever its weights.
    """
    trials, targets = _within_groups(sweep)
    keys = [key for key in sweep.searched() if _varies_within_a_group(key, trials)]
    needed = max(LEAST_TRIALS, 5 * len(keys))
    if not keys:
        return Importances((), math.nan, len(trials), "no searched key varies within a group of finished trials")
    if len(trials) < needed:
        refusal = (
            f"{len(trials)} finished trials (in groups of two and more) are too few for {len(keys)} keys: "
            f"{needed} are needed"
        )
        return Importances((), math.nan, len(trials), refusal)
    columns = [encode([trial.overrides.get(key) for trial in trials]) for key in keys]
    return _fit(keys, columns, targets)


def _within_groups(sweep: Sweep) -> tuple[list[Trial], list[float]]:
    groups: dict[str, list[tuple[Trial, float]]] = defaultdict(list)
    for trial in sweep.trials:
        score = sweep.score(trial)
        if trial.status == "finished" and score is not None and math.isfinite(score):
            groups[trial.group].append((trial, score))
    trials: list[Trial] = []
    targets: list[float] = []
    for members in groups.values():
        if len(members) > 1:
            mean = statistics.fmean(score for _, score in members)
            trials += [trial for trial, _ in members]
            targets += [score - mean for _, score in members]
    return trials, targets


def _varies_within_a_group(key: str, trials: Sequence[Trial]) -> bool:
    values: dict[str, set[str]] = defaultdict(set)
    for trial in trials:
        values[trial.group].add(param_text(trial.overrides.get(key)))
    return any(len(found) > 1 for found in values.values())


def encode(values: Sequence[Any]) -> list[float]:
    """Numbers as they are, anything else by its place among the sorted texts; what is not set is nan."""
    if all(value is None or is_number(value) for value in values):
        return [math.nan if value is None else float(value) for value in values]
    texts = sorted({param_text(value) for value in values if value is not None})
    return [math.nan if value is None else float(texts.index(param_text(value))) for value in values]


def is_number(value: Any) -> bool:
    """Whether a value has an order and a distance; true and false have not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fit(keys: Sequence[str], columns: Sequence[Sequence[float]], targets: Sequence[float]) -> Importances:
    """Five forests, each judged on the fifth of the trials that it has not seen."""
    try:
        from sklearn.ensemble import RandomForestRegressor
        from sklearn.inspection import permutation_importance
        from sklearn.metrics import r2_score
        from sklearn.model_selection import KFold
    except ImportError as err:
        raise UserError("scikit-learn is not installed: pip install 'bootvit[report]'") from err
    import numpy as np

    x, y = np.array(columns).T, np.array(targets)  # (trials, keys), (trials,)
    predicted, folds = np.zeros_like(y), []
    for seen, unseen in KFold(FOLDS, shuffle=True, random_state=0).split(x):
        forest = RandomForestRegressor(60, min_samples_leaf=2, random_state=0).fit(x[seen], y[seen])
        predicted[unseen] = forest.predict(x[unseen])
        result = permutation_importance(
            forest, x[unseen], y[unseen], scoring="neg_mean_absolute_error", n_repeats=5, random_state=0
        )
        folds.append(result.importances_mean)
    means, sds = np.mean(folds, axis=0), np.std(folds, axis=0, ddof=1)
    found = [Importance(key, float(m), float(s)) for key, m, s in zip(keys, means, sds, strict=True)]
    found.sort(key=lambda each: -each.mean)
    return Importances(tuple(found), float(r2_score(y, predicted)), len(targets), "")
