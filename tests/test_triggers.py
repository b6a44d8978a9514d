"""Plateau on sequences short enough to check by hand."""

import math

import pytest

from dynrank.errors import ConfigurationError
from dynrank.triggers import Plateau


def fired(trigger, values, first_step=0):
    """Steps at which the trigger is true."""
    return [step for step, value in enumerate(values, first_step) if trigger.observe(value, step)]


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_plateau_fires_after_patience_observations_without_improvement(patience):
    assert fired(Plateau(patience=patience), [3.0, 2.0] + [2.0] * patience) == [1 + patience]


def test_plateau_counts_anew_after_every_improvement():
    assert fired(Plateau(patience=3, min_delta=0.0), [5.0, 5.0, 5.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0]) == [9]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4, -1.0])
@pytest.mark.parametrize(("step", "improves"), [(0.09, False), (0.11, True)])
def test_plateau_min_delta_is_relative_to_the_best(size, step, improves):
    trigger = Plateau(patience=1, min_delta=0.1)
    trigger.observe(size, 0)
    assert trigger.observe(size - step * abs(size), 1) is not improves


def test_plateau_compares_with_the_best_and_not_with_the_last():
    assert fired(Plateau(patience=3, min_delta=0.0), [1.0, 9.0, 8.0, 7.0]) == [3]


def test_plateau_mode_max_mirrors_mode_min():
    values = [1.0, 0.9, 0.9, 0.5, 0.5, 0.6, 0.5]
    small = Plateau(patience=2, mode="min", min_delta=0.05)
    large = Plateau(patience=2, mode="max", min_delta=0.05)
    assert [small.observe(v, i) for i, v in enumerate(values)] == [large.observe(-v, i) for i, v in enumerate(values)]


def test_plateau_observes_nothing_during_the_warmup():
    trigger = Plateau(patience=2, warmup_steps=4)
    # 0.1 would be the best of all if it were seen, and the plateau would be there at step 5
    assert fired(trigger, [0.1, 0.1, 0.1, 0.1, 5.0, 4.0, 4.0, 4.0]) == [7]


def test_plateau_reset_forgets_the_history():
    trigger = Plateau(patience=2)
    assert fired(trigger, [1.0, 1.0, 1.0]) == [2]
    trigger.reset(2)
    # 9, 8 and 7 are worse than the forgotten best, and each improves on the one before
    assert fired(trigger, [9.0, 8.0, 7.0, 7.0, 7.0], first_step=3) == [7]


@pytest.mark.parametrize("cooldown", [0, 5])
def test_plateau_does_not_fire_again_on_the_same_plateau_within_the_cooldown(cooldown):
    trigger = Plateau(patience=2, cooldown_steps=cooldown)
    assert fired(trigger, [1.0] * 3) == [2]
    trigger.reset(2)
    first_heard = max(2 + cooldown, 3)
    assert fired(trigger, [1.0] * 20, first_step=3)[0] == first_heard + 2


def test_plateau_reset_within_the_warmup_does_not_shorten_it():
    trigger = Plateau(patience=1, warmup_steps=10, cooldown_steps=2)
    trigger.reset(1)
    assert fired(trigger, [1.0] * 12) == [11]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_plateau_value_that_is_not_finite_never_improves(mode, value):
    assert fired(Plateau(patience=2, mode=mode), [1.0, value, value]) == [2]
    assert fired(Plateau(patience=3, mode=mode), [value, value, value]) == [2]  # nor is it a first best


@pytest.mark.parametrize("cut", range(1, 8))
def test_plateau_state_round_trip_goes_on_as_if_uninterrupted(cut):
    options = {"patience": 2, "warmup_steps": 2, "cooldown_steps": 3}
    values = [9.0, 8.0, 7.0, 7.0, 7.0, 6.0, 6.0, 6.0, 6.0]

    def run(trigger, start, stop):
        answers = []
        for step in range(start, stop):
            answers.append(trigger.observe(values[step], step))
            if answers[-1]:
                trigger.reset(step)
        return answers

    whole = run(Plateau(**options), 0, len(values))
    before, after = Plateau(**options), Plateau(**options)
    head = run(before, 0, cut)
    after.load_state_dict(before.state_dict())
    assert head + run(after, cut, len(values)) == whole
    assert any(whole)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mode", "least"), ("patience", 0), ("min_delta", -0.1), ("warmup_steps", -1), ("cooldown_steps", -1)],
)
def test_plateau_refuses_a_value_out_of_range(name, value):
    with pytest.raises(ConfigurationError, match=rf"{name} must be .*schedule\.trigger\.{name}"):
        Plateau(**{name: value})
