"""What the presets are made of."""

import pytest

from dynrank.errors import ConfigurationError
from dynrank.schedules import (
    Stage,
    after_convergence,
    anneal,
    auto,
    budget,
    check_schedule,
    early_budget,
    energy,
    fixed,
    grow,
    grow_then_shrink,
    halving_on_plateau,
    milestones,
    one_stage,
    squeeze_at_end,
    squeeze_then_tune,
    stages,
)
from dynrank.targets import Budget, Energy, Factor, FinalRanks, LayerState, Rank, Smallest
from dynrank.triggers import At, Gap, Plateau, Run, Slope

RUN = Run(total_steps=100, steps_per_epoch=20)
TIMELINES = [  # (schedule, rank at the start, [(step, rank from there on)] where all stages come by time or deadline)
    (fixed(), 32, []),
    (after_convergence(8, drops=3, deadline=0.5), 64, [(50, 32), (50, 16), (50, 8)]),
    (milestones([24, 16, 8], [0.3, 0.5, 1]), 32, [(30, 24), (50, 16), (100, 8)]),
    (milestones([24, 8], [10, 40], "step"), 32, [(10, 24), (40, 8)]),
    (milestones([24, 8], [1, 3], "epoch"), 32, [(20, 24), (60, 8)]),
    (halving_on_plateau(8, deadline=0.6)[1:], 32, [(60, 8)]),
    (anneal(8, steps=3), 64, [(20, 32), (50, 16), (80, 8)]),
    (anneal(8, steps=3, shape="linear"), 64, [(20, 45), (50, 26), (80, 8)]),
    (anneal(8, steps=3, shape="cosine"), 64, [(20, 50), (50, 22), (80, 8)]),
    (anneal(8, steps=2, start=0, end=1), 64, [(0, 23), (100, 8)]),
    (squeeze_at_end(8), 64, [(100, 8)]),
    (squeeze_then_tune(8, tune=0.1), 64, [(90, 8)]),
    (grow(64), 8, [(50, 64)]),
    (grow_then_shrink(64, 16), 8, [(20, 64), (80, 16)]),
    (one_stage(At(step=100), FinalRanks()), 8, [(100, 8)]),
    (grow(64, At(fraction=0.1)) + anneal(8, steps=2, start=0.5, end=0.8), 16, [(10, 64), (50, 23), (80, 8)]),
]


@pytest.mark.parametrize(("schedule", "rank", "changes"), TIMELINES)
def test_preset_takes_a_layer_along_its_timeline(schedule, rank, changes):
    check_schedule(schedule, highest=rank, run=RUN)
    timeline = []
    for stage in schedule:
        rank = stage.to.ranks({"layer": LayerState(rank)})["layer"]
        timeline.append((stage.planned_step(RUN), rank))
    assert timeline == changes


def test_presets_hand_their_values_to_the_stage():
    (stage,) = energy(0.8, Gap(), lowest=2, multiple=4, deadline=0.6)
    assert stage == Stage(Gap(), Energy(0.8, lowest=2, multiple=4), 0.6, key="schedule.lowest")
    (stage,) = budget(parameters=900, lowest=2, highest=8, multiple=2, deadline=None)
    assert stage.to == Budget(900, lowest=2, highest=8, multiple=2)
    assert (stage.when, stage.deadline) == (Plateau(), None)
    (stage,) = early_budget(4, at=0.25, lowest=2)
    assert (stage.when, stage.to) == (At(fraction=0.25), Budget(rank=4, lowest=2))
    options = {"check_batches": 3, "lowest": 2, "highest": 8, "multiple": 2}
    assert [(s.when, s.to) for s in auto(0.1, at=0.25, **options)] == [
        (At(fraction=share), Smallest(0.1, **options)) for share in (0.25, 1.0)
    ]
    assert early_budget(4, share=0.25)[0].to == Budget(share=0.25)  # a final rank is the default of the other sizes
    assert [s.to for s in after_convergence(4, shared=True, drops=2)] == [Budget(rank=4, left=1), Budget(rank=4)]
    assert [s.to for s in milestones([8, 4], [0.1, 0.2], shared=True)] == [Budget(rank=8), Budget(rank=4)]
    assert budget(final_rank=4, bytes="8MiB")[0].to == Budget(bytes=8 * 2**20)
    (stage,) = one_stage(Slope(), Rank(4), 0.5, True)
    assert stage == Stage(Slope(), Rank(4), 0.5, True, key="schedule.target")
    (halving,) = halving_on_plateau(8, deadline=None)
    assert halving == Stage(Plateau(), Factor(0.5, lowest=8), repeat=True, key="schedule.final_rank")
    (stage,) = one_stage(At(step=30), Rank(8), deadline=0.75)  # beside a fixed time a deadline means nothing
    assert (stage.deadline, stage.planned_step(RUN)) == (None, 30)


def test_each_stage_has_a_trigger_of_its_own():
    mine = Plateau(patience=2)
    schedule = after_convergence(8, mine, drops=3) + halving_on_plateau(8, mine, deadline=None)
    schedule[0].when.observe(1, 2.0)
    assert [stage.when for stage in schedule[1:]] == [mine] * 3 == [Plateau(patience=2)] * 3
    assert schedule[0].when != mine


def test_stages_are_taken_as_they_are_and_named_by_their_place():
    schedule = stages([Stage(At(step=1), Rank(4)), Stage(At(step=1), Rank(2), key="mine")])
    assert schedule == [Stage(At(step=1), Rank(4), key="schedule.stages[0]"), Stage(At(step=1), Rank(2), key="mine")]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: after_convergence(0), "final_rank"),
        (lambda: after_convergence(8, "plateau"), "trigger"),
        (lambda: one_stage(At(step=3), Rank(4), repeat=True), "repeat"),
        (lambda: grow_then_shrink(64, 8, grow_at=1.5), "grow_at"),
        (lambda: milestones([8], [0.1, 0.2]), "ranks"),
        (lambda: milestones([16, 0], [0.1, 0.2]), "ranks[1]"),
        (lambda: milestones([16, 8], [0.5, 0.2]), "at"),
        (lambda: milestones([16, 8], [0.5, 1.2]), "at"),
        (lambda: milestones([16, 8], [0.5, "late"]), "at[1]"),
        (lambda: milestones([16, 8], [1, 1.5], "epoch"), "at"),
        (lambda: anneal(4, start=0.9, end=0.8), "start"),
        (lambda: squeeze_then_tune(4, tune=1), "tune"),
        (lambda: budget(), "parameters; schedule.share; schedule.final_rank; schedule.bytes"),
        (lambda: early_budget(share=0.5, parameters=7), "parameters"),
        (lambda: early_budget(bytes="8 apples"), "bytes"),
        (lambda: auto(-0.1), "tolerance"),
        (lambda: anneal(4, shape="cosine", shared=True), "shape"),
        (lambda: budget(0.5, highest=2, lowest=3), "highest"),
        (lambda: stages([Rank(4)]), "stages[0]"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(make, key):
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert f"schedule.{key}" in str(caught.value).replace(",", ";").split("set ")[-1], caught.value
