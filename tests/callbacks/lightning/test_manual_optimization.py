"""Manual optimization: with one optimizer it is the automatic run, several work, silence is refused."""

import pytest
import torch

import dynrank
from dynrank.callbacks import RankScheduler
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage
from dynrank.targets import Budget, Rank
from dynrank.triggers import At, Plateau


@pytest.fixture
def manual(regression, fit):
    """Trains by a module that has the loop in its own hands, and makes a step every so many batches."""

    def run(scheduler, *callbacks, base=regression[0], every=1, told=True, zeroed=False, **options):
        class Manual(base):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                optimizers = self.optimizers()
                optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
                if batch_idx % every == 0:
                    self.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx) / every)
                if batch_idx % every == every - 1:
                    for optimizer in optimizers:
                        optimizer.step()
                    if zeroed:
                        self.zero_grad()
                    if told:
                        scheduler.step(self)
                    self.lr_schedulers().step()

        return fit(scheduler, *callbacks, module=Manual(), **{"max_steps": 20, **options})

    return run


SCHEDULES = {
    "budget": lambda: RankScheduler(Stage(At(step=8), Budget(share=0.5), how=How(lr_factor=2.0))),
    "plateau": lambda: RankScheduler(Stage(Plateau(patience=1, min_delta=0.99), Rank(3))),
    "checked": lambda: RankScheduler(Stage(At(step=8), Rank(1), how=How(max_regression=0.0))),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_manual_run_with_a_step_each_batch_is_the_automatic_run_also_resumed(manual, fit, assert_same, tmp_path, kind):
    automatic, whole, rest = (SCHEDULES[kind]() for _ in range(3))
    expected, _ = fit(automatic, max_steps=20)
    assert_same(manual(whole, saved=tmp_path)[0], expected)
    # The next batch makes the change of the budget.
    assert_same(manual(rest, ckpt_path=tmp_path / "step=8.ckpt")[0], expected)
    assert automatic.history
    assert rest.history == whole.history == automatic.history


@pytest.mark.parametrize("automatic", [True, False])
def test_a_change_decided_between_the_two_batches_of_a_step_waits_for_its_end(manual, fit, automatic):
    batches = []

    class Spy(RankScheduler):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before = len(self.history)
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            batches.extend([batch_idx] * (len(self.history) - before))

    # The third validation, after the fifth batch of the second epoch, decides.
    scheduler = Spy(Stage(Plateau(patience=2, min_delta=0.99, warmup_steps=0), Rank(3)))
    if automatic:
        fit(scheduler, accumulate_grad_batches=2, max_steps=10)
    else:
        manual(scheduler, every=2, max_steps=10)
    assert batches == [6]


def test_several_optimizers_hold_the_factors_together(regression, manual):
    class Two(regression[0]):
        def configure_optimizers(self):
            layers = [layer for _, layer in dynrank.lora_layers(self)]
            adam = torch.optim.AdamW([layer.lora_A for layer in layers], lr=1e-2)
            sgd = torch.optim.SGD([layer.lora_B for layer in layers], lr=1e-2, momentum=0.9)
            return [adam, sgd], [torch.optim.lr_scheduler.ConstantLR(adam)]

    scheduler = RankScheduler(Stage(At(step=8), Rank(3), how=How(lr_factor=2.0)))
    module, fitted = manual(scheduler, base=Two)
    # Four batches make two steps each.
    assert [event.step for event in scheduler.history] == [8]
    adam, sgd = fitted.optimizers
    for _, layer in dynrank.lora_layers(module):
        assert layer.rank == 3
        assert adam.state[layer.lora_A]["exp_avg"].shape == layer.lora_A.shape
        assert sgd.state[layer.lora_B]["momentum_buffer"].shape == layer.lora_B.shape


def test_optimizer_without_adapters_makes_as_many_steps_as_it_likes(regression, fit):
    """As the critic of a GAN, after the step of the adapters; Lightning counts the steps of both."""

    class Two(regression[0]):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.critic = torch.nn.Linear(12, 1)

        def configure_optimizers(self):
            own = torch.optim.SGD(self.critic.parameters(), lr=1e-2)
            return torch.optim.AdamW(dynrank.adapter_parameters(self), lr=1e-2), own

        def training_step(self, batch, batch_idx):
            adapters, others = self.optimizers()
            self.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            adapters.step()
            scheduler.step(self)
            for _ in range(3):
                self.manual_backward(self.critic(batch[0]).square().mean())
                others.step()

    scheduler = RankScheduler(Stage(At(step=16), Budget(share=0.5)))
    fit(scheduler, module=Two(), max_steps=40)
    (event,) = scheduler.history
    assert (event.step, event.lowers) == (16, True)
    assert all(report.importance for report in event.layers)


def test_module_that_never_says_so_is_refused(manual):
    with pytest.raises(ConfigurationError, match=r"10 optimizer steps.*scheduler\.step\(self\) in training_step"):
        manual(SCHEDULES["budget"](), told=False)
    # Without stages there is nothing to do.
    manual(RankScheduler([]), told=False)


def test_step_after_zero_grad_is_refused(manual):
    with pytest.raises(ConfigurationError, match="before zero_grad"):
        manual(SCHEDULES["budget"](), zeroed=True)
    # This schedule needs no importance.
    manual(SCHEDULES["checked"](), zeroed=True)


def test_share_of_a_run_without_max_steps_is_refused(manual):
    with pytest.raises(ConfigurationError, match=r"known length; set max_steps"):
        manual(RankScheduler([Stage(At(fraction=0.5), Rank(3))]), max_steps=-1, max_epochs=2)


def test_step_under_automatic_optimization_is_an_error(regression):
    with pytest.raises(RuntimeError, match="manual optimization"):
        RankScheduler([]).step(regression[0]())


def test_manual_run_resumed_after_its_last_step_makes_the_change_at_its_end(manual, tmp_path):
    """No step is made in the resumed run, so nobody can have reported one."""
    schedule = [Stage(At(fraction=1.0), Rank(2))]
    manual(RankScheduler(schedule), saved=tmp_path)
    resumed = RankScheduler(schedule)
    module, _ = manual(resumed, ckpt_path=str(tmp_path / "step=20.ckpt"))
    assert [event.step for event in resumed.history] == [20]
    assert {layer.rank for _, layer in dynrank.lora_layers(module)} == {2}
