"""Functions of the step, by hand and as stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynrank.errors import ConfigurationError
from dynrank.schedules import constant, cosine, from_function, geometric, join, linear


def test_functions_by_hand():
    assert [linear(8, 4, 4)(step) for step in range(6)] == [8, 7, 6, 5, 4, 4]
    assert [linear(4, 8, 2)(step) for step in range(4)] == [4, 6, 8, 8]
    assert [cosine(32, 8, 4)(step) for step in range(6)] == [32, 28, 20, 12, 8, 8]  # 20 + 12 cos(pi t / 4)
    assert [geometric(64, 8, every=10)(step) for step in (0, 9, 10, 20, 30, 99)] == [64, 64, 32, 16, 8, 8]
    assert [geometric(4, 30, every=5, factor=2)(step) for step in (0, 5, 10, 15, 99)] == [4, 8, 16, 30, 30]
    assert constant(7)(123) == 7


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 50))
def test_linear_and_cosine_go_one_way_from_start_to_end(start, end, steps):
    for function in (linear(start, end, steps), cosine(start, end, steps)):
        ranks = [function(step) for step in range(steps + 3)]
        assert ranks[0] == start
        assert ranks[steps:] == [end] * 3
        assert ranks == sorted(ranks, reverse=start > end)


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
        (lambda: cosine(0, 4, 3), "start must .* got 0$"),
        (lambda: geometric(8, 4, every=0), "every must .* got 0$"),
        (lambda: from_function(lambda step: 2 - step, 3), "function .* int of at least 1, got 0 at step 2"),
        (lambda: from_function(lambda step: 2.5, 3), "function .* int of at least 1, got 2.5 at step 0"),
    ],
)
def test_what_cannot_be_counted_is_refused(make, words):
    with pytest.raises(ConfigurationError, match=words):
        make()
