"""The callback in a real trainer: when it acts, what it leaves alone, and that a resumed run cannot be told apart."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer

import dynrank
from dynrank.callbacks import RankScheduler, StepSeed
from dynrank.errors import ConfigurationError
from dynrank.triggers import Plateau


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
    return RankScheduler(3, trigger, **({"deadline": None} | options))


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
    scheduler = RankScheduler(3, Plateau(patience=1000), deadline=0.5)
    train(regression, scheduler)
    assert [(event.step, event.reason) for event in scheduler.history] == [(30, "deadline of 0.5 of the run")]


def test_scheduler_goes_down_in_equal_factors(regression):
    trigger = Plateau(patience=1, min_delta=0.9, cooldown_steps=9)
    scheduler = RankScheduler(1, trigger, drops=2, deadline=0.9)
    module_class, _, _ = regression
    train(regression, scheduler, module=module_class(rank=4))
    ranks = [(event.layers[0].rank_before, event.layers[0].rank_after) for event in scheduler.history]
    assert ranks == [(4, 2), (2, 1)]
    assert scheduler.history[1].step - scheduler.history[0].step >= 9


def test_scheduler_respects_pinned_layers_and_their_own_final_ranks(regression):
    module_class, _, _ = regression
    module = module_class(rank_map={"0": {"rank": 5, "pinned": True}, "2": {"rank": 6, "final_rank": 2}})
    scheduler = RankScheduler(3, deadline=0.5)
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

    scheduler = Spy(3, Plateau(patience=1000), deadline=0.35)
    train(regression, scheduler, accumulate_grad_batches=accumulate, max_steps=20)
    assert pending == [0]
    assert len(scheduler.history) == 1


def test_scheduler_makes_a_change_decided_by_the_last_validation(regression):
    scheduler = RankScheduler(3, Plateau(patience=1, min_delta=0.99), deadline=None)
    module, _ = train(regression, scheduler, max_steps=10)
    assert {layer.rank for _, layer in dynrank.lora_layers(module)} == {3}


def test_scheduler_warns_when_nothing_converged_and_there_is_no_deadline(regression):
    with pytest.warns(UserWarning, match="ranks are not final"):
        train(regression, RankScheduler(3, Plateau(patience=1000), deadline=None), max_steps=10)


def test_scheduler_warns_of_a_low_learning_rate(regression):
    with pytest.warns(UserWarning, match="too little to recover"):
        train(regression, RankScheduler(3, Plateau(patience=1000), deadline=0.9))


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
        scheduler = RankScheduler(3, Plateau(patience=1000), deadline=0.5, rewarmup_steps=rewarmup_steps)
        return train(regression, scheduler, module=Recording())[0].rates

    ratios = [ramped / plain for ramped, plain in zip(rates(4), rates(0), strict=True)]
    assert ratios[:30] + ratios[34:] == [1.0] * 56
    assert ratios[30:34] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5])


def test_rank_change_is_told_to_other_callbacks(regression):
    told = []

    class Listener(lightning.Callback):
        def on_rank_change(self, trainer, pl_module, event):
            told.append(event)

    scheduler = RankScheduler(3, deadline=0.5)
    train(regression, scheduler, extra=[Listener()])
    assert told == scheduler.history


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 5},
        # validations that fall into the middle of epochs
        {"val_check_interval": 6, "check_val_every_n_epoch": None, "accumulate_grad_batches": 2},
    ],
    ids=["plain", "accumulating"],
)
def test_resume_from_any_checkpoint_is_bit_equal(regression, tmp_path, options):
    def schedule():
        return plateau_schedule(rewarmup_steps=4)

    scheduler = schedule()
    options = {**options, "max_steps": 24}
    reference, _ = train(regression, scheduler, checkpoints=tmp_path, **options)
    assert 4 < scheduler.history[0].step < 20  # checkpoints lie before, at and after the drop, and within the ramp
    files = [
        file for file in sorted(tmp_path.glob("*.ckpt")) if "=24" not in file.name
    ]  # nothing is left to run from 24
    assert len(files) > 20
    for file in files:
        resumed = schedule()
        module, _ = train(regression, resumed, ckpt_path=file, **options)
        assert resumed.history == scheduler.history, file.name
        assert resumed.state_dict() == scheduler.state_dict(), file.name
        for name, value in reference.state_dict().items():
            assert torch.equal(module.state_dict()[name], value), f"{file.name}: {name}"


def test_best_checkpoint_from_before_the_drop_is_tested_at_its_own_rank(regression, tmp_path):
    module_class, data, trainer = regression

    class Tested(module_class):
        def test_step(self, batch, batch_idx):
            self.log("test/loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    before = ModelCheckpoint(
        tmp_path, filename="before", every_n_train_steps=9, save_top_k=1, save_on_train_epoch_end=False
    )
    fitted = trainer(callbacks=[RankScheduler(3, deadline=0.9), before], max_steps=12, enable_checkpointing=True)
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
    module, fitted = train(regression, RankScheduler(3, deadline=0.5), max_steps=10, extra=[])
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
        train(regression, RankScheduler(3, deadline=0.5), max_steps=10, module=module)
    assert {layer.rank for _, layer in dynrank.lora_layers(module)} == {6}


def test_unlogged_monitor_is_refused_with_those_that_are_logged(regression):
    with pytest.raises(ConfigurationError, match=r"'val/los'.*'val/loss'.*schedule\.trigger\.monitor"):
        train(regression, RankScheduler(3, Plateau("val/los")), max_steps=10)


@pytest.mark.parametrize("optimizer", [torch.optim.RMSprop, torch.optim.Adagrad])
def test_optimizer_without_a_rule_is_refused_before_the_first_step(regression, optimizer):
    module_class, _, _ = regression

    class Other(module_class):
        def configure_optimizers(self):
            return optimizer([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    module = Other()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ConfigurationError, match=rf"{optimizer.__name__}.*optimizer_state=reset"):
        train(regression, RankScheduler(3), module=module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_optimizer_without_a_rule_works_when_its_state_may_be_reset(regression):
    module_class, _, _ = regression

    class Other(module_class):
        def configure_optimizers(self):
            return torch.optim.RMSprop([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    module, _ = train(regression, RankScheduler(3, deadline=0.5, optimizer_state="reset"), module=Other(), max_steps=10)
    assert module.net[0].rank == 3


def test_manual_optimization_is_refused(regression):
    module_class, _, _ = regression
    module = module_class()
    module.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="automatic optimization"):
        train(regression, RankScheduler(3), module=module)


def test_final_rank_above_the_rank_is_refused(regression):
    with pytest.raises(ConfigurationError, match=r"at most rank = 6, got 7.*schedule\.final_rank"):
        train(regression, RankScheduler(7))


def test_model_without_lora_layers_is_refused(regression):
    module_class, _, _ = regression
    module = module_class()
    dynrank.merge(module)
    module.net.requires_grad_(True)
    with pytest.raises(ConfigurationError, match="LoRA layers"):
        train(regression, RankScheduler(3), module=module)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"final_rank": 0}, "schedule.final_rank"),
        ({"final_rank": 2.5}, "schedule.final_rank"),
        ({"drops": 0}, "schedule.drops"),
        ({"deadline": 1.5}, "schedule.deadline"),
        ({"rewarmup_steps": -1}, "schedule.rewarmup_steps"),
        ({"metric": "wieght"}, "schedule.metric"),
    ],
)
def test_value_out_of_range_names_its_key(values, key):
    with pytest.raises(ConfigurationError, match=key):
        RankScheduler(**{"final_rank": 3, **values})


def test_frozen_param_group_does_not_disturb_the_drop(regression):
    module_class, _, _ = regression

    class Frozen(module_class):
        def configure_optimizers(self):
            adapters = [p for p in self.parameters() if p.requires_grad]
            unused = torch.nn.Parameter(torch.ones(1))
            return torch.optim.AdamW([{"params": adapters}, {"params": [unused], "lr": 0.0}], lr=1e-3)

    scheduler = RankScheduler(3, deadline=0.5)
    train(regression, scheduler, module=Frozen(), max_steps=10)
    assert scheduler.finished


def test_resize_takes_lightnings_wrapper_of_an_optimizer():
    net = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    net(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    dynrank.resize(net, 2, optimizers=[LightningOptimizer(optimizer)])
    assert optimizer.state[net[0].lora_A]["exp_avg"].shape == (2, 8)
