"""State dicts without their frozen base: what is left out, and what of another base is noticed."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.layers.frozen_base import MARK, SAMPLES, check_base, frozen_bases, left_out, sampled, without_base
from dynrank.layers.peft_layers import follow_checkpoint_ranks


def adapted(seed=0, rank=2, **options):
    torch.manual_seed(seed)
    return dynrank.add_lora(
        nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 5)), rank=rank, **options
    )


def stripped(model):
    bases = {root: {n: sampled(p) for n, p in parts.items()} for root, parts in frozen_bases(model).items()}
    return without_base(model, model.state_dict(), bases)


def test_what_is_left_out_is_the_frozen_parameters_alone():
    model = adapted(modules_to_save=["2"], target_modules=["0"])
    state = stripped(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert left_out(state) == frozen
    assert frozen == {"0.base.weight", "0.base.bias", "1.weight", "1.bias"}
    assert set(state) == (set(model.state_dict()) - frozen) | {MARK}


def test_adapters_that_are_frozen_for_the_moment_stay_in():
    model = adapted()
    model[0].lora_A.requires_grad_(False)
    assert "0.lora_A" in stripped(model)


def test_a_parameter_that_was_changed_since_stays_in_and_comes_back():
    model = adapted()
    bases = {root: {n: sampled(p) for n, p in parts.items()} for root, parts in frozen_bases(model).items()}
    with torch.no_grad():
        model[1].weight.add_(1)
    state = without_base(model, model.state_dict(), bases)
    assert "1.weight" in state
    fresh = adapted()
    fresh.load_state_dict(state)
    assert torch.equal(fresh[1].weight, model[1].weight)


def test_it_loads_strictly_into_the_same_base_at_other_ranks():
    model, fresh = adapted(rank=3), adapted(rank=5)
    nn.init.normal_(model[0].lora_B)
    model.train()(torch.randn(8, 40))  # moves the batch norm's statistics
    done = fresh.load_state_dict(stripped(model))
    assert not done.missing_keys
    assert not done.unexpected_keys
    assert fresh[0].rank == 3
    x = torch.randn(4, 40)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", ["0.lora_B", "0._extra_state", "1.running_mean"])
def test_nothing_else_may_be_missing(name):
    state = stripped(adapted())
    del state[name]
    with pytest.raises(RuntimeError, match=name):
        adapted().load_state_dict(state)


def test_a_base_parameter_that_no_mark_stands_for_may_not_be_missing():
    state = stripped(adapted())
    del state[MARK]["parameters"]["1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.weight"):
        adapted().load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m[2].base.weight.data.mul_(2), r"'2\.base\.weight' had other values than here \(1 of 6"),
        (lambda m: setattr(m[1], "weight", nn.Parameter(torch.ones(31), False)), r"'1\.weight' had shape \[30\]"),
        (lambda m: m[1].register_parameter("bias", None), r"'1\.bias' is missing here"),
        (lambda m: m[0].base.weight.data.neg_(), r"'0\.base\.weight'.*Its base was Sequential"),
    ],
)
def test_another_base_is_refused_by_name_before_anything_is_loaded(change, named):
    state, other = stripped(adapted()), adapted(rank=4)
    change(other)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ConfigurationError, match=named):
        other.load_state_dict(state)
    after = other.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_model_inside_another_is_known_by_its_own_names():
    def outer(seed=0):
        return nn.ModuleDict({"left": adapted(seed), "right": adapted(seed + 1), "teacher": nn.Linear(2, 2)})

    model = outer()
    model["teacher"].requires_grad_(False)
    state = stripped(model)
    assert {key for key in state if key.endswith(MARK)} == {f"left.{MARK}", f"right.{MARK}"}
    assert "teacher.weight" in state  # nobody has adapted it
    outer().load_state_dict(state)
    with pytest.raises(ConfigurationError, match=r"'0\.base\.weight'"):
        outer(seed=5).load_state_dict(state)


def test_a_base_rounded_to_bfloat16_is_the_same_base():
    whole, half = adapted(), adapted().bfloat16()
    half.load_state_dict(stripped(whole))
    whole.load_state_dict(stripped(half))
    with pytest.raises(ConfigurationError, match="had other values"):
        adapted(seed=3).load_state_dict(stripped(half))


def test_a_base_of_another_kind_of_number_is_another_base():
    with pytest.raises(ConfigurationError, match=r"was torch\.float16 and is torch\.bfloat16"):
        check_base(adapted().bfloat16(), stripped(adapted().half()))


@given(shape=st.lists(st.integers(0, 40), max_size=3), transpose=st.booleans())
@settings(max_examples=40, deadline=None)
def test_samples_are_values_of_the_tensor_and_all_of_a_small_one(shape, transpose):
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    values = values.mT if transpose and values.ndim >= 2 else values
    found = sampled(nn.Parameter(values, requires_grad=False))
    assert len(found) == min(values.numel(), SAMPLES)
    assert len(found.unique()) >= (values.numel() if values.numel() <= SAMPLES else 0.8 * SAMPLES)
    assert set(found.tolist()) <= set(values.flatten().tolist())


def test_samples_lie_in_all_parts_of_a_large_tensor():
    rows, columns = 4096, 4096
    places = sampled(torch.arange(rows * columns))
    for at, count in ((places // columns, rows), (places % columns, columns)):
        assert len((at * 16 // count).unique()) == 16


def test_samples_are_taken_again_only_after_a_write():
    weight = nn.Parameter(torch.zeros(4), requires_grad=False)
    first = sampled(weight)
    assert sampled(weight) is first
    with torch.no_grad():
        weight.fill_(1)
    assert sampled(weight).tolist() == [1] * 4


def test_a_base_without_values_is_refused():
    with pytest.raises(ConfigurationError, match="meta"):
        sampled(torch.empty(3, device="meta"))


@pytest.mark.parametrize("mark", [None, {}, {"parameters": {"0.base.weight": {}}}, {"parameters": []}, "yes"])
def test_a_mark_that_is_none_is_refused(mark):
    state = stripped(adapted()) | {MARK: mark}
    with pytest.raises(ConfigurationError, match=MARK):
        adapted().load_state_dict(state)


def test_a_merged_model_has_no_base_left():
    assert not frozen_bases(dynrank.merge(adapted().eval()))


def test_peft_model():
    peft = pytest.importorskip("peft")

    def wrapped(seed=0, rank=4):
        torch.manual_seed(seed)
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", modules_to_save=["lm_head"])
        model = nn.ModuleDict(
            {"net": peft.get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=20, **size)), config)}
        )
        follow_checkpoint_ranks(model)
        return model

    model = wrapped()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    state = stripped(model)
    assert all(".lora_" in key or ".modules_to_save." in key or key.endswith(MARK) for key in state)
    fresh = wrapped(rank=2)
    fresh.load_state_dict(state)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(fresh["net"](input_ids=ids).logits, model["net"](input_ids=ids).logits)
    with pytest.raises(ConfigurationError, match="had other values"):
        wrapped(seed=1).load_state_dict(state)
