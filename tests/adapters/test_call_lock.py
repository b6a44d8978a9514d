"""Adapters exchanged while other threads use the model: every forward and every text sees one or the other."""

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from torch import nn
from trained import updated
from transformers import LlamaConfig, LlamaForCausalLM

import dynrank
from dynrank.adapters.call_lock import CallLock, call_lock_of

# A busy machine may need so many seconds.
LONG = 60
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


class Chain(nn.Module):
    """Many layers, each of which multiplies by what its adapter says: a mixture of adapters shows in the product."""

    def __init__(self, length=12):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(length))
        for layer in self.layers:
            nn.init.eye_(layer.weight)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            self.pause()
        return x

    def pause(self):
        time.sleep(0)


def llama():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **size, **ids, initializer_range=0.5)).eval()


class Forwards:
    """A Chain, used by forwards."""

    base = Chain
    options = [{"rank": 4, "target_modules": r"layers\.\d+"}, {"rank": 2, "target_modules": r"layers\.\d*[02468]"}]
    # The first is a module, and its call of this number is halfway through a use.
    middle = "layers.5", 1

    def __init__(self, folder):
        self.adapters = []
        for seed, chosen in enumerate(self.options):
            model = dynrank.add_lora(self.base(), **chosen)
            torch.manual_seed(seed)
            dynrank.save_adapter(updated(model), folder / str(seed))
            self.adapters.append(dynrank.read_adapter(folder / str(seed)))
        self.model = dynrank.load_adapter(self.base(), self.adapters[0])
        self.expected = [self.use(dynrank.load_adapter(self.base(), adapter)) for adapter in self.adapters]
        assert self.expected[0] != self.expected[1]

    @staticmethod
    def use(model):
        """What comes of one use."""
        return model(torch.ones(1, 4)).tolist()

    def interrupted(self, act):
        """What comes of one use, in whose midst ``act`` is called."""
        (name, halfway), calls = self.middle, count(1)

        def at_halfway(*_):
            if next(calls) == halfway:
                act()

        hook = self.model.get_submodule(name).register_forward_hook(at_halfway)
        try:
            return self.use(self.model)
        finally:
            hook.remove()


class Texts(Forwards):
    """A language model, used by its own ``generate``: 8 tokens, the likeliest ones."""

    base = staticmethod(llama)
    options = [
        {"rank": 4, "rank_map": {r"layers\.1\..*q_proj": 1}},
        {"rank": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_map": {r"layers\.0\..*q_proj": 5}},
    ]
    middle = "model", 4

    @staticmethod
    def use(model):
        return model.generate(PROMPT, max_new_tokens=8, do_sample=False).tolist()


class OwnLoop(Texts):
    """A language model, used by a loop of the test's own."""

    @staticmethod
    def use(model):
        ids = PROMPT
        with call_lock_of(model):
            for _ in range(8):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        return ids.tolist()


@pytest.fixture(params=[Forwards, Texts, OwnLoop])
def used(request, tmp_path):
    return request.param(tmp_path)


@contextmanager
def halfway(used):
    """The block runs while another thread is in the midst of a use; yields the future of what comes of it."""
    inside, go_on = threading.Event(), threading.Event()

    def pause():
        inside.set()
        assert go_on.wait(LONG)

    with ThreadPoolExecutor() as pool:
        use = pool.submit(used.interrupted, pause)
        try:
            assert inside.wait(LONG)
            yield use
        finally:
            go_on.set()


def test_swap_waits_for_the_use_under_way(used):
    swap = threading.Thread(target=dynrank.swap_adapter, args=(used.model, used.adapters[1]))
    with halfway(used) as use:
        swap.start()
        swap.join(0.3)
        assert swap.is_alive()
    swap.join(LONG)
    assert use.result() == used.expected[0]
    assert used.use(used.model) == used.expected[1]


def test_swap_that_is_interrupted_while_it_waits_lets_all_go_on(used, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with halfway(used), monkeypatch.context() as patched:
        patched.setattr(call_lock_of(used.model)._changed, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            dynrank.swap_adapter(used.model, used.adapters[1])
    assert used.use(used.model) == used.expected[0]
    dynrank.swap_adapter(used.model, used.adapters[1])
    assert used.use(used.model) == used.expected[1]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_swap_does_not_wait_for_a_use_that_an_exception_ended(used, error):
    def interrupt():
        raise error

    with pytest.raises(error):
        used.interrupted(interrupt)
    dynrank.swap_adapter(used.model, used.adapters[1])
    assert used.use(used.model) == used.expected[1]


def test_swap_within_the_models_own_use_is_refused(used):
    with pytest.raises(RuntimeError, match="own forward or generate"):
        used.interrupted(lambda: dynrank.swap_adapter(used.model, used.adapters[1]))
    assert used.use(used.model) == used.expected[0]


def use_and_swap(use, used, swapped, swaps):
    """Three threads use a model without a pause, whose adapters are swapped meanwhile."""
    stop, results = threading.Event(), []

    def work():
        while not stop.is_set():
            results.append(use())

    with ThreadPoolExecutor() as pool:
        users = [pool.submit(work) for _ in range(3)]
        try:
            for index in range(swaps):
                before = len(results)
                dynrank.swap_adapter(swapped, used.adapters[1 - index % 2])
                # A swap does not wait for ever, on a busy machine either.
                assert len(results) - before <= 120
        finally:
            stop.set()
    for user in users:
        user.result()
    assert all(result in used.expected for result in results)
    assert all(result in results for result in used.expected)


def test_every_use_in_many_threads_sees_one_adapter_or_the_other(used):
    """Swaps without a pause: neither they nor the uses starve, though those of three threads overlap all the time."""
    use_and_swap(lambda: used.use(used.model), used, used.model, swaps=20)


@pytest.mark.parametrize("entry", ["wrapped by a module", "compiled", "compiled before it was loaded", "in place"])
def test_every_forward_sees_one_adapter_however_it_is_called(entry, tmp_path, monkeypatch):
    used = Forwards(tmp_path)
    call = swapped = used.model
    monkeypatch.setattr(Chain, "pause", torch.compiler.disable(Chain.pause))
    if entry == "wrapped by a module":
        call = nn.Sequential(nn.Identity(), used.model)
    elif entry == "in place":
        used.model.compile(backend="eager")
    else:
        call = swapped = torch.compile(Chain() if "before" in entry else used.model, backend="eager")
    dynrank.swap_adapter(swapped, used.adapters[0])
    try:
        use_and_swap(lambda: used.use(call), used, swapped, swaps=12)
    finally:
        torch._dynamo.reset()


def test_a_model_that_can_be_swapped_compiles_to_one_graph(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    dynrank.save_adapter(dynrank.add_lora(copy.deepcopy(model), rank=2), tmp_path)
    dynrank.load_adapter(model, tmp_path)
    x = torch.ones(1, 4)
    try:
        for compiled in (model, nn.Sequential(nn.Identity(), model)):
            assert torch.equal(torch.compile(compiled, backend="eager", fullgraph=True)(x), model(x))
    finally:
        torch._dynamo.reset()


def test_a_model_with_a_lock_is_still_what_it_was(tmp_path):
    """It is named, saved, copied and pickled as before, and freed when nobody holds it."""
    used = Texts(tmp_path)
    model = used.model
    assert isinstance(model, LlamaForCausalLM)
    assert (type(model).__name__, type(model).__module__) == ("LlamaForCausalLM", LlamaForCausalLM.__module__)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made) is LlamaForCausalLM
        assert used.use(dynrank.swap_adapter(made, used.adapters[1])) == used.expected[1]
    assert used.use(model) == used.expected[0]
    dynrank.merge(model).save_pretrained(tmp_path / "merged")
    assert used.use(LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()) == used.expected[0]


def test_a_call_that_has_waited_comes_before_the_next_change():
    lock, order = CallLock(), []

    def call():
        with lock:
            order.append("call")

    def change():
        with lock.closed():
            order.append("second change")

    with ThreadPoolExecutor() as pool, lock.closed():
        pool.submit(call)
        while not lock._waiting:
            time.sleep(0.001)
        pool.submit(change)
        order.append("first change")
    assert order == ["first change", "call", "second change"]
