"""Experts that PEFT adapts as one tensor: each against its own dense SVD, and PEFT reading its own files."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

import dynrank
from dynrank.change.resize import Snapshot
from dynrank.layers.base import max_rank, params_per_rank
from dynrank.layers.peft_layers import follow_checkpoint_ranks

# For these models PEFT's all-linear means experts and routers, too.
REWRITTEN = ("Mixtral", "Qwen3Moe", "DeepseekV3")
KINDS = (*REWRITTEN, "Qwen3_5Moe", "GptOss", "GraniteMoe")
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
TENSORS = ("experts.gate_up_proj", "experts.down_proj")


@pytest.fixture
def wrapped(tiny_moe):
    """A function from an architecture to its model with PEFT's LoRA in all linear layers and experts, as if trained."""

    def build(kind):
        parameters = None if kind in REWRITTEN else TENSORS
        config = LoraConfig(
            r=6, lora_alpha=9, task_type="CAUSAL_LM", target_modules="all-linear", target_parameters=parameters
        )
        model = get_peft_model(tiny_moe(kind), config)
        with torch.no_grad():
            for factor in (parameter for parameter in model.parameters() if parameter.requires_grad):
                factor.normal_(std=0.3)
        return model

    return build


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def updates(model):
    """{tensor: (experts, ., .)} what PEFT adds to it."""
    tensors = {name: layer for name, layer in dynrank.lora_layers(model) if layer.num_products > 1}
    return {name: layer.module.get_delta_weight("default").detach() for name, layer in tensors.items()}


def unlike(model):
    """A lower rank for every layer, another one for the next."""
    layers = dict(dynrank.lora_layers(model))
    return {name: min(2 + i % 3, max_rank(layer)) for i, (name, layer) in enumerate(layers.items())}


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_becomes_the_best_approximation_of_its_dense_update(kind, wrapped):
    model = wrapped(kind).double()
    before = updates(model)
    ranks = unlike(model)
    reports = {report.layer: report for report in dynrank.resize(model, ranks)}
    assert {tuple(name.split(".")[-2:]) for name in before} == {tuple(name.split(".")) for name in TENSORS}
    assert reports.keys() == ranks.keys()
    for name, now in updates(model).items():
        u, s, vh = torch.linalg.svd(before[name], full_matrices=False)
        rank = ranks[name]
        assert_close(now, (u[:, :, :rank] * s[:, None, :rank]) @ vh[:, :rank], rtol=0, atol=1e-12)
        assert_close(reports[name].predicted_error, float((before[name] - now).norm()))
        assert_close(
            torch.tensor(reports[name].singular_values),
            s[:, : len(reports[name].singular_values)].square().sum(0).sqrt().float(),
        )
        assert reports[name].params_per_rank == 4 * sum(before[name].shape[1:])


@pytest.mark.parametrize("kind", ["DeepseekV3", "Qwen3_5Moe", "GptOss"])
def test_what_peft_saves_at_unlike_ranks_peft_loads_to_the_bit(kind, wrapped, tiny_moe, tmp_path):
    model = wrapped(kind)
    dynrank.resize(model, unlike(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_moe(kind), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert [layer.rank for _, layer in dynrank.lora_layers(loaded)] == [*unlike(model).values()]


def test_a_checkpoint_brings_its_ranks_into_tensors_of_experts(wrapped):
    model = wrapped("Qwen3Moe")
    fresh = wrapped("Qwen3Moe")
    dynrank.resize(model, unlike(model))
    follow_checkpoint_ranks(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_growth_keeps_every_expert_and_adds_rows_orthogonal_to_its_own(kind, wrapped):
    model = wrapped(kind).double()
    before = updates(model)
    layers = {name: layer for name, layer in dynrank.lora_layers(model) if name in before}
    old = {name: layer.rank for name, layer in layers.items()}
    dynrank.resize(model, {name: rank + 2 for name, rank in old.items()})
    for name, now in updates(model).items():
        assert_close(now, before[name], rtol=0, atol=1e-12)
        for lora_B, lora_A in layers[name].products():
            old_rows, rows = lora_A.split([old[name], 2])
            assert not (rows @ old_rows.mT).abs().gt(1e-12).any()
            assert rows.any(dim=1).all()
            assert not lora_B[:, old[name] :].any()


def factors(model):
    return {
        name: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
        for name, layer in dynrank.lora_layers(model)
    }


def test_a_snapshot_gives_back_factors_and_optimizer_state(wrapped):
    model = wrapped("Qwen3Moe")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    before = factors(model)
    state = copy.deepcopy(optimizer.state_dict())
    snapshot = Snapshot(model, [optimizer])
    dynrank.resize(model, unlike(model), optimizers=[optimizer])
    snapshot.restore()
    assert_close(factors(model), before, rtol=0, atol=0)
    assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


def test_an_expert_that_no_token_has_reached_can_still_learn_after_the_cut(wrapped):
    model = wrapped("Mixtral")
    name, layer = next((name, layer) for name, layer in dynrank.lora_layers(model) if layer.num_products > 1)
    with torch.no_grad():
        layer.products()[2][0].zero_()
    rows = layer.products()[2][1].clone()
    dynrank.resize(model, {name: 2})
    lora_B, lora_A = layer.products()[2]
    assert not lora_B.any()
    assert_close(lora_A, rows[:2])


def test_a_rank_above_the_layers_shape_shrinks_exactly():
    """PEFT allows any rank; the gate of Qwen's shared expert has one output."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 4)), LoraConfig(r=8, target_modules=["0"])).double()
    ((name, layer),) = dynrank.lora_layers(model)
    nn.init.normal_(layer.lora_B)
    update = layer.scaling * layer.lora_B @ layer.lora_A
    u, s, vh = torch.linalg.svd(update.detach(), full_matrices=False)
    (report,) = dynrank.resize(model, 3)
    assert_close(layer.scaling * layer.lora_B @ layer.lora_A, (u[:, :3] * s[:3]) @ vh[:3], rtol=0, atol=1e-12)
    assert len(report.singular_values) == 8
    assert params_per_rank(layer) == 20
