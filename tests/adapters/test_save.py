"""Adapters to and from PEFT itself, with equal logits; a file that cannot be used leaves the model as it was."""

import json
import os
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import dynrank
import dynrank.adapters.save
from dynrank.errors import ConfigurationError
from dynrank.layers.base import LoRALayer

pytestmark = [
    # PEFT says so of every Conv1D, and of a Linear beside one, and sets the flag itself.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (True|False):UserWarning"),
    # PEFT on an adapted lm_head that is tied, the case that is tested here.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    # PEFT saves the base weight of an adapted embedding along, and says so.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

TINY = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.point = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 5, 1, bias=False)
        self.head = nn.Linear(5, 4)

    def forward(self, image):
        return self.head(self.point(self.stem(image).relu()).mean((2, 3)))


GPT2 = GPT2Config(**TINY, n_embd=8, n_layer=2, n_head=2, n_positions=16)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY, **SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2),
    "bert": lambda: BertForSequenceClassification(BertConfig(**TINY, **SIZES, num_labels=3)),
    "conv": ConvNet,
}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "wte", "lm_head"],
    "bert": ["query", "value", "dense"],
    "conv": ["stem", "point"],
}
HEADS = {"bert": ["classifier"], "conv": ["head"]}


def plain(kind):
    """The same base model on every call."""
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def outputs(model, kind):
    with torch.no_grad():
        if kind == "conv":
            return model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)))
        return model(IDS).logits


def randomize(model, std=0.3):
    """Trained: factors and heads are no longer what they were made as."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    return model.eval()


def adapted(kind, rank=3, alpha=5, **options):
    options |= {"target_modules": TARGETS[kind], "modules_to_save": HEADS.get(kind, ())}
    return randomize(dynrank.add_lora(plain(kind), rank=rank, alpha=alpha, **options))


def by_peft(kind, folder, **options):
    """A PEFT model, whose adapter is in ``folder`` afterwards."""
    defaults = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[kind], "modules_to_save": HEADS.get(kind)}
    if kind == "bert":
        defaults["task_type"] = TaskType.SEQ_CLS
    model = randomize(get_peft_model(plain(kind), LoraConfig(**(defaults | options))))
    model.save_pretrained(folder)
    return model


def assert_equal_outputs(got, expected):
    assert (got - expected).abs().max() <= 1e-5


def assert_in_peft(model, kind, folder):
    """PEFT computes what ``model`` does, and the adapter matters."""
    dynrank.save_adapter(model, folder)
    expected = outputs(model, kind)
    assert_equal_outputs(outputs(PeftModel.from_pretrained(plain(kind), folder).eval(), kind), expected)
    assert_equal_outputs(outputs(dynrank.load_adapter(plain(kind), folder), kind), expected)
    assert (expected - outputs(plain(kind), kind)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", MODELS)
def test_save_adapter_loads_in_peft_and_here_with_equal_logits(kind, tmp_path):
    assert_in_peft(adapted(kind), kind, tmp_path)


@pytest.mark.parametrize("kind", MODELS)
def test_save_adapter_after_a_resize_has_mixed_ranks_and_fractional_alpha(kind, tmp_path):
    model = adapted(kind, rslora=True)
    names = [name for name, _ in dynrank.lora_layers(model)]
    dynrank.resize(model, {names[0]: 1, names[-1]: 4})
    # growth leaves columns of zeros, which a wrong alpha would not show
    randomize(model)
    assert_in_peft(model, kind, tmp_path)


class Nested(nn.Module):
    """Two modules of which one's name ends in the other's."""

    def __init__(self, inner):
        super().__init__()
        self.a, self.body = nn.Linear(6, 6), nn.ModuleDict({"a": inner})

    def forward(self, x):
        return self.body["a"](self.a(x))


@pytest.mark.parametrize("inner", [nn.Dropout, lambda: nn.Linear(6, 6)])  # PEFT could not adapt the first
def test_save_adapter_targets_no_module_whose_name_ends_in_that_of_a_layer(inner, tmp_path):
    model = dynrank.add_lora(Nested(inner()), rank=2, target_modules="a")
    dynrank.save_adapter(randomize(model), tmp_path)
    theirs = PeftModel.from_pretrained(Nested(inner()), tmp_path)
    assert {name.split(".lora_")[0] for name, _ in theirs.named_parameters() if "lora_A" in name} == {
        "base_model.model.a"
    }


@pytest.mark.parametrize("rank_map", [{"^a": {"rank": 1, "alpha": 7}}, {"body.a": {"rank": 1, "alpha": 7}}])
def test_save_adapter_keeps_ranks_and_scaling_of_names_that_end_alike(rank_map, tmp_path):
    torch.manual_seed(0)
    base = Nested(nn.Linear(6, 6))
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = randomize(dynrank.add_lora(base, rank=3, rank_map=rank_map))
    dynrank.save_adapter(model, tmp_path)
    fresh = Nested(nn.Linear(6, 6))
    fresh.load_state_dict(state)
    x = torch.randn(4, 6)
    assert_equal_outputs(PeftModel.from_pretrained(fresh, tmp_path).eval()(x), model(x))


@pytest.mark.parametrize("kind", MODELS)
def test_load_adapter_reads_what_peft_wrote(kind, tmp_path):
    expected = outputs(by_peft(kind, tmp_path), kind)
    model = plain(kind)
    assert dynrank.load_adapter(model, tmp_path) is model
    assert_equal_outputs(outputs(model, kind), expected)
    assert {layer.scaling for _, layer in dynrank.lora_layers(model)} == {5 / 3}


PATTERNS = {
    "rslora": {"use_rslora": True},
    "disjoint": {"rank_pattern": {"q_proj": 1, "down_proj": 5}, "alpha_pattern": {"v_proj": 2}},
    "overlapping": {
        "rank_pattern": {r"layers\.0.*": 2, "q_proj": 4, r"layers\.1\..*q_proj": 6},
        # in sorted order, for PEFT sorts the keys when it saves: another order would be lost on disk
        "alpha_pattern": {r"^model\.layers\.0.*": 1, "down_proj": 3, "q_proj": 7},
    },
    "overlapping-rslora": {"rank_pattern": {".*proj": 2, "v_proj": 4}, "use_rslora": True, "lora_alpha": 3},
    "regex": {"target_modules": r".*\.1\..*_proj"},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_load_adapter_takes_rank_and_scaling_as_peft_does(pattern, tmp_path):
    theirs = by_peft("llama", tmp_path, **PATTERNS[pattern])
    model = dynrank.load_adapter(plain("llama"), tmp_path)
    assert_equal_outputs(outputs(model, "llama"), outputs(theirs, "llama"))
    for name, layer in dynrank.lora_layers(model):
        other = theirs.base_model.model.get_submodule(name)
        assert (layer.rank, layer.scaling) == (other.r["default"], pytest.approx(other.scaling["default"]))


def test_load_adapter_trains_the_adapter_and_saved_heads_only(tmp_path):
    by_peft("bert", tmp_path)
    model = dynrank.load_adapter(plain("bert"), tmp_path)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or name.startswith("classifier.")), name


def test_load_adapter_then_save_adapter_writes_the_same(tmp_path):
    by_peft("gpt2", tmp_path / "theirs", rank_pattern={"wte": 2})
    dynrank.save_adapter(dynrank.load_adapter(plain("gpt2"), tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    factors = {key for key in theirs if "lora_" in key}  # PEFT adds the base weights of adapted embeddings
    assert set(ours) == factors
    assert all(torch.equal(ours[key], theirs[key]) for key in factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_adapter_dtype_is_that_of_the_factors(dtype, tmp_path):
    dynrank.save_adapter(adapted("llama"), tmp_path)
    model = dynrank.load_adapter(plain("llama").bfloat16(), tmp_path, dtype=dtype)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {dtype}


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


class Bomb:
    def __reduce__(self):
        return os._exit, (77,)


def only_bin(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))  # reading it would end the test run


def foreign(folder):
    save_file({"model.layers.0.weight": torch.ones(2)}, folder / "adapter_model.safetensors")


def rename(tensors):
    for key in [key for key in tensors if "layers.1" in key]:
        tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)


Q_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "truncated": (truncate, "not a whole safetensors file"),
    "foreign": (foreign, "is no PEFT key"),
    "pickle": (only_bin, "pickled adapters"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "cannot read the adapter"),
    "config no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not JSON"),
    "DoRA": (lambda folder: edit_config(folder, use_dora=True), "use_dora must be unset"),
    "bias": (lambda folder: edit_config(folder, bias="all"), "bias must be 'none'"),
    "not LORA": (lambda folder: edit_config(folder, peft_type="LOHA"), "peft_type must be LORA, got 'LOHA'"),
    "no alpha": (lambda folder: edit_config(folder, lora_alpha=None), "lora_alpha must be a finite number"),
    "NaN alpha": (lambda folder: edit_config(folder, lora_alpha=float("nan")), "lora_alpha"),
    "text in alpha_pattern": (lambda folder: edit_config(folder, alpha_pattern={"q_proj": "x"}), "alpha_pattern"),
    "no pattern in alpha_pattern": (lambda folder: edit_config(folder, alpha_pattern={"(": 2}), "alpha_pattern"),
    "dropout": (lambda folder: edit_config(folder, lora_dropout=1.5), "dropout must be"),
    "NaN": (lambda folder: edit_tensors(folder, lambda t: t[Q_A].fill_(float("nan"))), r"layers\.1.*q_proj.*NaN"),
    "half a pair": (lambda folder: edit_tensors(folder, lambda t: t.pop(Q_A)), "q_proj' lacks two factors"),
    "other shape": (lambda folder: edit_tensors(folder, lambda t: t.update({Q_A: torch.ones(3, 9)})), r"q_proj' is a"),
    "wrong base": (lambda folder: edit_tensors(folder, rename), r"no module 'model\.layers\.7\.self_attn\.q_proj'"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_load_adapter_refuses_a_faulty_adapter_and_leaves_the_model_alone(fault, tmp_path):
    by_peft("llama", tmp_path)
    break_it, message = BROKEN[fault]
    break_it(tmp_path)
    assert_refused(plain("llama"), tmp_path, message)


def assert_refused(model, folder, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=message):
        dynrank.load_adapter(model, folder)
    assert not any(isinstance(module, LoRALayer) for module in model.modules())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_load_adapter_refuses_a_head_that_is_not_finite(tmp_path):
    by_peft("bert", tmp_path)
    edit_tensors(tmp_path, lambda t: t["base_model.model.classifier.weight"].fill_(float("nan")))
    assert_refused(plain("bert"), tmp_path, r"classifier.*NaN")


def test_load_adapter_refuses_an_adapter_of_a_base_with_other_values(tmp_path):
    by_peft("gpt2", tmp_path)
    other = plain("gpt2")
    with torch.no_grad():
        other.transformer.wte.weight += 1
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))  # PEFT added it
    assert_refused(other, tmp_path, "wte.*another base")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_load_adapter_of_an_initialisation_that_changes_the_base_has_equal_outputs_or_is_refused(init, tmp_path):
    config = LoraConfig(r=3, target_modules=["head"], init_lora_weights=init)
    theirs = get_peft_model(plain("conv"), config)  # PEFT takes the first B A out of the base's weight
    with torch.no_grad():
        theirs.base_model.model.head.lora_B["default"].weight += 0.1
    theirs.save_pretrained(tmp_path)
    try:
        model = dynrank.load_adapter(plain("conv"), tmp_path)
    except ConfigurationError as error:
        assert "init_lora_weights" in str(error)  # noqa: PT017 (either answer is fine)
    else:
        assert_equal_outputs(outputs(model, "conv"), outputs(theirs.eval(), "conv"))


def test_load_adapter_refuses_a_model_with_lora_layers(tmp_path):
    model = adapted("llama")
    dynrank.save_adapter(model, tmp_path)
    with pytest.raises(ConfigurationError, match="LoRA layers already"):
        dynrank.load_adapter(model, tmp_path)


def test_save_adapter_refuses_a_model_without_lora_layers(tmp_path):
    with pytest.raises(ConfigurationError, match="no LoRA layers to save"):
        dynrank.save_adapter(plain("llama"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("part", ["weights", "config", "first rename", "second rename"])
def test_save_adapter_that_fails_leaves_the_old_adapter_whole(part, tmp_path, monkeypatch):
    dynrank.save_adapter(adapted("llama", alpha=5), tmp_path)
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    replace, calls = os.replace, []

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    def half_written(tensors, file, **_):
        with open(file, "wb") as opened:
            opened.write(b"half a file")
        fail()

    def fail_at(number):
        def wrapped(source, target):
            calls.append(target)
            if len(calls) == number:
                fail()
            replace(source, target)

        return wrapped

    if part == "weights":
        monkeypatch.setattr(dynrank.adapters.save, "save_file", half_written)
    elif part == "config":
        monkeypatch.setattr("pathlib.Path.write_text", fail)
    else:
        monkeypatch.setattr(os, "replace", fail_at(1 if part == "first rename" else 2))
    with pytest.raises(OSError, match="No space left"):
        dynrank.save_adapter(adapted("llama", rank=2, alpha=11), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in old} == old


def test_save_adapter_replaces_an_older_adapter_and_leaves_no_other_file(tmp_path):
    dynrank.save_adapter(adapted("llama"), tmp_path)
    dynrank.save_adapter(adapted("llama", rank=2), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {layer.rank for _, layer in dynrank.lora_layers(dynrank.load_adapter(plain("llama"), tmp_path))} == {2}


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied layers in several ways
def test_load_adapter_refuses_a_copy_of_a_tied_weight(tmp_path):
    """PEFT trains such a copy apart from the weight it was tied to; one parameter cannot be both."""
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"])
    get_peft_model(plain("gpt2"), config).save_pretrained(tmp_path)
    assert_refused(plain("gpt2"), tmp_path, "lm_head.weight' is tied")


def test_save_adapter_takes_a_trained_parameter_of_a_module_around_the_layers(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.shift = nn.Linear(6, 6), nn.Parameter(torch.zeros(6))

    model = dynrank.add_lora(Net(), rank=2)
    model.shift.requires_grad_(True)
    try:
        dynrank.save_adapter(randomize(model), tmp_path)
    except ConfigurationError:
        return  # refusing is fine: PEFT has no place for it either
    assert torch.equal(dynrank.load_adapter(Net(), tmp_path).shift, model.shift)


def test_save_adapter_goes_over_what_a_killed_save_left_behind(tmp_path):
    model = adapted("llama", alpha=5)
    dynrank.save_adapter(model, tmp_path)
    for name in ("adapter_model.safetensors.old", "adapter_model.safetensors.part", "adapter_config.json.part"):
        (tmp_path / name).write_bytes(b"half a file")
    dynrank.save_adapter(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_equal_outputs(outputs(dynrank.load_adapter(plain("llama"), tmp_path), "llama"), outputs(model, "llama"))
