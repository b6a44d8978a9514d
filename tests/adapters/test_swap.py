"""Adapters exchanged in a live model: equal to a fresh load, all or nothing, one or the other for every forward."""

import copy
import gc
import threading
import time
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import dynrank
from dynrank.adapters import load as adapter_loading
from dynrank.errors import ConfigurationError
from dynrank.layers.base import LoRALayer

TINY = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**TINY, n_embd=8, n_layer=2, n_head=2, n_positions=16)).eval()


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**TINY, **sizes, num_labels=3)).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def saved(folder, make, seed, **options):
    """An adapter of random numbers in ``folder``."""
    model = dynrank.add_lora(make(), **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    dynrank.save_adapter(model, folder)
    return folder


@pytest.fixture
def adapters(tmp_path):
    """Three adapters for GPT-2: unlike ranks, targets (one on the tied head) and scaling."""
    return [
        saved(tmp_path / "a", gpt2, 1, rank=3, alpha=5, target_modules=["c_attn"]),
        saved(tmp_path / "b", gpt2, 2, rank=5, alpha=2, target_modules=["wte", "c_attn", "c_fc"], rank_map={"wte": 1}),
        saved(tmp_path / "c", gpt2, 3, rank=2, target_modules=["c_proj", "lm_head"], rslora=True),
    ]


@pytest.mark.parametrize("in_memory", [False, True])
def test_swap_equals_a_fresh_load_whatever_was_there_before(adapters, in_memory):
    model, plain = gpt2(), gpt2()
    for index in (0, 1, 2, 0, 2, 1, 0):
        adapter = dynrank.read_adapter(adapters[index]) if in_memory else adapters[index]
        assert dynrank.swap_adapter(model, adapter) is model
        fresh = dynrank.load_adapter(gpt2(), adapters[index])
        assert torch.equal(logits(model), logits(fresh))
        assert [(n, x.rank, x.scaling) for n, x in dynrank.lora_layers(model)] == [
            (n, x.rank, x.scaling) for n, x in dynrank.lora_layers(fresh)
        ]
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            n for n, p in fresh.named_parameters() if p.requires_grad
        ]
    assert torch.equal(dynrank.merge(model).transformer.wte.weight, plain.transformer.wte.weight)


def test_swap_then_save_writes_the_adapter_that_came_in(adapters, tmp_path):
    model = dynrank.swap_adapter(dynrank.load_adapter(gpt2(), adapters[0]), adapters[1])
    dynrank.save_adapter(model, tmp_path / "again")
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert all((tmp_path / "again" / n).read_bytes() == (adapters[1] / n).read_bytes() for n in names)


def test_swap_draws_no_random_numbers(adapters):
    """A text that is being sampled in another thread goes on as it would have."""
    model = gpt2()
    before = torch.get_rng_state()
    dynrank.swap_adapter(dynrank.load_adapter(model, adapters[0]), adapters[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def with_heads(tmp_path):
    """Three adapters for BERT: with a trained classifier, with another one, and without."""
    whole = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    return [
        saved(tmp_path / "bert_a", bert, 1, rank=3, **whole),
        saved(tmp_path / "bert_b", bert, 2, rank=2, **whole),
        saved(tmp_path / "bert_c", bert, 3, rank=2, target_modules=["value", "classifier"]),
    ]


def test_swap_gives_a_head_back_its_own_values(with_heads):
    model, base = bert(), bert().state_dict()
    for index in (0, 1, 2, 0, 2):
        dynrank.swap_adapter(model, with_heads[index])
        assert torch.equal(logits(model), logits(dynrank.load_adapter(bert(), with_heads[index])))
    assert torch.equal(model.classifier.base.weight, base["classifier.weight"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


def test_swap_refuses_to_leave_a_head_of_the_adapter_before(with_heads):
    model = dynrank.load_adapter(bert(), with_heads[0])
    assert_refused(model, with_heads[2], r"classifier\.weight' was trained whole .* plain model")
    dynrank.swap_adapter(model, with_heads[1])
    assert torch.equal(logits(model), logits(dynrank.load_adapter(bert(), with_heads[1])))


def assert_refused(model, adapter, message):
    modules, tensors = list(model.modules()), [(n, p, p.clone()) for n, p in model.named_parameters()]
    with pytest.raises(ConfigurationError, match=message):
        dynrank.swap_adapter(model, adapter)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    for (name, now), (before, parameter, value) in zip(model.named_parameters(), tensors, strict=True):
        assert name == before
        assert now is parameter
        assert torch.equal(now, value)


def test_swap_refuses_an_adapter_of_another_model_and_changes_nothing(adapters, with_heads, tmp_path):
    model = dynrank.load_adapter(gpt2(), adapters[0])
    assert_refused(model, with_heads[0], "no module 'bert")
    assert_refused(model, tmp_path / "absent", "absent")


def test_swap_refuses_merged_layers(adapters):
    model = dynrank.load_adapter(gpt2(), adapters[0])
    layer = next(dynrank.lora_layers(model))[1]
    layer.merge()
    with pytest.raises(RuntimeError, match="c_attn' is merged"):
        dynrank.swap_adapter(model, adapters[1])
    layer.unmerge()
    dynrank.swap_adapter(model, adapters[1])


def test_a_hundred_swaps_leak_nothing(adapters):
    model = gpt2()

    def swaps(count):
        kept = [dynrank.read_adapter(folder) for folder in adapters]
        for index in range(count):
            dynrank.swap_adapter(model, kept[index % 3] if index % 2 else adapters[index % 3])
            logits(model)
        dynrank.swap_adapter(model, adapters[0])

    def census():
        gc.collect()
        kinds = [type(o) for o in gc.get_objects()]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        tensors = sum(issubclass(kind, torch.Tensor) for kind in kinds)
        return hooks, tensors, sum(issubclass(kind, LoRALayer) for kind in kinds), len(list(model.parameters()))

    swaps(6)
    before, old = census(), weakref.ref(next(dynrank.lora_layers(model))[1].lora_A)
    swaps(102)
    assert all(now <= then for now, then in zip(census(), before, strict=True))  # what other tests left may go
    assert old() is None


class Chain(nn.Module):
    """Many layers, each of which multiplies by what its adapter says: a mixture of adapters shows in the product."""

    def __init__(self, length=12):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(length))
        for layer in self.layers:
            nn.init.eye_(layer.weight)

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x)
            self.pause(index)
        return x

    def pause(self, index):
        time.sleep(0)


def scaled(folder, factor, every=1):
    """An adapter under which each (or each second) layer of a Chain multiplies by 1 + factor."""
    names = [f"layers.{index}" for index in range(0, 12, every)]
    model = dynrank.add_lora(Chain(), rank=4 // every, target_modules=names)
    for _, layer in dynrank.lora_layers(model):
        identity = factor * torch.eye(4)
        with torch.no_grad():
            layer.lora_A.copy_(torch.eye(4)[: layer.rank])
            layer.lora_B.copy_(identity[:, : layer.rank])
    dynrank.save_adapter(model, folder)
    return dynrank.read_adapter(folder)


@pytest.fixture
def chain(tmp_path):
    """(model, two adapters, what it computes under each)."""
    two = [scaled(tmp_path / "a", 0.5), scaled(tmp_path / "b", 0.25, every=2)]
    model = Chain()
    expected = [dynrank.swap_adapter(copy.deepcopy(model), adapter)(torch.ones(1, 4)).tolist() for adapter in two]
    dynrank.swap_adapter(model, two[0])
    return model, two, expected


def compiled(model, entry):
    """What to call, and to give to swap_adapter."""
    if entry == "compiled in place":
        model.compile(backend="eager")
    return torch.compile(model, backend="eager") if entry == "compiled" else model


COMPILING = [  # what torch itself does while it compiles
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
ENTRIES = ["model", *(pytest.param(entry, marks=COMPILING) for entry in ("compiled", "compiled in place"))]


@pytest.fixture(autouse=True)
def nothing_compiled_stays():
    yield
    torch._dynamo.reset()


def swap_in_the_middle_of_a_forward(model, adapter, entry="model"):
    """(what a forward returned during which a swap was asked for, whether the swap was over before it)."""
    call = compiled(model, entry)
    halfway, go_on, results, done = threading.Event(), threading.Event(), [], threading.Event()

    def pause(index):
        if index == 5 and not halfway.is_set():
            halfway.set()
            assert go_on.wait(20)

    def forward():
        results.append(call(torch.ones(1, 4)).tolist())

    def swap():
        dynrank.swap_adapter(call, adapter)
        done.set()

    model.pause = pause
    threads = [threading.Thread(target=forward), threading.Thread(target=swap)]
    threads[0].start()
    assert halfway.wait(20)
    threads[1].start()
    early = done.wait(0.2)
    go_on.set()
    for thread in threads:
        thread.join(20)
    return results[0], early


@pytest.mark.parametrize("entry", ENTRIES)
def test_swap_waits_for_the_forward_under_way(chain, entry):
    model, two, expected = chain
    result, early = swap_in_the_middle_of_a_forward(model, two[1], entry)
    assert not early
    assert result == expected[0]
    assert model(torch.ones(1, 4)).tolist() == expected[1]


def test_a_mixture_would_be_seen(chain, monkeypatch):
    """Without the waiting, the same forward sees both adapters: the tests beside this one can fail."""
    monkeypatch.setattr(adapter_loading, "gate_of", lambda m: type("G", (), {"closed": lambda s: nullcontext()})())
    model, two, expected = chain
    result, early = swap_in_the_middle_of_a_forward(model, two[1])
    assert early
    assert result not in expected


@pytest.mark.parametrize("entry", [*ENTRIES, "wrapper"])
def test_every_forward_of_many_threads_sees_one_adapter_or_the_other(chain, entry):
    model, two, expected = chain
    model.pause = torch.compiler.disable(lambda _: time.sleep(0))
    call = nn.Sequential(nn.Identity(), model) if entry == "wrapper" else compiled(model, entry)
    stop, seen, failures = threading.Event(), [], []

    def work():
        try:
            while not stop.is_set():
                seen.append(call(torch.ones(1, 4)).tolist())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for index in range(12 if entry.startswith("compiled") else 60):
        dynrank.swap_adapter(call if entry == "compiled" else model, two[1 - index % 2])
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not failures
    print("SEEN", __import__("collections").Counter(map(str, seen)), expected)
    assert all(result in expected for result in seen)
    assert all(result in seen for result in expected)  # both were at work


def test_swap_does_not_wait_for_a_forward_that_an_exception_ended(chain):
    model, two, expected = chain

    def interrupt(index):
        if index == 5:
            raise KeyboardInterrupt

    model.pause = interrupt
    ended = threading.Event()

    def forward():
        try:
            model(torch.ones(1, 4))
        except KeyboardInterrupt:
            ended.set()
            time.sleep(1)  # the thread lives on

    thread = threading.Thread(target=forward)
    thread.start()
    assert ended.wait(20)
    dynrank.swap_adapter(model, two[1])
    assert thread.is_alive()
    model.pause = lambda _: None
    assert model(torch.ones(1, 4)).tolist() == expected[1]
    thread.join(20)


def test_swap_within_the_models_own_forward_is_refused(chain):
    model, two, expected = chain
    model.pause = lambda _: dynrank.swap_adapter(model, two[1])
    with pytest.raises(RuntimeError, match="own forward"):
        model(torch.ones(1, 4))
    model.pause = lambda _: None
    assert model(torch.ones(1, 4)).tolist() == expected[0]
