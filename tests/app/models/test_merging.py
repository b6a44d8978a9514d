"""``dynrank merge``: files of plain models that compute what the adapted ones do; what no merge can be is refused."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from torch.testing import assert_close
from trained import updated
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2LMHeadModel,
)

import dynrank
from dynrank.app.commands import cli
from dynrank.app.models.merging import merge_adapter
from dynrank.app.models.names import ModelSettings
from dynrank.app.models.pretrained import load_causal_lm
from dynrank.errors import ConfigurationError

IN_FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def stored(zoo, tmp_path):
    """(folder of a GPT-2, folder of an adapter for it, what it computes then); its tied head is adapted, too."""
    zoo.plain("gpt2").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"model_max_length": 16}')
    model = zoo.adapted("gpt2", target_modules=["c_attn", "lm_head", "wte"], rank_map={"wte": 5})
    dynrank.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "model", tmp_path / "adapter", zoo.outputs(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_command_writes_a_plain_model_of_the_dtype_of_the_files(stored, dtype, launch, zoo, tmp_path):
    model, adapter, expected = stored
    GPT2LMHeadModel.from_pretrained(model, dtype=dtype).save_pretrained(model)
    code, printed, _ = launch(cli.main, "merge", adapter, "--model", model, "--out", tmp_path / "merged")
    assert code == 0
    assert f"GPT2LMHeadModel, {str(dtype).removeprefix('torch.')}" in printed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    if dtype == torch.float32:
        assert_close(zoo.outputs(merged), expected, **IN_FLOAT32)
    assert json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text()) == {"model_max_length": 16}


# The names of classes are the adapter's, or those of PEFT's task.
@pytest.mark.parametrize(
    ("cls", "changes", "labels"),
    [
        (BertForSequenceClassification, {}, 2),
        (BertForSequenceClassification, {"auto_mapping": None, "task_type": "SEQ_CLS"}, 3),
        (BertForTokenClassification, {"auto_mapping": None, "task_type": "TOKEN_CLS"}, 2),
    ],
)
def test_merge_adapter_finds_the_class_and_takes_the_head_from_the_adapter(cls, changes, labels, zoo, tmp_path):
    """An encoder stored by itself, trained with a head that is in the adapter only."""
    zoo.plain("bert").bert.save_pretrained(tmp_path / "model")
    base = cls.from_pretrained(tmp_path / "model", num_labels=labels).eval()
    names = [f"bert.encoder.layer.{index}.attention.self.query" for index in (0, 1)]
    model = zoo.adapted("bert", base=base, target_modules=names)
    dynrank.save_adapter(model, tmp_path / "adapter")
    zoo.edit_config(tmp_path / "adapter", **changes)
    merged = merge_adapter(tmp_path / "adapter", str(tmp_path / "model"), tmp_path / "out")
    assert type(merged).__name__ == cls.__name__
    assert_close(zoo.outputs(cls.from_pretrained(tmp_path / "out").eval()), zoo.outputs(model), **IN_FLOAT32)


IDS = torch.tensor([[3, 12, 4, 10, 5]])


def test_adapter_of_the_texts_part_of_a_model_for_images_is_merged_as_by_peft(tmp_path):
    """The class for texts has a part of the config in the base's folder."""
    qwen = pytest.importorskip("transformers.models.qwen3_5")
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2}
    linear = {f"linear_{name}": 2 if name.startswith("num") else 8 for name in (
        "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}  # fmt: skip
    text = {**sizes, **linear, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 4, "vocab_size": 50}
    config = qwen.Qwen3_5Config(text_config=text, vision_config={"depth": 1, "out_hidden_size": 32})
    base = tmp_path / "base"
    qwen.Qwen3_5ForConditionalGeneration(config).save_pretrained(base)
    model = updated(dynrank.add_lora(AutoModelForCausalLM.from_pretrained(base), rank=2)).eval()
    dynrank.save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    merge_adapter(tmp_path / "adapter", str(base), tmp_path / "merged")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert_close(merged(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


@pytest.fixture
def commits(tiny_llama, tmp_path, monkeypatch):
    """Folders of two commits of org/model in the hub's cache, without a network; the newer one has another head."""
    folders = [tmp_path / "models--org--model" / "snapshots" / (letter * 40) for letter in "ab"]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for folder in folders:
        shutil.copytree(tiny_llama, folder)
        model.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(f"of {folder.name[0]}")
        torch.nn.init.normal_(model.lm_head.weight)
    refs = tmp_path / "models--org--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("b" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folders


def test_the_base_of_an_adapter_is_of_the_commit_on_which_it_was_trained(commits, tmp_path):
    """Unless the user names the base; so is its tokenizer, which the merged model has."""
    model = load_causal_lm("org/model", settings=ModelSettings(revision="a" * 40))
    dynrank.save_adapter(dynrank.add_lora(model, rank=2, target_modules=["q_proj"]), tmp_path / "adapter")
    for given, folder in ((None, commits[0]), ("org/model", commits[1]), (str(commits[1]), commits[1])):
        out = tmp_path / f"out {given}".replace("/", " ")
        merged = merge_adapter(tmp_path / "adapter", given, out)
        assert torch.equal(merged.lm_head.weight, AutoModelForCausalLM.from_pretrained(folder).lm_head.weight)
        assert AutoTokenizer.from_pretrained(out).chat_template == f"of {folder.name[0]}"


def test_of_two_tokenizers_the_merged_model_has_the_adapter_s_alone(commits, tmp_path):
    """Of the files of both, transformers would read the base's special tokens, and its chat template."""
    model = AutoModelForCausalLM.from_pretrained(commits[0])
    dynrank.save_adapter(dynrank.add_lora(model, rank=2), tmp_path / "adapter")
    templates = {"default": "plain", "tool_use": "with tools"}
    tokenizer = AutoTokenizer.from_pretrained(commits[0], eos_token="the", chat_template=templates)
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", None, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("the", templates)


def test_a_head_that_no_file_holds_is_refused(zoo, tmp_path):
    zoo.plain("bert").bert.save_pretrained(tmp_path / "model")
    zoo.saved(tmp_path / "headless", "bert", target_modules=["query"], modules_to_save=())
    with pytest.raises(ConfigurationError, match=r"BertForSequenceClassification would have no weights \['classifier"):
        merge_adapter(tmp_path / "headless", str(tmp_path / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_refuses_what_it_cannot_use_runs_no_code_and_writes_nothing(stored, launch, zoo, tmp_path):
    model, _, _ = stored
    zoo.plain("llama").save_pretrained(tmp_path / "llama")
    for name in ("broken", "own", "linked"):
        shutil.copytree(model, tmp_path / name)
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no model")
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}}
    (tmp_path / "own" / "config.json").write_text(json.dumps(own))
    (tmp_path / "own" / "code.py").write_text("open('ran', 'w')\nclass Mine: pass\n")
    (tmp_path / "secret").write_text("of mine")
    (tmp_path / "linked" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    before = sorted(tmp_path.rglob("*"))
    for base, out, message in (
        ("model", "model", "out must be another folder than the one to read, got 'model' for both (--out)"),
        ("llama", "out", "was not trained on --model '"),
        ("./absent", "out", "--model"),
        ("broken", "out", "--model"),
        ("own", "out", "contains custom code"),
        ("linked", "out", "chat_template.jinja' must not be a link"),
    ):
        code, _, said = launch(cli.main, "merge", "adapter", "--model", base, "--out", out)
        assert (code, message in said) == (2, True), said
        assert sorted(tmp_path.rglob("*")) == before
