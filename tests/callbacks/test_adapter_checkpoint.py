"""AdapterCheckpoint in Lightning: what its files hold, and that runs go on, are tested and loaded from them."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from dynrank.callbacks import AdapterCheckpoint, RankScheduler, StepSeed
from dynrank.errors import ConfigurationError, DivergedError
from dynrank.layers.frozen_base import MARK
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import At

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:.*tensorboardX", "ignore:You are using the plain ModelCheckpoint"
)
STEPS, CHANGE = 24, 13  # ten batches an epoch


def scheduler():
    return RankScheduler([Stage(when=At(step=CHANGE), to=Rank(3))])


def fit(regression, folder, *, steps=STEPS, checkpoint=AdapterCheckpoint, seed=None, ckpt_path=None, **options):
    """(trainer, module) after a run that drops from rank 6 to 3 and saves every step."""
    make, data, trainer = regression
    module = make()
    if seed is not None:
        torch.manual_seed(seed)
        nn.init.normal_(module.net[2].base.weight)
    every = {"every_n_train_steps": 1 if ckpt_path is None else steps}
    callbacks = [StepSeed(1), scheduler(), checkpoint(folder, filename="{step}", save_top_k=-1, **every, **options)]
    trainer = trainer(max_steps=steps, callbacks=callbacks, enable_checkpointing=True, val_check_interval=5)
    trainer.fit(module, *data(), ckpt_path=ckpt_path)
    return trainer, module


def bits(trainer, module):
    optimizer = trainer.optimizers[0]
    state = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    history = [c.history for c in trainer.callbacks if isinstance(c, RankScheduler)]
    return dict(module.state_dict()), state, history


def assert_same(one, other):
    assert one[2] == other[2]
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture(scope="module")
def run(regression, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer, module = fit(regression, folder)
    return folder, bits(trainer, module)


def stored(folder, step):
    return torch.load(folder / f"step={step}.ckpt", weights_only=True)


def test_it_holds_what_is_trained_and_what_lightning_needs(regression, run, tmp_path):
    folder, _ = run
    fit(regression, tmp_path, steps=CHANGE, checkpoint=ModelCheckpoint)
    whole, ours = stored(tmp_path, CHANGE), stored(folder, CHANGE)
    base = {f"net.{i}.base.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(whole["state_dict"]) - set(ours["state_dict"]) == base
    assert set(ours["state_dict"]) - set(whole["state_dict"]) == {f"net.{MARK}"}
    assert set(ours) == set(whole)


@pytest.mark.parametrize("step", [CHANGE - 6, CHANGE - 1, CHANGE, CHANGE + 1])
def test_a_run_goes_on_to_the_same_bits(regression, run, tmp_path, step):
    folder, expected = run
    assert_same(bits(*fit(regression, tmp_path, ckpt_path=folder / f"step={step}.ckpt")), expected)


@pytest.mark.parametrize("kinds", [(AdapterCheckpoint, ModelCheckpoint), (ModelCheckpoint, AdapterCheckpoint)])
def test_a_run_goes_on_with_another_kind_of_checkpoint(regression, run, tmp_path, kinds):
    fit(regression, tmp_path, steps=CHANGE, checkpoint=kinds[0])
    again = fit(regression, tmp_path, checkpoint=kinds[1], ckpt_path=tmp_path / f"step={CHANGE}.ckpt")
    assert_same(bits(*again), run[1])
    assert (f"net.{MARK}" in stored(tmp_path, STEPS)["state_dict"]) == (kinds[1] is AdapterCheckpoint)


def test_last_and_a_second_fit_in_one_folder(regression, tmp_path, run):
    fit(regression, tmp_path, steps=CHANGE + 1, save_last=True)
    assert_same(bits(*fit(regression, tmp_path, save_last=True, ckpt_path="last")), run[1])


def test_best_from_before_the_change_is_tested_after_it(regression, tmp_path):
    make, data, trainer = regression

    class Scored(make):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("score", float(self.trainer.global_step))  # the first is the best

        def test_step(self, batch, batch_idx):
            x, y = batch
            self.log("test/loss", nn.functional.mse_loss(self.net(x), y))

    best = AdapterCheckpoint(tmp_path, monitor="score", filename="best")
    module = Scored()
    trainer = trainer(max_steps=STEPS, callbacks=[scheduler(), best], enable_checkpointing=True, val_check_interval=5)
    trainer.fit(module, *data())
    assert module.net[0].rank == 3
    found = trainer.test(module, data()[1], ckpt_path="best", verbose=False)[0]["test/loss"]
    assert module.net[0].rank == 6
    fresh = Scored.load_from_checkpoint(best.best_model_path)
    assert fresh.net[0].rank == 6
    validated = trainer.test(fresh, data()[1], verbose=False)[0]["test/loss"]
    assert found == validated


def test_load_from_checkpoint_after_the_change(regression, run):
    state = regression[0].load_from_checkpoint(run[0] / f"step={STEPS}.ckpt").state_dict()
    assert all(torch.equal(value, run[1][0][name]) for name, value in state.items())


def test_another_base_is_refused_before_anything_changes(regression, run, tmp_path):
    with pytest.raises(ConfigurationError, match=r"'net\.2\.base\.weight' had another shape or other values than here"):
        fit(regression, tmp_path, seed=3, ckpt_path=run[0] / "step=5.ckpt")


def test_a_damaged_file_is_refused(regression, run, tmp_path):
    content = (run[0] / "step=5.ckpt").read_bytes()
    (tmp_path / "damaged.ckpt").write_bytes(content[:-100])
    with pytest.raises(ConfigurationError, match=r"damaged\.ckpt"):
        fit(regression, tmp_path, ckpt_path=tmp_path / "damaged.ckpt")


def test_a_trained_head_and_parameters_trained_for_a_while_come_back(regression, tmp_path):
    make, data, trainer = regression

    class Headed(make):
        def __init__(self):
            super().__init__()
            self.net.extend([nn.Linear(6, 6), nn.Linear(6, 6)])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)  # the frozen base, too

    class Thaw(lightning.Callback):
        """A layer is trained for two steps, and frozen."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.net[4].requires_grad_(trainer.global_step < 2)

    def go(steps, **options):
        module = Headed()
        saving = AdapterCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        options_ = {"callbacks": [Thaw(), saving], "enable_checkpointing": True, "limit_val_batches": 0}
        trainer(max_steps=steps, **options_).fit(module, *data(), **options)
        return module

    first = go(4)
    names = set(stored(tmp_path, 4)["state_dict"])
    assert {"net.3.weight", "net.4.weight"} <= names
    assert not {"net.0.base.weight", "net.2.base.bias"} & names
    go(6, ckpt_path=tmp_path / "step=4.ckpt")  # what has been trained is carried on
    again = Headed.load_from_checkpoint(tmp_path / "step=6.ckpt")
    assert torch.equal(again.net[4].weight, first.net[4].weight)
    assert not torch.equal(again.net[4].weight, Headed().net[4].weight)


def test_a_diverged_model_is_not_saved(regression, tmp_path):
    make, data, trainer = regression

    class Diverging(make):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if self.global_step == 7 else 1)

    saving = AdapterCheckpoint(tmp_path, filename="last", every_n_train_steps=2, enable_version_counter=False)
    with pytest.raises(DivergedError, match=r"'net\.0\.lora_A' .*optimizer\.lr\n.*step 8; .*last\.ckpt"):
        trainer(max_steps=12, callbacks=[saving], enable_checkpointing=True).fit(Diverging(), *data())
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_run_that_it_cannot_serve_is_refused(regression, tmp_path):
    make, data, trainer = regression
    plain, beside = make(), ModelCheckpoint(tmp_path / "other")
    plain.net = nn.Sequential(nn.Linear(12, 6))
    for module, others, message in (
        (plain, [], "needs a model with LoRA layers"),
        (make(), [beside], "take one of the two out"),
    ):
        callbacks = [AdapterCheckpoint(tmp_path), *others]
        with pytest.raises(ConfigurationError, match=message):
            trainer(max_steps=1, callbacks=callbacks, enable_checkpointing=True).fit(module, *data())
