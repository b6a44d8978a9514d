"""The driver in a loop of few lines: when it measures and acts, what it undoes, what it refuses, and its resume."""

import io
import random
import signal
from contextlib import nullcontext, suppress
from math import inf, isnan, nan, prod

import numpy as np
import pytest
import schedulefree
import torch
from interrupted import interrupted
from torch import nn

import dynrank
from dynrank.driver.driver import RankDriver
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, auto, early_budget
from dynrank.targets import Budget, GrowTo, Rank, Unchanged
from dynrank.triggers import At, Plateau, Run, Trigger

torch.manual_seed(1)
X = torch.randn(80, 12)
Y = X @ torch.randn(12, 6)
STEPS = 24


class Loop(Training):
    """A run of 24 steps, a validation after every fourth, and a checkpoint after each."""

    def __init__(self, rank=6, optimizer=torch.optim.AdamW):
        torch.manual_seed(0)
        model = dynrank.add_lora(nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6)), rank=rank, alpha=rank)
        super().__init__(model, [optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2)])
        # (step, the first layer's rank) of each validation, and {step: its checkpoint}.
        self.validations = []
        self.files = {}
        self.told = []

    def validate(self):
        self.validations.append((self.step, self.model[0].rank))
        with torch.no_grad():
            return {"val/loss": nn.functional.mse_loss(self.model(X), Y).item()}

    def tell(self, event):
        self.told.append(event)

    def load(self, driver, file):
        saved = torch.load(io.BytesIO(file))
        self.model.load_state_dict(saved["model"])
        self.optimizers[0].load_state_dict(saved["optimizer"])
        driver.load_state_dict(saved["driver"])
        self.step = saved["step"]

    def train(self, driver, until=STEPS, total=STEPS):
        """Train from here on, as in another process; returns the driver."""
        (optimizer,) = self.optimizers
        driver.start(self, Run(total))
        while self.step < until:
            driver.advance(self)
            getattr(optimizer, "train", lambda: None)()
            batch = torch.randint(80, (8,), generator=torch.Generator().manual_seed(self.step))
            nn.functional.mse_loss(self.model(X[batch]), Y[batch]).backward()
            optimizer.step()
            self.step += 1
            driver.end_step(self)
            optimizer.zero_grad()
            if self.step % 4 == 0:
                driver.validated(self, self.validate())
            parts = {"model": self.model, "optimizer": optimizer, "driver": driver}
            file = io.BytesIO()
            torch.save({"step": self.step} | {name: part.state_dict() for name, part in parts.items()}, file)
            self.files[self.step] = file.getvalue()
        if until == STEPS:
            driver.finish(self)
        return driver


def at(step, target, **how):
    return Stage(At(step=step), target, how=How(**how))


def due(stages, optimizer=torch.optim.SGD):
    """(driver, loop) right before the change of step 5."""
    driver = RankDriver(stages)
    loop = Loop(optimizer=optimizer)
    driver.start(loop, Run(9))
    loop.step = 5
    return driver, loop


def trajectory(driver):
    return [(e.step, e.layers[0].rank_before, e.layers[0].rank_after) for e in driver.history]


# Resumes

SCHEDULES = {
    "undone, plateau": [Stage(Plateau(patience=2, min_delta=0.9), Rank(1), how=How(2.0, max_regression=0.02))],
    "grown, dropped": [at(4, Rank(3), lr_factor=2.0), at(10, GrowTo(6)), at(15, Rank(2), lr_factor=2.0)],
    "auto": auto(0.05, at=0.5),
    "by importance": [at(s, Budget(final_rank=r)) for s, r in ((7, 4), (15, 2))],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_run_that_resumes_or_goes_back_is_the_whole_run_bit_for_bit(name):
    stages = SCHEDULES[name]

    def check(driver, loop):
        assert driver.history == whole.history
        assert str(driver.state_dict()) == str(whole.state_dict())
        for key, value in loop.model.state_dict().items():
            assert torch.equal(value, first.model.state_dict()[key]), (loop.step, key)

    first = Loop()
    whole = first.train(RankDriver(stages))
    # Checkpoints lie before, at and after the change, and in its window.
    assert 3 < whole.history[0].step < 20
    assert whole.lr_factor == prod(event.lr_factor for event in whole.history)
    assert whole.history[0].undone == name.startswith("undone")
    for file in first.files.values():
        driver, loop = RankDriver(stages), Loop()
        loop.load(driver, file)
        check(loop.train(driver), loop)
    driver, loop = RankDriver(stages), Loop()
    loop.train(driver, 12)
    for place, until in ((10, 21), (9, 11), (6, STEPS)):
        with pytest.raises(ConfigurationError, match=r"loaded within its run, .* goes back calls driver\.abort\(\)"):
            loop.load(driver, first.files[place])
        driver.abort()
        loop.load(driver, first.files[place])
        loop.train(driver, until)
    check(driver, loop)


# When stages act


def test_processes_are_compared_at_the_start_after_the_first_step_and_before_a_change(monkeypatch):
    """So it is an error at once that nobody averages their gradients."""
    found = []
    monkeypatch.setattr("dynrank.driver.driver.check_processes", lambda *arguments: found.append(arguments[2]))
    Loop().train(RankDriver(at(3, Rank(3))), 5)
    assert found == ["at the start of training", "after the first step", "before the change of rank at step 3"]


END = Stage(At(fraction=1.0), Rank(2))


@pytest.mark.parametrize(
    ("stages", "last", "warnings"),
    [
        ([END], True, 0),
        # Stopped; decided by the last validation; and both, where the time goes before the decision.
        ([END], None, 1),
        ([Stage(Plateau(patience=1), Rank(2))], None, 1),
        ([Stage(Plateau(patience=1), Rank(3)), END], None, 1),
    ],
)
def test_run_that_ends_early_changes_then_and_warns_once_if_no_checkpoint_has_it(stages, last, warnings):
    driver, loop = due(stages)
    driver.end_step(loop, last=last)
    for loop.step in (4, 5):
        driver.validated(loop, {"val/loss": 1.0})
    assert len(driver.history) == 1 - warnings
    expected = pytest.warns(match="after training had ended at step 5, so no checkpoint has")
    with expected if warnings else nullcontext([]) as seen:
        driver.finish(loop)
    assert len(seen) == warnings
    assert trajectory(driver) == [(5, 6, 2)]


# Metrics


class Seeing(Trigger):
    """Never fires."""

    seen = []
    monitors = ("train/loss", "val/bleu")

    def fires(self, *values):
        self.seen.append(values)
        return False


def test_trigger_reads_each_validation_once_of_which_the_first_has_all_and_a_later_one_may_say_nothing():
    driver, loop = due(Stage(Seeing(), Rank(3)))
    cures = r"^Seeing must .*'train/loss'; logged: 'val/bleu'.* log it in .*, or observe train/loss$"
    with pytest.raises(ConfigurationError, match=cures):
        driver.validated(loop, {"val/bleu": 31.5})
    # As the precisions of a BLEU score, a table, a text.
    others = {"precisions": [60.0, 40.0], "note": "short", "none": None}
    driver.validated(loop, {"val/bleu": torch.tensor(31.5), "train/loss": 2, **others})
    # A resumed loop may report a validation again.
    driver.validated(loop, {"val/bleu": 31.5, "train/loss": 2})
    for loop.step, loss in ((6, {}), (7, {"train/loss": None})):
        driver.validated(loop, {"val/bleu": 32.5, **loss, **others})
    first, *later = Seeing.seen
    assert first == (2.0, 31.5)
    assert [(isnan(loss), bleu) for loss, bleu in later] == [(True, 32.5)] * 2


# What a change costs


def draw():
    return torch.rand(()).item() + random.random() + np.random.rand()


def test_validations_directly_before_and_after_draw_the_same_numbers_and_the_run_goes_on_as_without():
    """What the run itself has validated, perhaps on other data, is not compared with them."""
    driver, loop = due(Stage(Plateau(patience=1), Rank(1), how=How(max_regression=0.0)))

    def validate():
        assert dynrank.validating_change()
        return {"val/loss": draw() + loop.model[0].rank}

    loop.validate = validate
    for loop.step in (1, 2):
        driver.validated(loop, {"val/loss": 0.001})
    drawn = []
    for act in (lambda: None, lambda: driver.advance(loop)):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        act()
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    (event,) = driver.history
    assert (event.undone, dynrank.validating_change()) == (False, False)
    # The layer has rank 6, then 1.
    assert event.measured.before - event.measured.after == pytest.approx(5)
    assert event.measured.after > 1


@pytest.mark.parametrize("name", ["other", "val/loss"])
def test_a_metric_that_judges_a_change_is_missed_at_the_first_validation(name):
    """What a loop reports may lack it, so what it validates for a change decides, once."""
    driver, loop = due(at(9, Rank(1), max_regression=0.1))
    metrics = [{name: 1.0}]
    loop.validate = metrics.pop
    refused = pytest.raises(ConfigurationError, match=r"^check_monitor of How.*'val/loss'; logged: 'other'")
    with refused if name == "other" else nullcontext():
        for loop.step in (1, 2):
            driver.validated(loop, {"loss": 1.0})
    assert metrics == []


@pytest.mark.parametrize(
    ("most", "before", "after", "undone"),
    [
        # One that may cost anything is undone only if it diverges.
        *((inf, 0.0, 5.0, False), (inf, 1.0, nan, True)),
        *((0.02, 100.0, 101.9, False), (0.02, 100.0, 102.1, True), (0.02, -100.0, -98.1, False)),
    ],
)
def test_a_change_is_undone_if_it_costs_a_larger_share_of_the_metric(most, before, after, undone):
    driver, loop = due(at(5, Rank(1), max_regression=most))
    metrics = [{"val/loss": after}, {"val/loss": before}]
    loop.validate = metrics.pop
    driver.advance(loop)
    (event,) = loop.told
    assert (event.undone, event.measured.before, loop.model[0].rank) == (undone, before, 6 if undone else 1)


# Interrupts

HOWS = {"unchecked": {}, "checked": {"max_regression": 9.0}, "undone": {"max_regression": 0.0}}


@pytest.mark.parametrize("name", [*HOWS, "failing"])
def test_interrupt_at_any_line_of_a_change_leaves_all_of_it_or_nothing(name):
    """Ranks and weights, history, stage and learning rate, with one point of no return."""

    def changed(line):
        driver, loop = due(at(5, Rank(3), lr_factor=2.0, **HOWS.get(name, HOWS["checked"])))
        # A validation after the change fails, or is worse.
        metrics = [1.0] if name == "failing" else [1.0, 2.0]
        loop.validate = lambda: {"val/loss": metrics.pop(0)}

        def act():
            with suppress(IndexError):
                driver.advance(loop)

        _, lines = interrupted(act, line, below="driver")
        weights = torch.cat([value.flatten() for value in loop.model.state_dict().values()]).tolist()
        return (len(driver.history), driver.progress.stage, driver.lr_factor, loop.model[0].rank, weights), lines

    whole, lines = changed(0)
    ends = [changed(number)[0] for number in range(1, lines + 1)]
    before = ends.count(ends[0])
    assert ends[0][:-1] == (0, 0, 1.0, 6)
    assert whole[:-1] == {"undone": (1, 1, 1.0, 6), "failing": (0, 0, 1.0, 6)}.get(name, (1, 1, 2.0, 3))
    assert ends == [ends[0]] * before + [whole] * (len(ends) - before)
    assert before < len(ends) or name == "failing"


class Pressing(Plateau):
    """Ctrl-C is pressed when the trigger is reset, which is at the end of the change before it."""

    def reset(self):
        super().reset()
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["unchecked", "checked"])
def test_change_that_ctrl_c_could_not_stop_is_told(name):
    driver, loop = due([at(5, Rank(2), **HOWS[name]), Stage(Pressing("val/loss"), Rank(1))])
    with pytest.raises(KeyboardInterrupt):
        driver.advance(loop)
    assert [layer.rank for _, layer in dynrank.lora_layers(loop.model)] == [2, 2]
    assert loop.told == driver.history


# Rates, schedulers and optimizers of others


@pytest.mark.parametrize("end", [RankDriver.finish, lambda driver, _: driver.abort()], ids=["finish", "abort"])
def test_two_schedules_in_one_optimizer_are_refused_until_the_first_run_is_over(end):
    """Each would restore the rates that the other has raised, as in a cell of a notebook that is run again."""
    loop = Loop(optimizer=torch.optim.SGD)
    first, second = (RankDriver(early_budget(rank)) for rank in (4, 2))
    loop.train(first, 12)
    loop.step = 0
    with pytest.raises(ConfigurationError, match=r"another rank schedule drives this optimizer; .*driver\.abort\(\)"):
        loop.train(second, 12)
    end(first, loop)
    loop.train(second, 12)
    assert second.adapter_rates == {"lr/adapter": pytest.approx(1e-2 * second.lr_factor)}


@pytest.mark.parametrize("target", [Rank(4), Unchanged()])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_of_a_plain_loop_waits_anew_after_a_cut_alone(mode, target):
    """The metric is at its best before the change, and worse, but getting better, after it."""
    driver, loop = due(at(5, target))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(loop.optimizers[0], mode, factor=0.1, patience=1)
    loop.schedulers = [plateau]
    sign = 1 if mode == "min" else -1
    for metric in (1.0, 1.0):
        plateau.step(sign * metric)
    driver.advance(loop)
    for metric in (3.0, 2.9, 2.8, 2.7):
        plateau.step(sign * metric)
    assert (plateau.get_last_lr()[0] < 1e-2) == (target == Unchanged())


@pytest.mark.parametrize(("most", "other"), [(9.0, at(5, Rank(1))), (0.0, [])], ids=["kept", "undone"])
def test_validations_that_swap_the_weights_of_an_optimizer_of_schedulefree_change_nothing(most, other):
    """They call the optimizer's ``eval``, as Trainers do, and nobody but the driver its ``train`` before the change."""

    def factors(schedule):
        loop = Loop(optimizer=schedulefree.AdamWScheduleFree)
        validate = loop.validate
        loop.validate = lambda: loop.optimizers[0].eval() or validate()
        loop.train(RankDriver(schedule))
        return [*dynrank.adapter_parameters(loop.model)], len(loop.validations)

    checked, validated = factors(at(5, Rank(1), max_regression=most))
    expected, fewer = factors(other)
    assert validated == fewer + 2
    # Each swap rounds the weights.
    torch.testing.assert_close(checked, expected, rtol=1e-4, atol=1e-6)


def test_ranks_that_are_not_final_at_the_end_are_warned_of():
    with pytest.warns(UserWarning, match="before stage 1 .*plateau of val/loss; train longer, or .* deadline"):
        Loop().train(RankDriver(Stage(Plateau(patience=99), Rank(3))))


# What is refused


@pytest.mark.parametrize(
    ("schedule", "optimizer", "total", "message"),
    [
        *((wrong, torch.optim.SGD, 24, "a rank, a stage or a list of stages") for wrong in (None, True, "16", [16])),
        (at(5, Rank(7)), torch.optim.SGD, 24, r"stage 1: Rank\(rank=7\) changes none of the ranks \[6\]"),
        (at(5, Rank(3)), torch.optim.Adamax, 24, 'Adamax.*optimizer_state="reset"'),
        (Stage(At(fraction=0.5), Rank(3)), torch.optim.SGD, None, r"share of a run .*set max_steps"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_before_the_first_step(schedule, optimizer, total, message):
    loop = Loop(optimizer=optimizer)
    with pytest.raises(ConfigurationError, match=message):
        loop.train(RankDriver(schedule), total=total)
    assert loop.step == 0


def test_judging_without_validations_is_refused_at_the_start():
    loop = Training(Loop().model, [])
    with pytest.raises(ConfigurationError, match=r"max_regression=0.1 .*define validate\(\) in .*, or set max_regr"):
        RankDriver(at(1, Rank(1), max_regression=0.1)).start(loop, Run(9))


def test_driver_and_checkpoint_of_another_run_or_version_are_refused():
    loop = Loop()
    driver = loop.train(RankDriver(at(3, Rank(3))), 6)
    with pytest.raises(ConfigurationError, match="step 6 of another run"):
        Loop().train(driver)
    # A loop may go back to its beginning.
    driver.abort()
    driver.load_state_dict(RankDriver(at(3, Rank(3))).state_dict())
    Loop().train(driver)
    pinned = {"0": {"pinned": True}}
    others = RankDriver(at(3, Rank(2))), RankDriver(at(4, Rank(3))), RankDriver(at(3, Rank(3)), rank_map=pinned)
    found = r"Rank\(rank=3\).*Rank\(rank=2\)", r"step=3.*step=4", r"rank_map are \[\], here .*'0', 'RankBounds"
    for other, said in zip(others, found, strict=True):
        with pytest.raises(ConfigurationError, match=f"another schedule or rank_map: .*{said}"):
            Loop().load(other, loop.files[4])
    with pytest.raises(ConfigurationError, match="has no .*progress.* of a rank schedule, so .* by another version"):
        RankDriver(early_budget(2)).load_state_dict({})
    # A loop that loads the driver alone.
    for rank, step, said in ((6, 4, "rank 6 of '0', not 3"), (3, 0, "step 0;")):
        fresh = Loop(rank)
        fresh.step = step
        driver.load_state_dict(torch.load(io.BytesIO(loop.files[4]))["driver"])
        with pytest.raises(ConfigurationError, match=f"of after its change at step 3, and the run has .*{said}"):
            fresh.train(driver)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_schedule_that_can_change_no_rank_is_refused_and_one_that_only_balances_is_not(frozen):
    model = dynrank.add_lora(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), rank=4, rank_map={"0": {"pinned": True}})
    loop = Training(model, [torch.optim.SGD(model.parameters())])
    free = RankDriver(2, rank_map={"0": {"pinned": True}})
    free.start(loop, Run(total_steps=9))
    free.abort()
    if frozen:
        model[1].requires_grad_(False)
    rules = {"0": {"pinned": True}} if frozen else {".*": {"pinned": True}}
    with pytest.raises(ConfigurationError, match="can change no rank: all 2 layers are pinned by rank_map, or frozen"):
        RankDriver(2, rank_map=rules).start(loop, Run(total_steps=9))
    RankDriver(Stage(At(step=2), Unchanged()), rank_map=rules).start(loop, Run(total_steps=9))
