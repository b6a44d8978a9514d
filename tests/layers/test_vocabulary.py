"""Which embeddings belong to an adapter because tokens were added to the base."""

import shutil

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from dynrank.app.models.pretrained import load_causal_lm
from dynrank.layers.vocabulary import extended_embeddings


class Around(nn.Module):
    """A user's model around one of transformers."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.head = nn.Linear(8, 2)


@pytest.fixture
def made(zoo, tmp_path):
    """A function: a Llama from its files, with so many tokens."""
    zoo.plain("llama").save_pretrained(tmp_path / "base")

    def make(tokens):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        if tokens != 20:
            model.resize_token_embeddings(tokens)
        return model

    return make


@pytest.mark.parametrize("tokens", [17, 20, 23])
def test_embeddings_are_extended_if_the_base_has_fewer_tokens_in_its_files(tokens, made):
    model = made(tokens)
    both = [model.model.embed_tokens, model.lm_head] if tokens > 20 else []
    for root in (model, Around(model), torch.compile(model)):
        assert [id(module) for module in extended_embeddings(root)] == [id(module) for module in both]


def test_models_without_tokens_or_files_have_none(zoo):
    for kind in ("llama", "conv"):
        assert extended_embeddings(zoo.plain(kind)) == []


def test_a_base_whose_files_are_not_found_is_said_to_be_taken_as_it_is(made, tmp_path):
    model = made(23)
    shutil.rmtree(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"base '.*base' is no folder .* taken for unchanged"):
        assert extended_embeddings(model) == []


def test_a_model_of_a_short_name_knows_its_tokens_without_its_files(tiny_llama):
    """A run names the base as others know it, which need not be a place on this machine."""
    model = load_causal_lm(str(tiny_llama))
    model.config.name_or_path = "org/elsewhere"
    assert extended_embeddings(model) == []
    model.resize_token_embeddings(603)
    assert len(extended_embeddings(model)) == 2
