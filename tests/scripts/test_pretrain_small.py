"""Pre-training in miniature: the folder it leaves, and going on where it was interrupted."""

import re
from pathlib import Path

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.pytorch_utils import Conv1D

from dynrank.models.pretrained import load_causal_lm, load_tokenizer

SIZE = ["--steps", "6", "--characters", "40000", "--batch", "4", "--length", "32", "--width", "64"]
SIZE += ["--layers", "2", "--vocabulary", "600"]
# Each has a module of the last block, its class and the shapes of its weights.
TELLING = {
    "gpt2": ("transformer.h.1.attn.c_attn", Conv1D, [(64, 192), (192,)]),
    "bloom": ("transformer.h.1.self_attention.query_key_value", torch.nn.Linear, [(192, 64), (192,)]),
    "llama": ("model.layers.1.mlp.up_proj", torch.nn.Linear, [(170, 64)]),
    "qwen3_moe": ("model.layers.1.mlp.experts", Qwen3MoeExperts, [(8, 128, 64), (8, 64, 64)]),
}


@pytest.mark.parametrize("architecture", TELLING)
def test_pretrained_folder_is_a_model_for_tasks_and_interrupted_it_is_the_same(
    script, main, architecture, monkeypatch, tmp_path
):
    def launch(name):
        return main("pretrain_small", "--architecture", architecture, "--out", tmp_path / name, *SIZE)

    pretraining = script("pretrain_small")
    monkeypatch.setattr(pretraining, "KEEP_EVERY", 2)
    monkeypatch.setattr(pretraining, "PACKAGES", ("torchmetrics",))
    losses = re.findall(r"held out (.*?),", launch("whole"))
    assert float(losses[-1]) < float(losses[0])

    save = torch.save

    def interrupt(values, file):
        save(values, file)
        if values["step"] == 4:
            Path(file).rename(tmp_path / "part" / "pretraining.pt")
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        launch("part")
    monkeypatch.setattr(torch, "save", save)
    assert "goes on at step 4" in launch("part")

    whole, part = (load_causal_lm(str(tmp_path / name)) for name in ("whole", "part"))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), part.parameters(), strict=True))
    name, kind, shapes = TELLING[architecture]
    assert type(whole.get_submodule(name)) is kind
    assert [tuple(p.shape) for p in whole.get_submodule(name).parameters()] == shapes
    assert whole.lm_head.weight is whole.get_input_embeddings().weight
    tokenizer = load_tokenizer(str(tmp_path / "whole"))
    text = "Returns a tensor, if any: naïve."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == whole.config.eos_token_id == 0
    assert not list((tmp_path / "part").glob("pretraining*"))
