"""State dicts without their frozen base: what is left out, and what of another base is noticed."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaForCausalLM

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.layers.frozen_base import MARK, SAMPLES, adapted_models, fingerprint, left_out, without_base


def adapted(seed=0, rank=2, **options):
    torch.manual_seed(seed)
    return dynrank.add_lora(
        nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 5)), rank=rank, **{"alpha": rank} | options
    )


def stripped(model):
    return without_base(model, model.state_dict(), trained=())


def test_what_is_left_out_is_the_frozen_parameters_alone():
    model = adapted(modules_to_save=["2"], target_modules=["0"])
    # An adapter that is frozen for the moment stays in the state.
    model[0].lora_A.requires_grad_(False)
    state = stripped(model)
    frozen = {"0.base.weight", "0.base.bias", "1.weight", "1.bias"}
    assert left_out(state) == frozen
    assert set(state) == (set(model.state_dict()) - frozen) | {MARK}


@pytest.mark.parametrize("assign", [False, True])
def test_it_loads_strictly_into_the_same_base_at_other_ranks(assign):
    model = adapted(rank=3)
    fresh = adapted(rank=5)
    nn.init.normal_(model[0].lora_B)
    # This pass moves the statistics of the batch norm.
    model.train()(torch.randn(8, 40))
    base = fresh[0].base.weight
    state = stripped(model)
    keys = list(state)
    done = fresh.load_state_dict(state, assign=assign)
    assert not done.missing_keys
    assert not done.unexpected_keys
    assert list(state) == keys
    assert fresh[0].base.weight is base
    assert fresh[0].rank == 3
    x = torch.randn(4, 40)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_tokens_that_were_added_to_the_base_are_kept(zoo, tmp_path):
    """Each program draws their rows anew, so they are no part of the base."""
    zoo.plain("llama").save_pretrained(tmp_path)

    def made(seed, tokens):
        model = LlamaForCausalLM.from_pretrained(tmp_path)
        torch.manual_seed(seed)
        if tokens != 20:
            model.resize_token_embeddings(tokens, mean_resizing=False)
        return zoo.adapted("llama", seed, base=model).eval()

    model = made(1, 23)
    fresh = made(2, 23)
    assert not torch.equal(fresh.lm_head.weight, model.lm_head.weight)
    state = stripped(model)
    assert set(model.state_dict()) - set(state) == left_out(state)
    assert {name for name in state if "embed" in name or "head" in name} == {
        "model.embed_tokens.weight", "lm_head.weight"}  # fmt: skip
    fresh.load_state_dict(state)
    assert torch.equal(zoo.outputs(fresh), zoo.outputs(model))
    assert "lm_head.weight" in left_out(stripped(made(1, 20)))


@pytest.mark.parametrize("name", ["0.lora_B", "0._extra_state", "1.running_mean", "1.weight"])
def test_nothing_else_may_be_missing(name):
    state = stripped(adapted())
    state.pop(name, None)
    state[MARK]["parameters"].pop(name, None)
    with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
        adapted().load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m[2].base.weight.data.mul_(2), r"'2\.base\.weight' had .* other values than here \(1 of 6"),
        (lambda m: setattr(m[1], "weight", nn.Parameter(torch.ones(31), False)), r"'1\.weight' had another shape"),
        (lambda m: m[1].register_parameter("bias", None), r"'1\.bias' is missing here"),
        (lambda m: m[0].base.weight.data.neg_(), r"'0\.base\.weight'.*its own base, Sequential"),
    ],
)
def test_another_base_is_refused_by_name_before_anything_is_loaded(change, named):
    state = stripped(adapted())
    other = adapted(rank=4)
    change(other)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ConfigurationError, match=named):
        other.load_state_dict(state)
    after = other.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    "mark", ["x", {"model": "Sequential"}, {"model": "Sequential", "parameters": ["0.base.weight"]}]
)
def test_a_broken_mark_is_named(mark):
    with pytest.raises(ConfigurationError, match=rf"'{MARK}' is no mark of a base$") as caught:
        adapted().load_state_dict({**stripped(adapted()), MARK: mark})
    assert caught.value.arguments == ("ckpt_path",)


def test_a_model_inside_another_is_known_by_its_own_names():
    def outer(seed=0):
        return nn.ModuleDict({"left": adapted(seed), "right": adapted(seed + 1), "teacher": nn.Linear(2, 2)})

    model = outer()
    model["teacher"].requires_grad_(False)
    state = stripped(model)
    assert {key for key in state if key.endswith(MARK)} == {f"left.{MARK}", f"right.{MARK}"}
    # The teacher is frozen, but it has no adapter.
    assert "teacher.weight" in state
    outer().load_state_dict(state)
    with pytest.raises(ConfigurationError, match=r"'left\.0\.base\.weight'"):
        outer(seed=5).load_state_dict(state)


def test_a_base_rounded_to_bfloat16_is_the_same_base():
    whole = adapted()
    half = adapted().bfloat16()
    half.load_state_dict(stripped(whole))
    whole.load_state_dict(stripped(half))
    with pytest.raises(ConfigurationError, match="other values"):
        adapted(seed=3).load_state_dict(stripped(half))


@given(
    shape=st.lists(st.integers(1, 30), max_size=3),
    dtype=st.sampled_from([torch.int64, torch.uint8, torch.float32, torch.bfloat16]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_a_fingerprint_knows_shape_and_values_but_not_the_layout(shape, dtype, data):
    values = torch.randint(0, 99, shape).to(dtype)
    known = fingerprint(values)
    assert known != fingerprint(values[None])
    assert values.ndim < 2 or known == fingerprint(values.mT.contiguous().mT)
    with pytest.raises(ConfigurationError, match="meta"):
        fingerprint(values.to("meta"))
    values.view(-1)[data.draw(st.integers(0, values.numel() - 1))] += 1
    assert values.numel() > SAMPLES or known != fingerprint(values)


def test_a_fingerprint_sees_all_parts_of_a_large_tensor():
    values = torch.zeros(4096, 512)
    known = {fingerprint(values)}
    for part in values.split(256):
        part.fill_(1)
        known.add(fingerprint(values))
    assert len(known) == 17


def test_a_merged_model_has_no_base_left():
    assert not adapted_models(dynrank.merge(adapted().eval()))
