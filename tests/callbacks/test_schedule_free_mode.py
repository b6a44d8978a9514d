"""The average of schedule-free, here from its definition: the mean of all the points z, at a constant rate."""

import pytest
import schedulefree
import torch

from dynrank.callbacks import RankScheduler, ScheduleFreeMode
from dynrank.schedules import How, Stage, after_convergence
from dynrank.targets import Rank
from dynrank.triggers import At

NAME = "net.2.lora_A"


@pytest.fixture
def module_class(regression):
    class ScheduleFree(regression[0]):
        """Keeps what one factor is in training and in validation, and every z."""

        def __init__(self):
            super().__init__()
            self.trained = []
            self.validated = []
            self.z = []

        def configure_optimizers(self):
            optimizer = schedulefree.AdamWScheduleFree([p for p in self.parameters() if p.requires_grad], lr=1e-2)
            optimizer.register_step_post_hook(lambda o, *_: self.z.append(o.state[self.factor]["z"].clone()))
            return optimizer

        @property
        def factor(self):
            return self.get_parameter(NAME)

        def training_step(self, batch, batch_idx):
            self.trained.append(self.factor.detach().clone())
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.validated.append(self.factor.detach().clone())
            super().validation_step(batch, batch_idx)

        def average(self, steps):
            return torch.stack(self.z[:steps]).mean(0)

    return ScheduleFree


def test_validation_and_result_are_the_average(fit, module_class):
    module = module_class()
    start = module.factor.detach().clone()
    fit(ScheduleFreeMode(), module=module, max_steps=10, num_sanity_val_steps=2)
    # The first two values are those of the sanity check.
    assert torch.equal(module.validated[0], start)
    for steps, value in ((5, module.validated[-4]), (10, module.validated[-1]), (10, module.factor.detach())):
        torch.testing.assert_close(value, module.average(steps))
    # Gradients are taken at 0.9 average + 0.1 z, whatever came in between.
    for steps in range(2, 10):
        expected = 0.9 * module.average(steps) + 0.1 * module.z[steps - 1]
        torch.testing.assert_close(module.trained[steps], expected)


def test_no_checkpoint_changes_a_bit_of_the_run_and_all_resume_to_the_same(fit, assert_same, module_class, tmp_path):
    def run(**options):
        stages = RankScheduler(after_convergence(3, deadline=0.5))
        return fit(ScheduleFreeMode(), stages, module=module_class(), max_steps=16, val_check_interval=4, **options)[0]

    whole = run()
    assert whole.factor.shape[0] == 3
    assert_same(run(saved=tmp_path), whole)
    # The steps are before and after the drop, before a validation and not, and the last one.
    for step in (3, 4, 9, 12, 16):
        assert_same(run(ckpt_path=tmp_path / f"step={step}.ckpt"), whole, step)


def test_a_change_checked_after_the_last_step_leaves_the_average(fit, module_class):
    stages = RankScheduler(Stage(At(fraction=1.0), Rank(3), how=How(max_regression=1e9)))
    module, _ = fit(ScheduleFreeMode(), stages, module=module_class(), max_steps=4)
    (event,) = stages.history
    assert not event.undone
    assert torch.equal(module.factor, module.validated[-1])


def test_a_second_validation_and_other_optimizers_are_left_alone(regression, fit, module_class):
    module, fitted = fit(ScheduleFreeMode(), module=module_class(), max_steps=4)
    result = module.factor.detach().clone()
    fitted.validate(module, regression[1]()[1], verbose=False)
    assert torch.equal(module.factor, result)
    fit(ScheduleFreeMode(), max_steps=4)
