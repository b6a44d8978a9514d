"""Schedules: what the presets are made of, functions of the step, and what contradicts itself."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynrank.errors import ConfigurationError
from dynrank.schedules import (
    How,
    Stage,
    after_convergence,
    anneal,
    budget,
    check_schedule,
    constant,
    cosine,
    energy,
    fixed,
    from_function,
    geometric,
    grow,
    grow_then_shrink,
    halving_on_plateau,
    join,
    linear,
    milestones,
    one_stage,
    squeeze_at_end,
    squeeze_then_tune,
    stages,
)
from dynrank.targets import (
    Budget,
    Energy,
    Exactly,
    Factor,
    FinalRanks,
    GrowBy,
    GrowTo,
    LayerState,
    Rank,
    Towards,
)
from dynrank.triggers import At, Gap, Plateau, Run, Slope

RUN = Run(total_steps=100, steps_per_epoch=20)


def timeline(schedule, rank, run=RUN):
    """[(step, rank from there on)] of one layer under stages that all come by time or deadline."""
    changes = []
    for index, stage in enumerate(schedule):
        state = LayerState(rank, 512, 512)
        rank = stage.to.ranks({"layer": state})["layer"]
        changes.append((schedule[index].planned_step(run), rank))
    return changes


# Presets


def test_fixed_does_nothing():
    assert fixed() == []


@pytest.mark.parametrize(("drops", "ranks"), [(1, [8]), (2, [23, 8]), (3, [32, 16, 8])])
def test_after_convergence_goes_down_in_equal_factors_by_its_deadline(drops, ranks):
    schedule = after_convergence(8, Slope(), drops=drops)
    assert timeline(schedule, 64) == [(75, rank) for rank in ranks]
    assert all(stage.when == Slope() for stage in schedule)
    assert isinstance(after_convergence(8)[0].when, Plateau)


def test_a_deadline_beside_a_fixed_time_is_left_out():
    for schedule in (
        after_convergence(8, At(step=30)),
        one_stage(At(step=30), Rank(8), deadline=0.75),
        energy(0.9, At(step=30)),
        budget(0.5, trigger=At(step=30)),
        grow(64, At(step=30)),
    ):
        (stage,) = schedule
        assert stage.deadline is None
        assert stage.planned_step(RUN) == 30


def test_milestones_are_ranks_at_times():
    assert timeline(milestones([24, 16, 8], [0.3, 0.5, 0.7]), 32) == [(30, 24), (50, 16), (70, 8)]
    assert timeline(milestones([24, 8], [10, 40], "step"), 32) == [(10, 24), (40, 8)]
    assert timeline(milestones([24, 8], [1, 3], "epoch"), 32) == [(20, 24), (60, 8)]


def test_halving_repeats_and_then_ends_at_its_rank_in_any_case():
    halving, end = halving_on_plateau(8, deadline=0.6)
    assert halving.repeat
    assert halving.to == Factor(0.5, lowest=8)
    assert halving.deadline is None
    assert timeline([end], 32) == [(60, 8)]
    assert halving_on_plateau(8, deadline=None) == [halving]


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"steps": 3}, [(20, 32), (50, 16), (80, 8)]),
        ({"steps": 3, "shape": "linear"}, [(20, 45), (50, 26), (80, 8)]),
        ({"steps": 3, "shape": "cosine"}, [(20, 50), (50, 22), (80, 8)]),
        ({"steps": 1, "start": 0.4}, [(40, 8)]),
        ({"steps": 2, "start": 0.0, "end": 1.0}, [(0, 23), (100, 8)]),
    ],
)
def test_anneal_is_steps_of_a_shape_at_equal_distances(options, changes):
    assert timeline(anneal(8, **options), 64) == changes


def test_squeezes_come_at_the_end_or_leave_a_share_to_tune():
    assert timeline(squeeze_at_end(8), 64) == [(100, 8)]
    assert timeline(squeeze_then_tune(8, tune=0.1), 64) == [(90, 8)]


def test_energy_and_budget_hand_their_values_to_the_target():
    (stage,) = energy(0.8, Gap(), lowest=2, multiple=4, deadline=0.6)
    assert stage.to == Energy(0.8, lowest=2, multiple=4)
    assert (stage.when, stage.deadline) == (Gap(), 0.6)
    (stage,) = budget(parameters=900, lowest=2, highest=8, multiple=2, score="sensitivity", deadline=None)
    assert stage.to == Budget(900, None, lowest=2, highest=8, multiple=2, score="sensitivity")
    assert stage.deadline is None


def test_grow_and_grow_then_shrink():
    assert timeline(grow(64), 8) == [(50, 64)]
    assert timeline(grow_then_shrink(64, 16), 8) == [(20, 64), (80, 16)]


def test_stages_are_taken_as_they_are_and_named_by_their_place():
    own = Stage(At(step=1), Rank(2), key="mine")
    schedule = stages([Stage(At(step=1), Rank(4)), own])
    assert [stage.key for stage in schedule] == ["schedule.stages[0]", "mine"]
    assert [replace(stage, key="") for stage in schedule] == [Stage(At(step=1), Rank(r), key="") for r in (4, 2)]


def test_presets_join_with_plus():
    schedule = grow(64, At(fraction=0.1)) + anneal(8, steps=2, start=0.5, end=0.8)
    assert timeline(schedule, 16) == [(10, 64), (50, 23), (80, 8)]
    assert check_schedule(schedule, How(), highest=16, run=RUN)[-1] == (8, 8)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        *[
            (make, "schedule.final_rank")
            for make in (
                lambda: after_convergence(0),
                lambda: after_convergence("8"),
                lambda: halving_on_plateau(2.5),
                lambda: anneal(0),
                lambda: squeeze_at_end(0),
                lambda: squeeze_then_tune(None),
                lambda: grow(0),
                lambda: grow_then_shrink(64, 0),
            )
        ],
        (lambda: grow_then_shrink(0, 8), "schedule.peak_rank"),
        (lambda: grow_then_shrink(64, 8, grow_at=1.5), "schedule.grow_at"),
        (lambda: grow_then_shrink(64, 8, grow_at="early"), "schedule.grow_at"),
        (lambda: after_convergence(8, drops=0), "schedule.drops"),
        *[
            (lambda make=make, value=value: make(value), "schedule.deadline")
            for value in (0, 1.5, "0.5", float("nan"), True)
            for make in (
                lambda v: after_convergence(8, deadline=v),
                lambda v: halving_on_plateau(8, deadline=v),
                lambda v: energy(0.9, deadline=v),
                lambda v: budget(0.5, deadline=v),
                lambda v: grow(64, deadline=v),
                lambda v: grow_then_shrink(64, 8, deadline=v),
                lambda v: one_stage(Plateau(), Rank(4), deadline=v),
                lambda v: one_stage(At(step=3), Rank(4), deadline=v),
            )
        ],
        (lambda: halving_on_plateau(8, factor=0), "schedule.factor"),
        (lambda: milestones([8], [0.1, 0.2]), "schedule.ranks"),
        (lambda: milestones([], []), "schedule.ranks"),
        (lambda: milestones(8, 0.5), "schedule.ranks"),
        (lambda: milestones(None, None), "schedule.ranks"),
        (lambda: milestones([16, 0], [0.1, 0.2]), "schedule.ranks[1]"),
        (lambda: milestones([16, 8], [0.5, 0.2]), "schedule.at"),
        (lambda: milestones([16, 8], [0.5, 1.2]), "schedule.at"),
        (lambda: milestones([16, 8], [0.5, "late"]), "schedule.at"),
        (lambda: milestones([16], [0.5], "hour"), "schedule.unit"),
        (lambda: anneal(4, steps=0), "schedule.steps"),
        (lambda: anneal(4, start=0.9, end=0.8), "schedule.start"),
        (lambda: anneal(4, end=1.1), "schedule.end"),
        (lambda: anneal(4, start="early"), "schedule.start"),
        (lambda: anneal(4, shape="bent"), "schedule.shape"),
        (lambda: squeeze_then_tune(4, tune=0), "schedule.tune"),
        (lambda: squeeze_then_tune(4, tune=1), "schedule.tune"),
        (lambda: squeeze_then_tune(4, tune="short"), "schedule.tune"),
        (lambda: energy(1.1), "schedule.share"),
        (lambda: energy(0.9, lowest=0), "schedule.lowest"),
        (lambda: budget(), "schedule.share"),
        (lambda: one_stage(None, Rank(4)), "schedule.trigger"),
        (lambda: one_stage(Plateau(), None), "schedule.target"),
        (lambda: one_stage(At(step=3), Rank(4), repeat=True), "schedule.repeat"),
        (lambda: one_stage(Plateau(), Rank(4), repeat="no"), "schedule.repeat"),
        (lambda: one_stage(Plateau(), Rank(4), repeat=None), "schedule.repeat"),
        (lambda: Stage(At(step=3), Rank(4), deadline=0.5), "schedule.deadline"),
        (lambda: How(metric="wieght"), "schedule.metric"),
        (lambda: How(gauge="magic"), "schedule.gauge"),
        (lambda: How(optimizer_state="magic"), "schedule.optimizer_state"),
        (lambda: How(new_rows="magic"), "schedule.new_rows"),
        (lambda: How(window=-1), "schedule.window"),
        (lambda: How(window=2.5), "schedule.window"),
        (lambda: How(rewarmup_steps=-1), "schedule.rewarmup_steps"),
        (lambda: How(max_regression=-0.1), "schedule.max_regression"),
        (lambda: How(max_regression=float("nan")), "schedule.max_regression"),
        (lambda: How(max_regression=float("inf")), "schedule.max_regression"),
        (lambda: How(max_regression="1%"), "schedule.max_regression"),
        (lambda: How(check_monitor=""), "schedule.check_monitor"),
        (lambda: How(check_monitor=None), "schedule.check_monitor"),
    ],
)  # fmt: skip
def test_value_out_of_range_names_its_key(make, key):
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert key in str(caught.value)


# Functions of the step


def test_linear_and_cosine_by_hand():
    assert [linear(8, 4, 4)(step) for step in range(6)] == [8, 7, 6, 5, 4, 4]
    assert [linear(4, 8, 2)(step) for step in range(4)] == [4, 6, 8, 8]
    assert [cosine(32, 8, 4)(step) for step in range(6)] == [32, 28, 20, 12, 8, 8]  # 20 + 12 cos(pi t / 4)
    assert constant(7)(123) == 7


def test_geometric_by_hand():
    assert [geometric(64, 8, every=10)(step) for step in (0, 9, 10, 20, 30, 99)] == [64, 64, 32, 16, 8, 8]
    assert [geometric(4, 30, every=5, factor=2)(step) for step in (0, 5, 10, 15, 99)] == [4, 8, 16, 30, 30]


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 50))
def test_linear_and_cosine_go_one_way_from_start_to_end(start, end, steps):
    for function in (linear(start, end, steps), cosine(start, end, steps)):
        ranks = [function(step) for step in range(steps + 3)]
        assert ranks[0] == start
        assert ranks[steps:] == [end] * 3
        assert ranks == sorted(ranks, reverse=start > end)


def test_join_counts_each_from_its_own_start_as_optax_does():
    seen = []

    def spy(name, rank):
        return lambda step: seen.append((name, step)) or rank

    schedule = join([spy("a", 1), spy("b", 2), spy("c", 3)], boundaries=[3, 5])
    assert [schedule(step) for step in range(8)] == [1, 1, 1, 2, 2, 3, 3, 3]
    assert seen == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("c", 0), ("c", 1), ("c", 2)]


def test_join_nests_and_from_function_makes_stages_of_it():
    warm = join([constant(4), linear(4, 16, 6)], [2])
    schedule = from_function(join([warm, geometric(16, 4, every=2)], [10]), total_steps=16)
    assert timeline(schedule, 4) == [(0, 4), (3, 6), (4, 8), (5, 10), (6, 12), (7, 14), (8, 16), (12, 8), (14, 4)]
    assert all(isinstance(stage.to, Exactly) for stage in schedule)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_from_function_plays_back_any_function(ranks):
    schedule = from_function(ranks.__getitem__, len(ranks))
    changes, rank, played = dict(timeline(schedule, 5, Run(len(ranks)))), None, []
    for step in range(len(ranks)):
        rank = changes.get(step, rank)
        played.append(rank)
    assert played == ranks
    assert len(schedule) == 1 + sum(a != b for a, b in zip(ranks, ranks[1:], strict=False))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: join([constant(1)], [3]), "functions must be one more"),
        (lambda: join([constant(1)] * 3, [5, 3]), "boundaries must be ascending"),
        (lambda: linear(8, 4, 0), "steps"),
        (lambda: cosine(8, 4, 0), "steps"),
        (lambda: geometric(8, 4, every=0), "every"),
        (lambda: from_function(lambda step: 2 - step, 3), "function .* int of at least 1, got 0 at step 2"),
        (lambda: from_function(lambda step: 2.5, 3), "function .* int of at least 1, got 2.5 at step 0"),
    ],
)
def test_functions_refuse_what_they_cannot_count(make, words):
    with pytest.raises(ConfigurationError, match=words):
        make()


# Contradictions


PLATEAU = Plateau(warmup_steps=30)
FAULTS = {
    "target above the rank in a shrink": ([Stage(At(step=1), Rank(33), key="K")], {}, ["stage 1", "32", "33", "K"]),
    "target above the rank of the stage before": (
        [Stage(At(step=1), Rank(8)), Stage(At(step=2), Rank(16), key="K")],
        {},
        ["stage 2", "8", "16", "K"],
    ),
    "growth below the rank": ([Stage(At(step=1), GrowTo(31), key="K")], {}, ["stage 1", "32", "31", "K"]),
    "least above the rank": ([Stage(At(step=1), Energy(0.9, lowest=33), key="K")], {}, ["stage 1", "lowest", "K"]),
    "multiple that no rank meets": (
        [Stage(At(step=1), Budget(share=0.5, lowest=21, multiple=20), key="K")],
        {},
        ["stage 1", "multiple", "20", "21", "32", "K"],
    ),
    "multiple that no rank meets after a stage": (
        [Stage(At(step=1), Rank(6)), Stage(At(step=2), Budget(share=0.5, lowest=5, multiple=4), key="K")],
        {},
        ["stage 2", "multiple", "4", "5", "6", "K"],
    ),
    "multiple that no rank meets, by spectrum": (
        [Stage(At(step=1), Energy(0.9, multiple=64), key="K")],
        {},
        ["stage 1", "multiple", "64", "K"],
    ),
    "deadline before the warm-up": (
        [Stage(PLATEAU, Rank(8), deadline=0.25)],
        {},
        ["stage 1", "0.25", "25", "30", "schedule.deadline", "schedule.trigger.warmup_steps"],
    ),
    "deadline at the end of the warm-up": ([Stage(PLATEAU, Rank(8), deadline=0.3)], {}, ["stage 1", "30"]),
    "statistics with no window": ([Stage(At(step=1), Rank(8))], {"metric": "loss", "window": 0}, ["schedule.window"]),
    "sensitivity with no window": (
        [Stage(At(step=1), Budget(share=0.5, score="sensitivity"))],
        {"window": 0},
        ["stage 1", "schedule.window"],
    ),
    "gradient with no window": (
        [Stage(At(step=1), GrowTo(64))],
        {"new_rows": "gradient", "window": 0},
        ["stage 1", "schedule.window"],
    ),
    "times out of order": (
        [Stage(At(step=50), Rank(16)), Stage(At(fraction=0.4), Rank(8), key="K")],
        {},
        ["stage 2", "40", "50", "K"],
    ),
    "deadlines out of order": (
        [Stage(Plateau(), Rank(16), deadline=0.5), Stage(Plateau(), Rank(8), deadline=0.4, key="K")],
        {},
        ["stage 2", "40", "50", "K"],
    ),
    "epochs out of order": (
        [Stage(At(step=50), Rank(16)), Stage(At(epoch=2), Rank(8), key="K")],
        {},
        ["stage 2", "40", "50", "K"],
    ),
    "after the end": ([Stage(At(step=101), Rank(8), key="K")], {}, ["stage 1", "101", "100", "K"]),
    "after the last epoch": ([Stage(At(epoch=6), Rank(8), key="K")], {}, ["stage 1", "120", "100", "K"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_contradiction_is_refused_with_its_stage_and_key(name):
    schedule, how, words = FAULTS[name]
    with pytest.raises(ConfigurationError) as caught:
        check_schedule(schedule, How(**how), highest=32, run=RUN)
    assert all(word in str(caught.value) for word in words), caught.value
    assert str(caught.value).count("\n") == 1  # one fault, one line


def test_all_contradictions_are_listed_at_once():
    schedule = [Stage(At(step=200), Rank(64), key="first"), Stage(At(step=20), GrowTo(2), key="second")]
    with pytest.raises(ConfigurationError) as caught:
        check_schedule(schedule, How(metric="output", window=0), highest=32, run=RUN)
    assert str(caught.value).count("\n") == 6, caught.value
    assert {"first", "second"} <= set(str(caught.value).replace(";", " ").split())


@pytest.mark.parametrize("run", [Run(None), Run(None, 20)])
def test_what_needs_the_length_of_the_run_is_not_checked_without(run):
    schedule = [Stage(PLATEAU, Rank(8), deadline=0.25), Stage(At(step=500), Rank(4)), Stage(At(fraction=0.1), Rank(2))]
    assert check_schedule(schedule, How(), highest=32, run=run) == [(8, 8), (4, 4), (2, 2)]
    assert check_schedule([Stage(At(epoch=99), Rank(8))], How(), highest=32, run=Run(100)) == [(8, 8)]


def test_stage_of_its_own_how_is_checked_by_it():
    stage = Stage(At(step=1), Rank(8), how=How(metric="loss", window=0))
    with pytest.raises(ConfigurationError, match="window"):
        check_schedule([stage], How(), highest=32, run=RUN)
    check_schedule([replace(stage, how=How(metric="loss", window=1))], How(window=0), highest=32, run=RUN)


@pytest.mark.parametrize(
    "schedule",
    [
        fixed(),
        after_convergence(8, drops=3),
        milestones([24, 16, 8], [0.3, 0.5, 0.7]),
        milestones([16], [1.0]),
        halving_on_plateau(8),
        anneal(8),
        squeeze_at_end(8),
        squeeze_then_tune(8),
        energy(0.9, lowest=4, multiple=4),
        budget(0.5),
        grow(64),
        grow_then_shrink(64, 8),
        one_stage(At(step=100), FinalRanks()),
        one_stage(Plateau(), GrowBy(4), repeat=True),
    ],
)
def test_presets_contradict_nothing(schedule):
    ranges = check_schedule(schedule, How(), highest=32, run=RUN)
    assert len(ranges) == len(schedule)


def test_ranges_say_where_ranks_may_be_after_each_stage():
    schedule = [
        Stage(At(step=1), GrowBy(8)),
        Stage(At(step=2), Energy(0.9, lowest=3, multiple=2)),
        Stage(At(step=3), Rank(16)),
        Stage(At(step=4), Factor(0.5)),
    ]
    assert check_schedule(schedule, How(), highest=32, run=RUN) == [(40, 40), (4, 40), (4, 16), (2, 8)]


def test_ranges_of_a_repeated_stage_go_all_the_way_down():
    schedule = halving_on_plateau(3, deadline=None)
    assert check_schedule(schedule, How(), highest=32, run=RUN) == [(3, 16)]
    with pytest.raises(ConfigurationError, match="at most rank = 16"):
        check_schedule([*schedule, Stage(At(step=99), Rank(20))], How(), highest=32, run=RUN)


def test_planned_step_is_the_time_or_the_deadline():
    assert Stage(At(step=7), Rank(8)).planned_step(RUN) == 7
    assert Stage(At(epoch=2), Rank(8)).planned_step(RUN) == 40
    assert Stage(Plateau(), Rank(8), deadline=0.255).planned_step(RUN) == 26
    assert Stage(Plateau(), Rank(8)).planned_step(RUN) is None
    assert Stage(Plateau(), Towards(8)).needs == frozenset()
    assert Stage(Plateau(), Energy(0.9)).needs == {"values"}
    assert Stage(Plateau(), Budget(share=0.5, score="sensitivity")).needs == {"scores"}
