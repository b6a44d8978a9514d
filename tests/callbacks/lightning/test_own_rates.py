"""Rates that the program sets by itself, beside a change that raises the adapters' rate."""

import contextlib

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from tables import rows

from dynrank.callbacks import RankScheduler
from dynrank.schedules import How, Stage, early_budget
from dynrank.targets import Rank
from dynrank.triggers import At


class Used(lightning.Callback):
    """{the step: the rate by which SGD has moved a factor}"""

    def __init__(self):
        self.rates = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.factor = next(factor for name, factor in pl_module.named_parameters() if name.endswith("lora_B"))
        self.before = self.factor.detach().clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        moved = (self.factor - self.before).norm() / self.factor.grad.norm()
        self.rates[trainer.global_step - 1] = moved.item()


class Setting(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.set_rates()


@pytest.fixture
def setting(regression):
    """A class of modules that can set the rate of the present step."""

    class Own(regression[0]):
        schedules = False
        decays = False
        begins = 0

        def configure_optimizers(self):
            optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)] if self.schedules else []

        def rate(self, step):
            return 1e-2 * 0.98 ** (step + 1)

        def set_rates(self):
            if self.trainer.global_step < self.begins:
                return
            for group in self.optimizers().param_groups:
                group["lr"] = group["lr"] * 0.98 if self.decays else self.rate(self.trainer.global_step)

    return Own


def module_of(kind, own, scheduler):
    if kind == "hook":
        return type("Hook", (own,), {"on_train_batch_start": lambda self, batch, batch_idx: self.set_rates()})()
    if kind == "hook within the step":
        return type("Within", (own,), {"on_before_optimizer_step": lambda self, optimizer: self.set_rates()})()
    if kind == "callback":
        return own()

    class Manual(own):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.set_rates()
            self.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()
            scheduler.step(self)

    return Manual()


KINDS = ["hook", "hook within the step", "callback", "manual optimization"]


def fitted(fit, own, kind, scheduler=None, **options):
    scheduler = scheduler or RankScheduler(Stage(At(step=8), Rank(3), how=How(lr_factor=2.0)))
    used = Used()
    callbacks = [Setting()] if kind == "callback" else []
    module, _ = fit(scheduler, *callbacks, used, module=module_of(kind, own, scheduler), max_steps=16, **options)
    assert [event.step for event in scheduler.history] == [8]
    return module, used.rates


@pytest.mark.parametrize("schedules", [False, True])
@pytest.mark.parametrize("begins", [0, 8, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_rate_that_the_program_sets_is_raised_whenever_it_begins_to(fit, setting, kind, begins, schedules):
    """At the first step, with the cut, or after it, when the group and its scheduler contain the factor already."""
    setting.begins = begins
    setting.schedules = schedules
    # Beside a scheduler, the program may as well have meant to set the raised rate.
    said = pytest.warns(UserWarning, match="param group 0.* counts as set without the factor 2 ")
    with said if schedules and begins else contextlib.nullcontext():
        module, used = fitted(fit, setting, kind)
    expected = {step: module.rate(step) * (2 if step >= 8 else 1) for step in range(begins, 16)}
    assert {step: used[step] for step in expected} == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("schedules", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rate_of_a_step_is_logged_with_it_whoever_sets_it(fit, setting, tmp_path, kind, schedules):
    setting.schedules = schedules
    logger = CSVLogger(tmp_path, name="", version="")
    _, used = fitted(fit, setting, kind, logger=logger, log_every_n_steps=1)
    logged = {int(row["step"]): float(row["lr/adapter"]) for row in rows(tmp_path / "metrics.csv", "lr/adapter")}
    assert logged == pytest.approx({step: used[step] for step in range(8, 16)}, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_rate_that_the_program_lowers_a_little_each_step_is_raised_once(fit, setting, kind):
    setting.decays = True
    module, used = fitted(fit, setting, kind)
    assert used == pytest.approx({step: module.rate(step) * (2 if step >= 8 else 1) for step in range(16)}, rel=1e-3)


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("kind", ["hook", "hook within the step", "callback"])
def test_run_with_own_rates_goes_on_with_the_same_bits(fit, setting, assert_same, tmp_path, kind, decays):
    setting.decays = decays
    whole, _ = fitted(fit, setting, kind, saved=tmp_path)
    for step in (7, 8, 12):
        rest, _ = fitted(fit, setting, kind, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same(rest, whole, step)


def test_rate_that_the_program_writes_into_a_checkpoint_is_raised(fit, setting, tmp_path):
    class Editing(setting):
        def on_load_checkpoint(self, checkpoint):
            (group,) = checkpoint["optimizer_states"][0]["param_groups"]
            group["lr"] = 3e-3

    setting.schedules = True
    setting.begins = 16
    fitted(fit, setting, "callback", saved=tmp_path)
    with pytest.warns(UserWarning, match="param group 0.* to 0.003. It counts as set without the factor 2 "):
        _, used = fitted(fit, Editing, "callback", ckpt_path=tmp_path / "step=12.ckpt")
    # The program steps its scheduler once an epoch, so not within this run.
    assert {step: used[step] for step in (12, 15)} == pytest.approx(dict.fromkeys((12, 15), 6e-3), rel=1e-3)


class FineTuneLearningRateFinder(LearningRateFinder):
    """As in Lightning's documentation, but in one epoch alone, and it leaves the rate."""

    def __init__(self, epoch):
        super().__init__(num_training_steps=4, early_stop_threshold=None, update_attr=False)
        self.epoch = epoch

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("schedules", [False, True])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_search_for_a_rate_within_the_run_changes_nothing(fit, setting, tmp_path, monkeypatch, schedules, epoch):
    """It trains some steps and loads the checkpoint of before. The cut is in the epoch of number 1."""
    monkeypatch.chdir(tmp_path)
    setting.schedules = schedules
    scheduler = RankScheduler(early_budget(3, at=0.5, how=How(lr_factor=2.0)))
    used = Used()
    fit(scheduler, FineTuneLearningRateFinder(epoch), used, module=setting(), max_epochs=3, max_steps=-1)
    assert [event.step for event in scheduler.history] == [15]
    decay = 0.99 if schedules else 1.0
    expected = {step: 1e-2 * decay ** (step // 10) * (2 if step >= 15 else 1) for step in range(30)}
    assert used.rates == pytest.approx(expected, rel=1e-3)


def test_warm_up_that_replaces_the_scheduler_at_a_cut_gets_the_next_factor_too(fit, setting):
    """It starts from the raised rate."""

    class WarmingUp(lightning.Callback):
        def on_rank_change(self, trainer, pl_module, event):
            if event.step == 4:
                (optimizer,) = trainer.optimizers
                (config,) = trainer.lr_scheduler_configs
                config.scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
                config.interval = "step"

    setting.schedules = True
    stages = [Stage(At(step=step), Rank(rank), how=How(lr_factor=2.0)) for step, rank in ((4, 4), (8, 2))]
    used = Used()
    fit(RankScheduler(stages), WarmingUp(), used, module=setting(), max_steps=10)
    expected = [1e-2] * 4 + [1e-2, 1.5e-2, 2e-2, 2e-2] + [4e-2] * 2
    assert [*used.rates.values()] == pytest.approx(expected, rel=1e-3)
