"""How, Stage, and what contradicts itself in a schedule."""

import pytest

from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, after_convergence, check_schedule, grow
from dynrank.targets import Budget, Energy, GrowTo, Rank, Smallest, Towards
from dynrank.triggers import At, Plateau, Run

RUN = Run(total_steps=100, steps_per_epoch=20)


@pytest.mark.parametrize(
    "wrong", [{"metric": "wieght"}, {"window": 0}, {"max_regression": float("nan")}, {"check_monitor": ""}], ids=str
)
def test_how_names_a_wrong_value_and_its_key(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigurationError, match=rf"^{name} must .*got {value!r}; set schedule\.how\.{name}$"):
        How(**wrong)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Stage(None, Rank(4)), ["when", "Trigger", "At", "None"]),
        (lambda: Stage(Plateau(), 4), ["to", "Target", "4"]),
        (lambda: Stage(At(step=3), Rank(4), deadline=0.5), ["0.5", "step 3", "schedule.deadline"]),
        (lambda: Stage(At(fraction=0.5), Smallest(), how=How(max_regression=0.01)), ["after the last step"]),
        (lambda: Stage(At(fraction=1.0), Smallest()), ["max_regression"]),
    ],
)
def test_stage_names_a_wrong_value(make, names):
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert all(name in str(caught.value) for name in names), caught.value


PLATEAU = Plateau(warmup_steps=30)
FAULTS = {
    "target above the rank in a shrink": ([Stage(At(step=1), Rank(33), key="K")], ["stage 1", "32", "33", "K"]),
    "target above the rank of the stage before": (
        [Stage(At(step=1), Rank(8)), Stage(At(step=2), Rank(16), key="K")],
        ["stage 2", "8", "16", "K"],
    ),
    "growth below the rank": ([Stage(At(step=1), GrowTo(31), key="K")], ["stage 1", "32", "31", "K"]),
    "least above the rank": ([Stage(At(step=1), Energy(0.9, lowest=33), key="K")], ["stage 1", "lowest", "K"]),
    "multiple that no rank meets after a stage": (
        [Stage(At(step=1), Rank(6)), Stage(At(step=2), Budget(share=0.5, lowest=5, multiple=4), key="K")],
        ["stage 2", "multiple", "4", "5", "6", "K"],
    ),
    "deadline at the end of the warm-up": (
        [Stage(PLATEAU, Rank(8), deadline=0.3)],
        ["stage 1", "0.3", "30", "schedule.deadline", "schedule.trigger.warmup_steps"],
    ),
    "times out of order": (
        [Stage(At(step=50), Rank(16)), Stage(At(epoch=2), Rank(8), key="K")],
        ["stage 2", "40", "50", "K"],
    ),
    "after the end": ([Stage(At(epoch=6), Rank(8), key="K")], ["stage 1", "120", "100", "K"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_contradiction_is_refused_with_its_stage_and_key(name):
    schedule, words = FAULTS[name]
    with pytest.raises(ConfigurationError) as caught:
        check_schedule(schedule, highest=32, run=RUN)
    assert all(word in str(caught.value) for word in words), caught.value
    assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize(
    "target", [Rank(32), Towards(32), Towards(33, 2, 2), Energy(0.5, lowest=29, multiple=4), GrowTo(32)]
)
def test_target_that_may_leave_a_layer_as_it_is_is_no_contradiction(target):
    check_schedule([Stage(At(step=1), target)], highest=32, run=RUN)


def test_all_contradictions_are_listed_at_once():
    schedule = [Stage(At(step=200), Rank(64), key="first"), Stage(At(step=20), GrowTo(2), key="second")]
    with pytest.raises(ConfigurationError) as caught:
        check_schedule(schedule, highest=32, run=RUN)
    assert str(caught.value).count("\n") == 4, caught.value
    assert {"first", "second"} <= set(str(caught.value).replace(";", " ").split())


@pytest.mark.parametrize("run", [Run(None), Run(None, 20)])
def test_what_needs_the_length_of_the_run_is_not_checked_without(run):
    schedule = [Stage(PLATEAU, Rank(8), deadline=0.25), Stage(At(step=500), Rank(4)), Stage(At(fraction=0.1), Rank(2))]
    check_schedule(schedule, highest=32, run=run)
    check_schedule([Stage(At(epoch=99), Rank(8))], highest=32, run=Run(100))
    check_schedule(grow(64) + after_convergence(8), highest=32, run=run)
