"""Learning curves: what the fit is, how sure it is, and what the smaller fractions say of the largest."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from tiny_sweeps import make_conductor, make_sweep, run

from tune.tell.curves import Point, curves, describe, fit


def law(fraction: float, b: float = 10.0, c: float = 0.4) -> float:
    """Accuracy of a power law of the error, percent."""
    return 100 - b * fraction**-c


def test_an_exact_power_law_is_found_and_extrapolated() -> None:
    found = fit([Point(f, law(f)) for f in (0.05, 0.1, 0.2)])
    assert found is not None
    assert found.slope == pytest.approx(-0.4)
    assert math.exp(found.intercept) == pytest.approx(10.0)
    assert found.top1(1.0) == pytest.approx(90.0)
    low, high = found.interval(1.0) or (0, 0)
    assert low == pytest.approx(90.0, abs=1e-6)
    assert high == pytest.approx(90.0, abs=1e-6)


def test_two_points_give_no_interval_and_one_fraction_no_law() -> None:
    two = fit([Point(0.05, 60.0), Point(0.1, 70.0)])
    assert two is not None
    assert two.interval(0.5) is None
    assert fit([Point(0.1, 60.0), Point(0.1, 61.0)]) is None


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """400 noisy curves, four fractions, two seeds each: 95% of the intervals hold a new value, within chance."""
    generator = random.Random(0)
    held = 0
    for _ in range(400):
        noisy = [
            Point(f, 100 - (100 - law(f)) * math.exp(generator.gauss(0, 0.05)))
            for f in (0.05, 0.1, 0.2, 0.3)
            for _ in "ab"
        ]
        found = fit(noisy)
        assert found is not None
        low, high = found.interval(0.5) or (0, 0)
        held += low <= 100 - (100 - law(0.5)) * math.exp(generator.gauss(0, 0.05)) <= high
    assert 0.92 <= held / 400 <= 0.98


def test_the_largest_fraction_is_predicted_from_the_smaller_ones_only() -> None:
    points = [Point(f, law(f)) for f in (0.05, 0.1, 0.2)] + [Point(0.5, law(0.5) - 7)]
    found = describe(points)
    assert found is not None
    assert found["check"]["top1"] == pytest.approx(law(0.5), abs=1e-3)
    assert found["check"]["truth"] == pytest.approx(law(0.5) - 7, abs=1e-3)
    assert found["check"]["error"] == pytest.approx(7, abs=1e-3)
    assert found["all_images"]["fraction"] == 1.0


def test_a_perfect_score_does_not_break_the_logarithm() -> None:
    found = describe([Point(0.1, 99.0), Point(0.5, 100.0)])
    assert found is not None
    assert found["all_images"]["top1"] <= 100


def test_curves_follow_the_winners_of_the_groups_or_one_setting(tmp_path: Path) -> None:
    kd = "objective.vit.kd"
    space = {"data.fraction": {"grid": [0.05, 0.1, 0.2]}, kd: {"grid": [1, 2]}}
    grouped = make_sweep(tmp_path, space=space)
    conductor = make_conductor(grouped)
    run(conductor, lambda t, e: law(t.spec.overrides["data.fraction"]) - t.spec.overrides[kd], epochs=1)
    (curve,) = curves(grouped, conductor.trials)
    assert curve["line"] == "method=joint"
    assert [p["top1"] for p in curve["points"]] == pytest.approx([law(f) - 1 for f in (0.05, 0.1, 0.2)], abs=1e-3)
    rungs = make_sweep(tmp_path, space=space, fidelity="data.fraction", name="rungs")
    conductor = make_conductor(rungs)
    run(conductor, lambda t, e: law(t.spec.overrides["data.fraction"]) - t.spec.overrides[kd], epochs=1)
    (curve,) = curves(rungs, conductor.trials)
    assert '"objective.vit.kd":1' in curve["line"]
    assert curve["check"]["fraction"] == 0.2
