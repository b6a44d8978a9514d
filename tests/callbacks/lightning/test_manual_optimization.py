"""Manual optimization: with one optimizer it is the automatic run, several work, silence is refused."""

from contextlib import nullcontext

import lightning
import pytest
import torch

import dynrank
from dynrank.callbacks import RankScheduler
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage
from dynrank.targets import Budget, Rank
from dynrank.triggers import At, Plateau


def plateau(monitor, patience):
    return Stage(Plateau(monitor, patience=patience, min_delta=0.99, warmup_steps=0), Rank(3))


SCHEDULES = {
    "budget": Stage(At(step=8), Budget(share=0.5), how=How(lr_factor=2.0)),
    "checked": Stage(At(step=8), Rank(1), how=How(max_regression=0.0)),
    "end": Stage(At(fraction=1.0), Rank(3)),
    "loss": plateau("train/loss", 1),
    # The third validation, after the fifth batch of the second epoch, decides.
    "plateau": plateau("val/loss", 2),
    "nothing": [],
}


@pytest.fixture
def manual(regression, fit):
    """Trains by a module that has the loop in its own hands, and makes a step every so many batches."""

    def run(scheduler, *callbacks, every=1, told=True, zeroed=False, returns=True, **options):
        class Manual(regression[0]):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                if batch_idx % every == 0:
                    self.zero_grad()
                loss = super().training_step(batch, batch_idx)
                self.manual_backward(loss / every)
                if batch_idx % every == every - 1:
                    self.optimizers().step()
                    if zeroed:
                        self.zero_grad()
                    if told:
                        scheduler.step(self)
                    self.lr_schedulers().step()
                return loss if returns else None

        return fit(scheduler, *callbacks, module=Manual(), **{"max_steps": 20, **options})

    return run


class Seeing(lightning.Callback):
    def on_rank_change(self, trainer, pl_module, event):
        self.batch = trainer.fit_loop.batch_idx


@pytest.mark.parametrize(
    ("kind", "every", "batch"),
    [("budget", 1, 8), ("end", 1, 9), ("loss", 1, 0), ("plateau", 2, 6)],
)
def test_manual_run_is_the_automatic_run_also_resumed(manual, fit, assert_same, tmp_path, kind, every, batch):
    """A change that is decided between the two batches of a step waits for the next batch behind its end."""
    automatic, whole, rest = (RankScheduler(SCHEDULES[kind]) for _ in range(3))
    seeing = Seeing(), Seeing()
    expected, _ = fit(automatic, seeing[0], max_steps=20, accumulate_grad_batches=every)
    module, _ = manual(whole, seeing[1], every=every, saved=tmp_path)
    assert seeing[0].batch == seeing[1].batch == batch
    # Of two batches, a validation between them takes the first one's gradients in Lightning's manual optimization.
    if every == 1:
        assert_same(module, expected)
        assert whole.history == automatic.history
    # The next batch makes the change of the budget.
    assert_same(manual(rest, every=every, ckpt_path=tmp_path / "step=8.ckpt")[0], module)
    assert rest.history == whole.history
    saved = torch.load(tmp_path / "step=20.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())


def test_each_factor_may_have_an_optimizer_of_its_own(regression, fit):
    """Lightning counts the steps of both."""

    class Two(regression[0]):
        automatic_optimization = False

        def configure_optimizers(self):
            layers = [layer for _, layer in dynrank.lora_layers(self)]
            adam = torch.optim.AdamW([layer.lora_A for layer in layers], lr=1e-2)
            return adam, torch.optim.SGD([layer.lora_B for layer in layers], lr=1e-2, momentum=0.9)

        def training_step(self, batch, batch_idx):
            self.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()
            scheduler.step(self)

    scheduler = RankScheduler(Stage(At(step=20), Budget(share=0.5)))
    module, fitted = fit(scheduler, module=Two(), max_steps=24)
    (event,) = scheduler.history
    assert (event.step, event.lowers) == (20, True)
    assert all(report.importance for report in event.layers)
    for _, layer in dynrank.lora_layers(module):
        assert fitted.optimizers[0].state[layer.lora_A]["exp_avg"].shape == layer.lora_A.shape
        assert fitted.optimizers[1].state[layer.lora_B]["momentum_buffer"].shape == layer.lora_B.shape


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("checked", {"told": False}, r"10 optimizer steps.*scheduler\.step\(self\) in training_step"),
        ("budget", {"zeroed": True}, "before zero_grad"),
        ("end", {"max_steps": -1, "max_epochs": 2}, "known length; set max_steps"),
        ("loss", {"returns": False}, "train/loss, and training_step of this manual optimization returns no loss"),
        # This needs no step.
        ("nothing", {"told": False}, None),
    ],
)
def test_what_a_module_does_not_say_is_refused_if_the_schedule_needs_it(manual, kind, options, message):
    with pytest.raises(ConfigurationError, match=message) if message else nullcontext():
        manual(RankScheduler(SCHEDULES[kind]), **options)


def test_step_under_automatic_optimization_is_an_error(regression):
    with pytest.raises(RuntimeError, match="manual optimization"):
        RankScheduler([]).step(regression[0]())
