"""LoRA in stacked experts: dynrank's own against PEFT's, and PEFT's, expert by expert, against the dense SVD."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from trained import updated

import dynrank
from dynrank.layers.experts import grouped_product
from dynrank.layers.peft_layers import follow_checkpoint_ranks

# For these models PEFT's all-linear means experts and routers, too.
REWRITTEN = ("Mixtral", "Qwen3Moe", "DeepseekV3")
KINDS = (*REWRITTEN, "Qwen3_5Moe", "GptOss", "GraniteMoe")
TENSORS = ("experts.gate_up_proj", "experts.down_proj")
EXPERTS = r".*\.experts\.(gate_up|down)_proj"
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def own(model, rank=3, **options):
    return dynrank.add_lora(model, rank=rank, alpha=6, target_modules=EXPERTS, **options)


def both(model):
    """(dynrank's layers, PEFT's) in one model, with equal factors."""
    options = {"target_modules": [], "target_parameters": TENSORS}
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, lora_alpha=6, **options))
    ours = updated(own(model), 0.3)
    theirs = theirs.eval()
    for mine, other in pairs(ours, theirs):
        other.set_factors(mine.lora_A.detach().clone(), mine.lora_B.detach().clone())
    return ours, theirs


def pairs(ours, theirs):
    """Layers of the same name; PEFT's list the last of a module's parameters first."""
    others = dict(dynrank.lora_layers(theirs))
    return [(layer, others.pop(f"base_model.model.{name}")) for name, layer in dynrank.lora_layers(ours)]


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_a_fresh_layer_leaves_the_model_as_it_is_to_the_bit(kind, tiny_moe):
    for rank in (3, 8):
        assert torch.equal(own(tiny_moe(kind), rank)(IDS).logits, tiny_moe(kind)(IDS).logits)


# torch's grouped_mm takes no width of 10 in float32.
@pytest.mark.parametrize(("kind", "width"), [*((kind, 24) for kind in KINDS), ("Mixtral", 10)])
def test_output_and_gradients_are_pefts_and_stay_so_through_a_change_of_rank(kind, width, tiny_moe):
    ours, theirs = both(tiny_moe(kind, intermediate_size=width, experts_implementation="eager"))
    for rank in (3, 2):
        for model in (ours, theirs):
            dynrank.resize(model, rank, optimizers=())
            model(IDS).logits.square().mean().backward()
        assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
        for layer, other in pairs(ours, theirs):
            assert layer.rank == other.rank == rank
            for mine, expected in ((layer.lora_A.grad, other.lora_A.grad), (layer.lora_B.grad, other.lora_B.grad)):
                assert_close(mine, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["DeepseekV3", "GptOss"])
def test_merging_gives_the_plain_model_back_with_the_update_in_its_weights(kind, tiny_moe):
    model = updated(own(tiny_moe(kind)), 0.3)
    logits = model(IDS).logits
    dynrank.merge(model)
    plain = tiny_moe(kind)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert_close(model(IDS).logits, logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits, plain(IDS).logits)


def test_all_linear_takes_experts_and_rank_maps_name_them(tiny_moe):
    rules = {r"experts\.down_proj": 2, r"layers\.1\..*gate_up_proj": {"rank": 5, "final_rank": 1}}
    model = dynrank.add_lora(tiny_moe("Qwen3Moe"), rank=4, alpha=4, rank_map=rules)
    ranks = {name: layer.rank for name, layer in dynrank.lora_layers(model) if ".experts." in name}
    start = "model.layers.{}.mlp.experts.{}_proj"
    assert ranks == {
        start.format(i, n): r for i, n, r in [(0, "gate_up", 4), (0, "down", 2), (1, "gate_up", 5), (1, "down", 2)]
    }
    assert dict(dynrank.lora_layers(model))[start.format(1, "gate_up")].bounds.final_rank == 1


def test_unregistered_experts_are_named_and_the_other_layers_train(tiny_moe):
    model = tiny_moe("Llama4")
    stacked = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 3 or "router" in name)
    share = f"{stacked / sum(p.numel() for p in model.parameters()):.0%}"
    with pytest.warns(
        UserWarning, match=rf"{share} of the model .*4 parameters .*experts.gate_up_proj' and 2 layers .*router"
    ):
        dynrank.add_lora(model, rank=2, alpha=2)
    names = [name for name, _ in dynrank.lora_layers(model)]
    assert any(name.endswith("shared_expert.up_proj") for name in names)
    assert not [name for name in names if re.search(r"router|\.experts\.", name)]


def test_products_of_experts_compile_in_float32():
    """torch.compile knows grouped_mm in bfloat16 only."""
    x = torch.randn(7, 16)
    w = torch.randn(4, 16, 24)
    ends = torch.tensor([2, 2, 6, 7], dtype=torch.int32)
    assert_close(torch.compile(grouped_product, backend="eager")(x, w, ends), grouped_product(x, w, ends))


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
    return {name: min(2 + i % 3, layer.max_rank) for i, (name, layer) in enumerate(layers.items())}


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_becomes_the_best_approximation_of_its_dense_update(kind, wrapped):
    model = wrapped(kind).double()
    tensors = {name: layer for name, layer in dynrank.lora_layers(model) if layer.num_products > 1}
    # One expert that no token has reached yet; its rows of A stay, so that it can still learn.
    unreached = {name: layer.products()[2] for name, layer in tensors.items()}
    with torch.no_grad():
        for lora_B, _ in unreached.values():
            lora_B.zero_()
    rows = {name: lora_A.clone() for name, (_, lora_A) in unreached.items()}
    before = updates(model)
    ranks = unlike(model)
    reports = {report.layer: report for report in dynrank.resize(model, ranks, optimizers=())}
    assert {tuple(name.split(".")[-2:]) for name in before} == {tuple(name.split(".")) for name in TENSORS}
    assert reports.keys() == ranks.keys()
    for name, now in updates(model).items():
        u, s, vh = torch.linalg.svd(before[name], full_matrices=False)
        rank = ranks[name]
        assert_close(now, (u[:, :, :rank] * s[:, None, :rank]) @ vh[:, :rank], rtol=0, atol=1e-12)
        assert_close(tensors[name].products()[2][1], rows[name][:rank])
        assert_close(reports[name].predicted_error, float((before[name] - now).norm()))
        assert_close(
            torch.tensor(reports[name].singular_values),
            s[:, : len(reports[name].singular_values)].square().sum(0).sqrt().float(),
        )
        assert reports[name].params_per_rank == 4 * sum(before[name].shape[1:])


@pytest.mark.parametrize("kind", ["DeepseekV3", "Qwen3_5Moe", "GptOss"])
def test_unlike_ranks_in_pefts_files_and_in_checkpoints_load_to_the_bit(kind, wrapped, tiny_moe, tmp_path):
    model = wrapped(kind)
    fresh = wrapped(kind)
    dynrank.resize(model, unlike(model), optimizers=())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_moe(kind), tmp_path)
    follow_checkpoint_ranks(fresh)
    fresh.load_state_dict(model.state_dict())
    for other in (loaded, fresh):
        assert torch.equal(logits(other), logits(model))
        assert [layer.rank for _, layer in dynrank.lora_layers(other)] == [*unlike(model).values()]


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_growth_keeps_every_expert_and_adds_rows_orthogonal_to_its_own(kind, wrapped):
    model = wrapped(kind).double()
    before = updates(model)
    layers = {name: layer for name, layer in dynrank.lora_layers(model) if name in before}
    old = {name: layer.rank for name, layer in layers.items()}
    dynrank.resize(model, {name: rank + 2 for name, rank in old.items()}, optimizers=())
    for name, now in updates(model).items():
        assert_close(now, before[name], rtol=0, atol=1e-12)
        for lora_B, lora_A in layers[name].products():
            old_rows, rows = lora_A.split([old[name], 2])
            assert not (rows @ old_rows.mT).abs().gt(1e-12).any()
            assert rows.any(dim=1).all()
            assert not lora_B[:, old[name] :].any()


def test_a_rank_above_the_layers_shape_shrinks_exactly():
    """PEFT allows any rank; the gate of Qwen's shared expert has one output."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 4)), LoraConfig(r=8, target_modules=["0"])).double()
    ((name, layer),) = dynrank.lora_layers(model)
    nn.init.normal_(layer.lora_B)
    update = layer.scaling * layer.lora_B @ layer.lora_A
    u, s, vh = torch.linalg.svd(update.detach(), full_matrices=False)
    (report,) = dynrank.resize(model, 3, optimizers=())
    assert_close(layer.scaling * layer.lora_B @ layer.lora_A, (u[:, :3] * s[:3]) @ vh[:3], rtol=0, atol=1e-12)
    assert len(report.singular_values) == 8
    assert layer.params_per_rank == 20
