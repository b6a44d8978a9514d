"""How, Stage, and what contradicts itself in a schedule."""

import pytest

from dynrank.errors import ConfigurationError
from dynrank.schedules.stage import How, Stage, check_schedule
from dynrank.targets import Budget, Rank
from dynrank.triggers import At, Plateau, Run

RUN = Run(total_steps=100, steps_per_epoch=20)
ALL = Budget(share=1.0)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: How(lr_factor=0.0), ["lr_factor must ", "got 0.0"]),
        (lambda: How(max_regression=float("nan")), ["max_regression must ", "got nan"]),
        (lambda: Stage(None, Rank(4)), ["when", "Trigger", "At", "None"]),
        (lambda: Stage(Plateau(), 4), ["to", "Target", "4"]),
        (lambda: Stage(At(step=3), Rank(4), deadline=0.5), ["0.5", "step 3", "deadline"]),
        (lambda: Stage(At(fraction=0.5), ALL, how=How(max_regression=0.01), search=True), ["after the last step"]),
        (lambda: Stage(At(fraction=1.0), ALL, search=True), ["max_regression"]),
        (
            lambda: Stage(At(fraction=1.0), Rank(4), how=How(max_regression=0.01), search=True),
            ["Budget", "max_regression"],
        ),
    ],
)
def test_a_wrong_value_is_named(make, names):
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert all(name in str(caught.value) for name in names), caught.value


PLATEAU = Plateau(warmup_steps=30)
FAULTS = {
    "deadline at the end of the warm-up": (
        [Stage(PLATEAU, Rank(8), deadline=0.3)],
        ["stage 1", "0.3", "30", "deadline", "warmup_steps"],
    ),
    "times out of order": (
        [Stage(At(step=50), Rank(16)), Stage(At(epoch=2), Rank(8), arguments=["K"])],
        ["stage 2", "40", "50", "K"],
    ),
    "after the end": ([Stage(At(epoch=6), Rank(8), arguments=["K"])], ["stage 1", "120", "100", "K"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_contradiction_is_refused_with_its_stage_and_arguments(name):
    schedule, words = FAULTS[name]
    with pytest.raises(ConfigurationError) as caught:
        check_schedule(schedule, RUN)
    said = f"{caught.value} {caught.value.arguments}"
    assert all(word in said for word in words), said
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize("run", [Run(None), Run(None, 20)])
def test_what_needs_the_length_of_the_run_is_not_checked_without(run):
    schedule = [Stage(PLATEAU, Rank(8), deadline=0.25), Stage(At(step=500), Rank(4)), Stage(At(fraction=0.1), Rank(2))]
    check_schedule(schedule, run)
    check_schedule([Stage(At(epoch=99), Rank(8))], Run(100))
