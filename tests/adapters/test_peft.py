"""PEFT as an outside judge: what one can do with an adapter of PEFT is done with ours, on many architectures."""

import copy
import re

import pytest
import torch
import transformers as hf
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from torch.testing import assert_close

import dynrank
from dynrank.layers.kinds import layer_class

TOKENS = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
DEEP = {**TOKENS, **SIZES, "intermediate_size": 12}
ARCHITECTURES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DEEP, num_key_value_heads=1)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**TOKENS, n_embd=8, n_layer=2, n_head=2, n_positions=16)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**TOKENS, hidden_size=8, n_layer=2, n_head=2)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**TOKENS, **SIZES, ffn_dim=12, max_position_embeddings=16, word_embed_proj_dim=6)
    ),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**DEEP, num_labels=4)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=24, d_model=8, d_kv=2, d_ff=12, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**SIZES, intermediate_size=12, image_size=8, patch_size=4, num_labels=4)
    ),
}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def targets(model):
    """Every layer that can have LoRA, but for T5's shared embedding, which PEFT adapts in one of its places only."""
    return [n for n, m in model.named_modules() if layer_class(m) and not n.endswith(("shared", "embed_tokens.shared"))]


def logits(model):
    with torch.no_grad():
        if model.config.model_type == "vit":
            return model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))).logits
        extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        return model(input_ids=IDS, **extra).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapter_of_mixed_ranks_has_equal_logits_in_peft_and_comes_back(architecture, zoo, tmp_path):
    torch.manual_seed(0)
    base = ARCHITECTURES[architecture]().eval()
    names = targets(base)
    rules = dict.fromkeys(names[::3], {"rank": 1, "alpha": 7}) | dict.fromkeys(names[1::3], 4)
    # This embedding has two rows, so no update has a higher rank.
    rules |= {n: 2 for n in names if "token_type" in n}
    options = {"rslora": True, "rank_map": rules}
    expression = "|".join(map(re.escape, names))
    ours = zoo.trained(dynrank.add_lora(copy.deepcopy(base), rank=3, alpha=5, target_modules=expression, **options))
    dynrank.save_adapter(ours, tmp_path)
    expected = logits(ours)
    assert (expected - logits(base)).abs().max() > 1e-2
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert (logits(theirs) - expected).abs().max() <= 1e-5
    back = dynrank.load_adapter(copy.deepcopy(base), tmp_path)
    assert (logits(back) - expected).abs().max() <= 1e-5
    found = dict(dynrank.lora_layers(back))
    layers = dict(dynrank.lora_layers(ours))
    assert {n: x.rank for n, x in found.items()} == {n: x.rank for n, x in layers.items()}
    assert all(found[n].scaling == pytest.approx(x.scaling, rel=1e-15) for n, x in layers.items())
    assert all(torch.equal(found[n].lora_A, x.lora_A) for n, x in layers.items())
    assert all(torch.equal(found[n].lora_B, x.lora_B) for n, x in layers.items())


@pytest.mark.parametrize("kind", ["bert", "conv"])
def test_heads_and_fractional_alphas_after_a_resize_have_equal_outputs_in_peft(kind, zoo, tmp_path):
    model = zoo.adapted(kind, rslora=True)
    names = [name for name, _ in dynrank.lora_layers(model)]
    dynrank.resize(model, {names[0]: 1, names[-1]: 4}, optimizers=())
    # A growth leaves columns of zeros, which would not show a wrong alpha.
    zoo.trained(model)
    dynrank.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(zoo.plain(kind), tmp_path).eval()
    close(zoo.outputs(theirs), zoo.outputs(model))
    close(zoo.outputs(dynrank.load_adapter(zoo.plain(kind), tmp_path)), zoo.outputs(model))


# --- what PEFT's documentation says one can do with an adapter


def close(got, expected):
    assert_close(got, expected, rtol=0, atol=1e-5)


def test_auto_class_finds_the_base_by_the_name_in_our_config(zoo, tmp_path):
    zoo.plain("llama").save_pretrained(tmp_path / "base")
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    ours = zoo.adapted("llama", base=base)
    dynrank.save_adapter(ours, tmp_path / "adapter")
    close(zoo.outputs(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), zoo.outputs(ours))


def test_hotswap_between_adapters_of_unlike_ranks(zoo, tmp_path):
    """Padded, where ranks are mixed: PEFT's hot swap finds no layer in the patterns, and scales by the global alpha."""
    mixed = zoo.adapted("llama", rank=5, alpha=4, rank_map={"v_proj": {"rank": 2, "alpha": 9}}, rslora=True)
    dynrank.resize(mixed, {"model.layers.0.self_attn.q_proj": 1, "model.layers.1.mlp.down_proj": 3}, optimizers=())
    dynrank.save_adapter(mixed, tmp_path / "mixed")
    dynrank.export_adapter(tmp_path / "mixed", tmp_path / "padded", to="padded")
    wide = zoo.adapted("llama", 3, rank=7)
    narrow = zoo.adapted("llama", 4, rank=1, alpha=6)
    dynrank.save_adapter(wide, tmp_path / "wide")
    dynrank.save_adapter(narrow, tmp_path / "narrow")
    theirs = PeftModel.from_pretrained(zoo.plain("llama"), tmp_path / "wide").eval()
    for folder, ours in (("narrow", narrow), ("padded", mixed), ("wide", wide), ("padded", mixed)):
        hotswap_adapter(theirs, str(tmp_path / folder), adapter_name="default", torch_device="cpu")
        close(zoo.outputs(theirs), zoo.outputs(ours))
        close(zoo.outputs(dynrank.swap_adapter(zoo.plain("llama"), tmp_path / folder)), zoo.outputs(ours))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_model_of_inject_adapter_in_model_is_saved_for_peft(dtype, zoo, tmp_path):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    plain = copy.deepcopy(base)
    config = LoraConfig(r=5, target_modules=["0"], modules_to_save=["2"], init_lora_weights=False)
    ours = inject_adapter_in_model(config, base, adapter_name="mine")
    dynrank.resize(ours, 3, optimizers=())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    dynrank.save_adapter(ours, tmp_path, dtype=dtype)
    x = torch.randn(2, 4)
    theirs = PeftModel.from_pretrained(plain, tmp_path)
    assert_close(theirs(x), ours(x), rtol=0 if dtype is None else 2e-2, atol=0 if dtype is None else 2e-2)
    # The config of the model that trains on is not that of a stored adapter.
    assert not config.inference_mode
    assert config.base_model_name_or_path is None
    with pytest.raises(dynrank.ConfigurationError, match="inject_adapter_in_model returned, got a Sequential"):
        dynrank.save_adapter(torch.nn.Sequential(ours), tmp_path)
