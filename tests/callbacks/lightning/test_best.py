"""What Lightning's ModelCheckpoint and EarlyStopping take for the best, beside changes of rank."""

import logging
import math
import re
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from trained import ranks

import dynrank
from dynrank.callbacks import BestWeights, RankScheduler
from dynrank.callbacks.lightning.best import saved_file
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage
from dynrank.targets import GrowTo, Rank
from dynrank.triggers import At, Plateau


@pytest.fixture
def worsening(regression):
    """A module whose metric ``score`` is worse in each validation, so the first one is the best."""

    class Worsening(regression[0]):
        scores = 0

        def on_validation_epoch_end(self):
            self.scores += 1
            self.log("score", float(self.scores))

    return Worsening


def best(folder, **options):
    return ModelCheckpoint(folder, filename="{step}", monitor="score", **{"save_top_k": 1, **options})


def ranks_in(module_class, file):
    return ranks(module_class.load_from_checkpoint(file))


@pytest.mark.parametrize("top_k", [1, 2])
def test_best_and_last_checkpoints_are_of_after_the_cut(fit, worsening, tmp_path, caplog, monkeypatch, top_k):
    """And those of before are replaced first."""
    saver = best(tmp_path, save_top_k=top_k, save_last=True)
    # A command that another test has run in this process makes Lightning's logger quieter.
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    # Nothing is known yet of what it watches.
    waiting = EarlyStopping("train/loss", strict=False)
    with caplog.at_level(logging.INFO, logger=logger.name):
        fit(RankScheduler(Stage(At(step=12), Rank(2))), saver, waiting, module=worsening())
    assert "best so far: step 5 at rank 6; from here on the best of rank 2 counts" in caplog.text
    assert saver.best_model_path == str(tmp_path / "step=15.ckpt")
    assert float(saver.best_model_score) == 3
    assert {file.name for file in tmp_path.glob("step*")} == {f"step={step}.ckpt" for step in (15, 20)[:top_k]}
    for file in tmp_path.glob("*.ckpt"):
        assert ranks_in(worsening, file) == {2}, file.name


CUT = Stage(At(step=12), Rank(2))
GROWTH = [Stage(At(step=2), Rank(2)), Stage(At(step=12), GrowTo(6))]


@pytest.mark.parametrize(("stages", "options"), [(CUT, {"keep_best_before": True}), (GROWTH, {})])
def test_best_of_before_stays_where_ranks_grew_or_the_user_says_so(fit, worsening, tmp_path, stages, options):
    saver = best(tmp_path, save_last=True)
    plain = ModelCheckpoint(tmp_path, filename="plain", every_n_train_steps=9, save_on_train_epoch_end=False)
    with pytest.warns(UserWarning, match="has rank") as caught:
        fit(RankScheduler(stages, **options), saver, plain, module=worsening(), max_steps=14)
    messages = "\n".join(str(warning.message) for warning in caught)
    for kind, file, step in (("best", "step=5", 5), ("last", "last", 5), ("last", "plain", 9)):
        assert re.search(rf"the {kind} checkpoint, .*{file}.ckpt' of step {step}, has rank [26], but", messages), (
            messages
        )
    assert saver.best_model_path == str(tmp_path / "step=5.ckpt")


def test_cut_behind_the_last_step_is_validated_and_saved(fit, worsening, tmp_path):
    """So that ``ckpt_path="best"``, ``last.ckpt`` and the default checkpoint of the last epoch hold it."""
    saver = best(tmp_path / "best", save_last=True)
    plain = ModelCheckpoint(tmp_path / "plain")
    module, trainer = fit(RankScheduler(Stage(At(fraction=1.0), Rank(2))), saver, plain, module=worsening())
    assert ranks(module) == {2}
    # The validations at 5, 10, 15 and 20, and one of the cut model.
    assert float(saver.best_model_score) == float(trainer.callback_metrics["score"]) == 5
    for file in (saver.best_model_path, saver.last_model_path, plain.best_model_path):
        saved = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items()), file


class Normalized(lightning.LightningModule):
    """Its best weights belong to running statistics of then."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.BatchNorm1d(24), torch.nn.Linear(24, 6))
        self.register_buffer("temperature", torch.ones(()))
        self.net = dynrank.add_lora(net, rank=6, target_modules=["0", "2"])

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.net(batch[0]) * self.temperature, batch[1])

    def on_train_batch_start(self, batch, batch_idx):
        # Both change for the first time after the best validation.
        if self.global_step == 12:
            self.temperature += 1
            self.net[1].requires_grad_(True)
            self.net[2].lora_A.requires_grad_(True)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        self.net[2].lora_A.requires_grad_(False)
        # It becomes worse and worse.
        return torch.optim.SGD(self.parameters(), lr=1e-2, maximize=True)


@pytest.mark.parametrize("resumed", [None, 11, 13, 22])
def test_best_weights_are_restored_with_what_changes_only_after_them(fit, regression, tmp_path, resumed):
    """The statistics of BatchNorm, a buffer, and parameters that are unfrozen."""
    best = BestWeights("val/loss")
    module, trainer = fit(best, module=Normalized(), saved=tmp_path)
    if resumed:
        best = BestWeights("val/loss")
        checkpoint = tmp_path / f"step={resumed}.ckpt"
        other = Normalized()
        # As the run had them when it was killed.
        for layer in (other.net[1], other.net[2].lora_A) if resumed > 12 else ():
            layer.requires_grad_(True)
        module, trainer = fit(best, module=other, ckpt_path=checkpoint)
    assert best.step == 5
    trained = module.net[1].weight.detach().clone()
    module.freeze()
    best.restore(module)
    assert not torch.equal(trained, module.net[1].weight)
    (metrics,) = trainer.validate(module, regression[1]()[1], verbose=False)
    assert metrics["val/loss"] == pytest.approx(best.value, rel=1e-6)


@pytest.mark.parametrize("interval", [5, 30])
def test_best_weights_are_those_that_were_validated_also_where_hooks_put_an_average_in_place(fit, regression, interval):
    """Of a module's own, as of schedulefree's optimizers."""
    make, data, _ = regression

    class Averaging(make):
        def on_train_start(self):
            self.mean = [p.detach().clone() for p in self.parameters()]

        def on_train_batch_end(self, *_):
            for mean, value in zip(self.mean, self.parameters(), strict=True):
                mean.lerp_(value.detach(), 0.1)

        def swap(self):
            for mean, value in zip(self.mean, self.parameters(), strict=True):
                kept = value.detach().clone()
                value.data.copy_(mean)
                mean.copy_(kept)

        on_validation_start = on_validation_end = lambda self: self.swap() if hasattr(self, "mean") else None

    best = BestWeights("val/loss")
    module, trainer = fit(best, module=Averaging(), val_check_interval=interval if interval < 10 else None)
    assert best.step is not None
    best.restore(module)
    del module.mean
    (metrics,) = trainer.validate(module, data()[1], verbose=False)
    assert metrics["val/loss"] == pytest.approx(best.value, rel=1e-6)


def test_validation_behind_the_last_step_finds_the_metrics_of_before_a_resume(fit, regression, tmp_path):
    """EarlyStopping judges it by a metric of training, which Lightning has forgotten."""
    make, *_ = regression

    class Logging(make):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss)
            return loss

    def callbacks():
        return RankScheduler(Stage(At(fraction=1.0), Rank(2))), EarlyStopping("train/loss", patience=99)

    options = {"max_epochs": 2, "max_steps": -1}
    whole, _ = fit(*callbacks(), module=Logging(), saved=tmp_path, **options)
    module, _ = fit(*callbacks(), module=Logging(), ckpt_path=tmp_path / "step=20.ckpt", **options)
    assert ranks(whole) == ranks(module) == {2}


@pytest.mark.parametrize("options", [{}, {"keep_best_before": True}])
def test_cut_behind_the_last_step_is_validated_also_where_nothing_is_saved_by_a_metric(
    fit, worsening, regression, options
):
    """So a search of hyperparameters that returns ``trainer.callback_metrics`` judges the model that there is."""
    scheduler = RankScheduler(Stage(At(fraction=1.0), Rank(2)), **options)
    module, trainer = fit(scheduler, module=worsening())
    logged = dict(trainer.callback_metrics)
    assert float(logged["score"]) == 5
    (metrics,) = trainer.validate(module, regression[1]()[1], verbose=False)
    assert float(logged["val/loss"]) == metrics["val/loss"]


def test_checkpoint_that_another_thread_still_writes_has_no_ranks_yet(regression, tmp_path):
    """As that of AsyncCheckpointIO, at a change or at the end of a run."""
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "global_step": 1}, file)
    content = file.read_bytes()
    for size in (0, len(content) // 2):
        file.write_bytes(content[:size])
        assert saved_file(str(file), regression[0]()) is None


def test_patience_begins_anew_after_a_cut_and_a_resumed_run_goes_on_so(fit, worsening, tmp_path):
    """With a patience of 2 and the best score in the first validation, a run stops in the third one."""

    class Judging(lightning.Callback):
        def on_validation_end(self, trainer, pl_module):
            self.last = trainer.global_step

    def run(module, *stages, **options):
        judging = Judging()
        fit(RankScheduler([*stages]), EarlyStopping("score", patience=2), judging, module=module, **options)
        return judging.last

    cut = Stage(At(step=12), Rank(2))
    assert run(worsening(), max_steps=50) == 15
    # The one at 15 is the new best, and those at 20 and 25 are worse.
    assert run(worsening(), cut, max_steps=50, saved=tmp_path) == 25
    for step in (11, 14, 16, 21):
        again = worsening()
        again.scores = (step - 1) // 5
        assert run(again, cut, max_steps=50, ckpt_path=tmp_path / f"step={step}.ckpt") == 25, step


@pytest.mark.parametrize("keep", [False, True])
def test_reduction_on_a_plateau_waits_anew_after_a_cut(fit, worsening, tmp_path, keep):
    """The metric jumps at the cut, and falls in each validation after it; a resumed run goes on so."""
    scores = [1.0, 0.8, *(3.0 - 0.1 * number for number in range(20))]

    class Reducing(worsening):
        def on_validation_epoch_end(self):
            self.scores += 1
            self.log("score", scores[self.scores - 1])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1)
            return [optimizer], [{"scheduler": plateau, "monitor": "score", "interval": "step", "frequency": 5}]

    def run(module, **options):
        stage = Stage(At(step=10), Rank(2), how=How(lr_factor=2.0))
        scheduler = RankScheduler(stage, keep_best_before=keep)
        _, trainer = fit(scheduler, module=module, max_steps=40, **options)
        return trainer.optimizers[0].param_groups[0]["lr"]

    rate = run(Reducing(), saved=tmp_path)
    assert rate < 1e-3 if keep else rate == 2e-2
    again = Reducing()
    again.scores = 2
    assert run(again, ckpt_path=tmp_path / "step=12.ckpt") == rate


def test_score_of_before_the_cut_that_is_read_after_it_does_not_count(fit, worsening, tmp_path):
    """Lightning keeps it until the next validation, which is at step 15, and reads it at every second step."""

    class Reading(worsening):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=99)
            every = {"monitor": "score", "interval": "step", "frequency": 2, "strict": False}
            return [optimizer], [{"scheduler": self.plateau, **every}]

    def run(module, **options):
        every = {"every_n_train_steps": 2, "save_on_train_epoch_end": False, "enable_version_counter": False}
        saver = best(tmp_path / "best", **every)
        fit(RankScheduler(Stage(At(step=12), Rank(2))), saver, module=module, **options)
        return saver.best_model_path, float(saver.best_model_score), float(module.plateau.best)

    expected = str(tmp_path / "best" / "step=16.ckpt"), 3.0, 3.0
    assert run(Reading(), saved=tmp_path) == expected
    again = Reading()
    again.scores = 2
    assert run(again, ckpt_path=tmp_path / "step=14.ckpt") == expected


@pytest.mark.parametrize("step", [7, 12, 17])
def test_score_of_before_counts_in_no_validation_that_lacks_it(regression, fit, tmp_path, step):
    """The validations at 5, 20 and 35 log it; Lightning keeps its value in those between."""

    class Seldom(regression[0]):
        validations = 0

        def on_validation_epoch_end(self):
            if self.validations % 3 == 0:
                self.log("score", (0.1, 0.8, 0.7, 0.9)[self.validations // 3])
            self.validations += 1

    saver, stopper, weights = best(tmp_path), EarlyStopping("score", patience=99), BestWeights("score")
    fit(RankScheduler(Stage(At(step=step), Rank(2))), saver, stopper, weights, module=Seldom(), max_steps=60)
    assert (saver.best_model_path, saver.best_model_score) == (str(tmp_path / "step=35.ckpt"), 0.7)
    assert stopper.best_score == 0.7
    assert (weights.step, weights.value) == (35, pytest.approx(0.7))


@pytest.mark.parametrize(("step", "score", "at"), [(10, 0.2, 25), (13, 0.6, 45)])
def test_mean_over_an_epoch_counts_from_the_first_one_of_the_new_ranks_alone(
    fit, regression, tmp_path, step, score, at
):
    """An epoch has ten steps. Every fifth step is judged by the mean of the epoch before."""

    class Logging(regression[0]):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("score", (0.1, 0.2, 0.7, 0.6, 0.9)[self.current_epoch], on_step=False, on_epoch=True)
            return loss

    every = {"every_n_train_steps": 5, "save_on_train_epoch_end": False}
    saver = best(tmp_path, **every)
    cut = RankScheduler(Stage(At(step=step), Rank(2)))
    fit(cut, saver, module=Logging(), max_epochs=5, max_steps=-1, limit_val_batches=0)
    assert float(saver.best_model_score) == pytest.approx(score)
    assert saver.best_model_path == str(tmp_path / f"step={at}.ckpt")


def test_value_of_before_counts_no_longer_where_not_every_step_logs_one(fit, regression, tmp_path):
    """The first step of each epoch, of ten, does; a ModelCheckpoint and a scheduler read it after every fifth."""
    scores = (0.3, 0.1, 0.8, 0.7, 0.6)

    class Seldom(regression[0]):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 0:
                self.log("score", scores[self.current_epoch])
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=99)
            return [optimizer], [{"scheduler": self.plateau, "monitor": "score", "interval": "step", "frequency": 5}]

    saver = best(tmp_path, every_n_train_steps=5, save_on_train_epoch_end=False)
    module = Seldom()
    options = {"max_epochs": 5, "max_steps": -1, "limit_val_batches": 0}
    fit(RankScheduler(Stage(At(step=13), Rank(2))), saver, module=module, **options)
    assert (Path(saver.best_model_path).stem, float(saver.best_model_score)) == ("step=45", pytest.approx(0.6))
    assert float(module.plateau.best) == pytest.approx(0.6)


def logging_at_the_end_of_batches(module_class, score, by):
    """(a module, callbacks); ``score(trainer)`` is logged by a callback or by the module, which comes after all."""

    def logs(trainer, pl_module):
        value = score(trainer)
        if value is not None:
            pl_module.log("score", value)

    class Logging(module_class):
        def on_train_batch_end(self, *_):
            if by == "module":
                logs(self.trainer, self)

    class Watching(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if by == "callback":
                logs(trainer, pl_module)

    return Logging(), [Watching()]


@pytest.mark.parametrize("by", ["callback", "module"])
@pytest.mark.parametrize("step", [10, 13])
def test_score_that_is_logged_when_a_batch_ends_counts_from_the_first_of_the_new_ranks(
    fit, regression, tmp_path, step, by
):
    """After RankScheduler's own hook; what the module logs is read after the next batch."""

    def score(trainer):
        # After the cut the first is the best, but those of before are better.
        return 0.1 * trainer.global_step if trainer.global_step <= step else float(trainer.global_step)

    module, callbacks = logging_at_the_end_of_batches(regression[0], score, by)
    saver = best(tmp_path, every_n_train_steps=1, save_on_train_epoch_end=False)
    fit(RankScheduler(Stage(At(step=step), Rank(2))), *callbacks, saver, module=module, max_steps=20)
    read_at = step + 1 if by == "callback" else step + 2
    assert (Path(saver.best_model_path).stem, float(saver.best_model_score)) == (f"step={read_at}", step + 1)


def test_first_score_after_a_cut_may_be_the_last_before_it(fit, regression, tmp_path):
    """As accuracies often are."""
    scores = {4: 0.75, 8: 1.0, 12: 1.0, 16: 0.75, 20: 0.5}
    module, callbacks = logging_at_the_end_of_batches(regression[0], lambda t: scores.get(t.global_step), "callback")
    saver = best(tmp_path, mode="max", every_n_train_steps=4, save_on_train_epoch_end=False)
    fit(RankScheduler(Stage(At(step=9), Rank(2))), *callbacks, saver, module=module, limit_val_batches=0)
    assert (Path(saver.best_model_path).stem, float(saver.best_model_score)) == ("step=12", 1.0)


@pytest.mark.parametrize("by", ["callback", "module"])
def test_score_of_the_last_batch_of_an_epoch_counts_in_that_epoch(fit, regression, tmp_path, by):
    """An epoch has ten batches, and the next one resets what was logged."""
    scores = (0.1, 0.9, 0.6, 0.7, 0.8, 0.5)

    def score(trainer):
        return scores[trainer.current_epoch] if trainer.is_last_batch else None

    module, callbacks = logging_at_the_end_of_batches(regression[0], score, by)
    saver, stopper = best(tmp_path), EarlyStopping("score", patience=2, check_on_train_epoch_end=True)
    options = {"max_epochs": 6, "max_steps": -1, "limit_val_batches": 0}
    cut = RankScheduler(Stage(At(step=12), Rank(2)))
    _, trainer = fit(cut, *callbacks, saver, stopper, module=module, **options)
    assert (Path(saver.best_model_path).stem, float(saver.best_model_score)) == ("step=30", pytest.approx(0.6))
    assert trainer.global_step == 50


def test_first_score_after_a_cut_counts_also_in_a_resumed_run_and_for_a_trigger(fit, regression, tmp_path):
    """Every fifth step has one, and is validated."""
    scores = {5: 0.1, 10: 0.2, 15: 3.0, 20: 5.0, 25: 4.0, 30: 6.0}

    def run(**options):
        make = regression[0]
        module, callbacks = logging_at_the_end_of_batches(make, lambda t: scores.get(t.global_step), "callback")
        stages = [Stage(At(step=10), Rank(4)), Stage(Plateau("score", patience=9, warmup_steps=0), Rank(2))]
        scheduler = RankScheduler(stages)
        plateau = scheduler.driver.stages[1].when
        seen = []
        observe = plateau.observe
        plateau.observe = lambda now, value: seen.append((now, value)) or observe(now, value)
        saver = best(tmp_path / "best", every_n_train_steps=5, enable_version_counter=False)
        with pytest.warns(UserWarning, match="ended before stage 2"):
            fit(scheduler, *callbacks, saver, module=module, max_steps=32, **options)
        return Path(saver.best_model_path).stem, float(saver.best_model_score), seen

    seen = [(now, value) for now, value in scores.items() if now > 10]
    expected = ("step=15", 3.0)
    assert run(saved=tmp_path) == (*expected, seen)
    for step in (14, 15, 16, 20):
        found = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert found == (*expected, [(now, value) for now, value in seen if now >= step]), step


@pytest.mark.parametrize("monitor", ["score", "score_step"])
def test_score_of_a_step_that_is_also_a_mean_counts_from_the_first_step_of_the_new_ranks(
    fit, regression, tmp_path, monitor
):
    class Logging(regression[0]):
        def training_step(self, batch, batch_idx):
            now = self.global_step
            self.log("score", 0.1 * now if now < 13 else float(now), on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    saver = ModelCheckpoint(tmp_path, filename="{step}", monitor=monitor, every_n_train_steps=1)
    fit(RankScheduler(Stage(At(step=13), Rank(2))), saver, module=Logging(), max_steps=32)
    assert (Path(saver.best_model_path).stem, float(saver.best_model_score)) == ("step=14", 13.0)


def test_layer_that_is_unfrozen_at_the_begin_of_an_epoch_is_cut_there(fit, regression):
    class Unfreezing(regression[0]):
        def on_train_epoch_start(self):
            _, layer = next(dynrank.lora_layers(self))
            for factor in (layer.lora_A, layer.lora_B):
                factor.requires_grad_(self.current_epoch > 0)

        def configure_optimizers(self):
            return torch.optim.SGD(dynrank.adapter_parameters(self), lr=1e-2)

    module = Unfreezing()
    fit(RankScheduler(Stage(At(step=10), Rank(2))), module=module, max_steps=12)
    assert ranks(module) == {2}


@pytest.mark.parametrize("kind", ["forked", "end"])
def test_mean_that_has_the_name_of_a_step_or_comes_at_the_end_counts_from_the_first_whole_epoch(
    fit, regression, tmp_path, kind
):
    """Lightning has both under one name, and a hook at the end of an epoch logs after those of callbacks."""
    scores = (0.1, 0.2, 0.7, 0.6, 0.9) if kind == "forked" else (0.1, 0.7, 0.6, 0.8, 0.9)

    class Logging(regression[0]):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if kind == "forked":
                self.log("score", scores[self.current_epoch], on_step=True, on_epoch=True)
            return loss

        def on_train_epoch_end(self):
            if kind == "end":
                self.log("score", scores[self.current_epoch])

    saver, stopper = best(tmp_path), EarlyStopping("score", patience=99, check_on_train_epoch_end=True)
    options = {"max_epochs": 5, "max_steps": -1, "limit_val_batches": 0}
    cut = RankScheduler(Stage(At(step=13 if kind == "forked" else 3), Rank(2)))
    fit(cut, saver, stopper, module=Logging(), saved=tmp_path / "all", **options)
    at = scores.index(0.6) + 1
    assert (Path(saver.best_model_path).stem, float(saver.best_model_score)) == (f"step={10 * at}", pytest.approx(0.6))
    assert float(stopper.best_score) == pytest.approx(0.6)


def test_validation_of_a_resumed_run_is_saved_with_its_own_score(fit, regression, tmp_path):
    """ModelCheckpoint postpones what it saves to a validation that is due, if it does not know the metric yet."""

    class Improving(regression[0]):
        def on_validation_epoch_end(self):
            self.log("score", float(self.global_step))

    def run(**options):
        saver = best(tmp_path / "best", mode="max", every_n_train_steps=20, enable_version_counter=False)
        every = {"check_val_every_n_epoch": 2, "val_check_interval": 1.0}
        fit(RankScheduler(Stage(At(step=8), Rank(2))), saver, module=Improving(), max_steps=40, **every, **options)
        return Path(saver.best_model_path).stem, float(saver.best_model_score)

    assert run(saved=tmp_path) == ("step=40", 40.0)
    assert run(ckpt_path=tmp_path / "step=25.ckpt") == ("step=40", 40.0)


@pytest.mark.parametrize("length", [{"max_steps": 10}, {"max_epochs": 1, "max_steps": -1}])
def test_resume_behind_the_last_step_saves_by_a_metric_of_training(fit, regression, tmp_path, monkeypatch, length):
    """Which Lightning forgets in a resume."""

    class Logging(regression[0]):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("score", loss, on_step=True)
            return loss

    def run(**options):
        saver = best(tmp_path / "best", save_last=True, enable_version_counter=False)
        fit(RankScheduler(Stage(At(fraction=1.0), Rank(2))), saver, module=Logging(), **length, **options)
        return saver

    def killed(*_):
        raise ChildProcessError

    with monkeypatch.context() as patched:
        patched.setattr(RankScheduler, "on_train_end", killed)
        with pytest.raises(ChildProcessError):
            run()
    assert ranks_in(Logging, tmp_path / "best" / "last.ckpt") == {6}
    saver = run(ckpt_path=tmp_path / "best" / "last.ckpt")
    assert ranks_in(Logging, saver.last_model_path) == ranks_in(Logging, saver.best_model_path) == {2}


def test_weights_of_a_validation_that_is_nan_are_never_the_best(fit, regression):
    class Undefined(regression[0]):
        def on_validation_epoch_end(self):
            self.log("score", math.nan if self.global_step == 5 else float(self.global_step))

    best = BestWeights("score")
    fit(best, module=Undefined())
    assert (best.step, best.value) == (10, 10.0)


def test_best_weights_that_there_cannot_be_are_spoken_of(fit):
    best = BestWeights("val/los")
    module, _ = fit(best)
    with pytest.warns(UserWarning, match="every validation after the last change .* NaN or nothing as 'val/los'"):
        best.restore(module)
    # A validation before the change is none after it.
    late = BestWeights("val/loss")
    module, _ = fit(RankScheduler(Stage(At(fraction=1.0), Rank(2))), late, limit_val_batches=0)
    with pytest.warns(UserWarning, match="training was not validated after the last change of ranks"):
        late.restore(module)
    with pytest.raises(ConfigurationError, match="mode must be min or max, got 'MAX'"):
        BestWeights("score", "MAX")
