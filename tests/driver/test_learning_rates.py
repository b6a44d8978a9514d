"""The factor as an optimizer sees it: the rate is read inside the step, from what SGD does to its parameter."""

import contextlib
import copy
from functools import partial

import bitsandbytes
import pytest
import schedulefree
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler as lr
from transformers import (
    Adafactor,
    GreedyLR,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

import dynrank
from dynrank.driver.driver import RankDriver
from dynrank.driver.learning_rates import (
    LR_FACTOR,
    LearningRates,
    check_groups,
    factor_of_change,
    mark_as_loaded,
    warn_of_low_rate,
)
from dynrank.driver.schedulers import forget_plateau
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage
from dynrank.targets import Rank
from dynrank.triggers import At, Run


def test_factor_is_a_number_or_keeps_the_size_of_a_step():
    assert factor_of_change(How(lr_factor=2.0), {"q": 16}, {"q": 4}) == 2.0
    assert factor_of_change(How(lr_factor="sqrt"), {"q": 16, "v": 16}, {"q": 7, "v": 1}) == pytest.approx(2.0)


@pytest.fixture
def pair():
    """(adapter, head), each with a gradient of -1."""
    adapter = nn.Parameter(torch.zeros(1))
    head = nn.Parameter(torch.zeros(1))
    adapter.grad = -torch.ones(1)
    head.grad = -torch.ones(1)
    return adapter, head


class Knowing(Training):
    """As under a trainer, each rate that is no scheduler's is the program's own."""

    knows_schedulers = True


def scheduled(optimizer, schedulers, kind=Training):
    return kind(nn.Module(), [optimizer], schedulers=schedulers)


def plateau(optimizer):
    """It falls after every third step, whatever the metric."""
    scheduler = lr.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, min_lr=1e-3)
    step, scheduler.step = scheduler.step, lambda: step(1.0)
    return scheduler


@pytest.mark.parametrize("options", [{"patience": 2}, {"patience": 0, "cooldown": 2, "warmup": 2}])
@pytest.mark.parametrize("before", [[9.0, 8.0], [1.0, 2.0]])
@pytest.mark.parametrize("after", [[5.0, 4.0, 3.0], [5.0, 6.0, 7.0]])
def test_a_scheduler_that_waits_for_a_metric_counts_from_nothing_after_a_cut(before, after, options):
    """Also one that raises the rate after good values, which has counted some."""
    found = []
    for earlier in (before, []):
        scheduler = GreedyLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5), **options)
        for value in earlier:
            scheduler.step(value)
        forget_plateau([scheduler])
        scheduler.optimizer.param_groups[0]["lr"] = 0.5
        rates = []
        for value in after:
            scheduler.step(value)
            rates.append(scheduler.optimizer.param_groups[0]["lr"])
        found.append(rates)
    assert found[0] == found[1]


def in_turn(optimizer, first=lr.LinearLR, **options):
    parts = first(optimizer, 0.1, total_iters=4), lr.CosineAnnealingLR(optimizer, 14, **options)
    return lr.SequentialLR(optimizer, [*parts], [4])


def cyclic(optimizer, lowest, highest):
    return lr.CyclicLR(optimizer, lowest, highest, 4, mode="triangular2", cycle_momentum=False)


# From an optimizer and, for schedulers that are given rates, a factor for each of its groups.
SCHEDULERS = {
    "Lambda": lambda o, f: lr.LambdaLR(o, lambda step: 0.9**step),
    "Multiplicative": lambda o, f: lr.MultiplicativeLR(o, lambda step: 0.9),
    "Step": lambda o, f: lr.StepLR(o, 3, 0.5),
    "MultiStep": lambda o, f: lr.MultiStepLR(o, [3, 9], 0.5),
    "Constant": lambda o, f: lr.ConstantLR(o, 0.3, total_iters=9),
    "Linear": lambda o, f: lr.LinearLR(o, 0.1, total_iters=9),
    "Exponential": lambda o, f: lr.ExponentialLR(o, 0.9),
    "Polynomial": lambda o, f: lr.PolynomialLR(o, 18, power=2.0),
    "Cosine": lambda o, f: lr.CosineAnnealingLR(o, 8),
    "Cosine to a floor": lambda o, f: lr.CosineAnnealingLR(o, 18, eta_min=0.1),
    "Restarts": lambda o, f: lr.CosineAnnealingWarmRestarts(o, 4, eta_min=0.1),
    "OneCycle": lambda o, f: lr.OneCycleLR(o, [0.5 * x for x in f], total_steps=20, cycle_momentum=False),
    "Cyclic": lambda o, f: cyclic(o, [0.1 * x for x in f], [0.5 * x for x in f]),
    "Plateau": lambda o, f: plateau(o),
    "Sequential": lambda o, f: in_turn(o),
    "Sequential to a floor": lambda o, f: in_turn(o, eta_min=0.1),
    "Constant below a later floor": lambda o, f: in_turn(o, lr.ConstantLR, eta_min=0.1),
    "Chained": lambda o, f: lr.ChainedScheduler([lr.LinearLR(o, 0.1, total_iters=9), lr.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("changed_at", [2, 7])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_goes_on_as_one_made_with_the_multiplied_rate(pair, name, changed_at):
    """The adapter's group does, and the head's is left alone; step 2 lies within warm-ups."""
    adapter, head = pair

    def run(times):
        optimizer = torch.optim.SGD([{"params": [head]}, {"params": [adapter], "lr": 0.5 * times}], lr=0.5)
        return optimizer, SCHEDULERS[name](optimizer, [1.0, times])

    optimizer, scheduler = run(1.0)
    fresh, expected = run(3.0)
    for step in range(18):
        if step == changed_at:
            # The second one finds the factor in the group.
            LearningRates(optimizer, [adapter], 3.0, scheduled(optimizer, [scheduler], Knowing)).remove()
            LearningRates(optimizer, [adapter], 3.0, scheduled(optimizer, [scheduler], Knowing))
        before = adapter.item()
        optimizer.step()
        fresh_rates = [group["lr"] for group in fresh.param_groups]
        if step >= changed_at:
            assert adapter.item() - before == pytest.approx(fresh_rates[1], rel=1e-4, abs=1e-5)
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(fresh_rates)
            assert scheduler.get_last_lr() == pytest.approx(expected.get_last_lr())
        scheduler.step()
        fresh.step()
        expected.step()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_of_a_checkpoint_goes_on_with_a_new_optimizer(pair, name):
    """As one made with the multiplied rate does, which also begins at the base rate again."""
    adapter, head = pair

    def run(times):
        optimizer = torch.optim.SGD([{"params": [head]}, {"params": [adapter], "lr": 0.5 * times}], lr=0.5)
        return optimizer, SCHEDULERS[name](optimizer, [1.0, times])

    optimizer, scheduler = run(1.0)
    fresh, expected = run(3.0)
    LearningRates(optimizer, [adapter], 3.0, scheduled(optimizer, [scheduler], Knowing))
    for each in (optimizer, scheduler, fresh, expected) * 5:
        each.step()
    states = scheduler.state_dict(), expected.state_dict()
    optimizer, scheduler = run(1.0)
    fresh, expected = run(3.0)
    scheduler.load_state_dict(states[0])
    expected.load_state_dict(states[1])
    LearningRates(optimizer, [adapter], 3.0, scheduled(optimizer, [scheduler], Knowing))
    for _ in range(12):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([g["lr"] for g in fresh.param_groups])
        for each in (optimizer, scheduler, fresh, expected):
            each.step()


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("what", ["rates", "rates and what is shown", "base rates"])
@pytest.mark.parametrize("name", ["Lambda", "Step", "Cosine", "Restarts", "Exponential"])
def test_rates_from_which_a_scheduler_computes_count_as_set_without_the_factor(pair, name, what, resumed):
    """Programs that go on at another rate set them: LambdaLR (transformers' schedules) overwrites the group's rate."""
    adapter, _ = pair

    def used(factor):
        optimizer = torch.optim.SGD([adapter], lr=0.5)
        scheduler = SCHEDULERS[name](optimizer, [1.0])
        training = scheduled(optimizer, [scheduler], Knowing)
        rates = LearningRates(optimizer, [adapter], factor, training)
        for _ in range(2):
            optimizer.step()
            scheduler.step()
        saved = rates.of_groups()
        if resumed:
            rates.remove()
        scheduler.base_lrs = [0.2]
        if what != "base rates":
            optimizer.param_groups[0] |= {"lr": 0.2, "initial_lr": 0.2}
        if what == "rates and what is shown":
            scheduler._last_lr = [0.2]
        if resumed:
            LearningRates(optimizer, [adapter], factor, training, saved)
        found = []
        for _ in range(6):
            before = adapter.item()
            optimizer.step()
            scheduler.step()
            found.append(adapter.item() - before)
        return torch.tensor(found)

    expected = used(1.0) * 3
    with pytest.warns(UserWarning, match="rate of param group 0.* to 0.2. It counts as set without the factor 3"):
        torch.testing.assert_close(used(3.0), expected, rtol=1e-4, atol=1e-5)


# The loop is resumed before its first step.
@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_that_a_loop_steps_to_its_place_has_the_factor_once(pair, name):
    """Whether it computes its rate from a base rate, or multiplies the one that the loop has loaded."""
    adapter, _ = pair

    def used(times, factor):
        def made():
            optimizer = torch.optim.SGD([adapter], lr=0.5 * times)
            return optimizer, SCHEDULERS[name](optimizer, [times])

        first, scheduler = made()
        LearningRates(first, [adapter], factor, scheduled(first, [scheduler]))
        for each in (first, scheduler) * 6:
            each.step()
        optimizer, scheduler = made()
        optimizer.load_state_dict(first.state_dict())
        for _ in range(6):
            scheduler.step()
        LearningRates(optimizer, [adapter], factor, scheduled(optimizer, [scheduler]))
        found = []
        for _ in range(6):
            before = adapter.item()
            optimizer.step()
            scheduler.step()
            found.append(adapter.item() - before)
        return found

    assert used(1.0, 3.0) == pytest.approx(used(3.0, 1.0), rel=1e-4, abs=1e-5)


def test_rate_of_an_unknown_scheduler_is_raised_in_the_step_alone(pair):
    """It may set absolute rates, and so may a scheduler that a module keeps to itself, or a loop that gives none."""

    class Own(lr.LRScheduler):
        def get_lr(self):
            return [0.5 / (1 + self.last_epoch) for _ in self.optimizer.param_groups]

    adapter, _ = pair
    for make in (lambda made: [Own(made)], lambda made: [] if lr.StepLR(made, 9) else None, lambda _: None):
        optimizer = torch.optim.SGD([adapter], lr=0.5)
        schedulers = make(optimizer)
        before = adapter.item()
        LearningRates(optimizer, [adapter], 3.0, scheduled(optimizer, schedulers))
        optimizer.step()
        assert (optimizer.param_groups[0]["lr"], adapter.item() - before) == pytest.approx((0.5, 1.5))
        for scheduler in schedulers or ():
            scheduler.step()
            before = adapter.item()
            optimizer.step()
            assert adapter.item() - before == pytest.approx(0.75)


@pytest.mark.parametrize("kind", ["whole", "of keys that exist"])
@pytest.mark.parametrize("end", ["none", "finish", "abort"])
def test_rates_go_on_in_a_resume_by_torchs_distributed_checkpoint(kind, end, tmp_path):
    """It loads those keys of a param group alone that a new optimizer has, so not what a driver has written there."""

    def train(until, load=False):
        torch.manual_seed(0)
        model = dynrank.add_lora(nn.Sequential(nn.Linear(6, 6)), rank=4)
        saved = torch.load(tmp_path / "saved.pt") if load else None
        if load:
            model.load_state_dict(saved["model"])
        optimizer = torch.optim.AdamW(dynrank.adapter_parameters(model), lr=1e-2)
        scheduler = lr.CosineAnnealingLR(optimizer, 20)
        driver = RankDriver(Stage(At(step=4), Rank(2), how=How(lr_factor=2.0)))
        if load and kind == "whole":
            optimizer.load_state_dict(saved["optimizer"])
        elif load:
            state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
            checkpoint.load(state, checkpoint_id=tmp_path / "folder")
            set_optimizer_state_dict(model, optimizer, state["optimizer"])
        if load:
            scheduler.load_state_dict(saved["scheduler"])
            driver.load_state_dict(saved["driver"])
        loop = Training(model, [optimizer], step=saved["step"] if load else 0, schedulers=[scheduler])
        driver.start(loop, Run(20))
        rates = {}
        while loop.step < until:
            driver.advance(loop)
            rates[loop.step] = optimizer.param_groups[0]["lr"]
            model(torch.ones(2, 6)).square().mean().backward()
            optimizer.step()
            loop.step += 1
            driver.end_step(loop)
            optimizer.zero_grad()
            scheduler.step()
        if end == "finish":
            driver.finish(loop)
        elif end == "abort":
            driver.abort()
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "driver": driver}
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": until}, tmp_path / "saved.pt")
        checkpoint.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / "folder")
        return rates

    whole = train(20)
    train(10)
    assert train(20, load=True) == {step: rate for step, rate in whole.items() if step >= 10}


def test_a_new_optimizer_that_has_the_rate_of_a_checkpoint_by_chance_contains_no_factor(pair):
    """Such as 0, where one schedule ends and the warm-up of the next one begins."""
    adapter, _ = pair
    for rate in (0.0, 0.5):
        new = torch.optim.AdamW([adapter], lr=rate)
        mark_as_loaded(new, [(rate, 2.0, {})])
        assert LR_FACTOR not in new.param_groups[0]
        new.step()
        mark_as_loaded(new, [(rate, 2.0, {})])
        assert new.param_groups[0][LR_FACTOR] == 2.0
        plain = torch.optim.SGD([adapter], lr=rate)
        mark_as_loaded(plain, [(rate, 2.0, {})])
        assert (LR_FACTOR in plain.param_groups[0]) == (rate > 0)


def test_a_group_that_is_added_after_the_start_is_in_checkpoints_and_the_end():
    model = dynrank.add_lora(nn.Sequential(nn.Linear(6, 6)), rank=4)
    optimizer = torch.optim.AdamW(dynrank.adapter_parameters(model), lr=1e-2)
    driver = RankDriver(Stage(At(step=4), Rank(2)))
    loop = Training(model, [optimizer])
    driver.start(loop, Run(20))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})
    assert driver.state_dict()["rates"] == [[(1e-2, 1.0, {}), (0.5, 1.0, {})]]
    driver.abort()


def test_rate_that_a_checkpoint_contains_is_not_raised_again(pair):
    """Of optimizer and scheduler; a new optimizer, as in a second run, contains nothing of the factor."""
    adapter, _ = pair

    def run(*saved):
        optimizer = torch.optim.SGD([adapter], lr=0.5)
        parts = optimizer, lr.LambdaLR(optimizer, lambda step: 0.5**step)
        for part, state in zip(parts, saved, strict=False):
            part.load_state_dict(state)
        LearningRates(optimizer, [adapter], 3.0, scheduled(optimizer, [parts[1]]))
        return parts

    first = run()
    first[0].step()
    first[1].step()
    again = run(*(copy.deepcopy(part.state_dict()) for part in first))
    for optimizer, scheduler in (first, again):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.75)
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == pytest.approx([0.375])


@pytest.mark.parametrize("told", [True, False])
def test_scheduler_that_replaces_another_at_a_change_gets_the_next_factor_too(pair, told):
    """It starts from the raised rate, also one of which the loop has not told; that is said."""
    adapter, _ = pair
    unnamed = pytest.warns(UserWarning, match=r"group 0.* to 0.5\. It counts as set with the factor 2 .* have 0.5;")
    optimizer = torch.optim.SGD([adapter], lr=0.5)
    training = scheduled(optimizer, [lr.LambdaLR(optimizer, lambda step: 1.0)])
    rates = LearningRates(optimizer, [adapter], 1.0, training)
    rates.multiply(2.0)
    warmup = lr.LinearLR(optimizer, 0.5, total_iters=2)
    if told:
        training.schedulers = [warmup]
    with contextlib.nullcontext() if told else unnamed:
        for expected in (0.5, 0.75, 1.0, 2.0, 2.0):
            if expected == 2.0 and rates.factor == 2.0:
                rates.multiply(2.0)
            before = adapter.item()
            optimizer.step()
            assert adapter.item() - before == pytest.approx(expected)
            warmup.step()


@pytest.mark.parametrize("sets", ["absolute", "relative"])
@pytest.mark.parametrize("kind", [Training, Knowing])
@pytest.mark.parametrize("schedulers", [None, []])
def test_rate_that_the_program_sets_first_after_a_change_is_raised_once(pair, kind, schedulers, sets):
    """Without a scheduler the rate in the group never contains the factor, so both ways of setting it are right."""
    adapter, _ = pair
    optimizer = torch.optim.SGD([adapter], lr=0.5)
    rates = LearningRates(optimizer, [adapter], 1.0, scheduled(optimizer, schedulers, kind))
    rates.multiply(2.0)
    (group,) = optimizer.param_groups
    for expected in (1.0, 0.5, 0.5, 1.5):
        if expected == 1.5:
            rates.multiply(3.0)
        elif expected == 0.5 and group["lr"] == 0.5:
            group["lr"] = 0.25 if sets == "absolute" else group["lr"] * 0.5
        before = adapter.item()
        assert rates.of_next_step() == pytest.approx([expected])
        optimizer.step()
        assert adapter.item() - before == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "used"), [(Knowing, 1.0), (Training, 0.5)])
def test_rate_that_is_first_set_beside_a_scheduler_after_a_change_is_spoken_of(pair, kind, used):
    """Nobody can tell the old rate from half of the raised one: a trainer takes the first, and says so."""
    adapter, _ = pair
    optimizer = torch.optim.SGD([adapter], lr=0.5)
    scheduler = lr.StepLR(optimizer, 2, 0.1)
    rates = LearningRates(optimizer, [adapter], 1.0, scheduled(optimizer, [scheduler], kind))
    rates.multiply(2.0)
    optimizer.param_groups[0]["lr"] *= 0.5
    before = adapter.item()
    with pytest.warns(UserWarning, match=rf"param group 0.* to 0\.5.*so adapters have {used:g};"):
        optimizer.step()
    assert adapter.item() - before == pytest.approx(used)
    for share in (1.0, 0.1):
        scheduler.step()
        before = adapter.item()
        # It is said once.
        optimizer.step()
        assert adapter.item() - before == pytest.approx(share * used)


@pytest.mark.parametrize("schedules", [True, False])
def test_rate_in_a_tensor_that_all_groups_share_is_raised_for_adapters_alone(pair, schedules):
    """torch puts the same tensor into each group."""
    adapter, head = pair
    other = nn.Parameter(torch.zeros(1))
    other.grad = -torch.ones(1)
    groups = [{"params": [head]}, {"params": [adapter]}, {"params": [other]}]
    optimizer = torch.optim.SGD(groups, lr=torch.tensor(0.5))
    schedulers = [lr.StepLR(optimizer, 1, 0.5)] if schedules else []
    rates = LearningRates(optimizer, [adapter, other], 1.0, scheduled(optimizer, schedulers, Knowing))
    rate = 0.5
    for factor in (1.0, 2.0, 2.0, 6.0, 6.0):
        rates.multiply(factor / rates.factor)
        before = [parameter.item() for parameter in (head, adapter, other)]
        optimizer.step()
        moved = [after.item() - start for after, start in zip((head, adapter, other), before, strict=True)]
        assert moved == pytest.approx([rate, rate * factor, rate * factor])
        for scheduler in schedulers:
            scheduler.step()
            rate *= 0.5


LIMITED = {
    "polynomial": partial(get_polynomial_decay_schedule_with_warmup, lr_end=0.1, power=2.0),
    "cosine": partial(get_cosine_with_min_lr_schedule_with_warmup, min_lr=0.1),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step()")
@pytest.mark.parametrize("place", ["before the optimizer is loaded", "before the start", "after it"])
def test_scheduler_that_a_resumed_loop_steps_to_its_place_keeps_the_factor(pair, place):
    """Instead of loading its state."""
    adapter, _ = pair

    def made():
        optimizer = torch.optim.SGD([adapter], lr=0.1)
        return optimizer, lr.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step(optimizer, scheduler, count):
        for _ in range(count):
            optimizer.step()
            scheduler.step()

    def forward(scheduler):
        for _ in range(4):
            scheduler.step()

    optimizer, scheduler = made()
    rates = LearningRates(optimizer, [adapter], 1.0, scheduled(optimizer, [scheduler]))
    step(optimizer, scheduler, 2)
    rates.multiply(3.0)
    step(optimizer, scheduler, 2)
    again, other = made()
    if place == "before the optimizer is loaded":
        forward(other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if place == "before the start":
        forward(other)
    LearningRates(again, [adapter], 3.0, scheduled(again, [other]))
    if place == "after it":
        forward(other)
    for number in range(4, 8):
        before = adapter.item()
        step(again, other, 1)
        assert adapter.item() - before == pytest.approx(3 * 0.1 / (1 + number), rel=1e-3)


@pytest.mark.parametrize("changed_at", [1, 5, 13])
@pytest.mark.parametrize("name", LIMITED)
def test_limit_of_transformers_schedules_stays_also_in_a_resumed_run(pair, name, changed_at):
    """In warm-up, while it falls, and after its end, as one that is made with the multiplied rate."""
    adapter, _ = pair

    class Limited(Knowing):
        limits_are_rates = True

    def run(rate, *saved):
        optimizer = torch.optim.SGD([adapter], lr=rate)
        parts = optimizer, LIMITED[name](optimizer, 3, 12)
        for part, state in zip(parts, saved, strict=False):
            part.load_state_dict(state)
        return parts

    changed = run(0.5)
    fresh = run(1.5)
    rates = LearningRates(changed[0], [adapter], 1.0, scheduled(changed[0], [changed[1]], Limited))
    for step in range(16):
        if step == changed_at:
            rates.multiply(3.0)
        if step >= changed_at:
            resumed = run(0.5, *(copy.deepcopy(part.state_dict()) for part in changed))
            LearningRates(resumed[0], [adapter], rates.factor, scheduled(resumed[0], [resumed[1]], Limited))
            assert changed[0].param_groups[0]["lr"] == pytest.approx(fresh[0].param_groups[0]["lr"])
            optimizer, scheduler = resumed
            optimizer.step()
            scheduler.step()
        for optimizer, scheduler in (changed, fresh):
            optimizer.step()
            scheduler.step()
        if step >= changed_at:
            assert resumed[1].get_last_lr() == pytest.approx(fresh[1].get_last_lr())


@pytest.mark.parametrize("known", [None, False, True])
def test_limit_that_may_be_a_rate_or_a_share_is_warned_of(pair, known):
    """A function of transformers says only which share of the rate it is."""
    adapter, _ = pair

    class Loop(Training):
        limits_are_rates = known

    optimizer = torch.optim.SGD([adapter], lr=0.5)
    scheduler = LIMITED["cosine"](optimizer, 3, 12)
    rates = LearningRates(optimizer, [adapter], 1.0, scheduled(optimizer, [scheduler], Loop))
    with contextlib.nullcontext() if known is not None else pytest.warns(match=r"falls to 0\.2 .* by 3.*min_lr"):
        rates.multiply(3.0)


TOGETHER = {
    "chained": lambda *parts: [lr.ChainedScheduler([*parts])],
    "a list": lambda *parts: [*parts],
    "within another": lambda *parts: [
        lr.SequentialLR(parts[0].optimizer, [lr.ChainedScheduler([*parts]), lr.StepLR(parts[0].optimizer, 9)], [12])
    ],
}


@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("changed_at", [2, 7])
def test_limit_that_other_schedulers_multiply_lets_the_factor_be_made_in_the_step(pair, together, changed_at):
    """The rate that they have set is left alone, and multiplied by the whole factor."""
    adapter, _ = pair

    def run():
        optimizer = torch.optim.SGD([adapter], lr=0.5)
        parts = lr.LinearLR(optimizer, 0.1, total_iters=6), lr.CosineAnnealingLR(optimizer, 16, eta_min=0.1)
        return optimizer, TOGETHER[together](*parts)

    optimizer, schedulers = run()
    alone, expected = run()
    rates = LearningRates(optimizer, [adapter], 1.0, scheduled(optimizer, schedulers, Knowing))
    for step in range(14):
        if step == changed_at:
            rates.multiply(3.0)
        before = adapter.item()
        optimizer.step()
        rate = alone.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["lr"] == rate
        assert adapter.item() - before == pytest.approx(rate * (3.0 if step >= changed_at else 1.0), rel=1e-4)
        alone.step()
        for scheduler in [*schedulers, *expected]:
            scheduler.step()


@pytest.mark.parametrize("given", [{"lr_init": 1.0, "lr_end": 0.1}, {"lr_end": 0.1}])
def test_function_of_a_user_with_arguments_of_transformers_names_is_multiplied(pair, given):
    def falling(step, lr_end, lr_init=1.0):
        return max(lr_end, lr_init - step / 10)

    adapter, _ = pair
    optimizer = torch.optim.SGD([adapter], lr=0.5)
    scheduler = lr.LambdaLR(optimizer, partial(falling, **given))
    rates = LearningRates(optimizer, [adapter], 1.0, scheduled(optimizer, [scheduler], Knowing))
    rates.multiply(3.0)
    for step in range(12):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(3 * 0.5 * falling(step, **given))
        optimizer.step()
        scheduler.step()


def test_state_that_is_loaded_during_a_run_is_no_rate_of_the_program_s_own(pair):
    adapter, _ = pair
    optimizer = torch.optim.SGD([adapter], lr=0.5)
    schedulers = [lr.StepLR(optimizer, 9)]
    rates = LearningRates(optimizer, [adapter], 3.0, scheduled(optimizer, schedulers, Knowing))
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.9
    optimizer.load_state_dict(state)
    assert rates.of_next_step() == [0.9]
    optimizer.step()
    assert adapter.item() == pytest.approx(0.9)


OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "fused AdamW": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "Adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "8-bit AdamW": partial(bitsandbytes.optim.AdamW8bit, lr=1e-2, min_8bit_size=1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_group_ends_in_the_bits_of_a_group_for_each(name):
    def ends(groups):
        generator = torch.Generator().manual_seed(0)
        adapter, head = (nn.Parameter(torch.randn(64, 64, generator=generator)) for _ in range(2))
        optimizer = OPTIMIZERS[name](groups(adapter, head))
        LearningRates(optimizer, [adapter], 3.0)
        for _ in range(3):
            for parameter in (adapter, head):
                parameter.grad = torch.randn(64, 64, generator=generator)
            optimizer.step()
        return adapter, head

    two = ends(lambda adapter, head: [{"params": [adapter]}, {"params": [head]}])
    for value, expected in zip(ends(lambda adapter, head: [adapter, head]), two, strict=True):
        assert torch.equal(value, expected)


def test_checkpoint_of_a_mixed_group_has_no_lr_factor(pair):
    runs = []
    for factor in (3.0, 1.0):
        adapter, head = copy.deepcopy(pair)
        optimizer = torch.optim.SGD([head, adapter], lr=0.5, momentum=0.9)
        LearningRates(optimizer, [adapter], factor)

        def interrupted(optimizer=optimizer):
            runs.append(optimizer.state_dict())
            raise KeyboardInterrupt

        optimizer.step()
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(interrupted)
        runs.append(optimizer.state_dict())
    assert runs[0] == runs[1] == runs[2] == runs[3]


def test_optimizer_that_counts_in_its_groups_needs_one_of_adapters_alone(pair):
    adapter, head = pair
    mixed = schedulefree.SGDScheduleFree([adapter, head], lr=0.1)
    check_groups(mixed, [adapter], How())
    parted = schedulefree.SGDScheduleFree([{"params": [adapter]}, {"params": [head]}])
    how = How(lr_factor=2.0)
    check_groups(parted, [adapter], how)
    words = r"lr_factor=2.*group 0, which also has 1 other.*lr_factor"
    with pytest.raises(ConfigurationError, match=words):
        check_groups(mixed, [adapter], how)


def test_d_of_torchs_adafactor_is_a_setting_and_no_state(pair):
    check_groups(torch.optim.Adafactor([*pair]), pair[:1], How(lr_factor=2.0))


def test_optimizer_that_computes_its_own_rate_is_refused_a_factor(pair):
    adapter, head = pair
    check_groups(Adafactor([adapter]), [adapter], How())
    # It has no rate that could be too low.
    warn_of_low_rate(Training(nn.Module(), [Adafactor([adapter])]))
    check_groups(Adafactor([adapter], lr=1e-3, relative_step=False), [adapter], How(lr_factor=2.0))
    check_groups(Adafactor([{"params": [head]}]), [adapter], How(lr_factor=2.0))
    with pytest.raises(ConfigurationError, match=r"Adafactor computes its own; set lr_factor=1.*relative_step=False"):
        check_groups(Adafactor([adapter, head]), [adapter], How(lr_factor="sqrt"))


def test_group_that_is_added_later_has_no_part_of_the_factor(pair):
    adapter, head = pair
    optimizer = torch.optim.SGD([adapter], lr=0.5)
    LearningRates(optimizer, [adapter], 3.0)
    optimizer.add_param_group({"params": [head]})
    optimizer.step()
    assert (adapter.item(), head.item()) == pytest.approx((1.5, 0.5))


def test_adapters_in_a_group_that_is_added_later_follow_its_scheduler(pair):
    adapter, head = pair
    optimizer = torch.optim.SGD([head], lr=0.5)
    scheduler = lr.StepLR(optimizer, 1, 0.5)
    optimizer.add_param_group({"params": [adapter]})
    rates = LearningRates(optimizer, [adapter], 3.0, scheduled(optimizer, [scheduler]))
    for expected in (1.5, 3.0, 4.5):
        optimizer.step()
        scheduler.step()
        assert adapter.item() == pytest.approx(expected)
        rates.multiply(2.0)
