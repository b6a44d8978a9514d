"""RankScheduler on a user's module over PEFT's get_peft_model: resumes bit for bit, loads checkpoints of any rank."""

import lightning
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from trained import drive, ranks

import dynrank
from dynrank.callbacks import RankScheduler
from dynrank.errors import ConfigurationError
from dynrank.layers.peft_layers import follow_checkpoint_ranks
from dynrank.schedules import How, Stage, after_convergence, early_budget
from dynrank.targets import Budget
from dynrank.triggers import At, Plateau


def schedule(**options):
    return RankScheduler(after_convergence(3, Plateau(patience=1000), shared=False, deadline=0.5, how=How(**options)))


@pytest.fixture(params=["__init__", "configure_model"])
def module_class(request, regression):
    """A user's module over get_peft_model, made where ``request.param`` says; it trains in train mode, with dropout."""

    class Wrapped(regression[0]):
        def __init__(self):
            lightning.LightningModule.__init__(self)
            self.net = None
            if request.param == "__init__":
                self.make()
            # `load_from_checkpoint` needs this call.
            follow_checkpoint_ranks(self)

        def make(self):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(12, 24), nn.Dropout(0.2), nn.Linear(24, 6))
            options = {"r": 6, "lora_alpha": 12, "lora_dropout": 0.1, "target_modules": ["0", "2"]}
            self.net = get_peft_model(net, LoraConfig(**options, rank_pattern={"2": 5}))

        def configure_model(self):
            if self.net is None:
                self.make()

        def test_step(self, batch, batch_idx):
            self.log("test/loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    return Wrapped


def test_lightning_run_resumes_bit_equal_from_before_and_after_the_drop(module_class, fit, assert_same, tmp_path):
    scheduler = schedule(lr_factor=2.0)
    reference, _ = fit(scheduler, module=module_class(), saved=tmp_path, max_steps=12)
    assert [event.step for event in scheduler.history] == [6]
    assert ranks(reference) == {3}
    # The steps are before the decision, between it and the change, and after both.
    for step in (5, 6, 11):
        again = schedule(lr_factor=2.0)
        module, _ = fit(again, module=module_class(), ckpt_path=tmp_path / f"step={step}.ckpt", max_steps=12)
        assert again.history == scheduler.history, step
        assert again.state_dict() == scheduler.state_dict(), step
        assert vars(module.net.peft_config["default"]) == vars(reference.net.peft_config["default"]), step
        assert_same(module, reference, step)


def test_a_rank_map_steers_single_layers_and_is_kept_in_checkpoints(module_class, fit, assert_same, tmp_path):
    rank_map = {"0": {"pinned": True}, "2": {"highest": 2}}
    scheduler = RankScheduler(early_budget(4, at=0.25) + early_budget(2, at=0.75), rank_map=rank_map)
    reference, _ = fit(scheduler, module=module_class(), saved=tmp_path, max_steps=12)
    assert [layer.rank for _, layer in dynrank.lora_layers(reference)] == [6, 2]
    assert [report.layer[-1] for event in scheduler.history for report in event.layers] == ["2", "2"]
    again = RankScheduler(scheduler.driver.stages, rank_map=rank_map)
    module, _ = fit(again, module=module_class(), ckpt_path=tmp_path / "step=5.ckpt", max_steps=12)
    assert again.history == scheduler.history
    assert_same(module, reference, 5)
    other = RankScheduler(scheduler.driver.stages)
    with pytest.raises(ConfigurationError, match="the checkpoint was made under another rank_map"):
        fit(other, module=module_class(), ckpt_path=tmp_path / "step=5.ckpt", max_steps=12)


def test_checkpoints_of_both_ranks_load_into_a_finished_and_into_a_new_module(regression, fit, module_class, tmp_path):
    module, trainer = fit(schedule(), module=module_class(), saved=tmp_path, max_steps=12)
    x = torch.randn(5, 12)
    for step, expected_ranks in ((3, {6, 5}), (12, {3})):
        file = tmp_path / f"step={step}.ckpt"
        fresh = module_class.load_from_checkpoint(file, weights_only=True)
        trainer.test(module, regression[1]()[1], ckpt_path=file, verbose=False)
        assert ranks(fresh) == ranks(module) == expected_ranks
        expected = fresh.net.eval()(x)
        assert torch.equal(module.net.eval()(x), expected)
        module.net.save_pretrained(tmp_path / f"{step}")
        loaded = PeftModel.from_pretrained(fresh.net.unload(), tmp_path / f"{step}")
        assert torch.equal(loaded.eval()(x), expected)


def test_layer_narrower_than_its_rank_is_cut_with_the_others():
    """PEFT gives every layer of all-linear the one rank, Qwen2-MoE's gate of one output, too."""
    options = LoraConfig(r=6, target_modules=["0", "1"], init_lora_weights=False)
    net = get_peft_model(nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 1)), options)
    loop = dynrank.Training(net, [torch.optim.SGD(dynrank.adapter_parameters(net), lr=1e-2)])
    drive(Stage(At(step=1), Budget(share=0.5)), loop, 2, lambda: net(torch.ones(1, 12)).sum())
    wide, narrow = (layer.rank for _, layer in dynrank.lora_layers(net))
    assert (narrow, wide < 6) == (1, True)
