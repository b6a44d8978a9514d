"""Adapters exchanged while other threads use the model: every forward and every text sees one or the other."""

import copy
import pickle
import threading
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dynrank
from dynrank.adapters import load
from dynrank.adapters.call_lock import CallLock, call_lock_of

LONG = 60  # seconds: a busy machine


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
        with torch.no_grad():
            layer.lora_A.copy_(torch.eye(4)[: layer.rank])
            layer.lora_B.copy_(factor * torch.eye(4)[:, : layer.rank])
    dynrank.save_adapter(model, folder)
    return dynrank.read_adapter(folder)


def llama():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **size, **ids, initializer_range=0.5)).eval()


def text(model, **options):
    """What the model writes, greedily: 8 tokens."""
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    return model.generate(ids, max_new_tokens=8, do_sample=False, **options)[0, 5:].tolist()


class Streamer:
    """Calls ``on_token(number of the token)`` with each one but the prompt."""

    def __init__(self, on_token):
        self.on_token, self.count = on_token, -1

    def put(self, tokens):
        self.count += 1
        if self.count:
            self.on_token(self.count)

    def end(self):
        pass


class Forwards:
    """A Chain, used by forwards."""

    def __init__(self, folder):
        self.adapters = [scaled(folder / "a", 0.5), scaled(folder / "b", 0.25, every=2)]
        self.model = dynrank.load_adapter(Chain(), self.adapters[0])
        self.expected = [self.use(dynrank.load_adapter(Chain(), adapter)) for adapter in self.adapters]

    @staticmethod
    def use(model, halfway=None):
        """What comes of one use; ``halfway`` is called in its midst."""
        if halfway is not None:
            model.pause = lambda index: halfway() if index == 5 else None
        try:
            return model(torch.ones(1, 4)).tolist()
        finally:
            model.__dict__.pop("pause", None)


class Texts:
    """A language model, used by its own ``generate``."""

    def __init__(self, folder):
        rules = {r"layers\.1\..*q_proj": 1, r"layers\.0\..*q_proj": 5}
        options = [{"rank": 4}, {"rank": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_map": rules}]
        self.adapters = []
        for seed, chosen in enumerate(options):
            model = dynrank.add_lora(llama(), **chosen)
            torch.manual_seed(seed)
            for _, layer in dynrank.lora_layers(model):
                nn.init.normal_(layer.lora_B, std=1.0)
            dynrank.save_adapter(model, folder / str(seed))
            self.adapters.append(dynrank.read_adapter(folder / str(seed)))
        self.model = dynrank.load_adapter(llama(), self.adapters[0])
        self.expected = [self.use(dynrank.load_adapter(llama(), adapter)) for adapter in self.adapters]
        assert self.expected[0] != self.expected[1]

    @staticmethod
    def use(model, halfway=None):
        streamer = None if halfway is None else Streamer(lambda count: halfway() if count == 4 else None)
        return text(model, streamer=streamer)


class OwnLoop(Texts):
    """A language model, used by a loop of the test's own."""

    @staticmethod
    def use(model, halfway=None):
        ids = torch.tensor([[3, 1, 4, 1, 5]])
        with call_lock_of(model):
            for count in range(8):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
                if halfway is not None and count == 4:
                    halfway()
        return ids[0, 5:].tolist()


@pytest.fixture(params=[Forwards, Texts, OwnLoop])
def used(request, tmp_path):
    return request.param(tmp_path)


def swap_in_the_middle(used, model):
    """(what came of a use during which a swap was asked for, whether the swap was over before it)."""
    halfway, go_on, done, results = threading.Event(), threading.Event(), threading.Event(), []

    def pause():
        if not halfway.is_set():
            halfway.set()
            assert go_on.wait(LONG)

    def swap():
        dynrank.swap_adapter(model, used.adapters[1])
        done.set()

    threads = [threading.Thread(target=lambda: results.append(used.use(model, pause))), threading.Thread(target=swap)]
    threads[0].start()
    assert halfway.wait(LONG)
    threads[1].start()
    early = done.wait(0.3)
    go_on.set()
    for thread in threads:
        thread.join(LONG)
    return results[0], early


def test_swap_waits_for_the_use_under_way(used):
    result, early = swap_in_the_middle(used, used.model)
    assert not early
    assert result == used.expected[0]
    assert used.use(used.model) == used.expected[1]


def test_a_mixture_would_be_seen(used, monkeypatch):
    """Without the waiting, the same use sees both adapters: the tests beside this one can fail."""
    monkeypatch.setattr(load, "call_lock_of", lambda model: SimpleNamespace(closed=nullcontext))
    result, early = swap_in_the_middle(used, used.model)
    assert early
    assert result not in used.expected


@contextmanager
def in_use(use, count):
    """Threads that use a model without a pause; yields what comes of it."""
    stop, results, failures = threading.Event(), [], []

    def work():
        try:
            while not stop.is_set():
                results.append(use())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield results
    finally:
        stop.set()
        for thread in threads:
            thread.join(LONG)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_use_in_many_threads_sees_one_adapter_or_the_other(used, threads):
    """Swaps without a pause: neither they nor the uses starve, though those of three threads overlap all the time."""
    with in_use(lambda: used.use(used.model), threads) as results:
        for index in range(20):
            before = len(results)
            dynrank.swap_adapter(used.model, used.adapters[1 - index % 2])
            assert len(results) - before <= 40 * threads  # it does not wait for ever, on a busy machine either
    assert all(result in used.expected for result in results)
    assert all(result in results for result in used.expected)


COMPILING = [  # what torch itself does while it compiles
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.mark.parametrize(
    "entry",
    [
        "wrapped by a module",
        *(pytest.param(entry, marks=COMPILING) for entry in ("compiled", "compiled before it was loaded", "in place")),
    ],
)
def test_every_forward_sees_one_adapter_however_it_is_called(entry, tmp_path, monkeypatch):
    used = Forwards(tmp_path)
    call = model = used.model
    monkeypatch.setattr(Chain, "pause", torch.compiler.disable(Chain.pause))
    if entry == "wrapped by a module":
        call = nn.Sequential(nn.Identity(), model)
    elif entry == "in place":
        model.compile(backend="eager")
    else:
        call = torch.compile(Chain() if "before" in entry else model, backend="eager")
    swapped = model if entry == "wrapped by a module" else call
    dynrank.swap_adapter(swapped, used.adapters[0])
    try:
        with in_use(lambda: call(torch.ones(1, 4)).tolist(), 3) as results:
            for index in range(12):
                dynrank.swap_adapter(swapped, used.adapters[1 - index % 2])
    finally:
        torch._dynamo.reset()
    assert all(result in used.expected for result in results)
    assert all(result in results for result in used.expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
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


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_swap_does_not_wait_for_a_use_that_an_exception_ended(used, error):
    ended, leave = threading.Event(), threading.Event()

    def interrupt():
        raise error

    def work():
        try:
            used.use(used.model, interrupt)
        except error:
            ended.set()
            leave.wait(LONG)  # the thread lives on

    thread = threading.Thread(target=work)
    thread.start()
    assert ended.wait(LONG)
    dynrank.swap_adapter(used.model, used.adapters[1])
    assert used.use(used.model) == used.expected[1]
    leave.set()
    thread.join(LONG)


def test_swap_within_the_models_own_use_is_refused(used):
    with pytest.raises(RuntimeError, match="own forward or generate"):
        used.use(used.model, lambda: dynrank.swap_adapter(used.model, used.adapters[1]))
    assert used.use(used.model) == used.expected[0]


def test_swap_that_is_interrupted_while_it_waits_lets_all_go_on(used, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    go_on, inside = threading.Event(), threading.Event()

    def pause():
        inside.set()
        assert go_on.wait(LONG)

    thread = threading.Thread(target=lambda: used.use(used.model, pause))
    thread.start()
    assert inside.wait(LONG)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Condition, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            dynrank.swap_adapter(used.model, used.adapters[1])
    go_on.set()
    thread.join(LONG)
    assert used.use(used.model) == used.expected[0]
    dynrank.swap_adapter(used.model, used.adapters[1])
    assert used.use(used.model) == used.expected[1]


def test_a_model_with_a_lock_is_still_what_it_was(tmp_path):
    """It is named, saved, copied and pickled as before, and freed when nobody holds it."""
    used = Texts(tmp_path)
    model = used.model
    assert isinstance(model, LlamaForCausalLM)
    assert (type(model).__name__, type(model).__module__) == ("LlamaForCausalLM", LlamaForCausalLM.__module__)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(made) is LlamaForCausalLM
        assert text(dynrank.swap_adapter(made, used.adapters[1])) == used.expected[1]
    assert text(model) == used.expected[0]
    dynrank.merge(model).save_pretrained(tmp_path / "merged")
    assert text(LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()) == used.expected[0]


def test_a_call_that_has_waited_comes_before_the_next_change():
    lock, order = CallLock(), []

    def call():
        with lock:
            order.append("call")

    def change():
        with lock.closed():
            order.append("second change")

    with lock.closed():
        threads = [threading.Thread(target=target) for target in (call, change)]
        threads[0].start()
        while not lock._waiting:
            time.sleep(0.001)
        threads[1].start()
        order.append("first change")
    for thread in threads:
        thread.join(LONG)
    assert order == ["first change", "call", "second change"]
