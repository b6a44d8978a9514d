"""PEFT as an outside judge: what its documentation says one can do with an adapter is done with adapters of ours."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import dynrank

TINY = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])
NAMES = ["q_proj", "v_proj", "down_proj"]


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, **SIZES)).eval()


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**TINY, **SIZES, num_labels=3)).eval()


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=IDS, **options).logits


def trained(model, seed, **options):
    """Adapted, with the numbers that a training might have led to."""
    model = dynrank.add_lora(model, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def mixed(tmp_path):
    """(model of ours after changes of rank, folder of its adapter)."""
    options = {"rank_map": {"v_proj": {"rank": 2, "alpha": 9}}, "rslora": True}
    model = trained(llama(), 1, rank=5, alpha=4, target_modules=NAMES, **options)
    dynrank.resize(model, {"model.layers.0.self_attn.q_proj": 1, "model.layers.1.mlp.down_proj": 3})
    dynrank.save_adapter(model, tmp_path / "mixed")
    return model, tmp_path / "mixed"


@pytest.fixture
def other(tmp_path):
    """(model of ours, folder of its adapter): other layers than in ``mixed``, one rank."""
    model = trained(llama(), 2, rank=3, alpha=5, target_modules=["k_proj", "q_proj"])
    dynrank.save_adapter(model, tmp_path / "other")
    return model, tmp_path / "other"


def close(got, expected):
    assert_close(got, expected, rtol=0, atol=1e-5)


# --- rank_pattern and alpha_pattern


def test_every_layer_has_our_rank_and_scaling(mixed):
    ours, folder = mixed
    theirs = PeftModel.from_pretrained(llama(), folder).base_model.model
    layers = dict(dynrank.lora_layers(ours))
    assert len({layer.rank for layer in layers.values()}) == 4
    for name, layer in layers.items():
        found = theirs.get_submodule(name)
        assert (found.r["default"], found.scaling["default"]) == (layer.rank, pytest.approx(layer.scaling, rel=1e-12))
    assert {n for n, m in theirs.named_modules() if hasattr(m, "lora_A")} == set(layers)


# --- merging


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload_gives_our_merged_model(mixed, safe_merge):
    ours, folder = mixed
    expected = logits(ours)
    theirs = PeftModel.from_pretrained(llama(), folder).merge_and_unload(safe_merge=safe_merge)
    close(logits(theirs), expected)
    merged = dynrank.merge(ours).state_dict()
    assert set(theirs.state_dict()) == set(merged)
    for name, value in theirs.state_dict().items():
        close(value, merged[name])


def test_merge_adapter_and_unmerge_adapter_and_unload(mixed):
    ours, folder = mixed
    theirs = PeftModel.from_pretrained(llama(), folder)
    theirs.merge_adapter()
    close(logits(theirs), logits(ours))
    theirs.unmerge_adapter()
    close(logits(theirs), logits(ours))
    assert_close(logits(theirs.unload()), logits(llama()), rtol=0, atol=1e-6)


# --- saving and loading


@pytest.mark.parametrize("which", ["mixed", "other"])
def test_save_pretrained_of_what_was_loaded_round_trips(which, request, tmp_path):
    ours, folder = request.getfixturevalue(which)
    PeftModel.from_pretrained(llama(), folder).save_pretrained(tmp_path / "again")
    tensors = load_file(folder / "adapter_model.safetensors")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert set(tensors) == set(again)
    assert all(torch.equal(again[key], value) for key, value in tensors.items())
    close(logits(PeftModel.from_pretrained(llama(), tmp_path / "again")), logits(ours))
    back = dynrank.load_adapter(llama(), tmp_path / "again")
    assert torch.equal(logits(back), logits(ours))
    dynrank.save_adapter(back, tmp_path / "home")
    home = load_file(tmp_path / "home" / "adapter_model.safetensors")
    assert all(torch.equal(home[key], value) for key, value in tensors.items())


def test_state_dict_functions_take_our_file(mixed):
    ours, folder = mixed
    theirs = PeftModel(llama(), PeftConfig.from_pretrained(folder)).eval()
    weights = load_peft_weights(folder)
    result = set_peft_model_state_dict(theirs, weights)
    assert not result.unexpected_keys
    close(logits(theirs), logits(ours))
    state = get_peft_model_state_dict(theirs)
    assert set(state) == set(weights)
    assert all(torch.equal(state[key], value) for key, value in weights.items())


def test_low_cpu_mem_usage(mixed):
    ours, folder = mixed
    close(logits(PeftModel.from_pretrained(llama(), folder, low_cpu_mem_usage=True)), logits(ours))


def test_auto_class_finds_the_base_by_the_name_in_our_config(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    ours = trained(base, 1, rank=2, target_modules=NAMES)
    dynrank.save_adapter(ours, tmp_path / "adapter")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    close(logits(theirs), logits(ours))


def test_is_trainable_goes_on_with_our_adapter(mixed):
    _, folder = mixed
    assert not any(p.requires_grad for p in PeftModel.from_pretrained(llama(), folder).parameters())
    theirs = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    assert {n for n, p in theirs.named_parameters() if p.requires_grad} == {
        n for n, _ in theirs.named_parameters() if "lora_" in n
    }
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = theirs(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# --- several adapters


def test_adapters_of_unlike_layers_and_ranks_live_side_by_side(mixed, other):
    expected = {"mixed": logits(mixed[0]), "other": logits(other[0])}
    theirs = PeftModel.from_pretrained(llama(), mixed[1], adapter_name="mixed").eval()
    theirs.load_adapter(other[1], adapter_name="other")
    for name in ("other", "mixed", "other"):
        theirs.set_adapter(name)
        close(logits(theirs), expected[name])
        with theirs.disable_adapter():
            close(logits(theirs), logits(llama()))
    theirs.set_adapter("mixed")
    theirs.delete_adapter("other")
    close(logits(theirs), expected["mixed"])
    assert set(theirs.peft_config) == {"mixed"}


def test_a_batch_of_several_adapters(mixed, other):
    theirs = PeftModel.from_pretrained(llama(), mixed[1], adapter_name="mixed").eval()
    theirs.load_adapter(other[1], adapter_name="other")
    found = logits(theirs, adapter_names=["other", "__base__", "mixed"])
    close(found, torch.stack([logits(m)[i] for i, m in enumerate((other[0], llama(), mixed[0]))]))


def test_add_weighted_adapter_of_ours_comes_back(tmp_path):
    """Concatenated factors: the weighted sum of the updates, exactly."""
    updates = []
    for name, rank in (("first", 2), ("second", 3)):
        model = trained(llama(), rank, rank=rank, alpha=4, target_modules=NAMES)
        dynrank.save_adapter(model, tmp_path / name)
        updates.append({name: layer.delta_weight().detach() for name, layer in dynrank.lora_layers(model)})
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "first", adapter_name="first")
    theirs.load_adapter(tmp_path / "second", adapter_name="second")
    theirs.add_weighted_adapter(["first", "second"], [0.75, 0.5], "both", combination_type="cat")
    theirs.set_adapter("both")
    theirs.save_pretrained(tmp_path, selected_adapters=["both"])
    ours = dynrank.load_adapter(llama(), tmp_path / "both")
    for name, layer in dynrank.lora_layers(ours):
        assert layer.rank == 5
        close(layer.delta_weight(), 0.75 * updates[0][name] + 0.5 * updates[1][name])
    close(logits(theirs.eval()), logits(ours))


def test_hotswap_between_adapters_of_unlike_ranks(mixed, other, tmp_path):
    """Padded, where ranks are mixed: PEFT's hot swap finds no layer in the patterns, and scales by the global alpha."""
    dynrank.save_adapter(mixed[0], tmp_path / "padded", layout="padded")
    wide = trained(llama(), 3, rank=7, alpha=3, target_modules=NAMES)
    dynrank.save_adapter(wide, tmp_path / "wide")
    narrow = trained(llama(), 4, rank=1, alpha=6, target_modules=NAMES)
    dynrank.save_adapter(narrow, tmp_path / "narrow")
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "wide").eval()
    for folder, ours in (("narrow", narrow), ("padded", mixed[0]), ("wide", wide), ("padded", mixed[0])):
        hotswap_adapter(theirs, str(tmp_path / folder), adapter_name="default", torch_device="cpu")
        close(logits(theirs), logits(ours))
        swapped = dynrank.swap_adapter(llama(), tmp_path / folder)
        close(logits(swapped), logits(theirs))


# --- modules_to_save


def test_a_head_trained_whole_belongs_to_the_adapter(tmp_path):
    two = []
    for seed in (1, 2):
        model = trained(bert(), seed, rank=2 + seed, target_modules=["query"], modules_to_save=["classifier"])
        dynrank.save_adapter(model, tmp_path / str(seed))
        two.append(model)
    theirs = PeftModel.from_pretrained(bert(), tmp_path / "1", adapter_name="1").eval()
    theirs.load_adapter(tmp_path / "2", adapter_name="2")
    for name, ours in (("2", two[1]), ("1", two[0])):
        theirs.set_adapter(name)
        close(logits(theirs), logits(ours))
        head = theirs.base_model.model.classifier.modules_to_save[name]
        assert isinstance(head, nn.Linear)
        assert torch.equal(head.weight, ours.classifier.weight)
    with theirs.disable_adapter():
        close(logits(theirs), logits(bert()))
    expected = logits(two[0])
    close(logits(theirs.merge_and_unload()), expected)
    close(logits(dynrank.merge(two[0])), expected)
