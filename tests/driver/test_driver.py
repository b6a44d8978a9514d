"""The driver in a loop of few lines: when it measures and acts, what it undoes, what it refuses, and its resume."""

import copy
import random
import signal
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import schedulefree
import torch
import trained
from interrupted import interrupted
from torch import nn

import dynrank
from dynrank.driver.driver import RankDriver
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, after_convergence, auto, early_budget
from dynrank.targets import Budget, GrowTo, Rank, Unchanged
from dynrank.triggers import At, Plateau, Run

torch.manual_seed(1)
X = torch.randn(80, 12)
Y = X @ torch.randn(12, 6)


class Loop(Training):
    """Keeps what it is told, and the steps of its validations."""

    def __init__(self, rank, optimizer):
        torch.manual_seed(0)
        model = dynrank.add_lora(nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6)), rank=rank, alpha=rank)
        super().__init__(model, [optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2)])
        self.validations = []
        self.told = []

    def validate(self):
        self.validations.append(self.step)
        with torch.no_grad():
            return {"val/loss": nn.functional.mse_loss(self.model(X), Y).item()}

    def tell(self, event):
        self.told.append(event)


def drive(
    driver,
    steps=24,
    *,
    every=5,
    rank=6,
    folder=None,
    start=None,
    batch_end=None,
    optimizer=torch.optim.AdamW,
    run=None,
):
    """Train; with ``folder`` save each step there, and go on from step ``start`` if that is given."""
    loop = Loop(rank, optimizer)
    if start is not None:
        saved = torch.load(folder / f"{start}.pt")
        loop.model.load_state_dict(saved["model"])
        loop.optimizers[0].load_state_dict(saved["optimizer"])
        driver.load_state_dict(saved["driver"])
        loop.step = start
    driver.start(loop, run or Run(steps))
    while loop.step < steps:
        driver.advance(loop)
        batch = torch.randint(80, (8,), generator=torch.Generator().manual_seed(loop.step))
        nn.functional.mse_loss(loop.model(X[batch]), Y[batch]).backward()
        loop.optimizers[0].step()
        loop.step += 1
        if batch_end is not None:
            batch_end(loop)
        driver.end_step(loop)
        loop.optimizers[0].zero_grad()
        if loop.step % every == 0:
            driver.validated(loop, loop.validate())
        if folder is not None and start is None:
            parts = {"model": loop.model, "optimizer": loop.optimizers[0], "driver": driver}
            torch.save({name: part.state_dict() for name, part in parts.items()}, folder / f"{loop.step}.pt")
    driver.finish(loop)
    return loop


def at(step, target, **how):
    return Stage(At(step=step), target, how=How(**how))


def due(stages, optimizer=torch.optim.SGD):
    """(driver, loop) right before the change of step 5."""
    driver = RankDriver(stages)
    loop = Loop(6, optimizer)
    driver.start(loop, Run(9))
    loop.step = 5
    return driver, loop


def trajectory(driver):
    return [(e.step, e.layers[0].rank_before, e.layers[0].rank_after) for e in driver.history]


SCHEDULES = {
    "undone, plateau": lambda: [Stage(Plateau(patience=2, min_delta=0.9), Rank(1), how=How(max_regression=0.02))],
    "grown, dropped": lambda: [at(4, Rank(3)), at(10, GrowTo(6)), at(15, Rank(2))],
    "auto": lambda: auto(0.05, at=0.5),
    "by importance": lambda: [at(s, Budget(final_rank=r)) for s, r in ((7, 4), (15, 2))],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_resume_from_any_checkpoint_is_bit_equal(name, tmp_path):
    def made():
        return RankDriver(SCHEDULES[name]())

    whole = made()
    expected = drive(whole, folder=tmp_path).model.state_dict()
    # Checkpoints lie before, at and after the change, and in its window.
    assert 3 < whole.history[0].step < 20
    for step in range(1, 24):
        again = made()
        model = drive(again, folder=tmp_path, start=step).model
        assert again.history == whole.history, step
        assert str(again.state_dict()) == str(whole.state_dict()), step
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key]), (step, key)


@pytest.mark.parametrize("name", SCHEDULES)
def test_loop_that_goes_back_to_a_checkpoint_trains_as_if_it_had_not_gone_on(name, tmp_path):
    whole = RankDriver(SCHEDULES[name]())
    expected = drive(whole, folder=tmp_path).model.state_dict()
    again = RankDriver(SCHEDULES[name]())
    # Two searches load one checkpoint each before the run goes on.
    places = {12: [10], 21: [9, 6]}

    def go_back(loop):
        for place in places.pop(loop.step, []):
            saved = torch.load(tmp_path / f"{place}.pt")
            loop.model.load_state_dict(saved["model"])
            loop.optimizers[0].load_state_dict(saved["optimizer"])
            again.load_state_dict(saved["driver"])
            loop.step = place

    model = drive(again, batch_end=go_back).model
    assert not places
    assert again.history == whole.history
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_a_frozen_layer_keeps_its_rank_and_its_update_in_a_pool():
    """It brings nothing, so the pool alone would leave one direction of it."""
    loop = Loop(6, torch.optim.AdamW)
    frozen, free = (layer for _, layer in dynrank.lora_layers(loop.model))
    for factor in (frozen.lora_A, frozen.lora_B):
        nn.init.normal_(factor.requires_grad_(False))
    update = frozen.delta_weight()
    loss = partial(nn.functional.mse_loss, target=Y)
    trained.drive(Stage(At(step=4), Budget(share=0.75)), loop, 8, lambda: loss(loop.model(X)))
    # 297 parameters are left, of which a direction of the first has 36 and of the second 30.
    assert (frozen.rank, free.rank) == (6, 2)
    torch.testing.assert_close(frozen.delta_weight(), update)


def test_stages_before_one_whose_time_has_come_are_over():
    driver = RankDriver([Stage(Plateau(patience=99), Rank(5)), Stage(Plateau(), Rank(4)), at(12, Rank(3))])
    drive(driver)
    assert trajectory(driver) == [(12, 6, 3)]
    assert driver.finished


CHECKED = pytest.mark.parametrize("how", [{"max_regression": 9.0}, {}], ids=["checked", "unchecked"])


@CHECKED
def test_interrupt_at_any_line_of_a_change_leaves_all_of_it_or_nothing(how):
    """Ranks and weights, history, stage and learning rate, with one point of no return."""

    def changed(line):
        driver, loop = due(at(5, Rank(3), lr_factor=2.0, **how))
        _, lines = interrupted(lambda: driver.advance(loop), line, below="driver")
        weights = torch.cat([value.flatten() for value in loop.model.state_dict().values()]).tolist()
        progress = driver.progress.stage, driver.lr_factor
        return (loop.model[0].rank, weights, *trajectory(driver), *progress), lines

    whole, lines = changed(0)
    ends = [changed(number)[0] for number in range(1, lines + 1)]
    before = ends.count(ends[0])
    assert (ends[0][0], ends[0][2:], whole[0], whole[2:]) == (6, (0, 1.0), 3, ((5, 6, 3), 1, 2.0))
    assert 0 < before < len(ends)
    assert ends == [ends[0]] * before + [whole] * (len(ends) - before)


def test_validations_of_a_change_move_neither_random_numbers_nor_buffers():
    driver, loop = due(at(5, Rank(1), max_regression=9.0))
    norm = nn.BatchNorm1d(12)
    loop.model.add_module("norm", norm)

    def validate():
        norm(X)
        return {"val/loss": torch.rand(()).item() + random.random() + np.random.rand()}

    def drawn():
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    def seeded():
        torch.manual_seed(1), random.seed(1), np.random.seed(1)

    seeded()
    expected = drawn()
    buffers = copy.deepcopy([*norm.buffers()])
    loop.validate = validate
    seeded()
    driver.advance(loop)
    assert drawn() == expected
    assert all(map(torch.equal, norm.buffers(), buffers))
    assert loop.model[0].rank == 1


def under_schedulefree(driver, loop, steps):
    """Train as transformers' Trainer does, which calls the optimizer's ``train`` in each step."""
    optimizer = loop.optimizers[0]
    driver.start(loop, Run(12))
    while loop.step < steps:
        driver.advance(loop)
        optimizer.train()
        optimizer.zero_grad()
        nn.functional.mse_loss(loop.model(X), Y).backward()
        optimizer.step()
        loop.step += 1
        driver.end_step(loop)


@pytest.mark.parametrize(("most", "other"), [(9.0, How()), (0.0, None)], ids=["kept", "undone"])
def test_validations_that_swap_the_weights_of_an_optimizer_of_schedulefree_change_nothing(most, other):
    """They call the optimizer's ``eval``."""

    def factors(*stages):
        loop = Loop(6, schedulefree.AdamWScheduleFree)
        validate = loop.validate
        optimizer = loop.optimizers[0]
        loop.validate = lambda: optimizer.eval() or validate()
        under_schedulefree(RankDriver([*stages]), loop, 12)
        assert len(loop.validations) == (2 if stages and stages[0].how.max_regression is not None else 0)
        return [*dynrank.adapter_parameters(loop.model)]

    checked = factors(at(5, Rank(1), max_regression=most))
    expected = factors(*([] if other is None else [Stage(At(step=5), Rank(1), how=other)]))
    assert all(map(torch.equal, checked, expected))


def test_change_under_schedulefree_is_not_compared_with_a_validation_of_means():
    """As a callback of Lightning swaps the weights, which validations for a change do not call."""
    loop = Loop(6, partial(schedulefree.AdamWScheduleFree, betas=(0.5, 0.999)))
    optimizer = loop.optimizers[0]
    driver = RankDriver([at(3, Rank(5), max_regression=9.0)])
    under_schedulefree(driver, loop, 3)
    expected = loop.validate()["val/loss"]
    optimizer.eval()
    means = loop.validate()
    optimizer.train()
    assert means["val/loss"] != pytest.approx(expected, rel=1e-4)
    driver.validated(loop, means)
    driver.advance(loop)
    assert driver.history[0].measured.before == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("with_scheduler", [False, True])
def test_cell_of_a_notebook_that_is_interrupted_and_run_again_raises_its_rate_once(with_scheduler):
    """The optimizer and its scheduler are of an earlier cell, and nobody has called ``abort``."""
    loop = Loop(6, torch.optim.SGD)
    optimizer = loop.optimizers[0]
    schedulers = [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)] if with_scheduler else []
    factor = loop.model[0].lora_B

    def cell(rank, steps):
        driver = RankDriver([at(2, Rank(rank), lr_factor=2.0)])
        training = Training(loop.model, [optimizer], schedulers=schedulers)
        driver.start(training, Run(12))
        used = []
        for _ in range(steps):
            driver.advance(training)
            optimizer.zero_grad()
            nn.functional.mse_loss(loop.model(X), Y).backward()
            before = factor.detach().clone()
            optimizer.step()
            used.append(((factor.detach() - before).norm() / factor.grad.norm()).item())
            training.step += 1
            driver.end_step(training)
        return used

    assert cell(5, 4) == pytest.approx([0.01, 0.01, 0.02, 0.02], rel=1e-3)
    # With a scheduler the rate that the second run finds in the group has the first one's factor.
    found = 0.02 if with_scheduler else 0.01
    assert cell(4, 6) == pytest.approx([found, found, *[2 * found] * 4], rel=1e-3)


@pytest.mark.parametrize("end", ["finish", "abort"])
def test_run_that_has_ended_leaves_no_hook_on_the_optimizer(end):
    """In a group with a head the rate is raised inside steps; a checkpoint made after the end knows the factor."""
    head = nn.Parameter(torch.zeros(1))
    driver, loop = due(at(5, Rank(3), lr_factor=2.0), lambda factors, lr: torch.optim.SGD([*factors, head], lr=lr))
    driver.advance(loop)
    factor = loop.model[0].lora_B

    def length():
        before = factor.detach().clone()
        factor.grad = torch.ones_like(factor)
        loop.optimizers[0].step()
        return (before - factor).mean().item()

    assert length() == pytest.approx(2e-2, rel=1e-4)
    getattr(driver, end)(*[loop] * (end == "finish"))
    assert length() == pytest.approx(1e-2, rel=1e-4)
    assert driver.state_dict()["lr_factor"] == 2.0


def test_change_computes_the_svd_of_each_layer_once(monkeypatch):
    sizes = []
    plain = {name: getattr(torch.linalg, name) for name in ("svd", "svdvals")}

    def counted(name, matrix, *args, **options):
        sizes.append(len(matrix))
        return plain[name](matrix, *args, **options)

    for name in plain:
        monkeypatch.setattr(torch.linalg, name, partial(counted, name))
    driver = RankDriver(at(10, Budget(share=0.5, by="weight")))
    model = drive(driver).model
    assert len(driver.history) == 1
    assert sizes == [6] * len(dict(dynrank.lora_layers(model)))


@pytest.mark.parametrize(("step", "validations"), [(20, [5, 10, 15, 20, 20, 20]), (18, [5, 10, 15, 18, 18, 20])])
def test_check_validates_before_and_after_the_change_also_behind_a_validation(step, validations):
    # A growth leaves the loss alone.
    driver = RankDriver(at(step, GrowTo(6), max_regression=0.0))
    assert drive(driver, rank=2).validations == validations
    assert trajectory(driver) == [(step, 2, 6)]


def decayed(loop):
    for group in loop.optimizers[0].param_groups:
        group["initial_lr"] = 1e-2
        group["lr"] = 5e-4


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (Stage(Plateau(patience=99), Rank(3)), {}, "before stage 1 .*plateau of val/loss; set deadline"),
        (at(10, Rank(3)), {"batch_end": decayed}, "5.0% of its start, too low to recover"),
        # After the last step nothing is left to recover in.
        (Stage(At(fraction=1.0), Rank(3)), {"batch_end": decayed}, None),
    ],
    ids=["no plateau", "low rate", "at the end"],
)
def test_what_leaves_ranks_or_weights_unfinished_is_warned_of(stage, options, message):
    with nullcontext() if message is None else pytest.warns(UserWarning, match=message):
        drive(RankDriver(stage), **options)


@pytest.mark.parametrize("schedule", [None, True, "16", [16]])
def test_what_is_no_schedule_is_refused(schedule):
    with pytest.raises(ConfigurationError, match="a rank, a stage or a list of stages"):
        RankDriver(schedule)


@pytest.mark.parametrize(
    ("stage", "how", "message"),
    [
        (Stage(Plateau("val/los"), Rank(3)), {}, r"monitor of Plateau must .*'val/los'"),
        (at(5, Rank(3), max_regression=1.0, check_monitor="loss"), {}, r"check_monitor of How.*; logged: 'val/loss'"),
        (at(5, Rank(7)), {}, r"stage 1: Rank\(rank=7\) changes none of the ranks \[6\]"),
        (at(5, Rank(3)), {"optimizer": torch.optim.Adamax}, 'Adamax.*optimizer_state="reset"'),
        (Stage(At(fraction=0.5), Rank(3)), {"run": Run(None)}, r"share of a run .*set max_steps"),
    ],
    ids=["monitor", "check_monitor", "rank", "optimizer", "share"],
)  # fmt: skip
def test_what_cannot_be_carried_out_is_refused(stage, how, message):
    with pytest.raises(ConfigurationError, match=message):
        drive(RankDriver(stage), **how)


def test_check_in_a_loop_that_cannot_validate_says_what_to_define():
    with pytest.raises(ConfigurationError, match=r"max_regression=0.1 .*define validate\(\)"):
        RankDriver(at(1, Rank(1), max_regression=0.1)).start(Training(Loop(6, torch.optim.SGD).model, []), Run(9))


def test_driver_and_checkpoint_of_another_run_are_refused(tmp_path):
    driver = RankDriver(at(3, Rank(3)))
    drive(driver, 6, folder=tmp_path)
    with pytest.raises(ConfigurationError, match="step 6 of another run"):
        drive(driver)
    with pytest.raises(ConfigurationError, match=r"another schedule.*Rank\(rank=3\).*Rank\(rank=2\)"):
        drive(RankDriver(at(3, Rank(2))), folder=tmp_path, start=4)


def test_stages_to_come_may_be_others_than_in_the_checkpoint(tmp_path):
    """What is over stays, and so does the importance of layers."""
    drive(RankDriver([at(3, Rank(5)), at(14, Rank(3))]), folder=tmp_path)
    driver = RankDriver([at(3, Rank(5)), at(14, Rank(3)), at(20, Rank(1))])
    with pytest.warns(UserWarning, match="not the checkpoint's: it applies from step 10 on"):
        drive(driver, folder=tmp_path, start=10)
    assert trajectory(driver) == [(3, 6, 5), (14, 5, 3), (20, 3, 1)]


def test_a_metric_of_training_that_a_loop_has_not_logged_before_the_first_validation_is_named_with_the_cure():
    driver = RankDriver(Stage(Plateau("errors"), Rank(3)))
    loop = Loop(6, torch.optim.SGD)
    driver.start(loop, Run(24))
    with pytest.raises(
        ConfigurationError, match=r"'errors'; logged: 'val/loss'; .* driver.logged.log, before driver.val"
    ):
        driver.validated(loop, {"val/loss": 1.0})


def test_what_a_validation_returns_beside_numbers_is_left_alone():
    """As the precisions of a BLEU score, a table, a text."""
    driver = RankDriver(Stage(Plateau("val/bleu", patience=1, min_delta=9.0, mode="max"), Rank(3)))
    loop = Loop(6, torch.optim.SGD)
    driver.start(loop, Run(24))
    for loop.step in range(1, 3):
        driver.validated(
            loop, {"val/bleu": torch.tensor(31.5), "precisions": [60.0, 40.0], "note": "short", "none": None}
        )
    driver.advance(loop)
    assert trajectory(driver) == [(2, 6, 3)]
    assert driver.logged.values() == {"val/bleu": 31.5}


def test_trigger_reads_each_value_that_a_loop_logs_once_and_only_of_the_ranks_of_after():
    """The loop logs every sixth step, and validates every third; a resumed one goes on so."""

    class Logging(Loop):
        def logs_later(self, name):
            return True

    def run(until, saved=None):
        driver = RankDriver([at(7, Rank(3)), Stage(Plateau("train/errors", patience=9, warmup_steps=0), Rank(2))])
        loop = Logging(6, torch.optim.SGD)
        if saved is not None:
            driver.load_state_dict(saved["driver"])
            dynrank.resize(loop.model, saved["ranks"], optimizers=loop.optimizers)
            loop.step = saved["step"]
        seen = []
        plateau = driver.stages[1].when
        observe = plateau.observe
        plateau.observe = lambda now, value: seen.append((now, value)) or observe(now, value)
        driver.start(loop, Run(24))
        while loop.step < until:
            driver.advance(loop)
            loop.step += 1
            if loop.step % 6 == 0:
                # Python has one object for equal small numbers.
                driver.logged.log({"train/errors": loop.step // 12})
            if loop.step % 3 == 0:
                driver.validated(loop, loop.validate())
        ranks = {name: layer.rank for name, layer in dynrank.lora_layers(loop.model)}
        return seen, {"driver": driver.state_dict(), "ranks": ranks, "step": loop.step}

    seen, _ = run(24)
    assert seen == [(12, 1.0), (18, 1.0), (24, 2.0)]
    for step in (6, 8, 13, 16, 20):
        before, saved = run(step)
        after, _ = run(24, saved)
        assert before + after == seen, step


class Pressing(Plateau):
    """Ctrl-C is pressed when the trigger is reset, which is at the end of the change before it."""

    def reset(self):
        super().reset()
        signal.raise_signal(signal.SIGINT)


@CHECKED
def test_change_that_ctrl_c_could_not_stop_is_told(how):
    driver, loop = due([at(5, Rank(2), **how), Stage(Pressing("val/loss"), Rank(1))])
    with pytest.raises(KeyboardInterrupt):
        driver.advance(loop)
    assert [layer.rank for _, layer in dynrank.lora_layers(loop.model)] == [2, 2]
    assert loop.told == driver.history


def test_change_at_the_end_of_a_run_comes_at_an_early_end_too():
    driver, loop = due(Stage(At(fraction=1.0), Rank(2)))
    driver.finish(loop)
    assert trajectory(driver) == [(5, 6, 2)]


def test_a_trigger_that_the_checkpoint_does_not_know_begins_anew():
    """Also if the schedule has been in another run, whose metrics would let it fire."""

    def made(patience):
        return RankDriver(Stage(Plateau("val/loss", patience=patience), Rank(2)))

    driver = made(patience=3)
    for step, loss in enumerate([1.0, 2.0, 2.0]):
        driver.stages[0].when.observe(step, loss)
    driver.load_state_dict(made(patience=2).state_dict())
    assert driver.state_dict()["triggers"] == made(patience=3).state_dict()["triggers"]


def test_checkpoint_of_another_version_is_refused_in_one_sentence():
    driver = RankDriver(early_budget(2))
    state = driver.state_dict()
    del state["importance"]
    with pytest.raises(ConfigurationError, match="has no importance of a rank schedule, so another version"):
        driver.load_state_dict(state)


@pytest.mark.parametrize(
    "make", [lambda: after_convergence(2), lambda: Stage(Plateau(patience=2, min_delta=0.9), Rank(2))]
)
def test_stages_that_several_runs_share_begin_anew_in_each(make):
    """As in a loop over seeds; triggers remember what they have observed."""
    shared = make()
    histories = []
    for schedule in (make(), shared, shared):
        driver = RankDriver(schedule)
        drive(driver, 40)
        histories.append([str(event) for event in driver.history])
    assert histories[0]
    assert histories[1] == histories[2] == histories[0]


def test_two_schedules_of_other_layers_in_one_optimizer_are_refused():
    """Each would restore the rates that the other has raised, so they would rise at every step."""
    one = Loop(6, torch.optim.SGD)
    other = Loop(6, torch.optim.SGD)
    optimizer = torch.optim.SGD([*one.model.parameters(), *other.model.parameters()], lr=0.1)
    first = RankDriver(at(5, Rank(2), lr_factor=2.0))
    first.start(Training(one.model, [optimizer]), Run(9))
    second = RankDriver(at(5, Rank(2), lr_factor=2.0))
    with pytest.raises(ConfigurationError, match=r"another schedule .*ModuleDict"):
        second.start(Training(other.model, [optimizer]), Run(9))
    first.abort()
    second.start(Training(other.model, [optimizer]), Run(9))


@pytest.mark.parametrize("scheduled", [True, False])
def test_second_schedule_on_an_optimizer_takes_the_rate_that_it_finds(scheduled):
    """The first one has multiplied its factor into the rate, which a user then sets for the next phase."""
    loop = Loop(6, torch.optim.SGD)
    (optimizer,) = loop.optimizers
    (group,) = optimizer.param_groups
    for rank, rate in ((4, 0.01), (2, 0.003)):
        group["lr"] = rate
        group.pop("initial_lr", None)
        loop.schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)] if scheduled else []
        driver = RankDriver(at(loop.step + 2, Rank(rank), lr_factor=2.0))
        driver.start(loop, Run(8))
        used = []
        for _ in range(4):
            driver.advance(loop)
            optimizer.zero_grad()
            nn.functional.mse_loss(loop.model(X), Y).backward()
            before = loop.model[0].lora_B.detach().clone()
            optimizer.step()
            used.append(((loop.model[0].lora_B - before).norm() / loop.model[0].lora_B.grad.norm()).item())
            loop.step += 1
            driver.end_step(loop)
            for scheduler in loop.schedulers:
                scheduler.step()
        driver.finish(loop)
        assert used == pytest.approx([rate] * 2 + [2 * rate] * 2, rel=1e-3)


@pytest.mark.parametrize("target", [Rank(4), Unchanged()])
def test_plateau_of_a_plain_loop_waits_anew_after_a_cut_alone(target):
    """The metric is at its best before the change, and worse, but falling, after it."""
    loop = Loop(6, torch.optim.SGD)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(loop.optimizers[0], factor=0.1, patience=1)
    loop.schedulers = [plateau]
    driver = RankDriver(at(2, target, lr_factor=2.0))
    driver.start(loop, Run(8))
    for metric in (1.0, 1.0, 3.0, 2.9, 2.8, 2.7, 2.6, 2.5):
        driver.advance(loop)
        nn.functional.mse_loss(loop.model(X), Y).backward()
        loop.optimizers[0].step()
        loop.step += 1
        driver.end_step(loop)
        plateau.step(metric)
    driver.finish(loop)
    fell = loop.optimizers[0].param_groups[0]["lr"] < 1e-2
    assert fell == (target == Unchanged())
