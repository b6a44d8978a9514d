"""What holds for every trigger: warm-up, a history that a change clears, state, and wrong values."""

import io
from dataclasses import dataclass, field

import pytest
import torch

from dynrank.errors import ConfigurationError
from dynrank.triggers import Gap, Plateau, Trigger


@dataclass
class WhenTold(Trigger):
    """A trigger of a user's own: fires whenever it is shown True."""

    _observed: int = field(default=0, init=False)

    def fires(self, told):
        self._observed += 1
        return told


def fired(trigger, first, last):
    return [step for step in range(first, last) if trigger.observe(step, True)]


def test_warmup_hides_what_lies_before_it():
    trigger = WhenTold(warmup_steps=3)
    assert fired(trigger, 0, 6) == [3, 4, 5]
    # The steps of the warm-up do not enter the history either.
    assert trigger._observed == 3
    assert (trigger.reason, trigger.monitors) == ("WhenTold", ())


LOSSES = [9.0, 8.0, 7.0, 7.0, 7.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0]
ALL = {Plateau: ({"patience": 2}, LOSSES), Gap: ({"window": 2, "threshold": 0.1}, [(5.0, loss) for loss in LOSSES])}


def run(trigger, seen, first=0, *, changes=True):
    """What the trigger says to each observation; a change of rank resets it."""
    answers = []
    for step, value in enumerate(seen, first):
        answers.append(trigger.observe(step, *(value if isinstance(value, tuple) else (value,))))
        if answers[-1] and changes:
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
    """After a reset a trigger says what a new one would."""
    options, seen = ALL[kind]
    used = kind(**options)
    run(used, seen[:6])
    used.reset()
    fresh = run(kind(**options), seen[6:], 6, changes=False)
    assert any(fresh)
    assert run(used, seen[6:], 6, changes=False) == fresh


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Gap, {"window": 0}),
        (Plateau, {"min_delta": float("nan")}),
        (Gap, {"threshold": 0}),
        (Gap, {"mode": "least"}),
    ],
)
def test_a_wrong_value_names_its_argument(kind, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigurationError, match=rf"^{name} must .*got {value!r}$"):
        kind(**wrong)


def test_the_metric_may_be_given_first():
    assert Plateau("eval_loss").monitors == ("eval_loss",)
    assert Gap("a", "b").monitors == ("a", "b")
