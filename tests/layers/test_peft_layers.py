"""Models wrapped by PEFT, resized in place: PEFT reads its own files and ours, and we read its."""

import copy
import itertools
import json

import pytest
import torch
import transformers as hf
from peft import AdaLoraConfig, LoraConfig, PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.testing import assert_close
from trained import drive

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.layers.frozen_base import MARK, without_base
from dynrank.layers.peft_layers import config_changes, follow_checkpoint_ranks
from dynrank.rank_map import RankBounds
from dynrank.schedules import Stage
from dynrank.targets import Budget
from dynrank.triggers import At

pytestmark = [
    # PEFT says so of every Conv1D, and of a Linear beside one, and sets the flag itself.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (True|False):UserWarning"),
    # PEFT on an adapted embedding that is tied, and on the base weight that it saves along.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
]

TINY = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, **SIZES)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**TINY, n_embd=8, n_layer=2, n_head=2, n_positions=16)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TINY, **SIZES, num_labels=3)),
}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "wte"],
    "bert": ["query", "value", "word_embeddings"],
}
PREFIX = "base_model.model."


def plain(kind="llama"):
    """The same base model on every call, in float64."""
    torch.manual_seed(0)
    return MODELS[kind]().double().eval()


def randomize(model):
    """Trained: factors and heads are no longer what they were made as."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def config(kind="llama", **options):
    defaults = {"r": 6, "lora_alpha": 9, "target_modules": TARGETS[kind]}
    if kind == "bert":
        defaults |= {"task_type": TaskType.SEQ_CLS, "modules_to_save": ["classifier"]}
    return LoraConfig(**(defaults | options))


def wrapped(kind="llama", **options):
    return randomize(get_peft_model(plain(kind), config(kind, **options)))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def layers_of(model):
    return dict(dynrank.lora_layers(model))


def ranks_of(model):
    return {name: layer.rank for name, layer in layers_of(model).items()}


def settings(model, adapter="default"):
    c = model.peft_config[adapter]
    return c.r, c.lora_alpha, c.rank_pattern, c.alpha_pattern, c.use_rslora


def assert_reloads(model, folder, kind="llama", adapter="default"):
    """PEFT reads what PEFT has written of ``model``, with equal logits."""
    model.save_pretrained(folder, selected_adapters=[adapter])
    saved = folder if adapter == "default" else folder / adapter
    again = PeftModel.from_pretrained(plain(kind), saved)
    assert (logits(again) - logits(model)).abs().max() <= 1e-12
    assert ranks_of(again) == ranks_of(model)


def test_configs_name_each_layer_that_differs_in_full(tmp_path):
    model = wrapped(rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.1\..*v_proj": 3})
    assert_reloads(model, tmp_path / "before")
    # A config with the right ranks does not change.
    assert config_changes(model, {}) == []
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    dynrank.resize(model, {name: 2}, optimizers=())
    rank, alpha, rank_pattern, alpha_pattern, rslora = settings(model)
    assert (rank, alpha, rslora) == (6, 9, False)
    q = "^model\\.layers\\.{}\\.self_attn\\.q_proj"
    v = "^model\\.layers\\.1\\.self_attn\\.v_proj"
    assert rank_pattern == {q.format(0): 2, q.format(1): 4}
    # The scaling stays 9 / 4, so alpha is 4.5 at rank 2.
    assert alpha_pattern == {q.format(0): 4.5, v: 3}
    assert_reloads(model, tmp_path / "after")
    written = json.loads((tmp_path / "after" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == rank_pattern


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"use_rslora": True, "r": 4}, {"init_lora_weights": "orthogonal"}]
)
def test_scaling_by_another_rule_and_an_initialisation_for_even_ranks_reload(options, tmp_path):
    model = wrapped(**options)
    before = {layer.scaling for layer in layers_of(model).values()}
    dynrank.resize(model, 3, optimizers=())
    assert {layer.scaling for layer in layers_of(model).values()} == before
    assert settings(model)[4] is options.get("use_rslora", False)
    assert_reloads(model, tmp_path)
    module = next(iter(layers_of(model).values())).module
    module.set_scale("default", 1.0)
    assert module.scaling["default"] == pytest.approx(*before)


def test_rslora_is_kept_unless_a_scaling_would_change(tmp_path):
    model = wrapped(use_rslora=True)
    rounded = 1.7
    assert rounded * 3**0.5 / 3**0.5 != rounded
    for layer in layers_of(model).values():
        layer.module.scaling["default"] = rounded
    dynrank.resize(model, 3, optimizers=())
    assert settings(model)[4] is False
    assert_reloads(model, tmp_path)
    assert {layer.scaling for layer in layers_of(PeftModel.from_pretrained(plain("llama"), tmp_path)).values()} == {
        rounded
    }


def test_only_the_active_adapter_changes(tmp_path):
    model = wrapped()
    model.add_adapter("other", config(r=4, lora_alpha=2, target_modules=["q_proj", "k_proj"], use_rslora=True))
    shared = model.peft_config["default"]
    model.add_adapter("third", shared)
    before = copy.deepcopy(shared)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = settings(model, "other")
    reports = dynrank.resize(model, 2, optimizers=())
    assert len(reports) == 6
    for name, value in model.state_dict().items():
        assert ".default." in name or torch.equal(value, state[name]), name
    assert settings(model, "other") == other
    # The user's own object is also the config of the third adapter, so it may not change.
    assert shared == before
    assert settings(model)[0] == 2
    assert_reloads(model, tmp_path)
    model.set_adapter("other")
    assert set(ranks_of(model).values()) == {4}
    assert len(ranks_of(model)) == 4
    assert_reloads(model, tmp_path, adapter="other")
    dynrank.resize(model, 3, optimizers=())
    assert_reloads(model, tmp_path, adapter="other")
    model.set_adapter("default")
    assert_reloads(model, tmp_path)


def test_names_are_those_of_the_model_passed_in_and_the_config_is_found_in_it():
    model = wrapped()
    outer = nn.ModuleDict({"lm": model})
    assert list(layers_of(outer)) == [f"lm.{name}" for name in layers_of(model)]
    dynrank.resize(outer, {"lm.base_model.model.model.layers.1.mlp.down_proj": 2}, optimizers=())
    assert settings(model)[2] == {"^model\\.layers\\.1\\.mlp\\.down_proj": 2}
    injected = randomize(inject_adapter_in_model(config(), plain()))
    dynrank.resize(injected, 2, optimizers=())
    assert settings(injected)[0] == 2


def test_a_config_that_cannot_follow_stops_a_change_before_it_begins():
    model = wrapped()
    stray = wrapped().base_model.model.model.layers[0].mlp.down_proj
    # The layer does not hold this adapter, so it is none of the layers that change.
    stray._active_adapter = "other"
    outer = nn.ModuleDict({"lm": model, "stray": stray})
    before = copy.deepcopy((model.state_dict(), settings(model)))
    with pytest.raises(ConfigurationError, match="the config of PEFT's layer 'stray' is not in the model"):
        dynrank.resize(outer, 2, optimizers=())
    assert_close((model.state_dict(), settings(model)), before, rtol=0, atol=0)


def test_a_merged_adapter_keeps_its_ranks():
    model = wrapped()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="is merged"):
        dynrank.resize(model, 2, optimizers=())
    assert set(ranks_of(model).values()) == {6}


def two_active():
    model = wrapped()
    model.add_adapter("second", config(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


REFUSED = {
    "DoraLinearVariant.*use_dora=False": lambda: wrapped(use_dora=True),
    "ALoraLinearVariant": lambda: wrapped(alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
    "AdaLoRA": lambda: get_peft_model(plain(), AdaLoraConfig(target_modules=["q_proj"], total_step=9)),
    "MultiheadAttention": lambda: get_peft_model(
        nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)}), LoraConfig(target_modules=["attn"])
    ),
    "lora_bias=False": lambda: wrapped("gpt2", target_modules=["c_attn"], lora_bias=True),
    "init_lora_weights='pissa'": lambda: get_peft_model(plain().float(), config(init_lora_weights="pissa")),
    "ensure_weight_tying": lambda: wrapped("gpt2", target_modules=["wte", "lm_head"], ensure_weight_tying=True),
    r"q_proj' and 1 more: adapters \['default', 'second'\] are active": two_active,
    "a convolution in groups": lambda: get_peft_model(
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), LoraConfig(r=2, target_modules=["0"])
    ),
    "config is not in this model": lambda: wrapped().base_model.model.model.layers[0],
}


@pytest.mark.parametrize("message", REFUSED)
def test_layers_with_other_arithmetic_are_refused_by_name(message):
    model = REFUSED[message]()
    with pytest.raises(ConfigurationError, match=message) as caught:
        list(dynrank.lora_layers(model))
    name = str(caught.value).split("'")[1]
    assert name in {name for name, _ in model.named_modules()}
    with pytest.raises(ConfigurationError, match=message):
        dynrank.resize(model, 2, optimizers=())


@pytest.mark.parametrize(
    ("call", "instead"),
    [
        (lambda model, _: dynrank.merge(model), r"merge_and_unload\(\)"),
        (lambda model, _: dynrank.add_lora(model, rank=2, alpha=2), "resize and RankScheduler"),
        (lambda model, folder: dynrank.load_adapter(model, folder), r"load_adapter\(\), or pass the plain model"),
    ],
)
def test_functions_for_dynranks_own_layers_refuse_a_wrapped_model(call, instead, tmp_path):
    with pytest.raises(ConfigurationError, match=f"wrapped by PEFT .*{instead}"):
        call(wrapped(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", MODELS)
def test_after_a_resize_what_either_library_saves_loads_in_both(kind, tmp_path):
    model = wrapped(kind)
    dynrank.resize(model, dict(zip(ranks_of(model), itertools.cycle((1, 5, 2, 7, 3)), strict=False)), optimizers=())
    expected = logits(model)
    for layer in layers_of(model).values():
        module = layer.module
        assert module.r["default"] == layer.rank
        assert module.lora_alpha["default"] == pytest.approx(layer.scaling * layer.rank)
        if not layer.of_embedding:
            sizes = module.lora_A["default"].out_features, module.lora_B["default"].in_features
            assert sizes == (layer.rank, layer.rank)
    assert_reloads(model, tmp_path / "peft", kind)
    dynrank.save_adapter(model, tmp_path / "ours")
    for folder in (tmp_path / "peft", tmp_path / "ours"):
        theirs = PeftModel.from_pretrained(plain(kind), folder)
        ours = dynrank.load_adapter(plain(kind), folder)
        assert (logits(theirs) - expected).abs().max() <= 1e-12
        # `load_adapter` makes factors of float32.
        assert (logits(ours) - expected).abs().max() <= 1e-6
        assert ranks_of(theirs) == ranks_of(model)
    assert torch.equal(logits(model), expected)
    # PEFT merges a tied wte into the lm_head, too (its issue 2018).
    if kind != "gpt2":
        assert (logits(model.merge_and_unload()) - expected).abs().max() <= 1e-10


def test_save_refuses_nested_wrapped_models_and_numbers_not_finite(tmp_path):
    message = "get_peft_model or inject_adapter_in_model returned, got a ModuleDict"
    with pytest.raises(ConfigurationError, match=message):
        dynrank.save_adapter(nn.ModuleDict({"lm": wrapped()}), tmp_path / "out")
    model = wrapped("bert")
    model.base_model.model.classifier.modules_to_save["default"].bias.data[0] = torch.nan
    with pytest.raises(ConfigurationError, match=r"classifier.*NaN.*lr"):
        dynrank.save_adapter(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_layers_of_both_kinds_in_one_model_are_refused():
    own = dynrank.add_lora(nn.Sequential(nn.Linear(4, 4)), rank=2, alpha=2, target_modules=["0"])
    both = nn.ModuleList([own, wrapped()])
    with pytest.raises(ConfigurationError, match=r"of dynrank \('0\.0'\) and of PEFT \('1\.base_model"):
        dynrank.resize(both, 1, optimizers=())


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(("kind", "target"), [("llama", 2), ("gpt2", 8), ("bert", 2)])
def test_state_dict_of_other_ranks_loads_into_a_freshly_wrapped_model(kind, target, with_base, tmp_path):
    source = nn.ModuleDict({"lm": wrapped(kind)})
    names = list(ranks_of(source))
    dynrank.resize(source, {names[0]: target, names[-1]: 3}, optimizers=())
    state = source.state_dict()
    if not with_base:
        state = without_base(source, state, trained=())
        assert all(".lora_" in key or ".modules_to_save." in key or key.endswith(MARK) for key in state)
    outer = nn.ModuleDict({"lm": get_peft_model(plain(kind), config(kind))})
    parameters = [id(parameter) for parameter in outer.parameters()]
    follow_checkpoint_ranks(outer)
    hooks = len(outer._load_state_dict_pre_hooks)
    follow_checkpoint_ranks(outer)
    assert len(outer._load_state_dict_pre_hooks) == hooks > 0
    # Averaging callbacks copy the model in this way.
    outer = copy.deepcopy(outer) if target == 8 else outer
    outer.load_state_dict(state)
    assert target == 8 or [id(parameter) for parameter in outer.parameters()] == parameters
    assert torch.equal(logits(outer["lm"]), logits(source["lm"]))
    assert settings(outer["lm"]) == settings(source["lm"])
    assert_reloads(outer["lm"], tmp_path, kind)
    if not with_base:
        base = next(value for name, value in outer.named_parameters() if ".base_layer." in name)
        base.data.add_(1)
        with pytest.raises(ConfigurationError, match=r"base_layer.* had another shape or other values"):
            outer.load_state_dict(state)


def test_state_dict_that_does_not_fit_names_the_layer():
    model = wrapped()
    follow_checkpoint_ranks(model)
    state = model.state_dict()
    key = f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.default.weight"
    with pytest.raises(ConfigurationError, match=r"factors of '.*layers\.0\.mlp\.down_proj' are \[2, 9\] and \[8, 6\]"):
        model.load_state_dict({**state, key: torch.zeros(2, 9)})
    model.load_state_dict(state)


def test_view_that_is_made_anew_each_time_takes_no_settings():
    layer = next(iter(layers_of(wrapped()).values()))
    assert layer.bounds == RankBounds()
    with pytest.raises(AttributeError, match="bounds"):
        layer.bounds = RankBounds(pinned=True)


def test_layer_narrower_than_its_rank_is_cut_with_the_others():
    """PEFT gives every layer of all-linear the one rank, Qwen2-MoE's gate of one output, too."""
    options = LoraConfig(r=6, target_modules=["0", "1"], init_lora_weights=False)
    net = get_peft_model(nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 1)), options)
    loop = dynrank.Training(net, [torch.optim.SGD(dynrank.adapter_parameters(net), lr=1e-2)])
    drive(Stage(At(step=1), Budget(share=0.5)), loop, 2, lambda: net(torch.ones(1, 12)).sum())
    wide, narrow = (layer.rank for _, layer in dynrank.lora_layers(net))
    assert (narrow, wide < 6) == (1, True)
