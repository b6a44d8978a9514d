"""State-space models, whose kernels on CUDA read some layers' weights past the layers: those get no LoRA."""

import sys

import pytest
import torch
import transformers as hf
from torch import nn

import dynrank
from dynrank.errors import ConfigurationError

SMALL = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 8}
SMALL |= {"state_size": 4, "num_hidden_layers": 1}
HEADS = {"num_heads": 4, "head_dim": 4, "n_groups": 1}
# Each has a model and the function that is a kernel on CUDA.
MODELS = {
    "mamba": (lambda: hf.MambaForCausalLM(hf.MambaConfig(**SMALL)), "mamba_inner_fn"),
    "mamba2": (
        lambda: hf.Mamba2ForCausalLM(hf.Mamba2Config(**SMALL, **HEADS)),
        "mamba2_split_conv1d_scan_combined",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_layers_whose_weights_a_kernel_reads_are_refused_by_name(kind, monkeypatch):
    make, kernel = MODELS[kind]
    base = make()
    given = []
    code = sys.modules[type(base).__module__]
    monkeypatch.setattr(code, kernel, lambda *args, **named: given.extend([*args, *named.values()]))
    base(torch.tensor([[3, 1, 4, 1, 5]]), use_cache=False)
    weights = {id(value) for value in given}
    linear = {name: id(m.weight) for name, m in base.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    fused = {name for name, weight in linear.items() if weight in weights}
    assert fused
    for name in fused:
        with pytest.raises(ConfigurationError, match=f"{name}' cannot have LoRA: its parent reads the weight .*Mixer"):
            dynrank.add_lora(base, rank=2, alpha=2, target_modules=[name])
    assert {name for name, _ in dynrank.lora_layers(dynrank.add_lora(base, rank=2, alpha=2))} == linear.keys() - fused
