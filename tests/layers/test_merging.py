"""Dissolving LoRA layers into plain ones, tied weights included."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from trained import updated
from transformers import GPT2Config, GPT2LMHeadModel

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.layers.base import LoRALayer

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def gpt2():
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16, **ids)).eval()


def test_add_lora_leaves_a_tied_head_tied_and_the_embedding_as_it_is():
    model = gpt2()
    embedded = model.transformer.wte(IDS)
    updated(dynrank.add_lora(model, rank=2, target_modules=["lm_head"]), 0.3)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.transformer.wte(IDS), embedded)


@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["lm_head", "wte", "c_attn", "c_proj", "c_fc"]])
def test_merge_unties_an_adapted_head_and_keeps_the_logits(targets, tmp_path):
    model = dynrank.add_lora(gpt2(), rank=2, target_modules=targets)
    logits = updated(model, 0.3)(IDS).logits
    assert dynrank.merge(model) is model
    assert not any(isinstance(module, LoRALayer) for module in model.modules())
    assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_merge_leaves_the_tie_of_a_model_whose_head_is_not_adapted():
    model = dynrank.add_lora(gpt2(), rank=2, target_modules="all-linear")
    dynrank.merge(updated(model, 0.3))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings is True


def test_merge_restores_the_module_tree():
    torch.manual_seed(0)
    net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8)), "head": nn.Linear(8, 4)})
    names = [(name, type(module)) for name, module in net.named_modules()]
    updated(dynrank.add_lora(net, rank=2))
    x = torch.randn(3, 6)
    y = net["head"](net["body"](x))
    dynrank.merge(net)
    assert [(name, type(module)) for name, module in net.named_modules()] == names
    assert_close(net["head"](net["body"](x)), y)
    with pytest.raises(ConfigurationError, match="no LoRA layers"):
        dynrank.merge(net)


def test_an_interrupted_merge_counts_no_update_twice(monkeypatch):
    net = updated(dynrank.add_lora(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), rank=2))
    x = torch.randn(3, 6)
    y = net(x)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(net[1], "merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dynrank.merge(net)
    assert_close(net(x), y)
