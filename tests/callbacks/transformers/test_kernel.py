"""RankTrainerCallback(kernel=True): PEFT's layers train by the fused op, and come to what they come to without it."""

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from small_trainer import CUT, SAVING, STEPS, base, own, trainer
from torch.testing import assert_close
from trained import ranks
from transformers import TrainerCallback

from dynrank.callbacks import RankTrainerCallback
from dynrank.errors import ConfigurationError
from dynrank.layers import peft_op


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The ranks with which the op was called; it pays whatever the size."""
    made = []
    op = peft_op.lora_linear
    monkeypatch.setattr(peft_op, "lora_linear", lambda *args: (made.append(len(args[3])), op(*args))[1])
    for name in ("may_pay", "op_pays"):
        monkeypatch.setattr(peft_op, name, lambda *args: True)
    return made


def wrapped():
    return get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


class Classes(TrainerCallback):
    """The classes of the LoRA layers in each step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model, **_):
        self.seen.append({type(module) for module in model.modules() if isinstance(module, lora.LoraLayer)})


def trained(folder, way, *, kernel):
    schedule = RankTrainerCallback(CUT, kernel=kernel)
    if way == "model_init":
        made = trainer(folder, None, schedule, model_init=wrapped, **SAVING)
    else:
        made = trainer(folder, wrapped(), schedule if way == "callbacks" else None, **SAVING)
    if way == "attach":
        schedule.attach(made)
    classes = Classes()
    made.add_callback(classes)
    made.train()
    assert [event.step for event in schedule.history] == [CUT.when.step]
    assert ranks(made.model) == {2}
    assert classes.seen == [{peft_op.Linear if kernel else lora.layer.Linear}] * STEPS
    return made


@pytest.mark.parametrize("way", ["callbacks", "attach", "model_init"])
def test_a_run_by_the_op_ends_as_without_it_and_resumes(way, calls, tmp_path):
    plain = trained(tmp_path / "plain", way, kernel=False)
    assert calls == []
    fused = trained(tmp_path / "fused", way, kernel=True)
    # At its rank before the cut, and at that behind it: seven layers in each step.
    assert calls == [4] * 7 * CUT.when.step + [2] * 7 * (STEPS - CUT.when.step)
    assert_close(fused.model.state_dict(), plain.model.state_dict(), rtol=1e-3, atol=1e-5)
    calls.clear()
    fused.train(resume_from_checkpoint=str(tmp_path / "fused" / f"checkpoint-{STEPS - 2}"))
    assert calls == [2] * 7 * 2
    assert_close(fused.model.state_dict(), plain.model.state_dict(), rtol=1e-3, atol=1e-5)


def test_layers_of_dynrank_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigurationError, match="apply_lora_kernel .*Layers of dynrank.add_lora have the op already"):
        trainer(tmp_path, own(), RankTrainerCallback(CUT, kernel=True))
