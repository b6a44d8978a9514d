"""What a change costs is measured directly before and after it, on few data, and the run does not notice."""

from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import dynrank
from dynrank.callbacks import RankScheduler
from dynrank.driver.driver import RankDriver
from dynrank.driver.training import Training
from dynrank.driver.undo import batches_to_measure
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, auto
from dynrank.targets import Rank
from dynrank.triggers import At, Plateau, Run

pytestmark = pytest.mark.filterwarnings("ignore")


def loss_of(module, batches):
    """The mean over all examples, computed by hand without dropout."""
    module.eval()
    with torch.no_grad():
        parts = [(mse_loss(module.net(x), y).item(), len(x)) for x, y in batches]
    module.train()
    return sum(loss * count for loss, count in parts) / sum(count for _, count in parts)


class Watching(Callback):
    """Validates by hand after step 6, where the change comes before the next batch, and directly after the change."""

    def __init__(self, batches):
        self.batches = batches
        self.before = None
        self.event = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 6:
            self.before = loss_of(pl_module, self.batches)

    def on_rank_change(self, trainer, pl_module, event):
        self.event, self.after = event, loss_of(pl_module, self.batches)


def fitted(regression, loader, scheduler, watching, **options):
    make, data, trainer = regression
    module = make()
    torch.manual_seed(3)
    options = {"max_steps": 20, "num_sanity_val_steps": 0, **options}
    trainer(callbacks=[watching, scheduler], **options).fit(module, data()[0], loader)
    return module


# The last of three batches is a smaller one. In the last run no validation comes before the change.
@pytest.mark.parametrize(
    ("batch_size", "options"),
    [(30, {}), (4, {}), (4, {"check_val_every_n_epoch": 2})],
    ids=["whole data", "a share", "the first validation"],
)
def test_measured_cost_is_that_of_validations_by_hand(regression, batch_size, options):
    data = regression[1]()[1].dataset
    loader = DataLoader(data, batch_size=batch_size)
    # Of 20 batches, a change in a run of 20 steps takes four at equal distances.
    batches = [batch for i, batch in enumerate(loader) if batch_size == 30 or i % 5 == 2]
    watching = Watching(batches)
    scheduler = RankScheduler([Stage(At(step=6), Rank(1))], measure=True)
    module = fitted(regression, loader, scheduler, watching, **options)
    measured = watching.event.measured
    assert scheduler.history[0].measured == measured
    assert (measured.metric, measured.all_data) == ("val/loss", batch_size == 30)
    assert (measured.before, measured.after) == pytest.approx((watching.before, watching.after), rel=1e-5)
    assert measured.before != measured.after
    assert watching.event.cost in watching.event.reason_and_cost
    assert f"{measured.before:.4g} → {measured.after:.4g}" in watching.event.cost
    # Nothing else differs from a run without.
    other = fitted(regression, loader, RankScheduler([Stage(At(step=6), Rank(1))]), Watching(batches), **options)
    assert all(torch.equal(one, two) for one, two in zip(module.parameters(), other.parameters(), strict=True))


def test_a_change_that_is_checked_has_its_cost_without_more_validations(regression):
    loader = regression[1]()[1]
    watching = Watching(list(loader))
    stage = Stage(At(step=6), Rank(1), how=How(max_regression=1e3))
    fitted(regression, loader, RankScheduler([stage]), watching)
    measured = watching.event.measured
    assert (measured.before, measured.after) == pytest.approx((watching.before, watching.after), rel=1e-5)


class Counted(Training):
    """A run whose validation has so many batches."""

    validation_batches = 100

    def validate(self):
        return {}


@pytest.mark.parametrize(("steps", "changes"), [(3, 1), (100, 2), (1000, 16), (100_000, 3)])
def test_measurements_take_under_two_percent_of_a_run_or_four_batches(steps, changes):
    training = Counted(dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(3, 3)), rank=1, alpha=1), [])
    most = batches_to_measure(training, changes, Run(steps))
    taken = Counted.validation_batches if most is None else most
    assert 2 * changes * taken * 4 / 3 <= 0.02 * steps or (changes <= 2 and taken * changes <= 4)
    if steps == 100_000:
        assert taken > 30


def test_measuring_without_validation_is_refused_at_the_start():
    model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(3, 3)), rank=2, alpha=2)
    training = Training(model, [torch.optim.SGD(model.parameters())])
    with pytest.raises(ConfigurationError, match=r"measure=True .* no validation: .*measure=False"):
        RankDriver([Stage(At(step=1), Rank(1))], measure=True).start(training, Run(5))


@pytest.mark.parametrize(
    ("when", "how", "named"),
    [(At(step=6), How(check_monitor="val/los"), "check_monitor of How"), (Plateau("val/los"), How(), "of Plateau")],
)
def test_a_metric_that_no_validation_logs_is_refused_before_training(regression, when, how, named):
    scheduler = RankScheduler([Stage(when, Rank(1), how=how)], measure=True)
    with pytest.raises(ConfigurationError, match=rf"{named}.*'val/los'; logged: 'val/loss'"):
        fitted(regression, regression[1]()[1], scheduler, Watching([]), num_sanity_val_steps=1)


@pytest.mark.parametrize("validated", ["loss", "val/loss"])
def test_a_metric_that_judges_a_change_is_missed_at_the_first_validation(validated):
    """What a loop reports may lack it, so what it validates for a change decides, once."""

    class Loop(Training):
        count = 0

        def validate(self):
            self.count += 1
            return {validated: 1.0}

    model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(3, 3)), rank=2, alpha=2)
    driver = RankDriver([Stage(At(step=9), Rank(1), how=How(max_regression=0.1))])
    loop = Loop(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    driver.start(loop, Run(10))
    with (
        pytest.raises(ConfigurationError, match="'val/loss'; logged: 'loss'") if validated == "loss" else nullcontext()
    ):
        for loop.step in (1, 2):
            driver.validated(loop, {"loss": 1.0})
    assert loop.count == 1


class Elsewhere(Training):
    """A change is validated on other data than the run, and with noise."""

    def validate(self):
        return {"val/loss": float(torch.rand(()))}


@pytest.mark.parametrize("measure", [False, True])
def test_before_and_after_are_of_the_same_data_and_random_numbers_also_behind_a_validation(measure):
    model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(3, 3)), rank=2, alpha=2)
    stage = Stage(Plateau(patience=1), Rank(1), how=How(max_regression=None if measure else 0.0))
    driver = RankDriver(stage, measure=measure)
    loop = Elsewhere(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    driver.start(loop, Run(10))
    for loop.step in (1, 2):
        driver.validated(loop, {"val/loss": 0.001})
    driver.advance(loop)
    (event,) = driver.history
    assert event.measured.before == event.measured.after > 0.001
    assert not event.undone


def test_a_metric_that_no_validation_logs_is_refused_at_the_first_one_of_lightning(regression):
    make, data, trainer = regression
    made = trainer(
        callbacks=[RankScheduler(auto(how=How(check_monitor="val/los")))], max_steps=20, num_sanity_val_steps=0
    )
    with pytest.raises(ConfigurationError, match=r"'val/los'; logged: 'val/loss'"):
        made.fit(make(), *data())
    assert made.global_step == 10


class Logging(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/score", 0.5)


@pytest.mark.parametrize("sanity", [0, 1])
def test_a_metric_that_a_callback_logs_is_refused_at_the_first_validation(regression, sanity):
    make, data, trainer = regression
    scheduler = RankScheduler(Stage(At(step=9), Rank(1), how=How(check_monitor="val/score", max_regression=0.1)))
    made = trainer(callbacks=[scheduler, Logging()], max_steps=20, num_sanity_val_steps=sanity, val_check_interval=4)
    with pytest.raises(ConfigurationError, match=r"'val/score', which a callback logs"):
        made.fit(make(), *data())
    assert made.global_step == (0 if sanity else 4)

    # Also if the module has that hook, but not that metric: it is asked once, before the next step.
    class Having(make):
        def on_validation_epoch_end(self):
            self.log("val/other", 1.0)

    stages = [Stage(At(step=9), Rank(1), how=How(check_monitor="val/score", max_regression=0.1))]
    made = trainer(
        callbacks=[RankScheduler(stages), Logging()], max_steps=20, num_sanity_val_steps=sanity, val_check_interval=4
    )
    with pytest.raises(ConfigurationError, match=r"'val/score', which a callback logs"):
        made.fit(Having(), *data())
    assert made.global_step == (0 if sanity else 4)
    stages = [Stage(At(step=9), Rank(1), how=How(check_monitor="val/other", max_regression=0.1))]
    trainer(callbacks=[RankScheduler(stages), Logging()], max_steps=12, val_check_interval=4).fit(Having(), *data())
    # A schedule that does not judge by it takes it.
    scheduler = RankScheduler(Stage(At(step=9), Rank(1), how=How(max_regression=9.0)))
    trainer(callbacks=[scheduler, Logging()], max_steps=12, val_check_interval=4).fit(make(), *data())
    assert [event.undone for event in scheduler.history] == [False]


def test_a_metric_that_the_module_logs_of_two_loaders_together_judges_a_change(regression):
    """Lightning calls its hook "validation_step.0", and a name without the loader's number is the module's own."""
    make, data, trainer = regression
    train, val = data()

    class Twice(make):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            self.log("val/loss", torch.tensor(1.0))

    scheduler = RankScheduler(Stage(At(step=9), Rank(1), how=How(max_regression=0.1)))
    trainer(callbacks=[scheduler], max_steps=12, num_sanity_val_steps=1, val_check_interval=4).fit(
        Twice(), train, [val, val]
    )
    assert [str(event.measured) for event in scheduler.history] == ["val/loss 1 → 1"]


class Failing(Training):
    """The second validation, after the change, fails; the first one may lack the metric."""

    def __init__(self, model, name):
        super().__init__(model, [])
        self.name = name
        self.events = []
        self.validations = 0

    def validate(self):
        self.validations += 1
        if self.validations == 2:
            raise RuntimeError("no more data")
        return {self.name: 1.0}

    def tell(self, event):
        self.events.append(event)


@pytest.mark.parametrize(("name", "error", "rank"), [("val/loss", RuntimeError, 2), ("other", ConfigurationError, 4)])
def test_change_is_told_if_its_measurement_fails_and_not_made_without_a_metric(name, error, rank):
    model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(6, 6)), rank=4, alpha=4)
    driver = RankDriver(Stage(At(step=0), Rank(2)), measure=True)
    training = Failing(model, name)
    driver.start(training, Run(total_steps=5))
    with pytest.raises(error):
        driver.advance(training)
    assert (model[0].rank, len(training.events)) == (rank, int(rank == 2))
