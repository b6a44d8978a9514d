"""LoRA on layers that bitsandbytes or torchao has packed, on the CPU: against their own forward and against PEFT."""

import pytest
import torch
import torchao.quantization
from peft import PeftModel
from torch.testing import assert_close
from trained import updated
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.layers.frozen_base import without_base
from dynrank.layers.kinds import LoRAQuantizedLinear
from dynrank.layers.quantized import is_quantized

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear may get different generations:UserWarning"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning"),
]
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
TORCHAO = {
    "torchao": torchao.quantization.Int8WeightOnlyConfig(),
    "torchao, inputs too": torchao.quantization.Int8DynamicActivationInt8WeightConfig(),
}


@pytest.fixture(autouse=True)
def one_arithmetic(request, monkeypatch):
    """Where the CPU has AVX512-BF16, bitsandbytes rounds a 4-bit layer to bfloat16 in its first forward in eval."""
    if "as_the_cpu_is" not in request.fixturenames:
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def as_the_cpu_is():
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).save_pretrained(path)
    return path


@pytest.fixture(params=["nf4", "torchao", "int8"])
def base(request, folder):
    """Makes the quantised model anew on every call."""

    def make():
        options = {"device_map": "cpu", "dtype": torch.float32}
        if request.param in SETTINGS:
            options["quantization_config"] = BitsAndBytesConfig(**SETTINGS[request.param])
        model = LlamaForCausalLM.from_pretrained(folder, **options).eval()
        if request.param in TORCHAO:
            torchao.quantization.quantize_(model.model, TORCHAO[request.param])
        return model

    return make


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def packed(model):
    """Every tensor of the quantised layers, by name; of torchao's the values that they stand for."""
    found = {}
    for name, module in model.named_modules():
        if is_quantized(module):
            found |= {f"{name.removesuffix('.base')}.{key}": value for key, value in module.state_dict().items()}
    return {n: value.dequantize() if type(value) is not torch.Tensor else value for n, value in found.items()}


def adapted(model, **options):
    model = dynrank.add_lora(model, **({"rank": 4, "alpha": 6} | options))
    torch.manual_seed(1)
    return updated(model, 0.1)


def up_proj(model):
    return dict(dynrank.lora_layers(model))["model.layers.0.mlp.up_proj"]


def test_trained_truncated_saved_and_loaded_by_peft(base, tmp_path):
    model = dynrank.add_lora(base(), rank=8, alpha=16)
    assert all(isinstance(layer, LoRAQuantizedLinear) for _, layer in dynrank.lora_layers(model))
    before = {key: value.clone() for key, value in packed(base()).items()}
    optimizer = torch.optim.AdamW(dynrank.adapter_parameters(model), lr=1e-2)
    for rank in (8, 8, 4, 2, 2):
        dynrank.resize(model, rank, optimizers=[optimizer])
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(model.eval())
    after = packed(model)
    assert set(after) == set(before) != set()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    dynrank.save_adapter(model, tmp_path)
    assert (expected - logits(base())).abs().max() > 1e-2
    assert_close(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), expected, rtol=0, atol=1e-5)
    assert_close(logits(dynrank.load_adapter(base(), tmp_path)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_forward_and_gradients_are_those_of_the_packed_layer_and_the_formula(base, training):
    layer = up_proj(adapted(base()).train(training))
    x = torch.randn(2, 3, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    # No unpacked weight is kept for the backward.
    assert not [t for t in saved if t.is_floating_point() and sorted(t.shape) == [64, 128]]
    assert saved
    assert y.dtype == torch.float32
    lora_A, lora_B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    other = x.detach().clone().requires_grad_()
    expected = layer.base(other) + 1.5 * other @ lora_A.T @ lora_B.T
    assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    assert_close(layer.lora_A.grad, lora_A.grad, rtol=1e-4, atol=1e-5)
    assert_close(layer.lora_B.grad, lora_B.grad, rtol=1e-4, atol=1e-5)
    assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["int8", "torchao, inputs too", "nf4-double"], indirect=True)
@pytest.mark.usefixtures("as_the_cpu_is")
def test_layer_that_rounds_inputs_or_is_packed_for_the_cpu_computes_as_its_base(base):
    model = adapted(base())
    # On some CPUs bitsandbytes packs a 4-bit weight again in this pass.
    logits(model)
    layer = up_proj(model.train())
    x = torch.randn(2, 3, 64)
    assert_close(layer(x), layer.base(x) + 1.5 * x @ layer.lora_A.T @ layer.lora_B.T)


def test_merge_refuses_quantised_layers_and_changes_nothing(base):
    model = adapted(base())
    expected = logits(model)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ConfigurationError, match=r"q_proj' and 6 more of its layers are quantised; save the adapter"):
        dynrank.merge(model)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(logits(model), expected)


def test_a_state_dict_without_the_base_knows_it_again(base):
    model = adapted(base())
    fresh = dynrank.add_lora(base(), rank=2, alpha=3)
    state = without_base(model, model.state_dict(), trained=())
    assert not [name for name in state if name.endswith("base.weight")]
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(ConfigurationError, match="on another base"):
        dynrank.add_lora(LlamaForCausalLM(fresh.config), rank=2, alpha=2).load_state_dict(state)
