"""The callback in Lightning's trainer: when it acts, which validations it runs, and equal weights after a resume.

What does not depend on the trainer is tested in tests/driver.
"""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from tables import rows
from torch.utils.data import default_collate
from trained import ranks

import dynrank
from dynrank.callbacks import AdapterCheckpoint, RankScheduler
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, after_convergence, auto
from dynrank.targets import Rank
from dynrank.tasks.loader import ResumableLoader
from dynrank.triggers import At, Plateau


def at(step, target, *how, **options):
    return [Stage(At(step=step), target, how=How(*how, **options))]


def validations(folder):
    """Leaves a checkpoint of every validation there."""
    return ModelCheckpoint(folder, filename="validation {step}", monitor="val/loss", save_top_k=-1)


def plateau(**how):
    """This loss never halves between two validations: it fires at the third one after the warm-up."""
    trigger = Plateau(patience=2, min_delta=0.5, warmup_steps=5)
    return RankScheduler(after_convergence(3, trigger, shared=False, deadline=None, how=How(**how)))


def test_second_scheduler_of_a_derived_class_is_refused(fit):
    class Another(RankScheduler):
        pass

    with pytest.raises(ConfigurationError, match=r"got RankScheduler and Another .*join their stages"):
        fit(plateau(), Another(at(3, Rank(2))))


def test_scheduler_drops_once_after_the_plateau_and_tells_other_callbacks(fit):
    told = []

    class Listener(lightning.Callback):
        def on_rank_change(self, trainer, pl_module, event):
            told.append((event, ranks(pl_module)))

    scheduler = plateau()
    module, trainer = fit(scheduler, Listener())
    (event,) = scheduler.history
    assert event.reason == "plateau of val/loss"
    assert ranks(module) == {3}
    assert told == [(event, {3})]
    for _, layer in dynrank.lora_layers(module):
        for parameter in (layer.lora_A, layer.lora_B):
            state = trainer.optimizers[0].state[parameter]
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
            assert state["step"] == 24


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
        assert str(resumed.state_dict()) == str(whole.state_dict()), file.name
        assert_same(module, reference, file.name)


@pytest.mark.parametrize("end", ["squeeze", "plateau"])
def test_stage_due_after_the_last_step_is_done_by_a_resume(fit, assert_same, tmp_path, end):
    """At a set time, or decided by the last validation, which comes after a checkpoint."""

    def run(*callbacks, **options):
        when = Plateau(patience=1, min_delta=0.99) if end == "plateau" else At(fraction=1.0)
        # So the files of the last step stay as they are before the change.
        scheduler = RankScheduler(Stage(when, Rank(3), how=How(max_regression=1e9)), keep_best_before=True)
        return *fit(scheduler, *callbacks, max_steps=10, **options), scheduler.history

    with pytest.warns(UserWarning, match=r"the (best|last) checkpoint.*step 10, has rank 6.*model has rank 3"):
        module, trainer, history = run(validations(tmp_path), saved=tmp_path)
    assert ranks(module) == {3}
    files = sorted(tmp_path.glob("*step=10*"))
    # One file is from before the validation, and one from after it.
    assert len(files) == 2
    for file in files:
        again, resumed, events = run(ckpt_path=file)
        assert events == history, file.name
        # Loggers take their step from this count.
        steps = [made.fit_loop.epoch_loop._batches_that_stepped for made in (resumed, trainer)]
        assert steps == [10, 10], file.name
        assert_same(again, module, file.name)


@pytest.mark.parametrize("asks", [False, True])
def test_run_of_epochs_goes_on_in_the_middle_of_one(regression, fit, assert_same, tmp_path, asks):
    """Lightning forgets the place in the data if the module has asked for the length of the run."""

    class Module(regression[0]):
        def configure_optimizers(self):
            assert not asks or self.trainer.estimated_stepping_batches == 30
            return super().configure_optimizers()

    options = {"max_epochs": 3, "max_steps": -1, "val_check_interval": None}
    whole = RankScheduler(at(25, Rank(3)))
    again = RankScheduler(at(25, Rank(3)))
    module, _ = fit(whole, module=Module(), saved=tmp_path, **options)
    resumed, _ = fit(again, module=Module(), ckpt_path=tmp_path / "step=23.ckpt", **options)
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


def test_validations_of_a_check_reach_no_trigger_and_no_other_callback(regression, fit, tmp_path):
    observed = []
    validated = []
    saved = []
    drawn = []

    class Seeing(Plateau):
        def observe(self, step, *values):
            observed.append(step)
            return super().observe(step, *values)

    class Module(regression[0]):
        def on_validation_epoch_start(self):
            validated.append(self.global_step)

    class Saving(ModelCheckpoint):
        def on_validation_end(self, trainer, pl_module):
            saved.append(trainer.global_step)

    class Bar(RichProgressBar):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            drawn.append(trainer.global_step)

    class Reading(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            shown[trainer.global_step] = float(trainer.callback_metrics.get("val/loss", 0.0))

    stages = [
        Stage(At(step=8), Rank(3), how=How(max_regression=99.0)),
        Stage(Seeing(patience=99), Rank(2), deadline=1.0),
    ]
    stop = EarlyStopping("val/loss", patience=1)
    shown = {}
    others = [Saving(tmp_path), stop, Reading(), Bar()]
    fit(RankScheduler(stages), *others, module=Module(), max_steps=15, enable_progress_bar=True)
    assert shown[9] == shown[8] > 0
    assert validated == [5, 8, 8, 10, 15]
    assert observed == [10, 15]
    assert saved == drawn == [5, 10, 15]
    assert stop.stopped_epoch == 0


@pytest.mark.parametrize("kind", [ModelCheckpoint, AdapterCheckpoint])
def test_best_checkpoint_from_before_the_drop_is_tested_at_its_own_rank(regression, fit, tmp_path, kind):
    module_class = regression[0]
    _, val = regression[1]()
    trainer = regression[2]

    class Tested(module_class):
        def test_step(self, batch, batch_idx):
            self.log("test/loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    before = kind(tmp_path, filename="before", every_n_train_steps=9, save_on_train_epoch_end=False)
    words = r"the last checkpoint, .*before.ckpt' of step 9, has rank 6, but the trained model has rank 3"
    with pytest.warns(UserWarning, match=words):
        module, fitted = fit(RankScheduler(at(11, Rank(3))), before, module=Tested(), max_steps=12)
    assert ranks(module) == {3}
    reloaded = Tested.load_from_checkpoint(before.best_model_path)
    assert ranks(reloaded) == {6}
    expected = trainer().test(reloaded, val, verbose=False)
    assert fitted.test(module, val, ckpt_path="best", verbose=False) == expected
    assert ranks(module) == {6}


class Lengthening(GradientAccumulationScheduler):
    """One batch in a step, from the third epoch on four."""

    def __init__(self):
        super().__init__({0: 1, 2: 4})


def test_share_of_a_run_whose_steps_become_longer_needs_its_number_of_steps(regression):
    module_class, data, trainer = regression

    def fitted(**options):
        scheduler = RankScheduler([Stage(Plateau(patience=99), Rank(3), deadline=0.75)])
        made = trainer(callbacks=[scheduler, Lengthening()], num_sanity_val_steps=0, **options)
        made.fit(module_class(), *data())
        return [event.step for event in scheduler.history]

    assert fitted(max_steps=24, max_epochs=-1) == [18]
    with pytest.raises(ConfigurationError, match="needs a run of known length; set max_steps"):
        fitted(max_epochs=4)


def watching(**options):
    return RankScheduler(after_convergence(3, Plateau(**options), deadline=0.5))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (watching(monitor="val/los"), r"monitor of Plateau \(monitor\).*'val/los'; .*'val/loss'"),
        (RankScheduler(at(9, Rank(3), max_regression=0.1, check_monitor="train/loss")), "check_monitor of How"),
    ],
)
def test_monitor_that_is_not_logged_is_refused_before_the_first_step(fit, scheduler, message):
    class Starting(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            pytest.fail("training has begun")

    with pytest.raises(ConfigurationError, match=message):
        fit(scheduler, Starting(), num_sanity_val_steps=1)


def test_trigger_may_watch_what_only_training_logs(regression, fit):
    class Logging(regression[0]):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss)
            return loss

    scheduler = watching(monitor="train/loss", patience=1, min_delta=0.99)
    fit(scheduler, module=Logging(), num_sanity_val_steps=1)
    assert scheduler.history[0].reason.startswith("plateau of train/loss")
    scheduler = watching(monitor="train/loss", patience=1, min_delta=0.99)
    fit(scheduler, module=Logging(), limit_val_batches=0, max_steps=24, max_epochs=-1)
    # The second epoch ends at step 20.
    assert scheduler.history[0].reason.startswith("deadline at 0.5 of the run")


def test_check_without_validation_is_refused(fit):
    scheduler = RankScheduler(at(5, Rank(3), max_regression=0.1))
    with pytest.raises(ConfigurationError, match=r"give fit\(\) validation data, or set max_regression=None$"):
        fit(scheduler, limit_val_batches=0, max_steps=10)
