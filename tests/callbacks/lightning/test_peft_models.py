"""RankScheduler on a user's module over PEFT's get_peft_model, with the op: resumes bit for bit, loads any rank."""

import lightning
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.testing import assert_close

import dynrank
from dynrank.callbacks import RankScheduler
from dynrank.layers import peft_op
from dynrank.layers.peft_layers import follow_checkpoint_ranks
from dynrank.schedules import How, early_budget


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


def test_checkpoints_resume_bit_equal_and_load_at_their_ranks(regression, module_class, fit, assert_same, tmp_path):
    """The oracle has more resumes."""

    def run(**options):
        stages = early_budget(4, at=0.25, how=How(lr_factor=2.0)) + early_budget(2, at=0.75)
        rank_map = {"0": {"pinned": True}, "2": {"highest": 2}}
        scheduler = RankScheduler(stages, rank_map=rank_map, kernel=True)
        return fit(scheduler, module=module_class(), max_steps=12, **options)

    def ranks(module):
        return [layer.rank for _, layer in dynrank.lora_layers(module)]

    whole, trainer = run(saved=tmp_path)
    module, _ = run(ckpt_path=tmp_path / "step=9.ckpt")
    assert {type(layer) for layer in module.modules() if isinstance(layer, LoraLayer)} == {peft_op.Linear}
    assert vars(module.net.peft_config["default"]) == vars(whole.net.peft_config["default"])
    assert_same(module, whole)
    x = torch.randn(5, 12)
    for step, expected_ranks in ((2, [6, 5]), (12, [6, 2])):
        file = tmp_path / f"step={step}.ckpt"
        fresh = module_class.load_from_checkpoint(file, weights_only=True)
        trainer.test(whole, regression[1]()[1], ckpt_path=file, verbose=False)
        assert ranks(fresh) == ranks(whole) == expected_ranks
        expected = fresh.net.eval()(x)
        # By the op, which rounds otherwise.
        assert_close(whole.net.eval()(x), expected)
        whole.net.save_pretrained(tmp_path / f"{step}")
        loaded = PeftModel.from_pretrained(fresh.net.unload(), tmp_path / f"{step}")
        assert torch.equal(loaded.eval()(x), expected)
