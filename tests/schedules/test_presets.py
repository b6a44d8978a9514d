"""What the presets are made of; the oracle judges what runs make of them."""

from importlib.resources import files

import pytest

from dynrank.callbacks import RankScheduler, RankTrainerCallback
from dynrank.driver.driver import RankDriver
from dynrank.errors import ConfigurationError
from dynrank.runs.config import CONFIG_MODULE, compose
from dynrank.runs.job import make_scheduler
from dynrank.schedules import (
    How,
    Stage,
    after_convergence,
    anneal,
    auto,
    early_budget,
    energy,
    fixed,
    grow,
    milestones,
    rebalance,
    stages,
)
from dynrank.targets import Budget, Energy, Rank
from dynrank.triggers import At, Gap, Plateau


def test_presets_hand_their_values_to_the_stage():
    (stage,) = energy(0.8, Gap(), lowest=2, deadline=0.6)
    assert stage == Stage(Gap(), Energy(0.8, lowest=2), 0.6, key="schedule.lowest")
    early = How(lr_factor="sqrt")
    options = {"lowest": 2, "highest": 8}
    first, last = auto(0.1, share=0.5, at=0.25, **options)
    assert (first.when, first.to, first.how) == (At(fraction=0.25), Budget(share=0.5, **options), early)
    assert (last.when, last.to, last.search) == (At(fraction=1.0), Budget(share=1.0, **options), True)
    assert last.how == How(lr_factor="sqrt", max_regression=0.1)
    # A final rank is only the default of the other sizes.
    assert early_budget(4, share=0.25)[0].to == Budget(share=0.25)
    assert early_budget(4, bytes="8MiB")[0].to == Budget(bytes=8 * 2**20)
    assert [stage.when for stage in milestones([24, 8], [1, 3], "epoch")] == [At(epoch=1), At(epoch=3)]
    # Beside a fixed time a deadline means nothing.
    assert after_convergence(8, At(step=30), deadline=0.75)[0].deadline is None


PYTHON = {
    "fixed": (fixed, ""),
    "after_convergence": (lambda: after_convergence(4), "final_rank=4"),
    "milestones": (lambda: milestones([24, 16, 8], [0.3, 0.5, 0.7]), ""),
    "anneal": (lambda: anneal(4), "final_rank=4"),
    "energy": (energy, ""),
    "early_budget": (lambda: early_budget(4), "final_rank=4"),
    "auto": (auto, ""),
    "grow": (lambda: grow(64), ""),
    "rebalance": (lambda: rebalance(at=0.2), "at=0.2"),
    "stages": (lambda: stages([]), ""),
}


def test_every_schedule_has_its_python_call():
    presets = {entry.name.removesuffix(".yaml") for entry in (files(CONFIG_MODULE) / "schedule").iterdir()}
    assert presets - {"how", "trigger"} == PYTHON.keys()


@pytest.mark.parametrize("name", PYTHON)
def test_every_schedule_is_its_python_call_to_the_last_field(name):
    call, keys = PYTHON[name]
    config = compose([f"schedule={name}", *(f"schedule.{key}" for key in keys.split())])
    assert make_scheduler(config.schedule).driver.stages == call()


@pytest.mark.parametrize("callback", [RankScheduler, RankTrainerCallback, RankDriver])
def test_a_number_is_the_recommended_schedule(callback):
    made = callback(4)
    assert getattr(made, "driver", made).stages == early_budget(4)


def test_each_stage_has_a_trigger_of_its_own():
    mine = Plateau(patience=2)
    schedule = after_convergence(8, mine, drops=3) + grow(64, mine)
    schedule[0].when.observe(1, 2.0)
    assert [stage.when for stage in schedule[1:]] == [mine] * 3 == [Plateau(patience=2)] * 3
    assert schedule[0].when != mine


def test_stages_are_taken_as_they_are_and_named_by_their_place():
    schedule = stages([Stage(At(step=1), Rank(4)), Stage(At(step=1), Rank(2), key="mine")])
    assert schedule == [Stage(At(step=1), Rank(4), key="schedule.stages[0]"), Stage(At(step=1), Rank(2), key="mine")]


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: after_convergence(8, "plateau"), "trigger"),
        (lambda: milestones([8], [0.1, 0.2]), "ranks"),
        (lambda: milestones([16, 8], [0.5, 0.2]), "at"),
        (lambda: milestones([16, 8], [0.5, 1.2]), "at"),
        (lambda: milestones([16, 8], [1, 1.5], "epoch"), "at"),
        (lambda: anneal(4, start=0.9, end=0.8), "start"),
        (lambda: early_budget(), "parameters, share, final_rank, bytes"),
        (lambda: early_budget(bytes="8 apples"), "bytes"),
        (lambda: stages([Rank(4)]), "stages[0]"),
    ],
)
def test_a_wrong_value_names_its_argument(make, argument):
    with pytest.raises(ConfigurationError) as caught:
        make()
    # A fault of one value begins with its argument, one of several ends with what to set.
    said = str(caught.value)
    assert said.startswith(f"{argument} ") or argument in said.rpartition("; set ")[2], said
