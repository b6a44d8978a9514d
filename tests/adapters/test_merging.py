"""Merged models: equal to the adapted ones in float64, to PEFT's merge, and to themselves when loaded from disk."""

import copy
import json
import sys

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import dynrank
from dynrank.adapters.merging import merge_adapter
from dynrank.commands import cli
from dynrank.errors import ConfigurationError
from dynrank.layers.kinds import layer_class

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (True|False):UserWarning")

TINY = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = BertConfig(**TINY, **SIZES, num_labels=3)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Linear(6, 4)

    def forward(self, image):
        return self.head(self.stem(image).relu().mean((2, 3)))


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY, **SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**TINY, n_embd=8, n_layer=2, n_head=2, n_positions=16)),
    "bert": lambda: BertForSequenceClassification(BERT),
    "conv": ConvNet,
}


def plain(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval()


@torch.no_grad()
def outputs(model):
    if isinstance(model, PeftModel):
        model = model.base_model.model
    if isinstance(model, ConvNet):
        return model(torch.ones(1, 3, 6, 6, dtype=model.head.weight.dtype).cumsum(3))
    return model(input_ids=IDS).logits


def adapted(model, **options):
    options = {"rank": 3, "alpha": 5, "rslora": True} | options
    model = dynrank.add_lora(model, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.eval()


def everything(model, tied=True):
    left_out = ("token_type_embeddings", *(() if tied else ("lm_head", "wte")))
    return [n for n, m in model.named_modules() if layer_class(m) and not n.endswith(left_out)]


@pytest.mark.parametrize("kind", MODELS)
def test_merge_equals_the_adapted_model_to_rounding_in_float64(kind):
    base = plain(kind).double()
    model = adapted(copy.deepcopy(base), target_modules=everything(base), dtype=torch.float64)
    expected = outputs(model)
    assert_close(outputs(dynrank.merge(model)), expected, rtol=1e-12, atol=1e-12)
    assert (expected - outputs(base)).abs().max() > 1e-2
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", MODELS)
def test_merge_equals_that_of_peft(kind, tmp_path):
    base = plain(kind).double()
    # PEFT's merge changes both ends of a tied weight
    model = adapted(copy.deepcopy(base), target_modules=everything(base, tied=False), dtype=torch.float64)
    dynrank.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    theirs = theirs.double().merge_and_unload().state_dict()
    ours = dynrank.merge(model).state_dict()
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert_close(value, theirs[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_merge_keeps_the_dtype_and_rounds_once(dtype):
    base = plain("llama").to(dtype)
    model = adapted(copy.deepcopy(base))
    updates = {
        name: layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        for name, layer in dynrank.lora_layers(model)
    }
    dynrank.merge(model)
    for name, update in updates.items():
        exact = base.get_submodule(name).weight.double() + update
        found = model.get_submodule(name).weight
        assert found.dtype == dtype
        half_step = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
        # the sum is made in float32, with a few of its roundings
        assert ((found.double() - exact).abs() <= half_step + 4e-7 * exact.abs().max()).all()


def test_merge_of_a_layer_that_was_merged_by_itself_still_unties(tmp_path):
    model = adapted(plain("gpt2"), target_modules=["lm_head"])
    expected = outputs(model)
    model.lm_head.merge()
    dynrank.merge(model).save_pretrained(tmp_path)
    assert_close(outputs(GPT2LMHeadModel.from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def stored(tmp_path):
    """(folder of a GPT-2, folder of an adapter for it, what it computes then); its tied head is adapted, too."""
    plain("gpt2").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"model_max_length": 16}')
    model = adapted(plain("gpt2"), target_modules=["c_attn", "lm_head", "wte"], rank_map={"wte": 5})
    dynrank.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "model", tmp_path / "adapter", outputs(model)


def test_command_writes_a_plain_model(stored, run_command, tmp_path):
    model, adapter, expected = stored
    done = run_command("dynrank", "merge", "adapter", "--model", model, "--out", "merged", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "4 layers into GPT2LMHeadModel, float32" in done.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text()) == {"model_max_length": 16}
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_adapter_keeps_the_dtype_of_the_files(stored, dtype, tmp_path):
    model, adapter, _ = stored
    GPT2LMHeadModel.from_pretrained(model, dtype=dtype).save_pretrained(model)
    assert merge_adapter(adapter, str(model), tmp_path / "merged").dtype == dtype
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {dtype}


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize(
    ("cls", "named"),
    # the second has a head of the same shapes: only the name tells them apart
    [(BertForSequenceClassification, True), (BertForSequenceClassification, False), (BertForTokenClassification, True)],
)
def test_merge_adapter_finds_the_class_and_takes_the_head_from_the_adapter(cls, labels, named, tmp_path):
    """An encoder stored by itself, trained with a head that is in the adapter only."""
    torch.manual_seed(0)
    BertModel(BERT).save_pretrained(tmp_path / "model")
    model = cls.from_pretrained(tmp_path / "model", num_labels=labels).eval()
    names = [f"encoder.layer.{index}.attention.self.query" for index in (0, 1)]
    adapted(model, target_modules=[f"bert.{name}" for name in names], modules_to_save=["classifier"])
    dynrank.save_adapter(model, tmp_path / "adapter")
    if not named:
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_mapping": None}))
    assert merge_adapter(tmp_path / "adapter", str(tmp_path / "model"), tmp_path / "out").kind == cls.__name__
    merged = cls.from_pretrained(tmp_path / "out").eval()
    assert_close(outputs(merged), outputs(model), rtol=1e-4, atol=1e-5)


def test_merge_adapter_refuses_a_head_that_no_file_holds(tmp_path):
    BertModel(BERT).save_pretrained(tmp_path / "model")
    dynrank.save_adapter(adapted(plain("bert"), target_modules=["query"]), tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=r"BertForSequenceClassification would have no weights \['classifier"):
        merge_adapter(tmp_path / "adapter", str(tmp_path / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs the command in this process; the message, after a check of the exit code and that nothing was written."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        monkeypatch.setattr(sys, "argv", ["dynrank", "merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert "Traceback" not in error
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return error

    return call


def test_command_refuses_what_it_cannot_use(stored, refused, tmp_path):
    model, adapter, _ = stored
    plain("llama").save_pretrained(tmp_path / "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("of mine")
    (tmp_path / "empty").mkdir()
    assert "--out must be a new or empty folder" in refused("adapter", "--model", model, "--out", "full")
    assert "--out must be another folder" in refused("adapter", "--model", model, "--out", "adapter")
    assert "--out must be another folder" in refused("adapter", "--model", model, "--out", "model")
    error = refused("adapter", "--model", "llama", "--out", "out")
    assert "--model" in error
    assert "LlamaForCausalLM has no module 'transformer." in error
    assert "cannot load --model" in refused("adapter", "--model", "empty", "--out", "out")
    assert "--model must be a folder" in refused("adapter", "--model", "./absent", "--out", "out")
    assert "cannot read the adapter" in refused("absent", "--model", model, "--out", "out")
    assert "--out" in refused("adapter", "--model", model)
    (model / "model.safetensors").write_bytes(b"no model")
    assert "cannot load --model" in refused("adapter", "--model", model, "--out", "out")


def test_command_runs_no_code_of_the_model(stored, refused, tmp_path):
    model, _, _ = stored
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text("open('ran', 'w')\nclass Config: pass\n")
    assert "cannot load --model" in refused("adapter", "--model", model, "--out", "out")


def test_merge_adapter_that_cannot_write_leaves_nothing(stored, monkeypatch, tmp_path):
    model, adapter, _ = stored

    def full(*_, **__):
        (tmp_path / ".out.part" / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", full)
    with pytest.raises(ConfigurationError, match="cannot write to --out .*No space left"):
        merge_adapter(adapter, str(model), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter"}
