"""Validations that a change asks for, in the middle of training: of a part of the data, and unseen by everyone else."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from tables import rows
from torch import nn

from dynrank.callbacks import RankScheduler
from dynrank.callbacks.lightning.validation import validate_beside
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, auto
from dynrank.targets import Rank
from dynrank.triggers import At


class Asking(lightning.Callback):
    """Asks at one step for a validation, and computes by hand what there is to find."""

    def __init__(self):
        self.found = {}
        self.expected = []
        self.shown = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 7:
            self.shown.append(float(trainer.callback_metrics["val/loss"]))
            with torch.no_grad():
                pl_module.net[2].lora_B.add_(1.0)
                self.found = validate_beside(trainer)
                net = pl_module.net.eval()
                loader = trainer.val_dataloaders
                self.expected = [(nn.functional.mse_loss(net(x), y).item(), float(len(x))) for x, y in loader]
                net.train()
                net[2].lora_B.sub_(1.0)
            self.shown.append(float(trainer.callback_metrics["val/loss"]))


def test_silent_validation_is_the_mean_over_all_data_and_heard_by_nobody(regression, tmp_path):
    module_class, data, trainer = regression
    module = module_class()
    asking = Asking()
    logger = CSVLogger(tmp_path, name="", version="")
    train, _ = data()
    val = torch.utils.data.DataLoader(train.dataset, batch_size=30)
    made = trainer(callbacks=[asking], logger=logger, max_steps=12, val_check_interval=5, num_sanity_val_steps=0)
    made.fit(module, train, val)
    assert [weight for _, weight in asking.expected] == [30, 30, 20]
    mean = sum(value * weight for value, weight in asking.expected) / 80
    assert asking.found["val/loss"] == pytest.approx(mean, rel=1e-5)
    assert asking.shown[0] == asking.shown[1]
    assert [row["step"] for row in rows(tmp_path / "metrics.csv", "val/loss")] == ["4", "9"]


class Hearing(RichProgressBar):
    """A progress bar, which hears of validations as any callback does."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def on_validation_end(self, trainer, pl_module):
        super().on_validation_end(trainer, pl_module)
        self.heard.append(trainer.global_step)


def test_trials_of_a_search_are_heard_by_no_callback_and_by_no_bar(regression):
    module_class, data, trainer = regression
    hearing = Hearing()
    scheduler = RankScheduler(auto(0.3, at=0.5))
    options = {"val_check_interval": 6, "num_sanity_val_steps": 0, "enable_progress_bar": True}
    made = trainer(callbacks=[scheduler, hearing], max_steps=12, **options)
    made.fit(module_class(), *data())
    assert len(scheduler.history) == 2
    assert hearing.heard == [6]


def test_check_without_any_validation_batch_names_the_metric(regression):
    module_class, data, trainer = regression
    train, _ = data()
    nothing = torch.utils.data.DataLoader(torch.utils.data.Subset(train.dataset, []), batch_size=4)
    scheduler = RankScheduler(Stage(At(step=4), Rank(2), how=How(max_regression=0.1)))
    made = trainer(callbacks=[scheduler], max_steps=6, num_sanity_val_steps=0)
    with pytest.raises(ConfigurationError, match="check_monitor .* must name a metric that is logged, got 'val/loss'"):
        made.fit(module_class(), train, nothing)
