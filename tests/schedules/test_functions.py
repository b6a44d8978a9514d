"""Functions of the step, by hand and as stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynrank.errors import ConfigurationError
from dynrank.schedules import constant, cosine, from_function, geometric, join, linear


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 50))
def test_linear_and_cosine_go_one_way_from_start_to_end(start, end, steps):
    for function in (linear(start, end, steps), cosine(start, end, steps)):
        ranks = [function(step) for step in range(steps + 3)]
        assert ranks[0] == start
        assert ranks[steps:] == [end] * 3
        assert ranks == sorted(ranks, reverse=start > end)


@pytest.mark.parametrize(
    ("function", "ranks"),  # of every second step
    [
        (constant(7), [7, 7, 7, 7]),
        (linear(4, 8, 4), [4, 6, 8, 8]),
        (cosine(32, 8, 8), [32, 28, 20, 12]),  # 20 + 12 cos(pi t / 8)
        (geometric(64, 8, every=2), [64, 32, 16, 8]),
        (geometric(4, 30, every=2, factor=2), [4, 8, 16, 30]),
    ],
)
def test_function_by_hand(function, ranks):
    assert [function(step) for step in range(0, 8, 2)] == ranks


def test_join_counts_each_from_its_own_start():
    seen = []

    def spy(name, rank):
        return lambda step: seen.append((name, step)) or rank

    schedule = join([spy("a", 1), join([spy("b", 2), spy("c", 3)], [2])], boundaries=[3])
    assert [schedule(step) for step in range(7)] == [1, 1, 1, 2, 2, 3, 3]
    assert seen == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("c", 0), ("c", 1)]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=30))
def test_from_function_plays_back_any_function(ranks):
    changes = {stage.when.step: stage.to.rank for stage in from_function(ranks.__getitem__, len(ranks))}
    played = []
    for step in range(len(ranks)):
        played.append(changes.get(step, played[-1] if played else None))
    assert played == ranks
    assert len(changes) == 1 + sum(a != b for a, b in zip(ranks, ranks[1:], strict=False))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: join([constant(1)], [3]), "functions must be one more"),
        (lambda: join([constant(1)] * 3, [5, 3]), "boundaries must be ascending"),
        (lambda: linear(8, 4, 0), "steps must .* got 0$"),
        (lambda: from_function(lambda step: 2 - step, 3), "function .* int of at least 1, got 0 at step 2"),
        (lambda: from_function(lambda step: 2.5, 3), "function .* int of at least 1, got 2.5 at step 0"),
    ],
)
def test_what_cannot_be_counted_is_refused(make, words):
    with pytest.raises(ConfigurationError, match=words):
        make()
