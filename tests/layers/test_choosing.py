"""The presets against PEFT's all-linear on the same models; what is named wrongly is refused."""

import pytest
import torch
import transformers as hf
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn
from torch.nn.utils import prune

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.layers.choosing import target_names

TINY = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = hf.LlamaConfig(**TINY, **ENCODER)
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(LLAMA),
    "llama-classification": lambda: hf.LlamaForSequenceClassification(LLAMA),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**TINY, n_embd=8, n_layer=2, n_head=2, n_positions=16)),
    "bert-classification": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TINY, **ENCODER, num_labels=3)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**TINY, **T5)),
}
# By each model's own code: the linear layers within its attention blocks.
ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"c_attn", "attn.c_proj"},
    "bert-classification": {"query", "key", "value", "attention.output.dense"},
    "t5": {"q", "k", "v", "o"},
}


@pytest.fixture(scope="module")
def llama():
    return MODELS["llama"]()


@pytest.mark.parametrize("kind", MODELS)
def test_target_names_all_linear_selects_what_peft_selects(kind):
    model = MODELS[kind]()
    task = TaskType.SEQ_CLS if "classification" in kind else None
    config = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear", task_type=task), model)
    names = target_names(model, "all-linear")
    assert set(names) == set(config.target_modules)
    assert names == [name for name, _ in model.named_modules() if name in set(names)]


@pytest.mark.parametrize("kind", ATTENTION)
def test_target_names_attention_selects_the_linear_layers_of_attention(kind):
    model = MODELS[kind]()
    expected = {name for name, _ in model.named_modules() if any(name.endswith(f".{end}") for end in ATTENTION[kind])}
    assert set(target_names(model, "attention")) == expected


def test_target_names_attention_looks_at_the_modules_above_and_not_at_the_layer():
    model = nn.ModuleDict({"attention_head": nn.Linear(4, 4), "cross_attn": nn.ModuleDict({"mix": nn.Linear(4, 4)})})
    assert target_names(model, "attention") == ["cross_attn.mix"]


def test_target_names_takes_a_preset_within_a_list(llama):
    linear = target_names(llama, "all-linear")
    assert target_names(llama, ["all-linear", "lm_head", "q_proj"]) == [*linear, "lm_head"]
    assert target_names(llama, ["attention", "all-linear"]) == linear
    with pytest.raises(ConfigurationError, match="no layer matches 'attention'"):
        target_names(nn.ModuleDict({"first": nn.Linear(4, 4)}), ["first", "attention"])


def test_target_names_list_matches_whole_trailing_parts_and_regex_whole_names(llama):
    queries = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert target_names(llama, ("self_attn.q_proj", "lm_head")) == [*queries, "lm_head"]
    up_and_gate = [f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "up")]
    assert target_names(llama, r".*\.1\..*(gate|up)_proj") == up_and_gate


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "qproj"], r"'qproj'.*nearest: .*'q_proj'"),
        # No name is near, so the message lists all there are.
        (["query", "value"], r"'query'.*nearest: .*'q_proj'"),
        # Only whole parts of a name match.
        (["proj"], "'proj'"),
        # A string is an expression, which has to match the whole name.
        ("q_proj", "no layer matches"),
        ("(", r"target_modules.*'\('"),
        ([], "no layer matches"),
        (["self_attn"], "self_attn.*LlamaAttention is no plain"),
    ],
)
def test_target_names_refuses_what_matches_nothing_or_cannot_have_lora(llama, targets, message):
    with pytest.raises(ConfigurationError, match=message):
        target_names(llama, targets)


def test_children_with_bypassed_forward_are_skipped_or_refused_by_name():
    fused = {"attention": nn.MultiheadAttention(8, 2), "layer": nn.TransformerEncoderLayer(8, 2, 16)}
    model = nn.ModuleDict({**fused, "plain": nn.Linear(8, 8)})
    assert target_names(model, "all-linear") == ["plain"]
    for name in ("attention.out_proj", "layer.linear1", "layer.self_attn.out_proj"):
        with pytest.raises(ConfigurationError, match=f"'{name}' cannot have LoRA: its parent reads the weight"):
            target_names(model, [name])
    with pytest.raises(ConfigurationError, match="its parent reads the weight"):
        target_names(fused["layer"], r"self_attn\.out_proj")


def test_every_layer_of_wavlm_that_gets_lora_gets_gradients():
    """Its attention passes the weights of its layers to a function of torch."""
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    config = hf.WavLMConfig(**TINY, **ENCODER, **convolutions, **positions, classifier_proj_size=8)
    model = hf.WavLMForSequenceClassification(config)
    with pytest.raises(ConfigurationError, match="q_proj' cannot have LoRA: its parent reads the weight past"):
        target_names(model, ["q_proj"])
    dynrank.add_lora(model, rank=2)
    model(torch.randn(2, 400), labels=torch.tensor([0, 1])).loss.backward()
    names = [name.rpartition(".")[2] for name, layer in dynrank.lora_layers(model) if layer.lora_B.grad is not None]
    assert len(names) == len([*dynrank.lora_layers(model)])
    assert {"intermediate_dense", "output_dense", "gru_rel_pos_linear"} <= {*names}


class OwnForward(nn.Linear):
    def forward(self, x):
        return torch.relu(super().forward(x))


@pytest.mark.parametrize("make", [OwnForward, lambda *size: prune.identity(nn.Linear(*size), "weight")])
def test_target_names_refuses_a_layer_with_a_forward_or_a_computed_weight_of_its_own(make):
    model = nn.ModuleDict({"own": make(4, 4), "plain": nn.Linear(4, 4)})
    with pytest.raises(ConfigurationError, match="'own' cannot have LoRA: .*Linear, .*, or computes its weight"):
        target_names(model, ["own"])
    with pytest.warns(UserWarning, match="50% of the model stays frozen: 1 layers other than .*, such as 'own'"):
        assert target_names(model, "all-linear") == ["plain"]
