"""LoRA on weights that torchao has packed, for real, on the CPU: against the unpacked layer and against PEFT."""

import copy

import lightning
import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import dynrank
from dynrank.callbacks import AdapterCheckpoint
from dynrank.errors import ConfigurationError
from dynrank.layers.kinds import LoRAQuantizedLinear

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def base(settings=None):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
    torchao.quantize_(model.model, settings or torchao.Int8WeightOnlyConfig())
    return model


def adapted(model, **options):
    dynrank.add_lora(model, **({"rank": 4, "alpha": 6} | options))
    torch.manual_seed(1)
    for _, layer in dynrank.lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_in_training_it_is_the_op_on_the_unpacked_weight_and_keeps_none(dropout):
    model = adapted(base(), dropout=dropout).train()
    layer = dict(dynrank.lora_layers(model))["model.layers.0.mlp.up_proj"]
    assert isinstance(layer, LoRAQuantizedLinear)
    weight = layer.base.weight.dequantize()
    plain = nn.Sequential(nn.Linear(*weight.T.shape, bias=False))
    plain[0].weight = nn.Parameter(weight)
    dynrank.add_lora(plain, rank=4, alpha=6, target_modules=["0"], dropout=dropout).train()
    plain[0].load_state_dict({"lora_A": layer.lora_A, "lora_B": layer.lora_B}, strict=False)
    x, results, saved = torch.randn(2, 3, 64), [], []
    for either in (layer, plain[0]):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(7)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = either(leaf)
        assert any(t.shape == weight.shape for t in saved) == (either is plain[0])
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, either.lora_A, either.lora_B])])
    assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")  # it can't merge then
def test_trained_truncated_saved_and_loaded_by_peft(tmp_path):
    model = adapted(base(), rank=8, alpha=16).train()
    before = copy.deepcopy({n: m.weight for n, m in base().named_modules() if isinstance(m, nn.Linear)})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(6):
        if step == 3:
            dynrank.resize(model, 2, optimizers=[optimizer])
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    for name, layer in dynrank.lora_layers(model):
        assert torch.equal(layer.base.weight.dequantize(), before[name].dequantize())
    expected = logits(model.eval())
    assert (expected - logits(base())).abs().max() > 1e-2
    dynrank.save_adapter(model, tmp_path)
    assert_close(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), expected, rtol=0, atol=1e-5)
    assert_close(logits(dynrank.load_adapter(base(), tmp_path)), expected, rtol=0, atol=1e-5)


def test_merge_unpacks():
    model = adapted(base())
    expected = logits(model)
    merged = dynrank.merge(model)
    assert {type(p) for p in merged.parameters()} == {nn.Parameter}
    assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_weights_whose_inputs_are_rounded_too_keep_their_own_forward_and_are_not_merged():
    settings = torchao.Int8DynamicActivationInt8WeightConfig()
    plain, model = base(settings), adapted(base(settings)).train()
    layer = dict(dynrank.lora_layers(model))["model.layers.0.mlp.up_proj"]
    x = torch.randn(2, 3, 64)
    expected = plain.model.layers[0].mlp.up_proj(x) + 1.5 * x @ layer.lora_A.T @ layer.lora_B.T
    assert_close(layer(x), expected)
    with pytest.raises(ConfigurationError, match="rounds its inputs as well as its weight"):
        dynrank.merge(model)


def test_a_checkpoint_without_the_base_knows_it_again(tmp_path, regression):
    class Finetune(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = adapted(base()).train()

        def training_step(self, batch, _):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    data = torch.utils.data.DataLoader(torch.randint(20, (8, 6)), batch_size=4)
    saver = AdapterCheckpoint(tmp_path, save_last=True)
    regression[2](max_steps=2, callbacks=[saver], enable_checkpointing=True).fit(module := Finetune(), data)
    names = torch.load(saver.last_model_path)["state_dict"].keys()
    assert not [name for name in names if name.endswith("base.weight")]
    other = Finetune()
    other.load_state_dict(torch.load(saver.last_model_path)["state_dict"])
    assert torch.equal(logits(other.model.eval()), logits(module.model.eval()))
