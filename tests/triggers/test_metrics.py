"""Triggers on logged metrics: sequences short enough to check by hand, and recorded losses of real runs."""

import csv
import math
from pathlib import Path

import pytest

from dynrank.triggers import Gap, Plateau


def fired(trigger, values):
    """Steps at which the trigger is true; a value is a number, or a tuple where the trigger takes several."""
    seen = (value if isinstance(value, tuple) else (value,) for value in values)
    return [step for step, value in enumerate(seen) if trigger.observe(step, *value)]


# Plateau


@pytest.mark.parametrize(
    ("patience", "values", "steps"),
    [
        (1, [3.0, 2.0, 2.0], [2]),
        (3, [3.0, 2.0, 2.0, 2.0, 2.0], [4]),
        # The patience counts anew after every improvement.
        (3, [5.0, 5.0, 5.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0], [9]),
        # A value is compared with the best one and not with the last.
        (3, [1.0, 9.0, 8.0, 7.0], [3]),
    ],
)
def test_plateau_fires_after_patience_observations_without_improvement(patience, values, steps):
    assert fired(Plateau(patience=patience, min_delta=0.0), values) == steps


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4, -1.0])
@pytest.mark.parametrize(("step", "improves"), [(0.09, False), (0.11, True)])
def test_plateau_min_delta_is_relative_to_the_best(size, step, improves):
    trigger = Plateau(patience=1, min_delta=0.1)
    trigger.observe(0, size)
    assert trigger.observe(1, size - step * abs(size)) is not improves


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_plateau_value_that_is_not_finite_never_improves(mode, value):
    assert fired(Plateau(patience=2, mode=mode), [1.0, value, value]) == [2]
    assert fired(Plateau(patience=3, mode=mode), [value, value, value]) == [2]


# Gap

GROWING = [(1.0, 1.1), (1.0, 1.2), (1.0, 1.3), (1.0, 1.5)]


@pytest.mark.parametrize(
    ("options", "pairs", "steps"),
    [
        ({"threshold": 0.25, "window": 1}, GROWING, [2, 3]),
        # The means over the window are 0.2 and 1/3.
        ({"threshold": 0.25, "window": 3}, GROWING, [3]),
        ({"window": 1}, [(1e-3, 1.19e-3), (1e-3, 1.21e-3), (1e4, 1.19e4), (1e4, 1.21e4)], [1, 3]),
        ({"window": 1, "mode": "max"}, [(0.9, 0.95), (0.9, 0.75), (0.9, 0.7)], [2]),
        # pairs that have no gap are left out
        ({"window": 2}, [(1.0, 1.5), (math.nan, 1.0), (1.0, math.inf), (math.inf, 1.0), (0.0, 1.0), (1.0, 1.5)], [5]),
    ],
)
def test_gap_is_relative_to_training_and_a_mean_over_the_window(options, pairs, steps):
    assert fired(Gap(**options), pairs) == steps


# Both modes


def test_mode_max_mirrors_mode_min():
    values = [1.0, 0.9, 0.9, 0.5, 0.5, 0.6, 0.5, 0.3, 0.3, 0.3, 0.3, 0.3]
    small = Plateau(mode="min", min_delta=0.05)
    large = Plateau(mode="max", min_delta=0.05)
    answers = fired(small, values)
    assert answers
    assert answers == fired(large, [-value for value in values])


# Recorded runs


@pytest.mark.parametrize("name", ["drop_at_700", "fixed_16", "fixed_32"])
def test_plateau_of_a_recorded_run_is_at_its_flat_end(name):
    with open(Path(__file__).parent.parent / "data" / f"medical_terms_{name}.csv", encoding="utf-8") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        losses = [float(row["val/loss"]) for row in rows]
    first, *_ = fired(Plateau(patience=3), losses + losses[-1:] * 8)
    assert losses[min(first, len(losses) - 1)] <= min(losses) + 0.15 * (losses[0] - min(losses))
