"""Each schedule of conf/schedule in a short but real training run, composed as on the command line."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import dynrank
from dynrank.runs.config import plain
from dynrank.runs.job import make_scheduler

STEPS = 40
EVERY = 4
WIDTHS = [12, 32, 48, 24, 24, 32, 6]


@pytest.fixture
def preset_run(regression):
    """Train by a schedule of this name and these keys, without ``schedule.``; returns (scheduler, module)."""
    make, data, trainer = regression

    class Deep(make):
        def __init__(self, lora):
            super().__init__()
            layers = [(nn.Linear(*widths), nn.Tanh()) for widths in zip(WIDTHS, WIDTHS[1:], strict=False)]
            net = nn.Sequential(*itertools.chain(*layers))
            self.net = dynrank.add_lora(net, **lora | {"target_modules": ["2", "4", "6", "8"]})

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            # The loss of the validation is higher by 1, so there is always a gap.
            self.log("val/loss", 1 + super().training_step(batch, batch_idx))

    def run(name, keys=""):
        words = [f"schedule={name}", "lora.rank=16", "lora.alpha=32", *keys.split()]
        overrides = [word if word.startswith(("lora.", "schedule")) else f"schedule.{word}" for word in words]
        config = dynrank.compose(overrides)
        scheduler = make_scheduler(config.schedule)
        module = Deep(plain(config.lora))
        examples = data()[0].dataset
        options = {"val_check_interval": EVERY, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
        fitted = trainer(callbacks=[scheduler], max_steps=STEPS, **options)
        # 80 examples by 4: an epoch of 20 steps
        fitted.fit(module, DataLoader(examples, batch_size=4), DataLoader(examples, batch_size=80))
        assert fitted.global_step == STEPS
        return scheduler, module

    return run


def trajectory(scheduler):
    """[(step, ranks before, ranks after)] with one number where all layers agree."""

    def ranks(numbers):
        return numbers[0] if len(set(numbers)) == 1 else numbers

    return [
        (event.step, ranks([la.rank_before for la in event.layers]), ranks([la.rank_after for la in event.layers]))
        for event in scheduler.history
    ]


# Nothing improves by 90% from one validation to the next: a plateau as soon as patience allows.
NEVER_BETTER = "trigger.min_delta=0.9"
PLATEAU_AT_12 = f"{NEVER_BETTER} trigger.patience=2"
ONE = (
    "{_target_:dynrank.schedules.Stage,when:{_target_:dynrank.triggers.At,step:10},"
    "to:{_target_:dynrank.targets.GrowTo,rank:20}}"
)
TWO = (
    "{_target_:dynrank.schedules.Stage,when:{_target_:dynrank.triggers.Plateau,patience:99},deadline:0.75,"
    "to:{_target_:dynrank.targets.Rank,rank:8}}"
)
# Each schedule has (keys, trajectory); what stands after a comma tells runs of one schedule apart.
RUNS = {
    "fixed": ("", []),
    "after_convergence": (
        f"final_rank=4 drops=2 shared=false {PLATEAU_AT_12}",
        # The second drop waits for three fresh values, at 16, 20 and 24.
        [(12, 16, 8), (24, 8, 4)],
    ),
    "milestones": ("ranks=[8,4] at=[0,1] unit=epoch", [(0, 16, 8), (20, 8, 4)]),
    "after_convergence, gap": (
        "shared=false schedule/trigger=gap trigger.window=1 trigger.threshold=1e-9 "
        "trigger.warmup_steps=30 deadline=0.99",
        [(32, 16, 8)],
    ),
    "after_convergence, at a step": (
        "shared=false schedule/trigger=step trigger.step=15",
        [(15, 16, 8)],
    ),
    "anneal": ("final_rank=2 shared=false", [(8, 16, 8), (20, 8, 4), (32, 4, 2)]),
    "milestones, at the end": ("ranks=[8] at=[1.0]", [(40, 16, 8)]),
    "grow": ("lora.rank=4 final_rank=16 trigger.patience=99", [(20, 4, 16)]),
    "stages": (f"stages=[{ONE},{TWO}]", [(10, 16, 20), (30, 20, 8)]),
}


@pytest.mark.parametrize("name", RUNS)
def test_preset_follows_its_trajectory(preset_run, name):
    keys, expected = RUNS[name]
    scheduler, module = preset_run(name.partition(",")[0], keys)
    assert trajectory(scheduler) == expected
    assert scheduler.driver.finished
    end = expected[-1][2] if expected else 16
    assert {layer.rank for _, layer in dynrank.lora_layers(module)} == {end}
    assert all(torch.isfinite(layer.delta_weight()).all() for _, layer in dynrank.lora_layers(module))


def test_energy_takes_each_layer_to_the_rank_that_keeps_its_share(preset_run):
    scheduler, _ = preset_run("energy", f"share=0.95 lowest=2 {PLATEAU_AT_12}")
    (event,) = scheduler.history
    assert event.step == 12
    for layer in event.layers:
        squares = torch.tensor(layer.singular_values).square()
        assert layer.rank_after == max(2, 1 + int((squares.cumsum(0) < 0.95 * squares.sum()).sum()))
    # With equal ranks the test would not tell layers apart.
    assert len({layer.rank_after for layer in event.layers}) > 1


@pytest.mark.parametrize(
    ("name", "keys", "share", "step"),
    [
        ("early_budget", "final_rank=4", 0.25, 14),
        ("after_convergence", f"final_rank=4 {PLATEAU_AT_12}", 0.25, 12),
        ("milestones", "ranks=[8] at=[1.0] shared=true", 0.5, 40),
    ],
)
def test_budget_spends_its_pool_and_no_more(preset_run, name, keys, share, step):
    scheduler, module = preset_run(name, keys)
    (event,) = scheduler.history
    assert event.step == step
    layers = dict(dynrank.lora_layers(module))
    cost = {name: layer.lora_B.shape[0] + layer.lora_A.shape[1] for name, layer in layers.items()}
    pool = share * sum(16 * c for c in cost.values())
    spent = sum(layer.rank * cost[name] for name, layer in layers.items())
    assert pool - min(cost.values()) < spent <= pool


def test_auto_cuts_a_third_of_the_way_and_after_the_last_step(preset_run):
    scheduler, module = preset_run("auto", "tolerance=0.05")
    first, last = scheduler.history
    assert (first.step, last.step) == (14, 40)
    assert "directions" in last.reason
    assert sum(layer.rank for _, layer in dynrank.lora_layers(module)) < 64
