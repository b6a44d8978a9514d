"""Effects of directions against finite differences of the loss, and the choice of directions against brute force."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

import dynrank
from dynrank.adapters.by_data import effects, greedy
from dynrank.adapters.squeeze import squeeze
from dynrank.errors import ConfigurationError
from dynrank.linalg import truncate_product

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])


class Times(torch.nn.Module):
    """Multiplies the columns of B by gates."""

    def __init__(self, gates):
        super().__init__()
        self.gates = gates

    def forward(self, lora_B):
        return lora_B * self.gates


def losses_of(model, kind):
    """Each example's loss, one at a time; transformers' own loss would be float32."""
    for i, ids in enumerate(IDS):
        logits = model(input_ids=ids[None]).logits[0 if kind != "bert" else slice(None)]
        yield F.cross_entropy(logits, torch.tensor([i])) if kind == "bert" else F.cross_entropy(logits[:-1], ids[1:])


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_effects_are_finite_differences_of_the_loss_by_gates(zoo, kind):
    """GPT-2 has adapted embeddings, too. (Llama computes its norms in float32.)"""
    model = zoo.adapted(kind, base=zoo.plain(kind).double(), dtype=torch.float64)
    layers = dict(dynrank.lora_layers(model))
    found = effects(layers, losses_of(model, kind), scale=8)
    for name, layer in layers.items():
        change = truncate_product(layer.lora_B, layer.lora_A, layer.rank)
        layer.set_factors(change.lora_A, change.lora_B)
        gates = torch.ones(layer.rank, dtype=torch.float64)
        parametrize.register_parametrization(layer, "lora_B", Times(gates))
        for i in range(layer.rank):
            ends = []
            for step in (1e-5, -2e-5):
                gates[i] += step
                with torch.no_grad():
                    ends.append(torch.stack([*losses_of(model, kind)]))
            gates[i] += 1e-5
            torch.testing.assert_close(found[name][:, i], (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-9)
        parametrize.remove_parametrizations(layer, "lora_B")


def test_dropping_all_gates_of_an_expert_stack_counts_every_expert():
    """The loss is linear in B, so the effects of all directions together are the loss itself."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4))
    dynrank.add_lora(model, rank=2, alpha=2, target_modules=["0"], dtype=torch.float64)
    ((name, own),) = dynrank.lora_layers(model)
    own.set_factors(torch.randn(6, 5, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64))
    own.num_products = 3
    weights = torch.randn(3, 4, 5, dtype=torch.float64)
    loss = sum((w * (b @ a.detach())).sum() for w, (b, a) in zip(weights, own.products(), strict=True))
    found = effects({name: own}, [loss])
    assert found[name].shape == (1, 2)
    torch.testing.assert_close(found[name].sum(), loss.detach())


def test_directions_without_a_value_have_no_effect(zoo):
    model = zoo.adapted("llama")
    layers = dict(dynrank.lora_layers(model))
    first = next(iter(layers.values()))
    with torch.no_grad():
        first.lora_B[:, 1:] = first.lora_B[:, :1]
    found = effects(layers, losses_of(model, "llama"))
    assert (found[next(iter(layers))] != 0).sum(1).tolist() == [1, 1, 1]


def test_layer_outside_of_the_loss_is_an_error(zoo):
    model = zoo.adapted("llama")
    layers = dict(dynrank.lora_layers(model))
    first = next(iter(layers.values()))
    with pytest.raises(ConfigurationError, match=r"no gradient of an example in --data reaches 'model\.layers\.0\."):
        effects(layers, [first.lora_B.new_ones((), requires_grad=True) * 2])


def cost(rows, gone, terms=1):
    """The estimate by its definition."""
    gone = [*gone]
    gradient = rows.mean(0)
    hessian = (terms * rows.mT) @ rows / len(rows)
    return float(-gradient[gone].sum() + 0.5 * hessian[gone][:, gone].sum())


def dropped(kept, ranks):
    """Numbers of the dropped directions in all layers together."""
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    whole = {start + j for start, rank in zip(starts, ranks, strict=True) for j in range(rank)}
    return whole - {start + j for start, keep in zip(starts, kept.values(), strict=True) for j in keep.tolist()}


@pytest.mark.parametrize("seed", range(5))
def test_each_drop_is_the_cheapest_per_parameter_by_brute_force(seed):
    rows = torch.randn(20, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    given = {"a": rows[:, :4], "b": rows[:, 4:]}
    widths = {"a": 5, "b": 9}
    terms = torch.arange(1, 21)
    owner = "aaaabbbbb"
    gone = []
    total = 65
    while total > 14:
        allowed = [i for i in range(9) if i not in gone and sum(owner[j] == owner[i] for j in gone) + 1 < (4, 5)[i > 3]]
        gone.append(
            min(allowed, key=lambda i: (cost(rows, [*gone, i], terms) - cost(rows, gone, terms)) / widths[owner[i]])
        )
        total -= widths[owner[gone[-1]]]
        assert dropped(greedy(given, terms, widths, 1, total), [4, 5]) == set(gone)


def test_ranks_end_at_the_lowest_and_layers_below_it_keep_theirs():
    rows = torch.randn(20, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = {"b": rows[:, :4], "a": rows[:, 4:6], "c": rows[:, 6:]}
    kept = greedy(given, torch.ones(20), dict.fromkeys(given, 5), 3, 0)
    assert {name: len(keep) for name, keep in kept.items()} == {"b": 3, "a": 2, "c": 3}


def test_choice_does_not_depend_on_the_order_of_layers_also_with_ties():
    rows = torch.randn(6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round()
    given = {name: rows[:, 3 * i : 3 * i + 3] for i, name in enumerate("abcd")}
    ways = [
        greedy({n: given[n] for n in order}, torch.ones(6), dict.fromkeys(given, 7), 1, 42)
        for order in ("abcd", "dbca")
    ]
    assert {n: k.tolist() for n, k in ways[0].items()} == {n: k.tolist() for n, k in ways[1].items()}


def test_budget_keeps_the_layer_that_the_loss_needs_and_weight_the_large_one(tmp_path, zoo):
    """Of two layers one is large and gets zeros as input, the other is small, and the loss falls with its update."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"large": torch.nn.Linear(6, 6), "small": torch.nn.Linear(6, 6)}).double()
    dynrank.add_lora(model, rank=4, alpha=4, target_modules=["large", "small"], dtype=torch.float64)
    zoo.trained(model)
    layers = dict(dynrank.lora_layers(model))
    with torch.no_grad():
        layers["large"].lora_B.mul_(100)
    small = layers["small"]
    large = layers["large"]
    losses = [large(0 * x).sum() - (small(x) - small.base(x)).square().sum() for x in torch.eye(6).double()]
    widths = dict.fromkeys(layers, 12)
    by_data = greedy(effects(layers, losses), torch.ones(6), widths, 1, 60)
    assert {name: len(keep) for name, keep in by_data.items()} == {"large": 1, "small": 4}
    dynrank.save_adapter(model, tmp_path / "adapter")
    by_weight = squeeze(tmp_path / "adapter", tmp_path / "small", budget=60)
    assert {report.layer: report.rank_after for report in by_weight} == {"large": 4, "small": 1}
