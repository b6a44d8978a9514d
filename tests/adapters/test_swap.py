"""One adapter in the place of another: equal to a fresh load whatever was there before, all or nothing."""

import gc
import weakref

import pytest
import torch

import dynrank
from dynrank.layers.base import LoRALayer


@pytest.fixture
def adapters(zoo, tmp_path):
    """Three adapters for GPT-2: unlike ranks, targets (one on the tied head) and scaling."""
    rules = {"wte": 1}
    return [
        zoo.saved(tmp_path / "a", "gpt2", 1, target_modules=["c_attn"]),
        zoo.saved(tmp_path / "b", "gpt2", 2, rank=5, target_modules=["wte", "c_attn", "c_fc"], rank_map=rules),
        zoo.saved(tmp_path / "c", "gpt2", 3, rank=2, target_modules=["c_proj", "lm_head"], rslora=True),
    ]


@pytest.mark.parametrize("in_memory", [False, True])
def test_swap_equals_a_fresh_load_whatever_was_there_before(adapters, zoo, in_memory):
    model, plain = zoo.plain("gpt2"), zoo.plain("gpt2")
    for index in (0, 1, 2, 0, 2, 1, 0):
        adapter = dynrank.read_adapter(adapters[index]) if in_memory else adapters[index]
        assert dynrank.swap_adapter(model, adapter) is model
        fresh = dynrank.load_adapter(zoo.plain("gpt2"), adapters[index])
        assert torch.equal(zoo.outputs(model), zoo.outputs(fresh))
        for found in ("rank", "scaling"):
            ours, theirs = ({n: getattr(x, found) for n, x in dynrank.lora_layers(m)} for m in (model, fresh))
            assert ours == theirs
        ours, theirs = ([n for n, p in m.named_parameters() if p.requires_grad] for m in (model, fresh))
        assert ours == theirs
    assert torch.equal(dynrank.merge(model).transformer.wte.weight, plain.transformer.wte.weight)


def test_swap_then_save_writes_the_adapter_that_came_in(adapters, zoo, tmp_path):
    model = dynrank.swap_adapter(dynrank.load_adapter(zoo.plain("gpt2"), adapters[0]), adapters[1])
    dynrank.save_adapter(model, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (adapters[1] / name).read_bytes()


def test_swap_draws_no_random_numbers(adapters, zoo):
    """A text that is being sampled in another thread goes on as it would have."""
    model = dynrank.load_adapter(zoo.plain("gpt2"), adapters[0])
    before = torch.get_rng_state()
    dynrank.swap_adapter(model, adapters[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def with_heads(zoo, tmp_path):
    """Three adapters for BERT: with a trained classifier, with another one, and without."""
    return [
        zoo.saved(tmp_path / "bert_a", "bert", 1, target_modules=["query"]),
        zoo.saved(tmp_path / "bert_b", "bert", 2, rank=2, target_modules=["query"]),
        zoo.saved(tmp_path / "bert_c", "bert", 3, target_modules=["value", "classifier"], modules_to_save=()),
    ]


def test_swap_gives_a_head_back_its_own_values(with_heads, zoo):
    model, base = zoo.plain("bert"), zoo.plain("bert").state_dict()
    for index in (0, 1, 2, 0, 2):
        dynrank.swap_adapter(model, with_heads[index])
        fresh = dynrank.load_adapter(zoo.plain("bert"), with_heads[index])
        assert torch.equal(zoo.outputs(model), zoo.outputs(fresh))
    assert torch.equal(model.classifier.base.weight, base["classifier.weight"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "lora_" in n}


def test_swap_refuses_to_leave_a_head_of_the_adapter_before(with_heads, zoo):
    model = dynrank.load_adapter(zoo.plain("bert"), with_heads[0])
    zoo.assert_refused(
        model, with_heads[2], r"classifier\.weight' was trained whole .* plain model", dynrank.swap_adapter
    )
    dynrank.swap_adapter(model, with_heads[1])
    fresh = dynrank.load_adapter(zoo.plain("bert"), with_heads[1])
    assert torch.equal(zoo.outputs(model), zoo.outputs(fresh))


def test_swap_refuses_what_cannot_be_swapped_and_changes_nothing(adapters, with_heads, zoo, tmp_path):
    model = dynrank.load_adapter(zoo.plain("gpt2"), adapters[0])
    zoo.assert_refused(model, with_heads[0], "no module 'bert", dynrank.swap_adapter)
    zoo.assert_refused(model, tmp_path / "absent", "absent", dynrank.swap_adapter)
    dynrank.swap_adapter(model, adapters[1])


def test_many_swaps_leak_nothing(adapters, zoo):
    model = zoo.plain("gpt2")

    def swaps(count):
        kept = [dynrank.read_adapter(folder) for folder in adapters]
        for index in range(count):
            dynrank.swap_adapter(model, kept[index % 3] if index % 2 else adapters[index % 3])
            zoo.outputs(model)
        dynrank.swap_adapter(model, adapters[0])

    def census():
        gc.collect()
        kinds = [type(o) for o in gc.get_objects()]
        tensors = sum(issubclass(kind, torch.Tensor) for kind in kinds)
        return tensors, sum(issubclass(kind, LoRALayer) for kind in kinds), len(list(model.parameters()))

    swaps(6)
    before, old = census(), weakref.ref(next(dynrank.lora_layers(model))[1].lora_A)
    swaps(48)
    # Objects that other tests left may go.
    assert all(now <= then for now, then in zip(census(), before, strict=True))
    assert old() is None
