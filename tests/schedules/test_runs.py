"""What only conf/ can say of a schedule, in short but real runs: epochs, other triggers, stages of one's own.

The oracle judges runs by times and plateaus, and test_presets.py which of these a preset has.
"""

import pytest

import dynrank
from dynrank.app.runs.job import make_scheduler

ONE = (
    "{_target_:dynrank.schedules.Stage,when:{_target_:dynrank.triggers.At,step:10},"
    "to:{_target_:dynrank.targets.GrowTo,rank:6}}"
)
TWO = (
    "{_target_:dynrank.schedules.Stage,when:{_target_:dynrank.triggers.Plateau,patience:99},deadline:0.75,"
    "to:{_target_:dynrank.targets.Rank,rank:3}}"
)
GAP = "schedule/trigger=gap schedule.trigger.window=1 schedule.trigger.threshold=1e-9 schedule.trigger.warmup_steps=10"
# Each has the overrides of a run of 24 steps from rank 4, with validations after every fourth, and its changes.
RUNS = {
    "epochs": (
        "schedule=milestones schedule.ranks=[3,2] schedule.at=[0,1] schedule.unit=epoch",
        [(0, 4, 3), (10, 3, 2)],
    ),
    "a gap": (f"schedule=after_convergence schedule.shared=false {GAP}", [(12, 4, 2)]),
    "a step": ("schedule=after_convergence schedule/trigger=step schedule.trigger.step=15", [(15, 4, 2)]),
    "stages": (f"schedule=stages schedule.stages=[{ONE},{TWO}]", [(10, 4, 6), (18, 6, 3)]),
}


@pytest.mark.parametrize("name", RUNS)
def test_run_follows_its_configuration(name, regression):
    make, data, trainer = regression

    class Logging(make):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            # The loss of the validation is higher by 1, so there is always a gap.
            self.log("val/loss", 1 + super().training_step(batch, batch_idx))

    overrides, expected = RUNS[name]
    scheduler = make_scheduler(dynrank.compose(["lora.rank=4", *overrides.split()]).schedule)
    options = {"val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    module = Logging(rank=4)
    trainer(callbacks=[scheduler], max_steps=24, **options).fit(module, *data())
    changes = [(event.step, event.layers[0].rank_before, event.layers[0].rank_after) for event in scheduler.history]
    assert changes == expected
    assert scheduler.driver.finished
    assert {layer.rank for _, layer in dynrank.lora_layers(module)} == {expected[-1][2]}
