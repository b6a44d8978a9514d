"""The real llama.cpp as a judge: it computes with an exported adapter what PEFT does."""

import pytest
import torch
import transformers as hf
import xllamacpp
from gguf_files import write_gguf
from peft import PeftModel

import dynrank
from dynrank.adapters.squeeze import squeeze

IDS = [[3, 17, 20, 41, 9], [5, 1, 33, 7, 30, 2]]
SIZES = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
SIZES |= {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0}
KINDS = {"llama": (hf.LlamaConfig, hf.LlamaForCausalLM), "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM)}


def answers(base, adapter=None):
    """Logarithms of the probabilities of the next token after each of ``IDS``, in float32 throughout."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.verbosity = -1
    params.warmup = False
    params.fit_params = False
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    rows = []
    for ids in IDS:
        said = server.handle_completions({"prompt": ids, "n_predict": 1, "n_probs": 1000, "temperature": 0.0})
        found = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        rows.append([of_token["logprob"] for of_token in sorted(found, key=lambda each: each["id"])])
    return torch.tensor(rows)


@torch.no_grad()
def by_torch(model):
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in IDS])


def plain(kind):
    torch.manual_seed(0)
    config, cls = KINDS[kind]
    return cls(config(**SIZES)).eval()


def adapted(zoo, model, targets):
    """Ranks 1 to 5 and alphas 3 to 7, other ones in every layer."""
    rules = {
        rf"layers\.{layer}\..*{name}": {"rank": 1 + (layer + place) % 5, "alpha": 3 + (2 * layer + place) % 5}
        for layer in range(2)
        for place, name in enumerate(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    }
    return zoo.trained(dynrank.add_lora(model, rank=2, alpha=8, target_modules=targets, rank_map=rules))


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_with_an_exported_adapter_what_peft_does(kind, zoo, tmp_path):
    model = plain(kind)
    base = tmp_path / "base.gguf"
    model.save_pretrained(tmp_path / "base")
    # The vocabulary is nonsense: what is asked are numbers of tokens.
    write_gguf(base, model, [f"t{number}" for number in range(48)], ["t 1"])
    assert (answers(base) - by_torch(model)).abs().max() < 1e-4
    layers = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    dynrank.save_adapter(adapted(zoo, plain(kind), layers), tmp_path / "adapter")
    expected = by_torch(PeftModel.from_pretrained(plain(kind), tmp_path / "adapter").eval())
    assert (by_torch(model) - expected).abs().max() > 1
    dynrank.export_adapter(tmp_path / "adapter", tmp_path / "ours.gguf", to="gguf", model=str(tmp_path / "base"))
    assert (answers(base, tmp_path / "ours.gguf") - expected).abs().max() < 1e-4
    # In bfloat16 llama.cpp also rounds the inputs of such a tensor.
    narrow = {"to": "gguf", "model": str(tmp_path / "base"), "dtype": torch.bfloat16}
    rounding = dynrank.export_adapter(tmp_path / "adapter", tmp_path / "half.gguf", **narrow).rounding
    assert 0.001 < rounding.whole < 0.004
    near = (answers(base, tmp_path / "half.gguf") - expected).abs().max()
    assert near < 0.03 * (by_torch(model) - expected).abs().max()
    assert (tmp_path / "half.gguf").stat().st_size < 0.6 * (tmp_path / "ours.gguf").stat().st_size
    # llama.cpp has no float8, so such an adapter becomes float32.
    squeeze(tmp_path / "adapter", tmp_path / "eighth", dtype=torch.float8_e4m3fn)
    rounded = by_torch(PeftModel.from_pretrained(plain(kind), tmp_path / "eighth").eval())
    dynrank.export_adapter(tmp_path / "eighth", tmp_path / "eighth.gguf", to="gguf", model=str(tmp_path / "base"))
    assert (answers(base, tmp_path / "eighth.gguf") - rounded).abs().max() < 1e-4
