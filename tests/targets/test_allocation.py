"""The allocation is the best there is: against brute force where that is possible, against a table over all budgets."""

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank.errors import ConfigurationError
from dynrank.targets.allocation import allocate

# small integers make sums exact and ties frequent; the decimals make them rounded
VALUES = st.one_of(st.integers(0, 5).map(float), st.sampled_from([0.1, 0.2, 0.3, 0.7, 1e-9, 1e6]))


@st.composite
def problems(draw, layers=4, irregular=True):
    """(gains, costs, choices, budget) of up to ``layers`` layers, whose lowest ranks the budget pays."""
    gains, costs, choices = [], [], []
    for _ in range(draw(st.integers(1, layers))):
        gains.append(sorted(draw(st.lists(VALUES, max_size=6)), reverse=True))
        costs.append(draw(st.integers(1, 12)))
        if irregular and draw(st.booleans()):
            choices.append(sorted(draw(st.sets(st.integers(1, 8), min_size=1, max_size=5))))
        else:
            low, multiple = draw(st.integers(1, 3)), draw(st.integers(1, 3))
            choices.append(range(low + -low % multiple, low + multiple + draw(st.integers(0, 4)) + 1, multiple))
    low, high = (sum(c * pick(ranks) for c, ranks in zip(costs, choices, strict=True)) for pick in (min, max))
    return gains, costs, choices, draw(st.integers(low, high + 3))


def value(gains, ranks):
    return sum(sum(row[:rank]) for row, rank in zip(gains, ranks, strict=True))


def price(costs, ranks):
    return sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))


@given(problems())
@settings(max_examples=400, deadline=None)
def test_allocate_finds_the_best_of_all_and_the_cheapest_of_equals(problem):
    gains, costs, choices, budget = problem
    ranks = allocate(*problem)
    assert all(rank in allowed for rank, allowed in zip(ranks, choices, strict=True))
    assert price(costs, ranks) <= budget
    affordable = [other for other in itertools.product(*choices) if price(costs, other) <= budget]
    best = max(value(gains, other) for other in affordable)
    tolerance = 1e-12 * best
    assert value(gains, ranks) >= best - tolerance
    cheapest = min(price(costs, other) for other in affordable if value(gains, other) >= best - tolerance)
    if all(gain == int(gain) and gain <= 5 for row in gains for gain in row):
        assert price(costs, ranks) == cheapest


@given(problems(layers=12), st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_allocate_keeps_no_less_with_a_larger_budget(problem, more):
    gains, costs, choices, budget = problem
    less = value(gains, allocate(*problem))
    assert value(gains, allocate(gains, costs, choices, budget + more)) >= less * (1 - 1e-12)


def best_by_table(gains, costs, choices, budget):
    """The optimum by a table over every budget: slow, and nothing in common with the code under test."""
    table = torch.zeros(budget + 1, dtype=torch.float64)
    for row, cost, ranks in zip(gains, costs, choices, strict=True):
        new = torch.full_like(table, -torch.inf)
        for rank in ranks:
            spent = cost * rank
            if spent <= budget:
                kept = table[: budget + 1 - spent] + float(torch.as_tensor(row)[:rank].sum())
                new[spent:] = torch.maximum(new[spent:], kept)
        table = new
    return float(table[budget])


@pytest.mark.parametrize("costs", [[3, 7] * 6, [13, 17, 29, 31, 41, 53] * 2, [97, 101, 103, 107, 109, 113]], ids=str)
@pytest.mark.parametrize("share", [0.15, 0.4, 0.8])
@pytest.mark.parametrize("irregular", [False, True])
def test_allocate_agrees_with_a_table_of_all_budgets(costs, share, irregular):
    generator = torch.Generator().manual_seed(len(costs) + int(100 * share))
    shape = (len(costs), 12)
    gains = torch.rand(shape, dtype=torch.float64, generator=generator).sort(1, descending=True).values
    choices = [[1, 2, 3, 5, 8, 12] if irregular and i % 2 else range(1, 13) for i in range(len(costs))]
    budget = int(share * 12 * sum(costs))
    ranks = allocate(gains, costs, choices, budget)
    assert price(costs, ranks) <= budget
    assert value(gains, ranks) == pytest.approx(best_by_table(gains, costs, choices, budget), rel=1e-12)


def test_allocate_is_better_than_greedy():
    # by gain per parameter the first layer would come first, and leave 4 parameters that buy nothing
    assert allocate([[6.1, 6.1], [9.9, 9.9]], [6, 10], [[1, 2], [1, 2]], budget=16 + 10) == [1, 2]


LLAMA, MINI = [8192] * 128 + [15104] * 96, [768] * 24 + [1920] * 12 + [485]
SPECTRA = {
    "random": lambda rows, n: torch.randn(rows, n).square() * torch.rand(rows, 1),
    "geometric": lambda rows, n: torch.rand(rows, 1) * torch.exp(-torch.arange(n) / n * 8 * torch.rand(rows, 1)),
    "flat": torch.ones,
    "zero": torch.zeros,
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("costs", "highest", "seconds"), [(LLAMA, 64, 5), (MINI, 32, 2)], ids=["llama", "mini"])
def test_allocate_is_fast_for_whole_models(costs, highest, seconds, spectrum):
    torch.manual_seed(0)
    gains = SPECTRA[spectrum](len(costs), highest).sort(1, descending=True).values
    for share in (0.1, 0.5, 0.9):
        budget = int(share * highest * sum(costs))
        start = time.perf_counter()
        ranks = allocate(gains, costs, [range(1, highest + 1)] * len(costs), budget)
        assert time.perf_counter() - start < seconds
        assert price(costs, ranks) <= budget
        if spectrum != "zero":
            assert price(costs, ranks) > 0.99 * budget


def test_allocate_is_fast_when_every_step_is_worth_the_same_per_parameter():
    ranks = allocate([[float(cost)] * 64 for cost in LLAMA], LLAMA, [range(1, 65)] * len(LLAMA), 50_000_000)
    assert 50_000_000 - 256 < price(LLAMA, ranks) <= 50_000_000  # 256 divides every cost


def test_allocate_gives_zero_layers_the_lowest_rank():
    assert allocate([[0.0, 0.0], [2.0, 1.0]], [5, 5], [range(1, 3)] * 2, 1000) == [1, 2]


def test_allocate_refuses_a_budget_below_the_lowest_ranks():
    with pytest.raises(ConfigurationError, match="at least 60, .* got 59"):
        allocate([[1.0], [1.0]], [10, 20], [range(2, 5)] * 2, 59)


@pytest.mark.parametrize("row", [[1.0, 2.0], [-1.0], [float("nan")], [float("inf")]], ids=str)
def test_allocate_refuses_gains_of_another_kind(row):
    with pytest.raises(ConfigurationError, match="non-increasing.*layer 1"):
        allocate([[1.0], row], [1, 1], [[1], [1]], 9)


@pytest.mark.parametrize(("costs", "choices"), [([1], [[1], [1]]), ([1, 1], [[1], []]), ([1, 0], [[1], [1]])])
def test_allocate_refuses_lists_that_do_not_fit(costs, choices):
    with pytest.raises(ConfigurationError):
        allocate([[1.0], [1.0]], costs, choices, 9)
