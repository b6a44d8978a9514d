"""Models in GGUF files: the tiny Llama, written here as llama.cpp's converter would."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import dynrank
from dynrank.adapters.merging import merge_adapter
from dynrank.models.pretrained import load_causal_lm, load_tokenizer

gguf = pytest.importorskip("gguf")

# These are the sizes of `tiny_llama`.
HEADS, WIDTH, LAYERS, VOCABULARY = 2, 32, 2, 600
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
NAMES |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
NAMES |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return LlamaForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture(scope="module")
def file(llama, tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config, state = llama.config, {name: p.detach().numpy() for name, p in llama.named_parameters()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    made = json.loads((tiny_llama / "tokenizer.json").read_text())["model"]
    tokens = sorted(made["vocab"], key=made["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens + [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in made["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    for layer in range(LAYERS):
        for theirs, ours in NAMES.items():
            value = state[f"model.layers.{layer}.{theirs}.weight"]
            # llama.cpp interleaves the halves that a rotation turns.
            if ours in ("attn_q", "attn_k"):
                value = value.reshape(HEADS, 2, WIDTH // HEADS // 2, WIDTH).swapaxes(1, 2).reshape(value.shape)
            writer.add_tensor(f"blk.{layer}.{ours}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


IDS = torch.arange(5, 17)[None]


def test_model_of_the_file_is_the_model_and_has_the_same_layers_on_meta(llama, file):
    loaded = load_causal_lm(file).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(input_ids=IDS).logits, llama(input_ids=IDS).logits)
    shapes = {name: parameter.shape for name, parameter in llama.named_parameters()}
    meta = load_causal_lm(file, on_meta=True)
    assert {name: parameter.shape for name, parameter in meta.named_parameters()} == shapes
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}


def test_tokenizer_of_the_file_gives_text_back(file):
    tokenizer = load_tokenizer(file)
    ids = tokenizer("the model\n    of the file")["input_ids"]
    assert tokenizer.decode(ids) == "the model\n    of the file"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0)


def test_adapter_is_merged_into_the_model_of_the_file(file, tmp_path):
    model = dynrank.add_lora(load_causal_lm(file), rank=4, alpha=8)
    for _, layer in dynrank.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    dynrank.save_adapter(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", file, tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected = model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, atol=1e-3, rtol=1e-4)
    assert load_tokenizer(str(tmp_path / "merged"))("the model")["input_ids"]
