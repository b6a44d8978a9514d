"""The choice of directions against brute force, and the estimate against a loss that really is quadratic."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynrank.change.greedy import Quadratic
from dynrank.targets import Budget, LayerState


def quadratic(seed, ranks, width=10, samples=30, spread=1.0):
    """(the quadratic, its gradient, its Hessian) of layers l0, l1, ... of these ranks."""
    generator = torch.Generator().manual_seed(seed)
    gradients = {f"l{i}": torch.randn(r, generator=generator, dtype=torch.float64) for i, r in enumerate(ranks)}
    roots = {f"l{i}": torch.randn(samples, r, generator=generator, dtype=torch.float64) for i, r in enumerate(ranks)}
    roots = {name: root * spread ** torch.arange(root.shape[1]) for name, root in roots.items()}
    whole = torch.cat([*roots.values()], dim=1)
    return (
        Quadratic(gradients, roots, dict.fromkeys(gradients, width)),
        torch.cat([*gradients.values()]),
        whole.mT @ whole,
    )


def cost(gradient, hessian, gone):
    index = list(gone)
    return float(-gradient[index].sum() + 0.5 * hessian[index][:, index].sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_estimate_is_the_quadratic_whatever_is_kept(seed, ranks, data):
    found, gradient, hessian = quadratic(seed, ranks)
    kept, gone, start = {}, [], 0
    for i, rank in enumerate(ranks):
        stays = sorted(data.draw(st.sets(st.integers(0, rank - 1))))
        kept[f"l{i}"] = torch.tensor(stays, dtype=torch.int64)
        gone += [start + j for j in range(rank) if j not in stays]
        start += rank
    parts = found.estimated_loss(kept)
    assert sum(part.total for part in parts.values()) == pytest.approx(cost(gradient, hessian, gone), abs=1e-10)
    assert all(part.second_order >= 0 for part in parts.values())
    if len(ranks) == 1:
        assert parts["l0"].between_layers == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("seed", range(10))
def test_one_drop_is_the_best_of_all_and_many_are_close_to_the_best_subset(seed):
    found, gradient, hessian = quadratic(seed, [4, 4], spread=0.6)
    for dropped in (1, 4):
        subsets = [s for s in combinations(range(8), dropped) if {0, 1, 2, 3} - set(s) and {4, 5, 6, 7} - set(s)]
        costs = sorted(cost(gradient, hessian, subset) for subset in subsets)
        order = found.dropped({"l0": 1, "l1": 1})[0][:dropped]
        mine = cost(gradient, hessian, order)
        assert costs[0] - 1e-12 <= mine <= (costs[0] + 1e-12 if dropped == 1 else costs[len(costs) // 10])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(4)))
def test_choice_does_not_depend_on_the_order_of_layers(seed, order):
    generator = torch.Generator().manual_seed(seed)
    # Rounding makes ties.
    gradients = {f"l{i}": torch.randn(3, generator=generator).double().round() for i in range(4)}
    roots = {f"l{i}": torch.randn(6, 3, generator=generator).double().round() for i in range(4)}
    widths = dict.fromkeys(gradients, 7)
    names = [f"l{i}" for i in order]
    one = Quadratic(gradients, roots, widths)
    other = Quadratic({n: gradients[n] for n in names}, {n: roots[n] for n in names}, widths)
    ranks = dict.fromkeys(gradients, 1)
    assert {n: k.tolist() for n, k in one.kept(ranks).items()} == {n: k.tolist() for n, k in other.kept(ranks).items()}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(3, 11))
def test_budget_by_values_is_the_greedy_stopped_where_the_pool_holds(seed, directions):
    """Also where the cheapest drops lower the loss, and where later drops are cheaper than earlier ones."""
    found, gradient, _ = quadratic(seed, [4, 4, 4])
    states = {name: LayerState(4, 5, 5, values=values) for name, values in found.values().items()}
    ranks = Budget(parameters=10 * directions).ranks(states)
    assert sum(ranks.values()) == directions
    order, _ = found.dropped(dict.fromkeys(states, 1))
    gone = set(order[: 12 - directions])
    expected = {f"l{i}": [j for j in range(4) if 4 * i + j not in gone] for i in range(3)}
    assert {name: kept.tolist() for name, kept in found.kept(ranks).items()} == expected


def test_cost_counts_per_parameter():
    gradients = {"narrow": torch.zeros(2).double(), "wide": torch.zeros(2).double()}
    roots = {"narrow": torch.eye(4)[:, :2].double(), "wide": 1.5 * torch.eye(4)[:, 2:].double()}
    dear = Quadratic(gradients, roots, {"narrow": 10, "wide": 100})
    assert {n: len(k) for n, k in dear.kept({"narrow": 1, "wide": 1}).items()} == {"narrow": 1, "wide": 1}
    # The layers lose 1.125 / 100 and 0.5 / 10 for each parameter, and the smaller loss comes first.
    assert dear.dropped({"narrow": 1, "wide": 1})[0] == [3, 1]
