"""What all triggers share, on one that fires whenever it is shown True."""

from dataclasses import dataclass, field

import pytest

from dynrank.errors import ConfigurationError
from dynrank.triggers import Trigger


@dataclass
class WhenTold(Trigger):
    _heard: int = field(default=0, init=False)

    def _fires(self, told):
        self._heard += 1
        return told

    def _forget(self):
        self._heard = 0


def heard(trigger, first, last):
    return [step for step in range(first, last) if trigger.observe(step, True)]


def test_trigger_hears_nothing_before_the_warmup_is_over():
    trigger = WhenTold(warmup_steps=3)
    assert heard(trigger, 0, 6) == [3, 4, 5]
    assert trigger._heard == 3  # what is not heard does not enter the history either


def test_trigger_hears_nothing_in_the_cooldown_after_a_change():
    trigger = WhenTold(cooldown_steps=3)
    trigger.reset(4)
    assert heard(trigger, 4, 10) == [7, 8, 9]


def test_trigger_reset_forgets_and_never_shortens_the_warmup():
    trigger = WhenTold(warmup_steps=8, cooldown_steps=2)
    trigger._heard = 5
    trigger.reset(1)
    assert trigger._heard == 0
    assert heard(trigger, 2, 10) == [8, 9]


def test_trigger_state_holds_all_that_is_not_an_option():
    trigger = WhenTold(warmup_steps=1, cooldown_steps=4)
    heard(trigger, 0, 3)
    trigger.reset(3)
    heard(trigger, 3, 9)
    state = trigger.state_dict()
    assert state == {"_deaf_until": 7, "_heard": 2}
    other = WhenTold(warmup_steps=1, cooldown_steps=4)
    other.load_state_dict(state)
    assert other == trigger


@pytest.mark.parametrize("name", ["warmup_steps", "cooldown_steps"])
@pytest.mark.parametrize("value", [-1, 0.5, "1", None, True])
def test_trigger_refuses_spans_that_are_no_counts(name, value):
    with pytest.raises(ConfigurationError, match=rf"{name} must .*schedule\.trigger\.{name}"):
        WhenTold(**{name: value})
