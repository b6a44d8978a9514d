"""RankScheduler(kernel=True): PEFT's layers train by the fused op, also those of configure_model."""

import lightning
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.testing import assert_close
from trained import ranks

from dynrank.callbacks import RankScheduler
from dynrank.layers import peft_op
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import At


def test_a_run_by_the_op_ends_as_without_it(regression, fit, monkeypatch):
    calls = []
    op = peft_op.lora_linear
    monkeypatch.setattr(peft_op, "lora_linear", lambda *args: (calls.append(torch.is_grad_enabled()), op(*args))[1])
    for name in ("may_pay", "op_pays"):
        monkeypatch.setattr(peft_op, name, lambda *args: True)

    class Wrapped(regression[0]):
        def __init__(self):
            lightning.LightningModule.__init__(self)
            self.net = None

        def configure_model(self):
            if self.net is None:
                torch.manual_seed(0)
                net = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 6))
                self.net = get_peft_model(net, LoraConfig(r=6, lora_alpha=12, target_modules=["0", "1"]))

    ends = {}
    for kernel, kind in ((False, lora.layer.Linear), (True, peft_op.Linear)):
        scheduler = RankScheduler(Stage(At(step=5), Rank(3)), kernel=kernel)
        module, _ = fit(scheduler, module=Wrapped(), max_steps=8)
        assert [event.step for event in scheduler.history] == [5]
        assert ranks(module) == {3}
        assert {type(each) for each in module.modules() if isinstance(each, lora.LoraLayer)} == {kind}
        # Two layers in each step.
        assert calls.count(True) == 16 * kernel
        ends[kernel] = module.state_dict()
    assert_close(ends[True], ends[False], rtol=1e-3, atol=1e-5)
