"""The callback in Lightning's trainer: resumes, what triggers read, what is refused, and what a step costs.

What does not depend on the trainer, and all validations for a change, are tested in tests/driver.
"""

import sys
from math import isnan
from pathlib import Path
from statistics import mean

import pytest
from lightning.pytorch import callbacks as theirs
from trained import ranks, watched

import dynrank
from dynrank.callbacks import RankScheduler
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage
from dynrank.targets import Budget, Rank
from dynrank.triggers import At, Gap, Plateau


def at(step, target, **how):
    return Stage(At(step=step), target, how=How(**how))


def plateau(monitor="val/loss", patience=2, warmup=5, **how):
    """No loss falls to a tenth between two validations: it fires at number patience + 1 after the warm-up."""
    return Stage(Plateau(monitor, patience=patience, min_delta=0.9, warmup_steps=warmup), Rank(3), how=How(**how))


# Resumes

ACCUMULATING = {"val_check_interval": 6, "check_val_every_n_epoch": None, "accumulate_grad_batches": 2}
NONE = {"limit_val_batches": 0}
ROUNDED = {"precision": "bf16-true", "val_check_interval": 10, "max_steps": 40}
EPOCHS = {"max_epochs": 3, "max_steps": -1, "val_check_interval": None}
SCHEDULES = {
    # The loss falls, so the validation is below the mean of the steps before it.
    "gap to the loss": (
        [at(4, Rank(4)), Stage(Gap(mode="max", window=3, threshold=1e-9), Rank(3))],
        {"precision": "bf16-true"},
    ),
    "loss alone": (plateau("train/loss", patience=1, warmup=0), EPOCHS | NONE),
    "every second epoch": (
        plateau(patience=1, warmup=0),
        {"max_steps": 50, "val_check_interval": 1.0, "check_val_every_n_epoch": 2},
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_resume_from_any_checkpoint_is_bit_equal(regression, fit, assert_same, tmp_path, name):
    class Asking(regression[0]):
        def configure_optimizers(self):
            # Then Lightning by itself forgets the place in the data.
            assert self.trainer.estimated_stepping_batches > 20
            return super().configure_optimizers()

    schedule, options = SCHEDULES[name]
    whole = RankScheduler(schedule)
    reference, _ = fit(whole, module=Asking(), saved=tmp_path, **options)
    steps = sorted(int(file.stem[5:]) for file in tmp_path.glob("step=*.ckpt"))
    changes = {event.step for event in whole.history}
    assert changes
    # Before, at and after changes and validations; the tests of the driver go on from every step.
    for step in {*steps[:-1:6], 10, 15, 20, *(step + near for step in changes for near in (-1, 0, 1))} & {*steps}:
        resumed = RankScheduler(schedule)
        module, _ = fit(resumed, module=Asking(), ckpt_path=tmp_path / f"step={step}.ckpt", **options)
        assert resumed.history == whole.history, step
        assert str(resumed.state_dict()) == str(whole.state_dict()), step
        assert_same(module, reference, step)


def test_a_run_that_never_validated_goes_on_behind_its_last_change_where_a_validation_is_due(regression, fit, tmp_path):
    stage = Stage(Plateau("val/loss"), Rank(3), deadline=0.25)
    fit(RankScheduler(stage), saved=tmp_path, val_check_interval=10, limit_val_batches=1, check_val_every_n_epoch=9)
    resumed = RankScheduler(stage)
    fit(resumed, ckpt_path=tmp_path / "step=10.ckpt", val_check_interval=10, limit_val_batches=1)
    assert [event.step for event in resumed.history] == [6]


# What triggers read


@pytest.mark.filterwarnings("ignore:training ended before stage 2")
@pytest.mark.parametrize(
    ("options", "batches"),
    [({}, 5), (ROUNDED, 10), (ACCUMULATING, 6), ({**EPOCHS, "max_epochs": 4, **NONE}, 10)],
    ids=["validated", "bfloat16", "accumulating", "without validation"],
)
def test_loss_of_training_is_its_mean_since_the_last_look_or_change(regression, fit, tmp_path, options, batches):
    losses = []

    class Keeping(regression[0]):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return {"loss": loss} if batch_idx % 2 else loss

    def run(**more):
        scheduler = RankScheduler([at(13, Rank(4)), plateau("train/loss", patience=99)])
        seen = watched(scheduler.driver)
        fit(scheduler, module=Keeping(), **options, **more)
        return seen

    seen = run(saved=tmp_path)
    size = options.get("accumulate_grad_batches", 1)
    cut = 13 * size
    looks = range(batches * (cut // batches + 1), len(losses) + 1, batches)
    expected = [(look // size, mean(losses[max(cut, look - batches) : look])) for look in looks]
    assert len(expected) > 1
    assert seen == [(step, pytest.approx(loss)) for step, loss in expected]
    for step in (12, 14, 17):
        assert run(ckpt_path=tmp_path / f"step={step}.ckpt") == [row for row in seen if row[0] > step], step


def test_what_a_validation_does_not_log_says_nothing_though_lightning_keeps_it(regression, fit):
    class Seldom(regression[0]):
        def on_validation_epoch_end(self):
            if self.global_step % 6 == 2:
                self.log("score", float(self.global_step))

    scheduler = RankScheduler(Stage(Plateau("score", patience=1, mode="max", warmup_steps=0), Rank(3)))
    seen = watched(scheduler.driver)
    with pytest.warns(UserWarning, match="ended before stage 1"):
        fit(scheduler, module=Seldom(), val_check_interval=2, max_steps=16)
    assert [row for row in seen if not isnan(row[1])] == [(2, 2.0), (8, 8.0), (14, 14.0)]


# What is refused


class Another(RankScheduler):
    """A derived class; Lightning itself refuses two of one class."""


CURES = "log it in each validation, or observe train/loss$"
LONGER = theirs.GradientAccumulationScheduler({0: 1, 2: 4})
LATE = Stage(Plateau(patience=99), Rank(3), deadline=0.75)


@pytest.mark.parametrize(
    ("stage", "others", "options", "message"),
    [
        (plateau("score"), (), NONE, f"^Plateau must .*'score'; logged: 'train/loss'.*{CURES}"),
        (at(5, Rank(3), max_regression=0.1), (), NONE, "give fit.. validation data.* or set max_regression=None"),
        (plateau(), (Another(4),), {}, "another rank schedule drives this opt.*join the stages"),
        (plateau(), (theirs.EMAWeightAveraging(),), {}, "EMAWeightAveraging averages whole models of"),
        (plateau(), (theirs.StochasticWeightAveraging(1e-2),), {}, "StochasticWeightAveraging averages"),
        (at(5, Rank(3)), (), {"precision": "16-true"}, "16-true.*bf16-true"),
        (Stage(At(epoch=2), Rank(3)), (), {"reload_dataloaders_every_n_epochs": 1}, "epoch needs data of known length"),
        # Then steps become longer.
        (LATE, (LONGER,), {"max_epochs": 4, "max_steps": -1}, "needs a run of known length; set max_steps"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_before_the_first_step(regression, fit, stage, others, options, message):
    module = regression[0]()
    with pytest.raises(ConfigurationError, match=message):
        fit(RankScheduler(stage), *others, module=module, **options)
    assert module.trainer.global_step == 0


@pytest.mark.parametrize(
    ("stage", "others", "options", "step"),
    [
        # The number of steps is known, though they become longer.
        (LATE, (LONGER,), {}, 18),
        # An epoch has ten batches.
        (Stage(At(epoch=2), Rank(3)), (), {"accumulate_grad_batches": 4, "max_epochs": 3, "max_steps": -1}, 6),
    ],
)
def test_shares_of_a_run_and_epochs_are_counted_in_steps(fit, stage, others, options, step):
    scheduler = RankScheduler(stage)
    fit(scheduler, *others, **options)
    assert [event.step for event in scheduler.history] == [step]


def test_evaluate_judges_in_place_of_the_modules_validation(regression, fit):
    module = regression[0]()
    called = []

    def evaluate():
        called.append((module.global_step, ranks(module)))
        return {"f1": 1.0 / sum(ranks(module))}

    for mode, undone in (("min", True), ("max", False)):
        how = {"max_regression": 0.0, "check_monitor": "f1", "check_mode": mode}
        scheduler = RankScheduler(at(8, Rank(3), **how), evaluate=evaluate)
        fit(scheduler, module=module, max_steps=10, **NONE)
        (event,) = scheduler.history
        assert (event.undone, event.measured.before, event.measured.after) == (undone, 1 / 6, 1 / 3)
    assert called == [(8, {6}), (8, {3})] * 2


def test_ctrl_c_in_a_validation_for_a_change_leaves_the_module_as_it_was_before(regression, fit, assert_same, tmp_path):
    class Interrupted(regression[0]):
        def validation_step(self, batch, batch_idx):
            if self.global_step == 8 and ranks(self) == {3}:
                raise KeyboardInterrupt
            super().validation_step(batch, batch_idx)

    module, stage = Interrupted(), at(8, Rank(3), max_regression=99.0, lr_factor=2.0)
    scheduler = RankScheduler(stage)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(scheduler, module=module, saved=tmp_path)
    other, _ = fit(RankScheduler([]), max_steps=8)
    assert_same(module, other)
    assert "log" not in vars(module)
    assert all(part.training for part in module.modules())
    # Its run has ended.
    scheduler.load_state_dict(scheduler.state_dict())
    resumed, _ = fit(RankScheduler(stage), ckpt_path=tmp_path / "step=8.ckpt")
    assert_same(resumed, fit(RankScheduler(stage))[0])


# What a step costs


def walked(fit, step):
    """The files of dynrank that run at the start of the batch after ``step``; ranks are cut after 8."""
    root = Path(dynrank.__file__).parent
    scheduler = RankScheduler(Stage(At(step=8), Budget(share=0.5)))
    begin = scheduler.on_train_batch_start
    files = set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(root) and frame.f_code.co_name != "<module>":
            files.add(str(path.relative_to(root)))

    def noted(trainer, *rest):
        sys.setprofile(note if trainer.global_step == step else None)
        begin(trainer, *rest)
        sys.setprofile(None)

    scheduler.on_train_batch_start = noted
    fit(scheduler, max_steps=10)
    assert len(scheduler.history) == 1
    return files


def test_start_of_a_batch_asks_one_question_and_a_cut_runs_few_files(fit):
    """As dynrank/README.md counts them; with ``-s`` pytest shows their list."""
    assert walked(fit, 5) == {"callbacks/lightning/rank_scheduler.py", "driver/driver.py"}
    files = walked(fit, 8)
    print(*sorted(files), sep="\n")
    assert "change/change.py" in files
    assert len(files) <= 33
