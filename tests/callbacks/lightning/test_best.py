"""The best so far in a run whose ranks fall, what its last validation and checkpoint have, and BestWeights."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from trained import ranks

from dynrank.callbacks import BestWeights, RankScheduler
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, auto
from dynrank.targets import Rank
from dynrank.triggers import At, Plateau

CUT = [Stage(At(step=12), Rank(2), how=How(lr_factor=2.0))]
# A validation comes after every fifth step. The score jumps at the cut, and falls slowly after it.
SCORES = {step: {5: 1.0, 10: 0.8}.get(step, 4.0 - 0.01 * step) for step in range(5, 45, 5)}
# The best checkpoint, its score, the last step, and the rate then.
OF_AFTER = ("step=40", SCORES[40], 40, 1e-2)
OF_BEFORE = ("step=10", SCORES[10], 25, 1e-3)


@pytest.mark.parametrize(("keep", "expected"), [(False, OF_AFTER), (True, OF_BEFORE)])
def test_what_waits_for_a_better_score_starts_anew_after_a_cut_also_resumed(fit, regression, tmp_path, keep, expected):
    """ModelCheckpoint, EarlyStopping and ReduceLROnPlateau; the oracle has more cases of the first two."""

    class Scored(regression[0]):
        def on_validation_epoch_end(self):
            self.log("score", SCORES[self.global_step])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, cooldown=9)
            self.often = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=99)
            asked = {"monitor": "score", "interval": "step", "strict": False}
            return [optimizer], [{"scheduler": s, **asked, "frequency": n} for s, n in ((plateau, 5), (self.often, 2))]

    def run(**options):
        saver = ModelCheckpoint(tmp_path / "best", "{step}", monitor="score", save_top_k=2, save_last=True)
        # This reads scores of before the cut after it, because Lightning keeps them until the next validation.
        often = ModelCheckpoint(tmp_path / "often", monitor="score", every_n_train_steps=2)
        waiting = EarlyStopping("score", patience=3), EarlyStopping("train/loss", strict=False)
        scheduler = RankScheduler(CUT, keep_best_before=keep)
        module, trainer = fit(scheduler, saver, often, *waiting, module=Scored(), max_steps=40, **options)
        assert (float(module.often.best) < 1) == keep
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        # A resumed run, in the same folder, numbers its files.
        best = Path(saver.best_model_path).stem.partition("-")[0], float(saver.best_model_score)
        assert float(waiting[0].best_score) == float(often.best_model_score) == best[1]
        return *best, trainer.global_step, rate

    assert run(saved=tmp_path) == pytest.approx(expected)
    # Files of before the cut stay.
    after = {"step=35", "step=40"} if expected is OF_AFTER else set()
    assert {file.stem for file in (tmp_path / "best").iterdir()} == {"last", "step=5", "step=10"} | after
    for step in (12, 14):
        assert run(ckpt_path=tmp_path / f"step={step}.ckpt") == pytest.approx(expected), step


def test_best_of_an_earlier_fit_of_the_trainer_is_of_before_the_cut(regression, tmp_path):
    make, data, trainer = regression
    saver = ModelCheckpoint(tmp_path, "{step}", monitor="val/loss", mode="max")
    # The third validation decides, each one after an epoch of ten steps.
    scheduler = RankScheduler(Stage(Plateau(patience=2, min_delta=0.99, warmup_steps=0), Rank(2)))
    made = trainer(max_epochs=2, callbacks=[scheduler, saver], enable_checkpointing=True)
    module = make()
    with pytest.warns(UserWarning, match="ended before stage 1"):
        made.fit(module, *data())
    assert Path(saver.best_model_path).stem == "step=10"
    made.fit_loop.max_epochs = 4
    made.fit(module, *data())
    assert [event.step for event in scheduler.history] == [30]
    assert Path(saver.best_model_path).stem == "step=40"


@pytest.mark.parametrize("length", [{"max_steps": 20}, {"max_epochs": 2, "max_steps": -1}], ids=["steps", "epochs"])
@pytest.mark.parametrize("end", [lambda: Stage(At(fraction=1.0), Rank(2)), lambda: auto(0.5, at=0.3)])
def test_last_validation_and_checkpoint_have_the_cut_of_the_last_step(fit, regression, tmp_path, end, length):
    """So ``ckpt_path="best"`` loads it, and a search of hyperparameters judges it by ``trainer.callback_metrics``."""
    saver, plain = ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True), ModelCheckpoint(tmp_path / "plain")
    scheduler = RankScheduler(end())
    module, trainer = fit(scheduler, saver, plain, **length)
    assert (scheduler.history[-1].step, scheduler.history[-1].lowers) == (20, True)
    for file in (saver.best_model_path, saver.last_model_path, plain.best_model_path):
        saved = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items()), file
    logged = float(trainer.callback_metrics["val/loss"])
    assert float(saver.best_model_score) == logged
    assert trainer.validate(module, regression[1]()[1], verbose=False) == [{"val/loss": logged}]
    again = RankScheduler(end())
    fit(again, ckpt_path=plain.best_model_path, **length)
    assert again.history == scheduler.history


def test_run_that_is_stopped_early_is_cut_at_its_end_with_one_warning(fit):
    scheduler = RankScheduler(Stage(At(fraction=1.0), Rank(2)))
    with pytest.warns(UserWarning, match="rank") as caught:
        module, _ = fit(scheduler, EarlyStopping("val/loss", min_delta=99.0, patience=2))
    assert ranks(module) == {2}
    assert [event.step for event in scheduler.history] == [15]
    (said,) = [str(each.message) for each in caught if "rank" in str(each.message)]
    assert "ranks were changed after training had ended at step 15, so no checkpoint has the change" in said


@pytest.mark.parametrize(("resumed", "maximize", "step"), [(0, True, 5), (5, True, 5), (22, True, 5), (0, False, 24)])
def test_best_weights_are_those_that_were_validated(fit, regression, tmp_path, resumed, maximize, step):
    """With buffers.

    Lightning makes no validation after step 24, nor at a resume the one that was due: each is made.
    """

    class Normalized(regression[0]):
        """Its statistics change in each step, and hooks put other weights in place, as an average, for validations."""

        factor = 2.0

        def __init__(self):
            super().__init__()
            self.net.insert(1, torch.nn.BatchNorm1d(24))

        def on_validation_start(self):
            self.net[0].lora_B.data *= self.factor

        def on_validation_end(self):
            self.net[0].lora_B.data /= self.factor

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-2, maximize=maximize)

    best = BestWeights("val/loss")
    if resumed:
        fit(BestWeights("val/loss"), module=Normalized(), saved=tmp_path, max_steps=resumed)
    checkpoint = tmp_path / f"step={resumed}.ckpt" if resumed else None
    module, trainer = fit(best, module=Normalized(), ckpt_path=checkpoint)
    assert best.step == step
    best.restore(module)
    # They are in place already.
    module.factor = 1.0
    (metrics,) = trainer.validate(module, regression[1]()[1], verbose=False)
    assert metrics["val/loss"] == pytest.approx(best.value, rel=1e-6)


def test_best_weights_that_there_cannot_be_are_spoken_of(fit, regression):
    class Undefined(regression[0]):
        def on_validation_epoch_end(self):
            self.log("score", math.nan if self.global_step == 5 else float(self.global_step))
            if self.global_step == 5:
                self.log("seldom", 1.0)

    best, late = BestWeights("score"), BestWeights("seldom")
    module, _ = fit(best, module=Undefined())
    assert (best.step, best.value) == (10, 10.0)
    module.net[0].base.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"'net\.0\.base\.bias' was frozen in the best validation, at step 10"):
        best.restore(module)
    # A validation before the change is none after it.
    module, _ = fit(RankScheduler(Stage(At(step=12), Rank(2))), late, module=Undefined())
    with pytest.warns(UserWarning, match="no validation after the last change of ranks had a number as 'seldom'"):
        late.restore(module)
    with pytest.raises(ConfigurationError, match="mode must be min or max, got 'MAX'"):
        BestWeights("score", "MAX")


def test_best_of_one_metric_is_not_compared_with_another_after_a_resume():
    of_loss = BestWeights("val/loss")
    of_loss.step = 7
    of_loss.value = 2.3
    resumed = {name: BestWeights(name, mode) for name, mode in (("val/loss", "min"), ("val/accuracy", "max"))}
    for best in resumed.values():
        best.load_state_dict(of_loss.state_dict())
    assert [best.step for best in resumed.values()] == [7, None]
