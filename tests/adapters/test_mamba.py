"""State-space models, whose kernels on CUDA read some layers' weights past the layers: those get no LoRA."""

import copy
import sys

import pytest
import torch
import transformers as hf
from peft import PeftModel
from torch import nn

import dynrank
from dynrank.errors import ConfigurationError

TINY = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 8}
SMALL = TINY | {"state_size": 4, "num_hidden_layers": 1}
HYBRID = {"intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
HYBRID |= {"mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_n_groups": 1, "mamba_d_state": 4}
# Each has a model and the function that is a kernel on CUDA.
MODELS = {
    "mamba": (lambda: hf.MambaForCausalLM(hf.MambaConfig(**SMALL)), "mamba_inner_fn"),
    "mamba2": (
        lambda: hf.Mamba2ForCausalLM(hf.Mamba2Config(**SMALL, num_heads=4, head_dim=4, n_groups=1)),
        "mamba2_split_conv1d_scan_combined",
    ),
    "falcon_h1": (
        lambda: hf.FalconH1ForCausalLM(hf.FalconH1Config(**TINY, **HYBRID)),
        "mamba2_split_conv1d_scan_combined",
    ),
}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(params=MODELS)
def base(request):
    torch.manual_seed(0)
    return MODELS[request.param][0]().eval()


@pytest.fixture
def fused(base, monkeypatch):
    """{name: layer} of the linear layers whose weights ``base`` hands to its kernel in training."""
    given = []
    code = sys.modules[type(base).__module__]
    kernel = MODELS[base.config.model_type][1]
    monkeypatch.setattr(code, kernel, lambda *args, **named: given.extend([*args, *named.values()]))
    base.train()(IDS, use_cache=False)
    base.eval()
    weights = {id(value) for value in given}
    return {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and id(m.weight) in weights}


def test_mamba_layers_that_the_kernel_reads_are_refused_by_name(base, fused, zoo, tmp_path):
    for name in fused:
        with pytest.raises(ConfigurationError, match=f"{name}' cannot have LoRA: its parent reads the weight .*Mixer"):
            dynrank.add_lora(base, rank=2, target_modules=[name])
    plain = copy.deepcopy(base)
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    ours = zoo.trained(dynrank.add_lora(base, rank=2))
    assert fused
    assert {name for name, _ in dynrank.lora_layers(ours)} == linear - set(fused)
    dynrank.save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    with torch.no_grad():
        expected = ours(IDS).logits
        assert (expected - plain(IDS).logits).abs().max() > 1e-2
        assert (theirs(IDS).logits - expected).abs().max() <= 1e-5
