"""What the presets are made of; the oracle judges what runs make of such stages."""

from importlib.resources import files

import pytest
import torch

from dynrank.app.runs.config import CONFIG_MODULE, compose
from dynrank.app.runs.job import make_scheduler
from dynrank.callbacks import RankScheduler, RankTrainerCallback
from dynrank.driver.driver import RankDriver
from dynrank.errors import ConfigurationError
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
from dynrank.schedules.stage import check_schedule
from dynrank.targets import Budget, Energy, LayerState, Rank
from dynrank.triggers import At, Gap, Plateau, Run

BY_EQUAL_FACTORS = [(20, 32), (50, 16), (80, 8)]
# Each is (schedule, rank at the start, [(step, rank from there on)]); all stages come by time or deadline.
TIMELINES = [
    (early_budget(8, at=0.25), 32, [(25, 8)]),
    (after_convergence(8, drops=3, deadline=0.5), 64, [(50, 32), (50, 16), (50, 8)]),
    (after_convergence(8, drops=3, shared=False), 64, [(75, 32), (75, 16), (75, 8)]),
    (anneal(8), 64, BY_EQUAL_FACTORS),
    (anneal(8, shared=False), 64, BY_EQUAL_FACTORS),
    (milestones([24, 16, 8], [0.3, 0.5, 1]), 32, [(30, 24), (50, 16), (100, 8)]),
    (milestones([24, 8], [10, 40], "step"), 32, [(10, 24), (40, 8)]),
    (grow(64), 8, [(50, 64)]),
]


@pytest.mark.parametrize(("schedule", "rank", "changes"), TIMELINES)
def test_preset_takes_a_layer_along_its_timeline(schedule, rank, changes):
    run = Run(total_steps=100)
    check_schedule(schedule, run)
    timeline = []
    for stage in schedule:
        layer = LayerState(rank, values=torch.ones(rank, dtype=torch.float64))
        rank = stage.to.ranks({"layer": layer})["layer"]
        timeline.append((stage.planned_step(run), rank))
    assert timeline == changes


def test_presets_hand_their_values_to_the_stage():
    (stage,) = energy(0.8, Gap(), lowest=2, deadline=0.6)
    assert stage == Stage(Gap(), Energy(0.8, lowest=2), 0.6)
    assert [*stage.arguments] == ["lowest"]
    early = How(lr_factor="sqrt")
    options = {"lowest": 2, "highest": 8}
    first, last = auto(0.1, share=0.5, at=0.25, **options)
    assert (first.when, first.to, first.how) == (At(fraction=0.25), Budget(share=0.5, **options), early)
    assert (last.when, last.to, last.search) == (At(fraction=1.0), Budget(share=1.0, **options), True)
    assert last.how == How(lr_factor="sqrt", max_regression=0.1)
    # A final rank is only the default of the other sizes.
    assert early_budget(4, share=0.25)[0].to == Budget(share=0.25)
    assert [stage.to for stage in milestones([8, 4], [0.1, 0.2], shared=True)] == [Budget(final_rank=n) for n in (8, 4)]
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


def test_each_stage_of_a_driver_has_a_trigger_of_its_own():
    mine = Plateau(patience=2)
    driver = RankDriver(after_convergence(8, mine, drops=3) + grow(64, mine))
    driver.stages[0].when.observe(1, 2.0)
    assert [stage.when for stage in driver.stages[1:]] == [mine] * 3 == [Plateau(patience=2)] * 3
    assert driver.stages[0].when != mine


def test_stages_are_taken_as_they_are_and_named_by_their_place():
    schedule = stages([Stage(At(step=1), Rank(4)), Stage(At(step=1), Rank(2), arguments=["mine"])])
    assert schedule == [Stage(At(step=1), Rank(4)), Stage(At(step=1), Rank(2))]
    assert [[*stage.arguments] for stage in schedule] == [["stages[0].to"], ["mine"]]


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
