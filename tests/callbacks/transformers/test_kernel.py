"""RankTrainerCallback(kernel=True): PEFT's layers train by the fused op, and come to what they come to without it."""

import pytest
from peft import LoraConfig, get_peft_model
from small_trainer import CUT, SAVING, STEPS, base, trainer
from torch.testing import assert_close
from trained import ranks

from dynrank.callbacks import RankTrainerCallback
from dynrank.layers import peft_op


def wrapped():
    return get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


@pytest.mark.parametrize("anew", [False, True], ids=["the constructor's model", "one of model_init"])
def test_a_run_by_the_op_ends_as_without_it_and_resumes(anew, monkeypatch, tmp_path):
    # The ranks with which the op is called, which pays whatever the size.
    calls = []
    op = peft_op.lora_linear
    monkeypatch.setattr(peft_op, "lora_linear", lambda *args: (calls.append(len(args[3])), op(*args))[1])
    for name in ("may_pay", "op_pays"):
        monkeypatch.setattr(peft_op, name, lambda *args: True)

    def made(folder, *, kernel):
        schedule = RankTrainerCallback(CUT, kernel=kernel)
        model = None if anew else wrapped()
        return trainer(folder, model, schedule, model_init=wrapped if anew else None, **SAVING)

    plain, fused = (made(tmp_path / str(kernel), kernel=kernel) for kernel in (False, True))
    plain.train()
    assert calls == []
    fused.train()
    # At its rank before the cut, and at that behind it: seven layers in each step.
    assert calls == [4] * 7 * CUT.when.step + [2] * 7 * (STEPS - CUT.when.step)
    assert ranks(fused.model) == {2}
    assert_close(fused.model.state_dict(), plain.model.state_dict(), rtol=1e-3, atol=1e-5)
    calls.clear()
    fused.train(resume_from_checkpoint=str(tmp_path / "True" / f"checkpoint-{STEPS - 2}"))
    assert calls == [2] * 7 * 2
    assert_close(fused.model.state_dict(), plain.model.state_dict(), rtol=1e-3, atol=1e-5)
