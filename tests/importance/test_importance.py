"""The importance of layers, against a loop by hand in float64; and ranks in proportion to it, against a bisection."""

import copy
import io
from itertools import pairwise
from statistics import stdev

import prodigyopt
import pytest
import schedulefree
import torch
from by_hand import ByHand
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from storages import storages_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM

import dynrank
from dynrank.driver.driver import RankDriver
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.importance.importance import Importance, bytes_held
from dynrank.schedules import How, Stage
from dynrank.targets import Budget, LayerState, Rank
from dynrank.triggers import At, Run

X = torch.randn(20, 8, 6, generator=torch.Generator().manual_seed(1))
# Of an optimizer that has no rule.
STATES = {"unknown": "reset"}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "Muon": lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
}


class Shared(nn.Module):
    """A layer that runs twice, an embedding, and a layer that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 6)
        self.twice = nn.Linear(6, 6)
        self.idle = nn.Linear(6, 6)

    def forward(self, x):
        return self.twice(torch.tanh(self.twice(x + self.words.weight[0] + self.words(x[:, 0].abs().long()))))


def trained(model, steps, *observers, optimizer=OPTIMIZERS["AdamW"], dtype=torch.float32, backward=None):
    made = optimizer([p for p in model.parameters() if p.requires_grad])
    for step in range(steps):
        loss = (model(X[step].to(dtype)) - X[step, :, :6].roll(1, -1)).square().mean()
        if backward is None:
            loss.backward()
            made.step()
        else:
            backward(loss, made, step)
        for observer in observers:
            observer.end_step()
        made.zero_grad()


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return dynrank.add_lora(Shared(), rank=3, alpha=3, target_modules=["words", "twice", "idle"], dtype=dtype)


def sgd(model):
    return torch.optim.SGD(dynrank.adapter_parameters(model), lr=0.1)


def measuring(model, *optimizers, at=15, **how):
    """(driver, training) at the start of a run whose stage at step ``at`` shares ranks by importance."""
    driver = RankDriver(Stage(At(step=at), Budget(share=0.5), how=How(**how)))
    training = Training(model, optimizers or [sgd(model)])
    driver.start(training, Run(total_steps=20))
    return driver, training


@pytest.mark.parametrize(
    ("name", "dtype"), [("SGD", torch.float32), ("AdamW", torch.bfloat16), ("Muon", torch.float32)]
)
def test_shares_are_the_sums_of_a_loop_by_hand(name, dtype):
    model = model_of(dtype).to(dtype)
    measured = Importance(dict(dynrank.lora_layers(model)))
    hand = ByHand(model)
    trained(model, 12, measured, hand, optimizer=OPTIMIZERS[name], dtype=dtype)
    for layer, share in measured.of_layers().items():
        terms = hand.terms(layer)
        assert len(terms) == 11
        assert share.value == pytest.approx(sum(terms), rel=1e-4, abs=1e-7)
        assert share.error == pytest.approx(stdev(terms) * 11**0.5, rel=1e-4, abs=1e-7)
    assert measured.of_layers()["idle"] == (0.0, 0.0)
    assert measured.of_layers()["twice"].value > 0


def test_shares_of_all_layers_add_up_to_the_decrease_of_the_loss():
    """With one batch and small steps, up to the second order."""
    model = model_of()
    before = Importance(dict(dynrank.lora_layers(model)))
    losses = []

    def step(_, made, __):
        loss = (model(X[0]) - X[0].roll(1, -1)).square().mean()
        losses.append(loss.item())
        loss.backward()
        made.step()

    trained(model, 20, before, optimizer=lambda p: torch.optim.SGD(p, lr=0.05), backward=step)
    importance = sum(share.value for share in before.of_layers().values())
    assert importance == pytest.approx(losses[0] - losses[-1], rel=0.02)


OVERWRITING = {
    "AdamWScheduleFree": lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2),
    "RAdamScheduleFree": lambda p: schedulefree.RAdamScheduleFree(p, lr=1e-2, foreach=False),
    "SGDScheduleFree": lambda p: schedulefree.SGDScheduleFree(p, lr=0.1, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, foreach=True),
    "Prodigy": lambda p: prodigyopt.Prodigy(p, weight_decay=0.1, decouple=False),
    "unknown": lambda p: type("Mine", (schedulefree.AdamWScheduleFree,), {})(p, lr=1e-2),
}


@pytest.mark.parametrize("by_closure", [False, True])
@pytest.mark.parametrize("name", OVERWRITING)
def test_gradients_that_the_step_overwrites_are_measured_as_they_were(name, by_closure):
    model = model_of()
    made = OVERWRITING[name](dynrank.adapter_parameters(model))
    hand = ByHand(model)
    driver, training = measuring(model, made, optimizer_state=STATES.get(name, "transport"))
    getattr(made, "train", lambda: None)()
    overwritten = False
    for step in range(12):
        gradients = {}

        @torch.enable_grad()
        def closure(step=step, gradients=gradients):
            made.zero_grad()
            backward(model, X[step], X[step].roll(1, -1))
            gradients.update({p: p.grad.clone() for p in dynrank.adapter_parameters(model) if p.grad is not None})

        made.step(closure) if by_closure else (closure(), made.step())
        training.step += 1
        driver.end_step(training)
        for parameter, gradient in gradients.items():
            overwritten |= not torch.equal(parameter.grad, gradient)
            parameter.grad = gradient
        hand.end_step()
    assert overwritten
    assert driver.state_dict()["importance"]["sums"] == pytest.approx(
        [sum(hand.terms(layer)) for layer in hand.layers], rel=1e-4, abs=1e-8
    )


def test_scaled_loss_whose_first_steps_are_skipped_brings_the_same():
    """The first scale overflows float32, so GradScaler skips steps, and in these the factors do not move."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60, growth_interval=1000)

    def step(loss, made, number):
        scaler.scale(1024 * loss).backward()
        scaler.step(made)
        scaler.update()

    plain = model_of()
    scaled = model_of()
    seen = [Importance(dict(dynrank.lora_layers(model))) for model in (plain, scaled)]
    trained(plain, 10, seen[0], backward=lambda loss, made, step: ((1024 * loss).backward(), step > 0 and made.step()))
    trained(scaled, 10, seen[1], backward=step)
    assert scaler.get_scale() < 2.0**127
    for name, share in seen[0].of_layers().items():
        assert seen[1].of_layers()[name].value == pytest.approx(share.value, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_fused_step_that_a_head_alone_made_infinite_is_measured_as_without_fusing(name, separate):
    """A fused optimizer leaves the gradients of such a step scaled."""
    found = {}
    for fused in (False, True):
        model = model_of()
        head = nn.Parameter(torch.ones(()))
        adapters = dynrank.adapter_parameters(model)
        # Another optimizer of some factors does not skip the step, and is never fused.
        parts = [[*adapters[2:], head], adapters[:2]] if separate else [[*adapters, head]]
        made = [getattr(torch.optim, name)(p, lr=1e-2, fused=fused and i == 0) for i, p in enumerate(parts)]
        driver, training = measuring(model, *made)
        scaler = torch.amp.GradScaler("cpu", growth_interval=1000)
        for step in range(12):
            loss = (model(X[step]) - X[step].roll(1, -1)).square().mean()
            scaler.scale(loss + head * (float("inf") if step in (4, 5, 9) else 1.0)).backward()
            for optimizer in made:
                scaler.step(optimizer)
            scaler.update()
            training.step += 1
            driver.end_step(training)
            model.zero_grad()
            head.grad = None
        found[fused] = driver.state_dict()["importance"]
    assert scaler.get_scale() == 2.0**13
    assert any(found[True]["sums"])
    # The kernels differ in their last digits. Of several optimizers one that has skipped its step is known not to have
    # made it, so another gradient judges the update before.
    for key in ("sums", "squares"):
        assert found[True][key] == pytest.approx(found[False][key], rel=0.2 if separate else 1e-4, abs=1e-8)
    if not separate:
        assert found[True]["steps"] == found[False]["steps"] == [11, 11, 0]


def in_halves(model, x, target):
    """Two backwards of half a batch each."""
    for rows in (slice(0, 4), slice(4, 8)):
        (0.5 * (model(x[rows]) - target[rows]).square().mean()).backward()


def backward(model, x, target):
    (model(x) - target).square().mean().backward()


def in_bfloat16(model, x, target):
    with torch.autocast("cpu", torch.bfloat16):
        backward(model, x, target)


def recomputed(model, x, target):
    (checkpoint(model, x, use_reentrant=False) - target).square().mean().backward()


def clipped(model, x, target):
    backward(model, x, target)
    # A bound above every norm, so that only the place of clipping in the step is new.
    nn.utils.clip_grad_norm_(model.parameters(), 1e3)


def compiled(model, x, target):
    backward(torch.compile(model, backend="aot_eager"), x, target)


@pytest.mark.parametrize(
    ("way", "tolerance"), [(in_halves, 1e-4), (clipped, 1e-4), (recomputed, 1e-5), (compiled, 1e-4), (in_bfloat16, 0.1)]
)
def test_ways_to_make_a_step_bring_the_same(way, tolerance):
    found = []
    for make_gradients in (backward, way):
        model = model_of()
        measured = Importance(dict(dynrank.lora_layers(model)))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for x in X[:10]:
            optimizer.zero_grad()
            make_gradients(model, x, x.roll(1, -1))
            optimizer.step()
            measured.end_step()
        found.append(measured.of_layers())
    for name in ("words", "twice"):
        assert found[1][name].value == pytest.approx(found[0][name].value, rel=tolerance)


def test_experts_and_tied_layers_bring_the_sums_of_a_loop_by_hand():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        tie_word_embeddings=True,
    )
    names = ["q_proj", "experts.down_proj", "embed_tokens"]
    model = dynrank.add_lora(MixtralForCausalLM(config), rank=3, alpha=3, target_modules=names)
    measured = Importance(dict(dynrank.lora_layers(model)))
    hand = ByHand(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(24, (8, 2, 10), generator=torch.Generator().manual_seed(0))
    for rows in tokens:
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        measured.end_step()
        hand.end_step()
    found = measured.of_layers()
    assert any("experts" in name for name in found)
    assert any("embed_tokens" in name for name in found)
    for name, share in found.items():
        assert share.value == pytest.approx(sum(hand.terms(name)), rel=1e-4, abs=1e-7)
        assert share.value != 0


def test_step_without_finite_gradients_is_left_out():
    model = model_of()
    measured = Importance(dict(dynrank.lora_layers(model)))
    hand = ByHand(model)

    def step(loss, made, number):
        loss.backward()
        if number == 5:
            model.twice.lora_A.grad[0, 0] = float("nan")
        else:
            made.step()

    trained(model, 10, measured, hand, backward=step)
    terms = hand.terms("twice")
    assert measured.of_layers()["twice"].value == pytest.approx(sum(t for t in terms if t == t), rel=1e-5)
    assert measured.of_layers()["words"].value == pytest.approx(
        sum(hand.terms("words")) - hand.terms("words")[4], rel=1e-5
    )


def test_ranks_that_somebody_else_has_changed_start_the_updates_anew():
    model = model_of()
    measured = Importance(dict(dynrank.lora_layers(model)))
    trained(model, 5, measured)
    dynrank.resize(model, 2, optimizers=())
    trained(model, 1, measured)
    before = measured.of_layers()
    trained(model, 1, measured)
    assert measured.of_layers() == before
    trained(model, 1, measured)
    assert measured.of_layers() != before


def test_layers_of_several_dtypes_get_the_sums_of_a_loop_by_hand():
    """Each dtype has a buffer of its own; a factor of 1,500 numbers fills a block and a part of the next."""
    torch.manual_seed(0)
    net = dynrank.add_lora(nn.Sequential(nn.Linear(6, 500), nn.Tanh(), nn.Linear(500, 6)), rank=3, backend="reference")
    net[2].lora_A.data = net[2].lora_A.data.bfloat16()
    net[0].lora_B.data = net[0].lora_B.data.double()
    measured = Importance(dict(dynrank.lora_layers(net)))
    hand = ByHand(net)
    trained(net, 8, measured, hand, optimizer=OPTIMIZERS["SGD"])
    for name, found in measured.of_layers().items():
        assert found.value == pytest.approx(sum(hand.terms(name)), rel=1e-4, abs=1e-9)
        assert found.value != 0


def test_loaded_state_goes_on_bit_for_bit():
    """From a step in which one layer had no gradient, so that its update waits."""
    model = model_of()
    layers = dict(dynrank.lora_layers(model))
    measured = Importance(layers)
    trained(model, 4, measured)
    model.words.requires_grad_(False)
    trained(model, 1, measured)
    other = Importance(layers)
    state = io.BytesIO()
    torch.save(measured.state_dict(), state)
    state.seek(0)
    other.load_state_dict(torch.load(state, weights_only=True))
    for factor in (model.words.lora_A, model.words.lora_B):
        factor.requires_grad_(True)
    trained(model, 4, measured, other)
    for name, tensor in measured.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0)


class Counted(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


def operations_in_a_step(layers, target):
    """How many operations the driver dispatches after a step."""
    model = dynrank.add_lora(nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers))), rank=2)
    driver = RankDriver(Stage(At(step=15), target))
    driven(driver, model, range(5))
    model(X[5]).square().mean().backward()
    training = Training(model, [sgd(model)], step=6)
    with Counted() as counted:
        driver.end_step(training)
    return counted.count


def test_step_takes_as_many_operations_for_few_layers_as_for_many():
    few, many = (operations_in_a_step(layers, Budget(share=0.5)) for layers in (8, 224))
    assert 0 < few == many <= 40


@pytest.mark.parametrize("target", [Rank(1), Budget(share=0.5, by="weight")])
def test_step_takes_no_operation_where_no_stage_asks_for_importance(target):
    assert operations_in_a_step(8, target) == 0


@pytest.mark.filterwarnings("ignore:1 of . layers, 'idle' first, had no gradients")
def test_importance_is_measured_until_the_last_stage_that_asks_for_it():
    model = model_of()
    shared = Stage(At(step=10), Budget(share=0.8))
    driver = RankDriver([Stage(At(step=5), Rank(2)), shared, Stage(At(step=15), Rank(1))])
    driven(driver, model, range(20))
    known = [[layer.importance is not None for layer in event.layers] for event in driver.history]
    assert [set(each) for each in known] == [{True}, {True}, {False}]
    assert driver.state_dict()["importance"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_held_are_those_of_two_copies_of_each_factor(dtype):
    torch.manual_seed(0)
    model = dynrank.add_lora(nn.Sequential(nn.Linear(6, 1024), nn.Linear(1024, 6)), rank=4, dtype=dtype).to(dtype)
    measured = Importance(dict(dynrank.lora_layers(model)))
    trained(model, 4, measured, dtype=dtype)
    factors = dynrank.adapter_parameters(model)
    held = bytes_held(factors)
    # Three sums by layer, two flags, and three numbers of each factor.
    assert 0 <= sum(storages_of(measured, ["_layers", "_factors"]).values()) - held <= 8 * (3 * 2 + 3 * 4 + 2 * 4)
    # Each small factor is filled up to a block.
    assert held == pytest.approx(sum(factor.numel() * (dtype.itemsize + 4) for factor in factors), rel=0.3)


# Ranks


def bisected(values, sizes, highest, pool, lowest=1):
    """The largest factor of all values whose rounded ranks fit the pool, by a bisection; nothing is filled up."""

    def at(factor):
        return {name: min(max(round(factor * v), lowest), highest[name]) for name, v in values.items()}

    low = 0.0
    high = 1e6
    for _ in range(200):
        middle = (low + high) / 2
        fits = sum(rank * sizes[name] for name, rank in at(middle).items()) <= pool
        low, high = (middle, high) if fits else (low, middle)
    return at(low)


@st.composite
def problems(draw):
    count = draw(st.integers(1, 6))
    values = draw(st.lists(st.floats(0.01, 10.0), min_size=count, max_size=count, unique=True))
    ranks = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    sizes = draw(st.sampled_from([[10], [10, 25]]))
    widths = [sizes[index % len(sizes)] for index in range(count)]
    layers = {
        f"{index}": LayerState(rank, size, size, importance=value)
        for index, (value, rank, size) in enumerate(zip(values, ranks, widths, strict=True))
    }
    # Which of two equal quotients comes first is a matter of rounding.
    quotients = sorted(la.importance / (2 * rank + 1) for la in layers.values() for rank in range(1, la.rank))
    assume(all(high > low * (1 + 1e-9) for low, high in pairwise(quotients)))
    least, most = (sum(layers[n].params_per_rank * r for n, r in of.items()) for of in (
        dict.fromkeys(layers, 1), {n: la.rank for n, la in layers.items()}
    ))  # fmt: skip
    return layers, draw(st.integers(least, most))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_ranks_are_in_proportion_to_importance(problem):
    layers, pool = problem
    ranks = Budget(parameters=pool).ranks(layers)
    sizes = {name: layer.params_per_rank for name, layer in layers.items()}
    expected = bisected(
        {name: layer.importance for name, layer in layers.items()},
        sizes,
        {name: layer.rank for name, layer in layers.items()},
        pool,
    )
    left = pool - sum(rank * sizes[name] for name, rank in expected.items())
    if len({*sizes.values()}) == 1:
        assert ranks == expected
    else:
        # The rest goes to layers that are narrower than the one that does not fit.
        extra = {name: ranks[name] - rank for name, rank in expected.items()}
        assert min(extra.values()) >= 0
        assert sum(count * sizes[name] for name, count in extra.items()) <= left < max(sizes.values())


def state(importance, rank=8, **options):
    return LayerState(rank, 10, 10, importance=importance, **options)


@pytest.mark.parametrize(
    ("budget", "layers", "expected"),
    [
        ({"final_rank": 4}, [None, None, None], [4, 4, 4]),
        ({"final_rank": 4}, [0.0, 0.0, 0.0], [4, 4, 4]),
        ({"final_rank": 4}, [3.0, 1.0, 0.0], [8, 3, 1]),
        ({"final_rank": 4, "highest": 6}, [9.0, 1.0, 1.0], [6, 3, 3]),
        ({"final_rank": 4, "lowest": 2}, [9.0, 1.0, 0.0], [8, 2, 2]),
        # Two layers share what the loss needs; a third has needed nothing.
        ({"final_rank": 6}, [1.0, 1.0, 0.0], [8, 8, 1]),
    ],
)
def test_bounds_of_ranks_by_importance(budget, layers, expected):
    states = {f"{index}": state(value) for index, value in enumerate(layers)}
    assert [*Budget(**budget).ranks(states).values()] == expected


def test_pinned_layers_and_own_bounds_stay_out_of_the_proportion():
    layers = {
        "pinned": state(99.0, lowest=8, highest=8),
        "own": state(0.1, lowest=5, highest=5),
        "capped": state(9.0, highest=3),
        "free": state(9.0),
    }
    ranks = Budget(parameters=20 * 24).ranks(layers)
    assert ranks == {"pinned": 8, "own": 5, "capped": 3, "free": 8}


def driven(driver, model, steps):
    """``steps`` further steps of a plain loop, from where the driver's last loop ended."""
    training = Training(model, [sgd(model)], step=steps[0])
    driver.start(training, Run(total_steps=20))
    for step in steps:
        driver.advance(training)
        model(X[step]).square().mean().backward()
        training.optimizers[0].step()
        training.step += 1
        driver.end_step(training)
        training.optimizers[0].zero_grad()


def test_optimizers_that_step_in_turn_are_judged_by_their_next_own_gradients():
    """As in a GAN: the gradients of the other optimizer's layers lie there, old and added to."""
    torch.manual_seed(0)
    model = dynrank.add_lora(
        nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), rank=3, alpha=3, dtype=torch.float64
    )
    layers = dict(dynrank.lora_layers(model.double()))
    factors = {name: [layer.lora_A, layer.lora_B] for name, layer in layers.items()}
    optimizers = {name: torch.optim.SGD(pair, lr=0.3, momentum=0.5) for name, pair in factors.items()}
    driver, training = measuring(model, *optimizers.values())
    updates = {}
    terms = {name: [] for name in layers}
    for step, name in enumerate(["0", "2", "2", "0", "0", "2", "0", "2"]):
        optimizers[name].zero_grad()
        (model(X[step].double()) - X[step].double().roll(1, -1)).square().mean().backward()
        if name in updates:
            pairs = zip(factors[name], updates[name], strict=True)
            terms[name].append(-sum((p.grad * update).sum().item() for p, update in pairs))
        before = [p.detach().clone() for p in factors[name]]
        optimizers[name].step()
        updates[name] = [p.detach() - old for p, old in zip(factors[name], before, strict=True)]
        training.step += 1
        driver.end_step(training)
    measured = Importance(layers)
    measured.load_state_dict(driver.state_dict()["importance"])
    for name, share in measured.of_layers().items():
        assert share.value == pytest.approx(sum(terms[name]), rel=1e-9)
        assert share.error == pytest.approx(stdev(terms[name]) * len(terms[name]) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_that_are_gone_before_end_step_are_refused(set_to_none, parts):
    """Otherwise nothing would be known of these layers, and they would fall to the lowest rank."""
    model = model_of()
    factors = dynrank.adapter_parameters(model)
    optimizers = [torch.optim.SGD(factors[part::parts], lr=0.1) for part in range(parts)]
    driver, training = measuring(model, *optimizers)
    model(X[0]).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    optimizers[0].zero_grad(set_to_none)
    training.step += 1
    with pytest.raises(ConfigurationError, match=r"^[^.]*call end_step .*RankScheduler\.step\) before zero_grad$"):
        driver.end_step(training)


@pytest.mark.parametrize("ended", [0, 7])
def test_second_step_whose_end_was_not_told_is_refused(ended):
    """Otherwise nothing would be known of any layer; a loop that ends a step before it counts it tells none in time."""
    model = model_of()
    driver, training = measuring(model)

    def step(number, counted):
        training.optimizers[0].zero_grad()
        model(X[number]).square().mean().backward()
        training.optimizers[0].step()
        training.step += counted
        driver.end_step(training)

    for number in range(ended + 1):
        step(number, counted=number < ended)
    with pytest.raises(ConfigurationError, match=r"end_step was not called .* call driver\.end_step\(training\) after"):
        step(ended + 1, counted=True)


def test_steps_that_torch_makes_to_save_an_optimizer_are_none_of_the_run():
    """Of one without a state, as SGD, each save makes a step at a rate of zero."""
    found = []
    for saves in (False, True):
        model = model_of()
        driver, training = measuring(model)
        for step in range(6):
            model(X[step]).square().mean().backward()
            training.optimizers[0].step()
            training.step += 1
            driver.end_step(training)
            training.optimizers[0].zero_grad()
            if saves:
                get_optimizer_state_dict(model, training.optimizers)
        found.append(driver.state_dict()["importance"]["sums"])
    assert found[0] == found[1]
    assert any(found[0])


def test_change_that_knows_nothing_of_any_layer_warns():
    """As of an optimizer that steps, and deletes gradients, within the backward pass."""
    driver, training = measuring(model_of(), at=3)
    for training.step in (1, 2, 3):
        driver.end_step(training)
    with pytest.warns(match="at step 3 shares ranks by importance, and nothing is known"):
        driver.advance(training)


def test_layers_that_no_step_has_reached_are_named_at_the_change():
    """As those whose weights a module reads past them; a pinned one has no part in the change."""

    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read, self.pinned = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            return self.called(nn.functional.linear(x, self.read.weight))

    model = dynrank.add_lora(Past(), rank=4, rank_map={"pinned": {"pinned": True}})
    driver, training = measuring(model, at=3)
    for step in range(3):
        driver.advance(training)
        training.optimizers[0].zero_grad()
        model(X[step]).square().mean().backward()
        training.optimizers[0].step()
        training.step += 1
        driver.end_step(training)
    with pytest.warns(match="1 of 2 layers, 'read' first, had no gradients before the change of rank at step 3"):
        driver.advance(training)


def test_steps_without_gradients_of_adapters_are_no_fault():
    """A step of a head alone, a step that GradScaler skips, a loss of zero, and a layer that the loss does not reach"""
    model = model_of()
    head = nn.Parameter(torch.ones(6))
    made = torch.optim.SGD([*dynrank.adapter_parameters(model), head], lr=0.1)
    driver, training = measuring(model, made)
    scaler = torch.amp.GradScaler("cpu")
    losses = [
        lambda: (head.sum(), made),
        lambda: (float("inf") * model(X[0]).square().sum(), scaler),
        lambda: (0.0 * model(X[0]).square().sum(), made),
        lambda: (model(X[0]).square().mean(), made),
        lambda: (model(X[1]).square().mean(), made),
    ]
    for make in losses:
        loss, by = make()
        (scaler.scale(loss) if by is scaler else loss).backward()
        if by is scaler:
            scaler.step(made)
            made.zero_grad()
        else:
            made.step()
        training.step += 1
        driver.end_step(training)
        made.zero_grad()
    assert driver.state_dict()["importance"]["steps"] == [2, 2, 0]


def test_second_start_of_the_same_layers_goes_on_with_the_sums():
    """It loses the term of the step between the two, whose update no gradient has followed."""
    model = model_of()
    driver = RankDriver(Stage(At(step=15), Budget(share=0.5)))
    driven(driver, model, range(5))
    first = driver.state_dict()["importance"]
    driven(driver, model, range(5, 10))
    second = driver.state_dict()["importance"]
    # The layer that no loss reaches has none.
    assert (first["steps"], second["steps"]) == ([4, 4, 0], [8, 8, 0])


@pytest.mark.parametrize("by_peft", [False, True])
def test_run_leaves_nothing_on_a_model_that_is_copied_stored_or_used_again(by_peft):
    """Neither a copy's training nor a run that never ended enters another run's sums."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    if by_peft:
        model = get_peft_model(net, LoraConfig(r=3, target_modules=["0", "2"]))
    else:
        model = dynrank.add_lora(net, rank=3, alpha=3)
    schedule = Stage(At(step=15), Budget(share=0.5))
    interrupted = RankDriver(schedule)
    driven(interrupted, model, range(5))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    before = interrupted.state_dict()["importance"]["sums"]
    drivers = [RankDriver(schedule) for _ in range(3)]
    for driver, each in zip(drivers, [*copies, model], strict=True):
        driven(driver, each, range(5))
    assert interrupted.state_dict()["importance"]["sums"] == before
    first, *others = [driver.state_dict()["importance"]["sums"] for driver in drivers]
    assert any(first)
    assert others == [first] * 2


def test_state_between_a_load_and_the_start_is_that_of_the_checkpoint():
    model = model_of()
    driver = RankDriver(Stage(At(step=15), Budget(share=0.5)))
    driven(driver, model, range(5))
    state = driver.state_dict()
    other = RankDriver(Stage(At(step=15), Budget(share=0.5)))
    other.load_state_dict({**state, "lr_factor": 2.0})
    assert other.state_dict()["lr_factor"] == 2.0
    assert other.state_dict()["importance"] == state["importance"]
