"""Adapters of every kind of model that people adapt: in PEFT with equal logits, and back again bit-equal."""

import copy
import re

import pytest
import torch
import transformers as hf
from peft import PeftModel
from torch import nn

import dynrank
from dynrank.layers.kinds import LAYERS, layer_class

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (True|False):UserWarning"),  # of every Conv1D
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # adapted tied heads
]

TOKENS = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**TOKENS, **SIZES, "intermediate_size": 12, "num_key_value_heads": 1}
BERT = {**TOKENS, **SIZES, "intermediate_size": 12}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA, head_dim=4)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA, head_dim=4)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**LLAMA, head_dim=4)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**TOKENS, n_embd=8, n_layer=2, n_head=2, n_positions=16)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**TOKENS, hidden_size=8, n_layer=2, n_head=2)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**TOKENS, **SIZES, ffn_dim=12, max_position_embeddings=16, word_embed_proj_dim=6)
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**TOKENS, **SIZES, intermediate_size=12)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=4)),
    "roberta": lambda: hf.RobertaForTokenClassification(hf.RobertaConfig(**BERT, num_labels=4)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=24, d_model=8, d_kv=2, d_ff=12, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**SIZES, intermediate_size=12, image_size=8, patch_size=4, num_labels=4)
    ),
}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(scope="module", params=MODELS)
def base(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def targets(model):
    """Every layer that can have LoRA, but for T5's shared embedding, which PEFT adapts in one of its places only."""
    return [n for n, m in model.named_modules() if layer_class(m) and not n.endswith(("shared", "embed_tokens.shared"))]


def logits(model):
    with torch.no_grad():
        if model.config.model_type == "vit":
            return model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))).logits
        extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        return model(input_ids=IDS, **extra).logits


@pytest.mark.parametrize(
    ("ranks", "layout"), [("uniform", "native"), ("mixed", "native"), ("rslora", "native"), ("mixed", "padded")]
)
def test_adapter_has_equal_logits_in_peft_and_comes_back(base, ranks, layout, tmp_path):
    names = targets(base)
    options = {"rslora": ranks == "rslora", "rank_map": {}}
    if ranks == "mixed":
        options["rank_map"] = dict.fromkeys(names[::3], {"rank": 1, "alpha": 7}) | dict.fromkeys(names[1::3], 4)
    options["rank_map"] |= {n: 2 for n in names if "token_type" in n}  # two rows: no update has a higher rank
    expression = "|".join(map(re.escape, names))
    ours = dynrank.add_lora(copy.deepcopy(base), rank=3, alpha=5, target_modules=expression, **options)
    torch.manual_seed(1)
    for _, layer in dynrank.lora_layers(ours):
        nn.init.normal_(layer.lora_B, std=0.3)
    dynrank.save_adapter(ours, tmp_path, layout=layout)
    expected = logits(ours)
    assert (expected - logits(base)).abs().max() > 1e-2
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert (logits(theirs) - expected).abs().max() <= 1e-5
    back = dynrank.load_adapter(copy.deepcopy(base), tmp_path)
    assert (logits(back) - expected).abs().max() <= 1e-5
    if layout == "native":
        found, layers = dict(dynrank.lora_layers(back)), dict(dynrank.lora_layers(ours))
        assert {n: x.rank for n, x in found.items()} == {n: x.rank for n, x in layers.items()}
        assert all(found[n].scaling == pytest.approx(x.scaling, rel=1e-15) for n, x in layers.items())
        assert all(torch.equal(found[n].lora_A, x.lora_A) for n, x in layers.items())
        assert all(torch.equal(found[n].lora_B, x.lora_B) for n, x in layers.items())


def test_every_kind_of_layer_is_among_them():
    kinds = {type(m) for make in MODELS.values() for m in make().modules()}
    assert {cls.supported for cls in LAYERS} <= kinds
