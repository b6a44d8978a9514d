"""The callback in a real trainer: when it acts, what it leaves alone, and that a resumed run cannot be told apart."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer

import dynrank
from dynrank.callbacks import RankScheduler, StepSeed
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, after_convergence, grow
from dynrank.targets import Budget, Energy, Factor, GrowTo, Rank
from dynrank.triggers import At, Plateau, SubspaceStable, TailEnergy


def dropping(final_rank, trigger=None, how=None, *, scheduler=RankScheduler, **options):
    """A scheduler that drops to ``final_rank`` after convergence."""
    return scheduler(after_convergence(final_rank, trigger, **options), how)


def train(regression, scheduler, *, ckpt_path=None, checkpoints=None, module=None, extra=(), **options):
    module_class, data, trainer = regression
    callbacks = [scheduler, StepSeed(0), *extra]
    if checkpoints is not None:
        callbacks.append(
            ModelCheckpoint(
                checkpoints, filename="s{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
            )
        )
        callbacks.append(ModelCheckpoint(checkpoints, filename="v{step}", monitor="val/loss", save_top_k=-1))
    module = module or module_class()
    settings = {"max_steps": 60, "val_check_interval": 5, "num_sanity_val_steps": 0} | options
    fitted = trainer(callbacks=callbacks, enable_checkpointing=checkpoints is not None, **settings)
    fitted.fit(module, *data(), ckpt_path=ckpt_path)
    return module, fitted


def plateau_schedule(**options):
    # this loss never halves between two validations: it fires at the third one after the warm-up
    trigger = Plateau(patience=2, min_delta=0.5, warmup_steps=5)
    how = How(**options)
    return dropping(3, trigger, how, deadline=None)


def test_scheduler_drops_once_after_the_plateau_and_carries_the_optimizer(regression):
    scheduler = plateau_schedule()
    module, trainer = train(regression, scheduler)
    (event,) = scheduler.history
    assert event.reason == "plateau of val/loss"
    assert {layer.rank for _, layer in dynrank.lora_layers(module)} == {3}
    for _, layer in dynrank.lora_layers(module):
        for parameter in (layer.lora_A, layer.lora_B):
            state = trainer.optimizers[0].state[parameter]
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
            assert state["step"] == 60  # as many as without a drop


def test_scheduler_drops_at_the_deadline_when_nothing_converges(regression):
    scheduler = dropping(3, Plateau(patience=1000), deadline=0.5)
    train(regression, scheduler)
    assert [(event.step, event.reason) for event in scheduler.history] == [(30, "deadline of 0.5 of the run")]


def test_scheduler_goes_down_in_equal_factors(regression):
    trigger = Plateau(patience=1, min_delta=0.9, cooldown_steps=9)
    scheduler = dropping(1, trigger, drops=2, deadline=0.9)
    module_class, _, _ = regression
    train(regression, scheduler, module=module_class(rank=4))
    ranks = [(event.layers[0].rank_before, event.layers[0].rank_after) for event in scheduler.history]
    assert ranks == [(4, 2), (2, 1)]
    assert scheduler.history[1].step - scheduler.history[0].step >= 9


def test_scheduler_respects_pinned_layers_and_their_own_final_ranks(regression):
    module_class, _, _ = regression
    module = module_class(rank_map={"0": {"rank": 5, "pinned": True}, "2": {"rank": 6, "final_rank": 2}})
    scheduler = dropping(3, deadline=0.5)
    train(regression, scheduler, module=module)
    assert {name: layer.rank for name, layer in dynrank.lora_layers(module)} == {"net.0": 5, "net.2": 2}


@pytest.mark.parametrize("accumulate", [2, 3])
def test_scheduler_never_acts_within_accumulation(regression, accumulate):
    pending = []

    class Spy(RankScheduler):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before = len(self.history)
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if len(self.history) > before:
                pending.append(batch_idx % accumulate)

    scheduler = dropping(3, Plateau(patience=1000), scheduler=Spy, deadline=0.35)
    train(regression, scheduler, accumulate_grad_batches=accumulate, max_steps=20)
    assert pending == [0]
    assert len(scheduler.history) == 1


def test_scheduler_makes_a_change_decided_by_the_last_validation(regression):
    scheduler = dropping(3, Plateau(patience=1, min_delta=0.99), deadline=None)
    module, _ = train(regression, scheduler, max_steps=10)
    assert {layer.rank for _, layer in dynrank.lora_layers(module)} == {3}


def test_scheduler_warns_when_nothing_converged_and_there_is_no_deadline(regression):
    with pytest.warns(UserWarning, match="ranks are not final"):
        train(regression, dropping(3, Plateau(patience=1000), deadline=None), max_steps=10)


def test_scheduler_warns_of_a_low_learning_rate(regression):
    with pytest.warns(UserWarning, match="too little to recover"):
        train(regression, dropping(3, Plateau(patience=1000), deadline=0.9))


def test_rewarmup_lowers_the_rate_of_the_steps_after_the_drop_only(regression):
    module_class, _, _ = regression

    class Recording(module_class):
        def configure_optimizers(self):
            self.rates = []
            optimizers, schedules = super().configure_optimizers()
            # registered before the ramp's own hook, so it runs before the rate is put back
            optimizers[0].register_step_post_hook(lambda o, *_: self.rates.append(o.param_groups[0]["lr"]))
            return optimizers, schedules

    def rates(rewarmup_steps):
        scheduler = dropping(3, Plateau(patience=1000), How(rewarmup_steps=rewarmup_steps), deadline=0.5)
        return train(regression, scheduler, module=Recording())[0].rates

    ratios = [ramped / plain for ramped, plain in zip(rates(4), rates(0), strict=True)]
    assert ratios[:30] + ratios[34:] == [1.0] * 56
    assert ratios[30:34] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5])


def test_rank_change_is_told_to_other_callbacks(regression):
    told = []

    class Listener(lightning.Callback):
        def on_rank_change(self, trainer, pl_module, event):
            told.append(event)

    scheduler = dropping(3, deadline=0.5)
    train(regression, scheduler, extra=[Listener()])
    assert told == scheduler.history


ACCUMULATING = {"val_check_interval": 6, "check_val_every_n_epoch": None, "accumulate_grad_batches": 2}
LOSS = How(metric="loss", window=4, rewarmup_steps=4)
SCHEDULES = {
    "plateau": (lambda: plateau_schedule(rewarmup_steps=4), {}),
    # validations that fall into the middle of epochs
    "accumulating": (lambda: plateau_schedule(rewarmup_steps=4), ACCUMULATING),
    # decided at a validation, then measured
    "loss": (lambda: dropping(3, Plateau(patience=2, min_delta=0.5, warmup_steps=5), LOSS, deadline=None), {}),
    "loss accumulating": (
        lambda: dropping(3, Plateau(patience=1, min_delta=0.5, warmup_steps=5), LOSS, deadline=None),
        ACCUMULATING,
    ),
    "budget by deadline": (lambda: RankScheduler([Stage(Plateau(patience=99), Budget(share=0.5), 0.5)], LOSS), {}),
    "grown, dropped": (lambda: RankScheduler([*at(4, Rank(3)), *at(10, GrowTo(6)), *at(15, Rank(2))]), {}),
    "settled": (lambda: RankScheduler([Stage(SubspaceStable(rank=2, overlap=0.5, every=3), Energy(0.9))]), {}),
    "undone": (lambda: RankScheduler(at(9, Rank(1)), How(max_regression=0.05)), {}),
    # checkpoints between the validation that decides and the change that it is compared with
    "checked at a plateau": (lambda: plateau_schedule(max_regression=0.05), {}),
    "function": (lambda: RankScheduler(lambda step: 6 if step < 7 else 4 if step < 14 else 5), {}),
    # each change lies within the window of the next
    "function, measured": (
        lambda: RankScheduler(lambda step: max(2, 6 - max(0, step - 2) // 2), How(metric="loss", window=4)),
        {},
    ),
}


def at(step, target):
    return [Stage(At(step=step), target)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_resume_from_any_checkpoint_is_bit_equal(regression, tmp_path, name):
    schedule, options = SCHEDULES[name]
    scheduler = schedule()
    options = {"val_check_interval": 5, **options, "max_steps": 24}
    reference, _ = train(regression, scheduler, checkpoints=tmp_path, **options)
    # checkpoints lie before, at and after the change, within its window and within the ramp
    assert 3 < scheduler.history[0].step < 20
    files = [
        file for file in sorted(tmp_path.glob("*.ckpt")) if "=24" not in file.name
    ]  # nothing is left to run from 24
    assert len(files) > 20
    for file in files:
        resumed = schedule()
        module, _ = train(regression, resumed, ckpt_path=file, **options)
        assert resumed.history == scheduler.history, file.name
        assert str(resumed.state_dict()) == str(scheduler.state_dict()), file.name
        for key, value in reference.state_dict().items():
            assert torch.equal(module.state_dict()[key], value), f"{file.name}: {key}"


def test_statistics_are_collected_in_the_window_and_nowhere_else(regression):
    observed = []

    class Spy(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            observed.append(pl_module.net[0]._tap is not None)

    scheduler = RankScheduler(at(20, Rank(3)), How(metric="output", window=5))
    train(regression, scheduler, extra=[Spy()], max_steps=30)
    assert [step for step, on in enumerate(observed) if on] == [15, 16, 17, 18, 19]
    assert scheduler.history[0].step == 20


def test_change_that_cannot_be_foreseen_is_made_a_window_after_its_decision(regression):
    trigger = Plateau(patience=1, min_delta=0.99)
    scheduler = dropping(3, trigger, How(metric="loss", window=7), deadline=None)
    train(regression, scheduler, max_steps=30)
    assert scheduler.history[0].step == 10 + 7  # validations at 5 and 10


def test_change_after_the_last_step_is_measured_before_it(regression):
    scheduler = RankScheduler([Stage(At(fraction=1.0), Rank(2))], How(metric="loss", window=5))
    module, _ = train(regression, scheduler, max_steps=12)
    assert (scheduler.driver.finished, scheduler.history[0].step, module.net[0].rank) == (True, 12, 2)


def test_stage_whose_time_has_come_ends_those_before_it(regression):
    never = Plateau(patience=1000)
    stages = [Stage(never, Rank(5)), Stage(never, Rank(4)), *at(12, Rank(3)), *at(20, Rank(2))]
    scheduler = RankScheduler(stages)
    train(regression, scheduler, max_steps=30)
    assert [(e.step, e.layers[0].rank_before, e.layers[0].rank_after) for e in scheduler.history] == [
        (12, 6, 3),
        (20, 3, 2),
    ]


def test_repeated_stage_acts_until_nothing_is_left_to_do(regression):
    trigger = Plateau(patience=1, min_delta=0.99)
    scheduler = RankScheduler([Stage(trigger, Factor(0.5, lowest=2), repeat=True)])
    train(regression, scheduler)
    assert [event.layers[0].rank_after for event in scheduler.history] == [3, 2]
    assert scheduler.driver.finished


def test_tail_energy_looks_at_its_own_pace(regression):
    looks = []

    class Looking(TailEnergy):
        def observe(self, step, *seen):
            looks.append(step)
            return super().observe(step, *seen)

    scheduler = RankScheduler([Stage(Looking(rank=3, share=0.999, every=7, warmup_steps=10), Rank(3))])
    train(regression, scheduler, max_steps=30)
    assert looks == [7, 14]
    assert scheduler.history[0].step == 14


class Snapshots(lightning.Callback):
    """Factors and optimizer state as they are at every hook of a change."""

    def __init__(self):
        self.predicted, self.changed = [], []

    def on_rank_prediction(self, trainer, pl_module, event):
        self.predicted.append((event, self.state(trainer, pl_module)))

    def on_rank_change(self, trainer, pl_module, event):
        self.changed.append((event, self.state(trainer, pl_module)))

    def state(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        tensors = [value.clone() for value in pl_module.state_dict().values()]
        for _, layer in dynrank.lora_layers(pl_module):
            for parameter in (layer.lora_A, layer.lora_B):
                tensors += [value.clone() for value in optimizer.state[parameter].values()]
        return tensors


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_change_that_costs_too_much_is_undone_exactly_and_tried_again_gentler(regression):
    snapshots = Snapshots()
    scheduler = RankScheduler(at(40, Rank(1)), How(max_regression=0.05))
    train(regression, scheduler, extra=[snapshots])
    attempts = [(event.layers[0].rank_after, event.undone) for event in scheduler.history]
    assert attempts[0] == (1, True)
    assert [rank for rank, _ in attempts] == [1, 4, 5][: len(attempts)]  # half as far each time
    before = snapshots.predicted[0][1]
    for event, state in snapshots.changed:
        assert equal(state, before) is event.undone
    assert all(event.reason.startswith("undone: val/loss") == event.undone for event in scheduler.history)


def test_change_within_the_allowed_regression_stays(regression):
    scheduler = RankScheduler(at(40, Rank(4)), How(max_regression=100.0))
    module, _ = train(regression, scheduler)
    assert [event.undone for event in scheduler.history] == [False]
    assert module.net[0].rank == 4


def test_check_validates_once_more_only_where_the_last_value_is_old(regression):
    module_class, _, _ = regression

    class Counting(module_class):
        validated = ()

        def on_validation_epoch_start(self):
            self.validated += (self.global_step,)

    module = Counting()
    train(regression, RankScheduler(at(20, Rank(4)), How(max_regression=100.0)), module=module, max_steps=22)
    assert module.validated == (5, 10, 15, 20, 20)  # step 20 has just been validated
    module = Counting()
    train(regression, RankScheduler(at(18, Rank(4)), How(max_regression=100.0)), module=module, max_steps=19)
    assert module.validated == (5, 10, 15, 18, 18)


def test_undone_change_leaves_the_run_as_if_it_had_not_been_tried(regression):
    plain, _ = train(regression, RankScheduler([]), max_steps=30)
    refusing = RankScheduler(at(20, Rank(1)), How(max_regression=0.0))
    module, _ = train(regression, refusing, max_steps=30)
    assert all(event.undone for event in refusing.history)
    assert len(refusing.history) > 1
    for name, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_growth_in_a_run_leaves_the_loss_alone(regression):
    snapshots = Snapshots()
    scheduler = RankScheduler(grow(6, At(step=20)), How(max_regression=0.0))
    module_class, _, _ = regression
    module, _ = train(regression, scheduler, module=module_class(rank=2), extra=[snapshots])
    assert [(e.layers[0].rank_before, e.layers[0].rank_after, e.undone) for e in scheduler.history] == [(2, 6, False)]
    assert torch.linalg.matrix_rank(module.net[0].lora_B.detach()) > 2  # and the new directions learn


def test_checkpoint_of_another_schedule_is_refused(regression, tmp_path):
    train(regression, dropping(3, deadline=0.5), checkpoints=tmp_path, max_steps=10)
    file = next(tmp_path.glob("sstep=5*.ckpt"))
    with pytest.raises(ConfigurationError, match="1 stages.*2"):
        train(regression, dropping(3, drops=2, deadline=0.5), ckpt_path=file, max_steps=10)


def test_best_checkpoint_from_before_the_drop_is_tested_at_its_own_rank(regression, tmp_path):
    module_class, data, trainer = regression

    class Tested(module_class):
        def test_step(self, batch, batch_idx):
            self.log("test/loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    before = ModelCheckpoint(
        tmp_path, filename="before", every_n_train_steps=9, save_top_k=1, save_on_train_epoch_end=False
    )
    fitted = trainer(callbacks=[dropping(3, deadline=0.9), before], max_steps=12, enable_checkpointing=True)
    module, (loader, val) = Tested(), data()
    fitted.fit(module, loader, val)
    assert module.net[0].rank == 3
    reloaded = Tested.load_from_checkpoint(before.best_model_path)
    assert reloaded.net[0].rank == 6
    expected = trainer().test(reloaded, val, verbose=False)
    assert fitted.test(module, val, ckpt_path=before.best_model_path, verbose=False) == expected
    assert module.net[0].rank == 6


def test_load_from_checkpoint_takes_the_reduced_rank(regression, tmp_path):
    module_class, _, _ = regression
    module, fitted = train(regression, dropping(3, deadline=0.5), max_steps=10, extra=[])
    fitted.save_checkpoint(tmp_path / "after.ckpt")
    reloaded = module_class.load_from_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    assert {layer.rank for _, layer in dynrank.lora_layers(reloaded)} == {3}
    x = torch.randn(5, 12)
    assert torch.equal(reloaded.eval().net(x), module.eval().net(x))


def test_nan_at_the_drop_names_the_layer_and_changes_nothing(regression):
    module_class, _, _ = regression

    class Diverging(module_class):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.global_step == 5:
                self.net[2].lora_B.data[0, 0] = float("nan")

    module = Diverging()
    with pytest.raises(ConfigurationError, match=r"net\.2.*nothing has been changed"):
        train(regression, dropping(3, deadline=0.5), max_steps=10, module=module)
    assert {layer.rank for _, layer in dynrank.lora_layers(module)} == {6}


def test_unlogged_monitor_is_refused_with_those_that_are_logged(regression):
    with pytest.raises(
        ConfigurationError, match=r"monitor of Plateau \(schedule\.trigger\.monitor\).*'val/los'.*'val/loss'"
    ):
        train(regression, dropping(3, Plateau("val/los")), max_steps=10)


@pytest.mark.parametrize("optimizer", [torch.optim.RMSprop, torch.optim.Adagrad])
def test_optimizer_without_a_rule_is_refused_before_the_first_step(regression, optimizer):
    module_class, _, _ = regression

    class Other(module_class):
        def configure_optimizers(self):
            return optimizer([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    module = Other()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ConfigurationError, match=rf"{optimizer.__name__}.*optimizer_state=reset"):
        train(regression, dropping(3), module=module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_optimizer_without_a_rule_works_when_its_state_may_be_reset(regression):
    module_class, _, _ = regression

    class Other(module_class):
        def configure_optimizers(self):
            return torch.optim.RMSprop([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    module, _ = train(
        regression, dropping(3, how=How(optimizer_state="reset"), deadline=0.5), module=Other(), max_steps=10
    )
    assert module.net[0].rank == 3


def test_final_rank_above_the_rank_is_refused(regression):
    with pytest.raises(ConfigurationError, match=r"stage 1: rank .* rank = 6, .*got 7.*schedule\.final_rank"):
        train(regression, dropping(7))


def test_model_without_lora_layers_is_refused(regression):
    module_class, _, _ = regression
    module = module_class()
    dynrank.merge(module)
    module.net.requires_grad_(True)
    with pytest.raises(ConfigurationError, match="LoRA layers"):
        train(regression, dropping(3), module=module)


def test_scheduler_of_another_run_is_refused(regression):
    scheduler = dropping(3, deadline=0.5)
    train(regression, scheduler, max_steps=10)
    with pytest.raises(ConfigurationError, match="step 10 of another run"):
        train(regression, scheduler, max_steps=10)


def test_same_trainer_goes_on_with_its_scheduler(regression):
    scheduler = RankScheduler([*at(5, Rank(4)), Stage(Plateau(patience=99), Rank(2))])
    with pytest.warns(UserWarning, match="training ended before stage 2"):
        module, trainer = train(regression, scheduler, max_steps=10)
    trainer.fit_loop.epoch_loop.max_steps = 12
    with pytest.warns(UserWarning, match="training ended before stage 2"):
        trainer.fit(module, *regression[1]())
    assert (trainer.global_step, len(scheduler.history), module.net[0].rank) == (12, 1, 4)


def test_layers_are_free_again_after_a_run_that_failed_while_they_were_measured(regression):
    module_class, _, _ = regression

    class Failing(module_class):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.global_step == 8:
                raise ZeroDivisionError

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        train(regression, RankScheduler(at(10, Rank(4)), How("loss", window=4)), module=module, max_steps=12)
    assert [layer._tap for _, layer in dynrank.lora_layers(module)] == [None, None]


def test_check_without_validation_is_refused(regression):
    scheduler = RankScheduler(at(5, Rank(3)), How(max_regression=0.1))
    with pytest.raises(ConfigurationError, match=r"give fit\(\) validation data.*max_regression=null"):
        train(regression, scheduler, limit_val_batches=0, max_steps=10)


def test_check_of_a_training_metric_is_refused_before_the_change(regression):
    module_class, _, _ = regression

    class Logging(module_class):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss)
            return loss

    module, how = Logging(), How(max_regression=0.1, check_monitor="train/loss")
    for step in (5, 7):  # at a validation, and between two
        with pytest.raises(ConfigurationError, match=r"check_monitor of How .*, got 'train/loss'; logged: 'val/loss'"):
            train(regression, RankScheduler(at(step, Rank(3)), how), module=module, max_steps=10)
        assert module.net[0].rank == 6


def test_end_that_comes_unforeseen_says_what_was_not_measured(regression):
    stop = EarlyStopping("val/loss", patience=1, min_delta=99)
    scheduler = RankScheduler([Stage(At(fraction=1.0), Rank(2))], How(metric="loss", window=5))
    with pytest.warns(UserWarning, match=r"not measured before; set schedule\.metric=weight"):
        train(regression, scheduler, extra=[stop])


def test_share_of_a_run_of_unknown_length_is_refused(regression):
    module_class, data, trainer = regression
    loader, _ = data()

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(loader.dataset)

    stream = torch.utils.data.DataLoader(Endless(), batch_size=8)
    with pytest.raises(ConfigurationError, match=r"share of a run .*set trainer\.max_steps"):
        trainer(callbacks=[dropping(3, deadline=0.5)], max_epochs=2).fit(module_class(), stream, stream)


@pytest.mark.parametrize("schedule", [None, True, "16", [16], [None]])
def test_what_is_no_schedule_is_refused(schedule):
    with pytest.raises(ConfigurationError, match="set schedule"):
        RankScheduler(schedule)


def test_frozen_param_group_does_not_disturb_the_drop(regression):
    module_class, _, _ = regression

    class Frozen(module_class):
        def configure_optimizers(self):
            adapters = [p for p in self.parameters() if p.requires_grad]
            unused = torch.nn.Parameter(torch.ones(1))
            return torch.optim.AdamW([{"params": adapters}, {"params": [unused], "lr": 0.0}], lr=1e-3)

    scheduler = dropping(3, deadline=0.5)
    train(regression, scheduler, module=Frozen(), max_steps=10)
    assert scheduler.driver.finished


def test_resize_takes_lightnings_wrapper_of_an_optimizer():
    net = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    net(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    dynrank.resize(net, 2, optimizers=[LightningOptimizer(optimizer)])
    assert optimizer.state[net[0].lora_A]["exp_avg"].shape == (2, 8)


def test_run_of_epochs_goes_on_in_the_middle_of_one(regression, tmp_path):
    options = {"max_epochs": 3, "max_steps": -1, "val_check_interval": None}
    whole, _ = train(regression, RankScheduler(at(25, Rank(3))), checkpoints=tmp_path, **options)
    resumed, _ = train(regression, RankScheduler(at(25, Rank(3))), ckpt_path=tmp_path / "sstep=23.ckpt", **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
