"""Triggers on logged metrics: sequences short enough to check by hand, and recorded losses of real runs."""

import csv
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynrank.triggers import Gap, Plateau, Slope


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
        (3, [5.0, 5.0, 5.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0], [9]),  # counts anew after every improvement
        (3, [1.0, 9.0, 8.0, 7.0], [3]),  # compares with the best and not with the last
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
    assert fired(Plateau(patience=3, mode=mode), [value, value, value]) == [2]  # nor is it a first best


# Slope


@given(st.lists(st.floats(0.5, 2.0), min_size=4, max_size=4), st.floats(0.0, 0.3))
def test_slope_is_the_least_squares_line_of_torch(values, min_delta):
    positions = torch.arange(4, dtype=torch.float64)
    system = torch.stack([positions, torch.ones(4, dtype=torch.float64)], dim=1)
    slope = float(torch.linalg.lstsq(system, torch.tensor(values, dtype=torch.float64)[:, None]).solution[0])
    improvement, allowed = -3 * slope, min_delta * sum(values) / 4
    if abs(improvement - allowed) > 1e-9:  # on the edge, rounding decides
        assert (fired(Slope(window=4, min_delta=min_delta), values) == [3]) is (improvement <= allowed)


@pytest.mark.parametrize(("drop", "fires"), [(0.009, True), (0.011, False)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_slope_min_delta_is_the_improvement_over_the_window_relative_to_the_mean(size, drop, fires):
    values = [size * (1 + drop * (2 - i) / 4) for i in range(5)]  # mean `size`, `drop` of it over the window
    assert bool(fired(Slope(window=5, min_delta=0.01), values)) is fires


def test_slope_is_not_moved_by_one_lucky_value_as_plateau_is():
    values = [2.0, 1.9, 1.8, 1.3, 1.6, 1.5, 1.4]  # falls by 0.1 each time, but for one outlier
    assert fired(Plateau(patience=3), values) == [6]
    assert fired(Slope(window=5), values) == []


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ([1.0, 1.0, 1.0, 1.0], [2, 3]),  # a whole window is needed
        ([1.0, 1.1, 1.2], [2]),  # getting worse
        ([1.0, math.nan, 1.0, math.inf, 1.0], [4]),  # what is not finite is left out
        ([math.nan] * 9, []),
    ],
)
def test_slope_by_hand(values, steps):
    assert fired(Slope(window=3), values) == steps


# Gap

GROWING = [(1.0, 1.1), (1.0, 1.2), (1.0, 1.3), (1.0, 1.5)]


@pytest.mark.parametrize(
    ("options", "pairs", "steps"),
    [
        ({"threshold": 0.25, "window": 1}, GROWING, [2, 3]),
        ({"threshold": 0.25, "window": 3}, GROWING, [3]),  # means 0.2 and 1/3
        ({"window": 1}, [(1e-3, 1.19e-3), (1e-3, 1.21e-3), (1e4, 1.19e4), (1e4, 1.21e4)], [1, 3]),
        ({"window": 1, "mode": "max"}, [(0.9, 0.95), (0.9, 0.75), (0.9, 0.7)], [2]),
        # pairs that have no gap are left out
        ({"window": 2}, [(1.0, 1.5), (math.nan, 1.0), (1.0, math.inf), (math.inf, 1.0), (0.0, 1.0), (1.0, 1.5)], [5]),
    ],
)
def test_gap_is_relative_to_training_and_a_mean_over_the_window(options, pairs, steps):
    assert fired(Gap(**options), pairs) == steps


# Both modes


@pytest.mark.parametrize("kind", [Plateau, Slope])
def test_mode_max_mirrors_mode_min(kind):
    values = [1.0, 0.9, 0.9, 0.5, 0.5, 0.6, 0.5, 0.3, 0.3, 0.3, 0.3, 0.3]
    small, large = kind(mode="min", min_delta=0.05), kind(mode="max", min_delta=0.05)
    answers = fired(small, values)
    assert answers
    assert answers == fired(large, [-value for value in values])


# Recorded runs


@pytest.mark.parametrize("name", ["drop_at_700", "fixed_16", "fixed_32"])
@pytest.mark.parametrize("kind", [Plateau, Slope])
def test_plateau_of_a_recorded_run_is_at_its_flat_end_and_not_on_the_steep_start(name, kind):
    with open(Path(__file__).parent.parent / "data" / f"medical_terms_{name}.csv", encoding="utf-8") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        losses = [float(row["val/loss"]) for row in rows]
    first, *_ = fired(kind(), losses + losses[-1:] * 8)
    assert losses[min(first, len(losses) - 1)] <= min(losses) + 0.15 * (losses[0] - min(losses))
