"""The callback in Lightning's trainer: when it acts, which validations it runs, and equal weights after a resume.

What does not depend on the trainer is tested in tests/driver.
"""

import sys
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from tables import rows
from torch.utils.data import DataLoader, Subset, default_collate
from trained import ranks

import dynrank
from dynrank.app.tasks.loader import ResumableLoader
from dynrank.callbacks import RankScheduler
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, after_convergence, auto, early_budget
from dynrank.targets import Budget, Rank
from dynrank.triggers import At, Gap, Plateau


def at(step, target, *how, **options):
    return [Stage(At(step=step), target, how=How(*how, **options))]


def validations(folder):
    """Leaves a checkpoint of every validation there."""
    return ModelCheckpoint(folder, filename="validation {step}", monitor="val/loss", save_top_k=-1)


def plateau(**how):
    """This loss never halves between two validations: it fires at the third one after the warm-up."""
    trigger = Plateau(patience=2, min_delta=0.5, warmup_steps=5)
    return RankScheduler(after_convergence(3, trigger, shared=False, deadline=None, how=How(**how)))


class Another(RankScheduler):
    """A derived class; Lightning itself refuses two of one class."""


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Another(4), r"got RankScheduler and Another .*join their stages"),
        (EMAWeightAveraging(), "EMAWeightAveraging averages weights of one rank"),
        (StochasticWeightAveraging(1e-2), "StochasticWeightAveraging averages weights of one rank"),
    ],
)
def test_callbacks_that_cannot_be_beside_a_schedule_are_refused(fit, other, message):
    with pytest.raises(ConfigurationError, match=message):
        fit(plateau(), other)


ACCUMULATING = {"val_check_interval": 6, "check_val_every_n_epoch": None, "accumulate_grad_batches": 2}
SCHEDULES = {
    # validations that fall into the middle of epochs
    "accumulating": (lambda: plateau(lr_factor=2.0), ACCUMULATING),
    # checkpoints between the validation that decides and the change that it is compared with
    "checked at a plateau": (lambda: plateau(max_regression=0.05), {}),
    # a cut in the middle, and trials after the last step
    "auto": (lambda: RankScheduler(auto(0.3, at=0.5)), {}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_resume_from_any_checkpoint_is_bit_equal(fit, assert_same, tmp_path, name):
    schedule, options = SCHEDULES[name]
    whole = schedule()
    reference, _ = fit(whole, validations(tmp_path), saved=tmp_path, **options)
    # Checkpoints lie before, at and after the change, and in its window.
    assert 3 < whole.history[0].step < 20
    # After step 24 nothing is left to do.
    files = [file for file in sorted(tmp_path.glob("*.ckpt")) if "=24" not in file.name]
    assert len(files) > 20
    # The tests of the driver go on from every step, so some are enough here.
    for file in files[::4]:
        resumed = schedule()
        module, _ = fit(resumed, ckpt_path=file, **options)
        assert resumed.history == whole.history, file.name
        # The resumed run has no checkpoint callback whose metric would be kept.
        assert str(resumed.state_dict() | {"logged": {}}) == str(whole.state_dict() | {"logged": {}}), file.name
        assert_same(module, reference, file.name)


@pytest.mark.parametrize("over", ["steps", "an epoch"])
def test_gap_to_a_loss_of_training_is_observed_alike_in_a_resumed_run(regression, fit, tmp_path, over):
    """Checkpoints lie right before validations, where Lightning knows no metric of training any more.

    A mean over an epoch of ten steps is known from its end on, so the validations at 5 and 10 come too early.
    """

    class Logging(regression[0]):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            # What is logged at a step is the same in a resumed run, a mean over a part of an epoch is not.
            value = loss if over == "steps" else torch.tensor(2.0)
            self.log("train/loss", value, on_step=over == "steps", on_epoch=over != "steps")
            return loss

    def run(**options):
        scheduler = RankScheduler(Stage(Gap(window=9), Rank(3)))
        with pytest.warns(UserWarning, match="ended before stage 1"):
            fit(scheduler, module=Logging(), **options)
        return scheduler.driver.stages[0].when.state_dict()["_gaps"]

    whole = run(saved=tmp_path)
    assert len(whole) == (4 if over == "steps" else 2)
    for step in (5, 13, 15):
        assert run(ckpt_path=tmp_path / f"step={step}.ckpt") == whole, step


def test_metric_of_training_that_is_never_logged_is_missed_in_the_second_epoch(fit):
    with pytest.raises(ConfigurationError, match="train of Gap must name a metric that is logged, got 'train/los'"):
        fit(RankScheduler(Stage(Gap("train/los"), Rank(3))))


def test_means_over_an_epoch_are_observed_once_each_also_in_a_resumed_run(regression, fit, tmp_path):
    """Validations after every second step read the mean of the last epoch, of ten steps, again and again."""

    class Logging(regression[0]):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", torch.tensor(2.0), on_step=False, on_epoch=True)
            return loss

    def run(patience, **options):
        when = Plateau("train/loss", patience=patience, min_delta=0.1, warmup_steps=0)
        scheduler = RankScheduler(Stage(when, Rank(3)))
        fit(scheduler, module=Logging(), max_steps=50, val_check_interval=2, **options)
        return [event.step for event in scheduler.history]

    # The first mean is the best, and each of the next two is one without a better one.
    steps = run(2, saved=tmp_path)
    assert len(steps) == 1
    assert 30 < steps[0] < 40
    for step in (9, 14, 26):
        assert run(2, ckpt_path=tmp_path / f"step={step}.ckpt") == steps, step
    # From behind the last step of an epoch, Lightning knows no mean over it.
    for step in (10, 20):
        (later,) = run(2, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert steps[0] < later <= steps[0] + 10, step


@pytest.mark.parametrize(("step", "first"), [(8, 20), (13, 30)])
@pytest.mark.parametrize("where", ["training_step", "on_train_epoch_end"])
def test_trigger_reads_the_mean_of_the_epoch_that_has_ended_where_nothing_is_validated(
    regression, fit, tmp_path, where, step, first
):
    """Also in a resumed run, and though the module's hook comes after those of callbacks. An epoch has ten steps."""

    class Logging(regression[0]):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if where == "training_step":
                self.log("score", 9.0 - self.current_epoch, on_step=False, on_epoch=True)
            return loss

        def on_train_epoch_end(self):
            if where == "on_train_epoch_end":
                self.log("score", 9.0 - self.current_epoch)

    def run(**options):
        scheduler = RankScheduler([*at(step, Rank(3)), Stage(Plateau("score", warmup_steps=0), Rank(2))])
        trigger = scheduler.driver.stages[1].when
        seen = []
        observe = trigger.observe
        trigger.observe = lambda now, score: seen.append((now, score)) or observe(now, score)
        with pytest.warns(UserWarning, match="ended before stage 2"):
            fit(scheduler, module=Logging(), limit_val_batches=0, max_epochs=5, max_steps=-1, **options)
        return seen

    seen = run(saved=tmp_path)
    assert seen == [(now, 10.0 - now // 10) for now in range(first, 51, 10)]
    for resumed in (9, 14, 25):
        assert run(ckpt_path=tmp_path / f"step={resumed}.ckpt") == [row for row in seen if row[0] > resumed], resumed


@pytest.mark.parametrize(("step", "first"), [(10, 25), (13, 35)])
def test_trigger_reads_a_mean_once_a_whole_epoch_has_the_ranks_of_after(regression, fit, step, first):
    """Before that a gap between it and the validation says nothing of the model. An epoch has ten steps."""

    class Logging(regression[0]):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", float(self.current_epoch), on_step=False, on_epoch=True)
            return loss

    scheduler = RankScheduler([*at(step, Rank(3)), Stage(Gap(window=9), Rank(2))])
    gap = scheduler.driver.stages[1].when
    seen = []
    observe = gap.observe
    gap.observe = lambda at_step, train, val: seen.append((at_step, train)) or observe(at_step, train, val)
    with pytest.warns(UserWarning, match="ended before stage 2"):
        fit(scheduler, module=Logging(), max_steps=40)
    # The mean that is known then is of the epoch before.
    assert seen == [(now, (now - 1) // 10 - 1.0) for now in range(first, 41, 5)]


def test_trigger_waits_for_a_metric_that_not_every_step_logs(regression, fit, tmp_path):
    """Lightning keeps its value of before the change; a run that is resumed between the two waits, too."""

    class Seldom(regression[0]):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 0:
                self.log("train/loss", float(self.global_step))
            return loss

    def run(**options):
        scheduler = RankScheduler([*at(13, Rank(3)), Stage(Gap(window=9), Rank(2))])
        gap = scheduler.driver.stages[1].when
        seen = []
        observe = gap.observe
        gap.observe = lambda now, train, val: seen.append((now, train)) or observe(now, train, val)
        with pytest.warns(UserWarning, match="ended before stage 2"):
            fit(scheduler, module=Seldom(), max_steps=40, **options)
        return seen

    seen = run(saved=tmp_path)
    assert seen == [(25, 20.0), (30, 20.0), (35, 30.0), (40, 30.0)]
    for step in (12, 14, 16):
        assert run(ckpt_path=tmp_path / f"step={step}.ckpt") == seen, step


def test_run_that_validates_every_second_epoch_resumes_from_the_end_of_any(fit, assert_same, tmp_path):
    options = {"max_steps": 60, "val_check_interval": 1.0, "check_val_every_n_epoch": 2}

    def run(**more):
        scheduler = RankScheduler(Stage(Plateau(patience=1, min_delta=0.99, warmup_steps=0), Rank(3)))
        module, _ = fit(scheduler, **options, **more)
        return module, [event.step for event in scheduler.history]

    whole, steps = run(saved=tmp_path)
    assert steps == [40]
    for step in (10, 20, 30, 40):
        resumed, found = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert found == steps, step
        assert_same(resumed, whole, step)


def test_run_without_validation_resumes_from_the_end_of_any_epoch(regression, fit, assert_same, tmp_path):
    """A trigger reads the value of its last step; Lightning ends no epoch behind whose last batch a run is resumed."""

    class Logging(regression[0]):
        def training_step(self, batch, batch_idx):
            self.log("score", 1.0)
            return super().training_step(batch, batch_idx)

    def run(**options):
        scheduler = RankScheduler(Stage(Plateau("score", patience=2, warmup_steps=0), Rank(3)))
        module, _ = fit(scheduler, module=Logging(), max_steps=40, limit_val_batches=0, **options)
        return module, [event.step for event in scheduler.history]

    whole, steps = run(saved=tmp_path)
    assert steps == [30]
    for step in (9, 10, 11, 20, 30):
        resumed, found = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert found == steps, step
        assert_same(resumed, whole, step)


def test_mean_that_a_resume_has_forgotten_is_not_the_value_of_the_last_step(regression, fit, tmp_path):
    """Lightning has both under one name; an epoch has ten steps."""

    class Logging(regression[0]):
        def training_step(self, batch, batch_idx):
            self.log("score", float(batch_idx == 9) - self.current_epoch, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    def run(**options):
        scheduler = RankScheduler(Stage(Plateau("score", patience=9, warmup_steps=0), Rank(3)))
        plateau = scheduler.driver.stages[0].when
        seen = []
        observe = plateau.observe
        plateau.observe = lambda now, value: seen.append((now, pytest.approx(value))) or observe(now, value)
        with pytest.warns(UserWarning, match="ended before stage 1"):
            fit(scheduler, module=Logging(), max_steps=40, limit_val_batches=0, **options)
        return seen

    means = [(10, 0.1), (20, -0.9), (30, -1.9), (40, -2.9)]
    assert run(saved=tmp_path) == means
    assert run(ckpt_path=tmp_path / "step=20.ckpt") == means[2:]


@pytest.mark.parametrize(
    ("make", "score"),
    [(partial(ModelCheckpoint, monitor="score"), "best_model_score"), (partial(EarlyStopping, "score"), "best_score")],
)
def test_validation_that_is_due_at_a_resume_is_judged_by_a_metric_of_training(regression, fit, tmp_path, make, score):
    """Which Lightning has forgotten."""

    class Logging(regression[0]):
        def training_step(self, batch, batch_idx):
            self.log("score", float(self.global_step))
            return super().training_step(batch, batch_idx)

    def run(**options):
        judge = make()
        _, trainer = fit(RankScheduler(at(8, Rank(3))), judge, module=Logging(), max_steps=22, **options)
        return trainer.global_step, getattr(judge, score)

    whole = run(saved=tmp_path, default_root_dir=tmp_path)
    for step in (5, 10, 15):
        assert run(ckpt_path=tmp_path / f"step={step}.ckpt", default_root_dir=tmp_path) == whole, step


@pytest.mark.parametrize("error_in", [10, 13, 18, 19])
def test_a_batch_that_an_exception_has_ended_is_not_counted_in_the_resume(regression, error_in, tmp_path):
    """Its checkpoint has a batch that has begun."""
    make, data, trainer = regression

    class Failing(make):
        def training_step(self, batch, batch_idx):
            if self.global_step == error_in and self.trainer.ckpt_path is None:
                raise RuntimeError("no memory")
            return super().training_step(batch, batch_idx)

    def run(**options):
        scheduler = RankScheduler(Stage(At(epoch=2), Rank(2)))
        saver = OnExceptionCheckpoint(tmp_path, "saved")
        made = trainer(max_epochs=3, callbacks=[scheduler, saver], enable_checkpointing=True, num_sanity_val_steps=0)
        made.fit(Failing(), *data(), **options)
        return [event.step for event in scheduler.history]

    with pytest.raises(RuntimeError, match="no memory"):
        run()
    assert run(ckpt_path=tmp_path / "saved.ckpt") == [20]


@pytest.mark.parametrize("where", ["validation", "training"])
def test_value_is_observed_once_though_lightning_keeps_it(regression, fit, where):
    """A metric that some validations lack, and one that not every step logs: both get better each time."""

    class Seldom(regression[0]):
        validations = 0

        def training_step(self, batch, batch_idx):
            if where == "training" and batch_idx == 0:
                self.log("score", 1.0 - 0.1 * self.current_epoch)
            return super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            if where == "validation" and self.validations % 3 == 0:
                self.log("score", 1.0 - 0.1 * self.validations)
            self.validations += 1

    scheduler = RankScheduler(Stage(Plateau("score", patience=1, warmup_steps=0), Rank(3)))
    with pytest.warns(UserWarning, match="ended before stage 1"):
        fit(scheduler, module=Seldom(), val_check_interval=2)
    assert not scheduler.history


def test_others_see_the_changed_ranks_in_the_step_that_uses_them(fit):
    """Wherever they stand in the list: a LearningRateMonitor logs the rate of that step."""

    class Seeing(lightning.Callback):
        def __init__(self):
            self.seen = {}

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen[trainer.global_step] = ranks(pl_module)

    before, behind = Seeing(), Seeing()
    fit(before, RankScheduler([*at(6, Rank(3)), *at(10, Rank(2))]), behind, max_steps=12)
    assert before.seen == behind.seen == {step: {6} if step < 6 else {3} if step < 10 else {2} for step in range(12)}


LENGTHS = {"steps": {"max_steps": 10}, "epochs": {"max_epochs": 1, "max_steps": -1}}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("end", ["squeeze", "plateau"])
def test_stage_due_after_the_last_step_is_done_by_a_resume(fit, assert_same, tmp_path, end, length):
    """At a set time, or decided by the last validation, which comes after a checkpoint."""

    def run(*callbacks, **options):
        when = Plateau(patience=1, min_delta=0.99) if end == "plateau" else At(fraction=1.0)
        # So the files of the last step stay as they are before the change.
        scheduler = RankScheduler(Stage(when, Rank(3), how=How(max_regression=1e9)), keep_best_before=True)
        return *fit(scheduler, *callbacks, **LENGTHS[length], **options), scheduler.history

    with pytest.warns(UserWarning, match=r"the (best|last) checkpoint.*step 10, has rank 6.*model has rank 3"):
        module, trainer, history = run(validations(tmp_path), saved=tmp_path)
    assert ranks(module) == {3}
    files = sorted(tmp_path.glob("*step=10*"))
    # One file is from before the validation, and one from after it.
    assert len(files) == 2
    for file in files:
        again, resumed, events = run(ckpt_path=file)
        assert events == history, file.name
        # Loggers take their step from this count; of an epoch that Lightning itself ends, it has one less.
        steps = [made.fit_loop.epoch_loop._batches_that_stepped for made in (resumed, trainer)]
        assert steps == [10, 10] or (length == "epochs" and steps == [9, 10]), file.name
        assert_same(again, module, file.name)


def test_run_of_epochs_goes_on_in_the_middle_of_one(regression, fit, assert_same, tmp_path):
    """Lightning forgets the place in the data if the module has asked for the length of the run."""

    class Asking(regression[0]):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == 30
            return super().configure_optimizers()

    options = {"max_epochs": 3, "max_steps": -1, "val_check_interval": None}
    module, _ = fit(RankScheduler(at(25, Rank(3))), module=Asking(), saved=tmp_path, **options)
    file = tmp_path / "step=23.ckpt"
    resumed, _ = fit(RankScheduler(at(25, Rank(3))), module=Asking(), ckpt_path=file, **options)
    assert_same(resumed, module)


def test_run_goes_on_at_the_end_of_an_epoch_that_was_shorter(regression, tmp_path):
    """As in one process after two: each step has its number, and no epoch is empty."""
    module_class, data, trainer = regression

    class Module(module_class):
        epochs = 0

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss)
            return loss

        def on_train_epoch_end(self):
            self.epochs += 1

    def run(steps, size, checkpoint=None):
        module = Module()
        loader = ResumableLoader(data()[1].dataset, [1] * 80, size, 3, default_collate)
        logger = CSVLogger(tmp_path, name="", version=str(steps))
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"log_every_n_steps": 1, "logger": logger, "enable_checkpointing": True}
        options |= {"val_check_interval": 5, "num_sanity_val_steps": 0}
        made = trainer(max_steps=steps, callbacks=[RankScheduler([]), saves], **options)
        made.fit(module, loader, data()[1], ckpt_path=checkpoint)
        return module.epochs, [int(row["step"]) for row in rows(tmp_path / str(steps) / "metrics.csv", "train/loss")]

    assert run(12, 16) == (3, [*range(12)])
    assert run(17, 8, tmp_path / "step=10.ckpt") == (2, [*range(10, 17)])


def test_validations_of_a_check_reach_no_callback(regression, fit):
    validated = []
    heard = []
    drawn = []
    shown = {}

    class Module(regression[0]):
        def on_validation_epoch_start(self):
            validated.append(self.global_step)

    class Hearing(lightning.Callback):
        def on_validation_end(self, trainer, pl_module):
            heard.append(trainer.global_step)

        def on_train_batch_end(self, trainer, *_):
            shown[trainer.global_step] = float(trainer.callback_metrics.get("val/loss", 0.0))

    class Bar(RichProgressBar):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            drawn.append(trainer.global_step)

    scheduler = RankScheduler(at(8, Rank(3), max_regression=99.0))
    fit(scheduler, Hearing(), Bar(), module=Module(), max_steps=15, enable_progress_bar=True)
    assert shown[9] == shown[8] > 0
    assert validated == [5, 8, 8, 10, 15]
    assert heard == drawn == [5, 10, 15]


def test_share_of_a_run_whose_steps_become_longer_needs_its_number_of_steps(regression):
    module_class, data, trainer = regression

    def fitted(**options):
        scheduler = RankScheduler([Stage(Plateau(patience=99), Rank(3), deadline=0.75)])
        # From the third epoch on a step has four batches.
        longer = GradientAccumulationScheduler({0: 1, 2: 4})
        made = trainer(callbacks=[scheduler, longer], num_sanity_val_steps=0, **options)
        made.fit(module_class(), *data())
        return [event.step for event in scheduler.history]

    assert fitted(max_steps=24, max_epochs=-1) == [18]
    with pytest.raises(ConfigurationError, match="needs a run of known length; set max_steps"):
        fitted(max_epochs=4)


def test_trigger_may_watch_what_only_training_logs(regression, fit):
    class Logging(regression[0]):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss)
            return loss

    def reason(**options):
        trigger = Plateau(monitor="train/loss", patience=1, min_delta=0.99)
        scheduler = RankScheduler(after_convergence(3, trigger, deadline=0.5))
        fit(scheduler, module=Logging(), **options)
        return scheduler.history[0].reason

    assert reason(num_sanity_val_steps=1).startswith("plateau of train/loss")
    # The second epoch ends at step 20.
    assert reason(limit_val_batches=0, max_steps=24, max_epochs=-1).startswith("deadline at 0.5 of the run")


def test_check_without_validation_is_refused(fit):
    scheduler = RankScheduler(at(5, Rank(3), max_regression=0.1))
    with pytest.raises(ConfigurationError, match=r"give fit\(\) validation data, or set max_regression=None$"):
        fit(scheduler, limit_val_batches=0, max_steps=10)


def test_a_callback_that_waits_never_looks_through_the_modules(regression, fit):
    """While it trains, validates and accumulates; and it keeps no trainer afterwards."""

    class Counted(regression[0]):
        walks = 0

        def named_modules(self, *args, **options):
            self.walks += 1
            return super().named_modules(*args, **options)

    def walks(steps, *callbacks):
        module, _ = fit(*callbacks, module=Counted(), max_steps=steps, accumulate_grad_batches=2)
        return module.walks

    waiting = [RankScheduler(Stage(At(fraction=1.0), Rank(3))) for _ in range(2)]
    assert walks(20, waiting[0]) - walks(4, waiting[1]) == walks(20) - walks(4)
    assert not [value for value in vars(waiting[0]).values() if type(value).__module__.startswith("lightning")]


def test_a_cut_runs_few_files(fit):
    """As dynrank/README.md counts them; with ``-s`` pytest shows their list."""
    root = Path(dynrank.__file__).parent
    scheduler = RankScheduler(Stage(At(step=8), Budget(share=0.5)))
    advance = scheduler.driver.advance
    # The hook of the callback itself calls the driver.
    files = {"callbacks/lightning/rank_scheduler.py"}

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(root) and frame.f_code.co_name != "<module>":
            files.add(str(path.relative_to(root)))

    def walked(training):
        sys.setprofile(note if training.step == 8 else None)
        advance(training)
        sys.setprofile(None)

    scheduler.driver.advance = walked
    fit(scheduler, max_steps=10)
    assert len(scheduler.history) == 1
    print(*sorted(files), sep="\n")
    assert "change/change.py" in files
    assert len(files) <= 31


@pytest.fixture
def curriculum(regression, tmp_path):
    """Runs ``fit`` with epochs of so many steps, where Lightning makes the loader anew in each."""
    make, data, trainer = regression

    def run(lengths, *callbacks, ckpt_path=None):
        class Curriculum(make):
            def train_dataloader(self):
                rows = Subset(data()[1].dataset, range(8 * lengths[self.trainer.current_epoch]))
                return DataLoader(rows, batch_size=8)

        options = {"max_epochs": len(lengths), "reload_dataloaders_every_n_epochs": 1, "enable_checkpointing": True}
        options |= {"default_root_dir": tmp_path / "root"}
        trainer(callbacks=[*callbacks], **options).fit(Curriculum(), ckpt_path=ckpt_path)

    return run


@pytest.mark.parametrize("lengths", [(2, 4, 6, 8), (8, 6, 4, 2)])
@pytest.mark.parametrize(("at", "epoch"), [(At(epoch=2), 2), (At(epoch=3), 3), (At(fraction=1.0), 4)])
def test_epochs_may_differ_in_length(curriculum, lengths, at, epoch):
    """What is due after the last step waits for it."""
    scheduler = RankScheduler(Stage(at, Rank(2)))
    curriculum(lengths, scheduler)
    assert [event.step for event in scheduler.history] == [sum(lengths[:epoch])]


def test_a_run_that_resumes_within_a_shorter_epoch_knows_when_the_next_one_begins(curriculum, tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    lengths = (8, 4, 4, 4)
    for start in (None, 5, 8, 9, 11, 12):
        scheduler = RankScheduler(Stage(At(epoch=2), Rank(2)))
        path = None if start is None else tmp_path / f"step={start}.ckpt"
        curriculum(lengths, scheduler, *([] if start else [saver]), ckpt_path=path)
        assert [event.step for event in scheduler.history] == [12], start


def test_a_search_for_a_batch_size_before_the_first_step_moves_a_cut(regression, tmp_path):
    """As in Lightning's documentation: the search begins in the first epoch, which the schedule has seen begin."""
    make, data, trainer = regression
    loader, _ = data()

    class Searching(BatchSizeFinder):
        def on_fit_start(self, trainer, pl_module):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                self.scale_batch_size(trainer, pl_module)

    class Module(make):
        batch_size = 4

        def train_dataloader(self):
            return DataLoader(loader.dataset, batch_size=self.batch_size)

        val_dataloader = train_dataloader

    module = Module()
    scheduler = RankScheduler(early_budget(3, at=0.5))
    callbacks = [scheduler, Searching(init_val=4, max_trials=2, steps_per_trial=1)]
    options = {"default_root_dir": tmp_path, "enable_checkpointing": True, "max_epochs": 2}
    trainer(callbacks=callbacks, **options).fit(module)
    # 80 rows are 10 steps of 8 in an epoch.
    assert module.batch_size == 8
    assert [event.step for event in scheduler.history] == [10]
