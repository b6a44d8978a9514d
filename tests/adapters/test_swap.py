"""One adapter in the place of another, between calls: equal to a fresh load whatever was there before, or refused."""

import gc
import weakref

import pytest
import torch

import dynrank
from dynrank.layers.base import LoRALayer

ADAPTERS = {
    # Unlike ranks, targets (one on the tied head) and scaling.
    "gpt2": [
        {"target_modules": ["c_attn"]},
        {"rank": 5, "target_modules": ["wte", "c_attn", "c_fc"], "rank_map": {"wte": 1}},
        {"rank": 2, "target_modules": ["c_proj", "lm_head"], "rslora": True},
    ],
    # Each with a trained classifier.
    "bert": [
        {"target_modules": ["query"]},
        {"rank": 2, "target_modules": ["query"]},
        {"target_modules": ["value"]},
    ],
}


@pytest.fixture
def saved(zoo, tmp_path):
    def folders(kind):
        return [zoo.saved(tmp_path / f"{kind}{i}", kind, i, **options) for i, options in enumerate(ADAPTERS[kind], 1)]

    return folders


@pytest.fixture
def adapters(saved):
    return saved("gpt2")


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_swap_equals_a_fresh_load_whatever_was_there_before(kind, saved, zoo, in_memory):
    model = zoo.plain(kind)
    adapters = saved(kind)
    for index in (0, 1, 2, 0, 2, 1, 0):
        adapter = dynrank.read_adapter(adapters[index]) if in_memory else adapters[index]
        assert dynrank.swap_adapter(model, adapter) is model
        fresh = dynrank.load_adapter(zoo.plain(kind), adapters[index])
        assert torch.equal(zoo.outputs(model), zoo.outputs(fresh))
        for found in ("rank", "scaling"):
            ours, theirs = ({n: getattr(x, found) for n, x in dynrank.lora_layers(m)} for m in (model, fresh))
            assert ours == theirs
        ours, theirs = ([n for n, p in m.named_parameters() if p.requires_grad] for m in (model, fresh))
        assert ours == theirs


def test_swap_then_save_writes_the_adapter_that_came_in(adapters, zoo, tmp_path):
    model = dynrank.swap_adapter(dynrank.load_adapter(zoo.plain("gpt2"), adapters[0]), adapters[1])
    dynrank.save_adapter(model, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (adapters[1] / name).read_bytes()


def test_swap_draws_no_random_numbers(adapters, zoo):
    model = dynrank.load_adapter(zoo.plain("gpt2"), adapters[0])
    before = torch.get_rng_state()
    dynrank.swap_adapter(model, adapters[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_swap_refuses_what_cannot_be_swapped_and_changes_nothing(saved, zoo, tmp_path):
    first, second, _ = saved("bert")
    without_head = zoo.saved(tmp_path / "bare", "bert", target_modules=["value"], modules_to_save=())
    model = dynrank.load_adapter(zoo.plain("bert"), first)
    for adapter, message in {
        without_head: r"classifier\.weight' was trained whole .* plain model",
        saved("gpt2")[0]: "no module 'transformer",
        tmp_path / "absent": "absent",
    }.items():
        zoo.assert_refused(model, adapter, message, dynrank.swap_adapter)
    dynrank.swap_adapter(model, second)
    assert torch.equal(zoo.outputs(model), zoo.outputs(dynrank.load_adapter(zoo.plain("bert"), second)))


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
    before = census()
    old = weakref.ref(next(dynrank.lora_layers(model))[1].lora_A)
    swaps(48)
    # Objects that other tests left may go.
    assert all(now <= then for now, then in zip(census(), before, strict=True))
    assert old() is None
