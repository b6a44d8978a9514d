import json
import socket
from importlib.util import find_spec

import pytest
from transformers import AutoModelForSequenceClassification, LlamaConfig

from dynrank.errors import ConfigurationError
from dynrank.models import names, pretrained
from dynrank.models.pretrained import load_causal_lm, load_classifier, load_tokenizer, read_config


def test_gguf_file_without_its_package_says_how_to_install_it(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install gguf"):
        load_causal_lm(str(tmp_path / "model.gguf"))


@pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf")
@pytest.mark.parametrize("content", [b"", b"GGUF"])
def test_gguf_file_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"model.*model\.gguf"):
        load_tokenizer(str(tmp_path / "model.gguf"))


def test_encoder_is_no_causal_language_model():
    with pytest.raises(ConfigurationError, match="no causal language model"):
        load_causal_lm("minilm")


LOADERS = {
    "tokenizer": load_tokenizer,
    "classifier": lambda name, key: load_classifier(name, 3, key),
    "classifier on meta": lambda name, key: load_classifier(name, 3, key, on_meta=True),
    "causal lm": load_causal_lm,
    "causal lm on meta": lambda name, key: load_causal_lm(name, key, on_meta=True),
    "config": read_config,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_folder_without_a_model_is_refused_by_its_key(loader, tmp_path):
    with pytest.raises(ConfigurationError, match=f"--base={tmp_path}"):
        LOADERS[loader](str(tmp_path), "--base")


@pytest.mark.parametrize("loader", ["tokenizer", "classifier", "causal lm"])
def test_config_that_ships_has_no_weights(loader):
    assert read_config("llama-2-7b").hidden_size == 4096
    with pytest.raises(ConfigurationError, match="--base=llama-2-7b is a config without weights"):
        LOADERS[loader]("llama-2-7b", "--base")


@pytest.mark.parametrize("loader", LOADERS)
def test_code_in_a_folder_is_not_run(loader, tmp_path):
    classes = ["AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification"]
    places = {name: "code.Own" for name in classes} | {"AutoTokenizer": ["code.Own", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": places}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": places}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ConfigurationError, match=f"--base={tmp_path}") as caught:
        LOADERS[loader](str(tmp_path), "--base")
    # No command takes this argument, so the message may not ask for it.
    assert "trust_remote_code" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_name_on_the_hub_is_refused_at_once_where_there_is_no_network(loader, monkeypatch):
    def nowhere(*_):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(names, "getproxies", dict)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it is tried again"))
    names.hub_is_known.cache_clear()
    try:
        with pytest.raises(ConfigurationError, match="--base=nobody/nothing is not in the cache, and http"):
            LOADERS[loader]("nobody/nothing", "--base")
    finally:
        names.hub_is_known.cache_clear()


def test_body_that_does_not_fit_its_config_is_refused(tmp_path):
    tokenizer = load_tokenizer("minilm")
    tokenizer.save_pretrained(tmp_path)
    size = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
    made = AutoModelForSequenceClassification.from_config(LlamaConfig(vocab_size=len(tokenizer), **size))
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ConfigurationError, match=r"mlp.*model.*do not fit"):
        load_classifier(str(tmp_path), 3)
