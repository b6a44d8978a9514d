"""Triggers on logged metrics, by sequences short enough to check by hand; and what holds for every trigger."""

import io
import math
from dataclasses import dataclass, field

import pytest
import torch

from dynrank.errors import ConfigurationError
from dynrank.triggers import Gap, Plateau, Trigger


def fired(trigger, values):
    """Steps at which the trigger is true; a value is a number, or a tuple where the trigger takes several."""
    seen = (value if isinstance(value, tuple) else (value,) for value in values)
    return [step for step, value in enumerate(seen) if trigger.observe(step, *value)]


# Plateau


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(
    ("patience", "values", "steps"),
    [
        (1, [3.0, 2.0, 2.0], [2]),
        (3, [3.0, 2.0, 2.0, 2.0, 2.0], [4]),
        # The patience counts anew after every improvement.
        (3, [5.0, 5.0, 5.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0], [9]),
        # A value is compared with the best one and not with the last.
        (3, [1.0, 9.0, 8.0, 7.0], [3]),
        # What is not finite is left out.
        (2, [math.nan, math.inf, 3.0, math.nan, 3.0, -math.inf, 3.0, 2.0, math.nan], [6]),
    ],
)
def test_plateau_fires_after_patience_observations_without_improvement(mode, patience, values, steps):
    sign = 1 if mode == "min" else -1
    assert fired(Plateau(patience=patience, min_delta=0.0, mode=mode), [sign * value for value in values]) == steps


@pytest.mark.parametrize("size", [1e-3, 1e4, -1.0])
@pytest.mark.parametrize(("step", "improves"), [(0.09, False), (0.11, True)])
def test_plateau_min_delta_is_relative_to_the_best(size, step, improves):
    trigger = Plateau(patience=1, min_delta=0.1)
    trigger.observe(0, size)
    assert trigger.observe(1, size - step * abs(size)) is not improves


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


# Every trigger


@dataclass
class WhenTold(Trigger):
    """A trigger of a user's own: fires whenever it is shown True."""

    _observed: int = field(default=0, init=False)

    def fires(self, told):
        self._observed += 1
        return told


def test_warmup_hides_what_lies_before_it():
    trigger = WhenTold(warmup_steps=3)
    assert fired(trigger, [True] * 6) == [3, 4, 5]
    # The steps of the warm-up do not enter the history either.
    assert trigger._observed == 3
    assert (trigger.reason, trigger.monitors) == ("WhenTold", ())


LOSSES = [9.0, 8.0, 7.0, 7.0, 7.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0]
ALL = {Plateau: ({"patience": 2}, LOSSES), Gap: ({"window": 2, "threshold": 0.1}, [(5.0, loss) for loss in LOSSES])}


def run(trigger, seen, first=0):
    """What the trigger says to each observation; a change of rank resets it."""
    answers = []
    for step, value in enumerate(seen, first):
        answers.append(trigger.observe(step, *(value if isinstance(value, tuple) else (value,))))
        if answers[-1]:
            trigger.reset()
    return answers


@pytest.mark.parametrize("kind", ALL)
def test_state_of_a_checkpoint_goes_on_as_if_uninterrupted(kind):
    options, seen = ALL[kind]
    options = {**options, "warmup_steps": 2}
    whole = run(kind(**options), seen)
    assert sum(whole) >= 2
    for cut in range(1, len(seen)):
        before = kind(**options)
        after = kind(**options)
        file = io.BytesIO()
        head = run(before, seen[:cut])
        torch.save(before.state_dict(), file)
        file.seek(0)
        after.load_state_dict(torch.load(file, weights_only=True))
        assert head + run(after, seen[cut:], cut) == whole


@pytest.mark.parametrize("kind", ALL)
def test_a_change_starts_the_history_anew(kind):
    options, seen = ALL[kind]
    used = kind(**options)
    run(used, seen[:1])
    assert used != kind(**options)
    used.reset()
    assert used == kind(**options)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Gap, {"window": 0}),
        (Plateau, {"min_delta": float("nan")}),
    ],
)
def test_a_wrong_value_names_its_argument(kind, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigurationError, match=rf"^{name} must .*got {value!r}$"):
        kind(**wrong)
