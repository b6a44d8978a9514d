"""Models in GGUF files: the tiny Llama, written here as llama.cpp's converter would."""

import json

import pytest
import torch
from gguf_files import write_gguf
from transformers import LlamaForCausalLM

import dynrank
from dynrank.app.models.merging import merge_adapter
from dynrank.app.models.names import ModelSettings
from dynrank.app.models.pretrained import load_causal_lm, load_tokenizer
from dynrank.errors import ConfigurationError


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return LlamaForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture(scope="module")
def file(llama, tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    made = json.loads((tiny_llama / "tokenizer.json").read_text())["model"]
    tokens = sorted(made["vocab"], key=made["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(llama.config.vocab_size - len(tokens))]
    write_gguf(path, llama, tokens, [" ".join(pair) if isinstance(pair, list) else pair for pair in made["merges"]])
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
    with pytest.raises(ConfigurationError, match="is a GGUF file, .*; set model.quantization=none"):
        load_causal_lm(file, settings=ModelSettings(quantization="nf4"))


def test_adapter_is_merged_into_the_model_of_the_file(file, tmp_path):
    model = dynrank.add_lora(load_causal_lm(file), rank=4, alpha=8)
    for _, layer in dynrank.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    dynrank.save_adapter(model, tmp_path / "adapter")
    # The adapter names the file, not its folder.
    merge_adapter(tmp_path / "adapter", None, tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected = model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, atol=1e-3, rtol=1e-4)
    # The tokenizer of the file is written beside it.
    tokenizers = [load_tokenizer(place) for place in (file, str(tmp_path / "merged"))]
    ids, written = (tokenizer("the model\n    of the file")["input_ids"] for tokenizer in tokenizers)
    assert ids == written
    assert tokenizers[0].decode(ids) == "the model\n    of the file"
