"""The keys of ``model``: a packed base is trained, and a resumed run of it has the weights of an uninterrupted one."""

import json

import pytest
import torch
from safetensors.torch import load_file

import dynrank
from dynrank.app.models.names import ModelSettings
from dynrank.app.models.pretrained import load_causal_lm
from dynrank.app.runs import job
from dynrank.layers.quantized import is_quantized

ROWS = [{"prompt": f"item {i}:", "answer": f" {('class', 'import', 'return x')[i % 3]}"} for i in range(60)]
SPEED = ["optimizer.lr=0.01", "optimizer.warmup_steps=1", "optimizer.decay=constant_with_warmup", "task.batch_size=8"]
QUIET = ["trainer.enable_progress_bar=false", "plots=false", "trainer.val_check_interval=4", "checkpoint_every=4"]


# Lightning gives advice about small data.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_packed_base_is_trained_and_goes_on_to_the_same_bits(quantization, tiny_llama, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    options = ["task=completion", f"data.train={tmp_path / 'rows.json'}", f"task.model={tiny_llama}", *SPEED, *QUIET]
    options += [f"model.quantization={quantization}", "model.gradient_checkpointing=true"]

    def run(name, steps, *more):
        config = dynrank.compose([*options, "lora.rank=8", "schedule=fixed", f"trainer.max_steps={steps}", *more])
        return job.run(config, tmp_path / name), load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    first, _ = run("first", 4)
    whole, adapter = run("whole", 12)
    _, resumed = run("resumed", 12, f"ckpt_path={tmp_path / 'first' / 'checkpoints' / 'last.ckpt'}")
    assert adapter.keys() == resumed.keys()
    assert all(torch.equal(factor, resumed[name]) for name, factor in adapter.items())
    assert whole.test["test/loss"] < 0.9 * first.test["test/loss"]
    base = load_causal_lm(str(tiny_llama), settings=ModelSettings(quantization=quantization))
    adapted = dynrank.load_adapter(base, tmp_path / "whole" / "adapter")
    assert all(is_quantized(layer.base) for _, layer in dynrank.lora_layers(adapted))
    built = job.build(dynrank.compose([*options, f"lora.from={tmp_path / 'whole' / 'adapter'}"]))
    ids = torch.arange(27).view(3, 9) * 22
    assert torch.equal(adapted.eval()(input_ids=ids).logits, built.module.model.eval()(input_ids=ids).logits)


def test_settings_reach_the_model(tiny_llama):
    model = load_causal_lm(str(tiny_llama), settings=ModelSettings(dtype="bfloat16", attention="eager"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert not model.is_gradient_checkpointing
    model = load_causal_lm(str(tiny_llama), settings=ModelSettings(dtype="auto", gradient_checkpointing=True))
    # The config of the model says float32.
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.is_gradient_checkpointing
