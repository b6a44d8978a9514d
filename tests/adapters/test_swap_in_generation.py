"""Adapters exchanged while other threads generate: every text is written by one adapter or the other."""

import gc
import pickle
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dynrank
from dynrank.adapters import between_forwards

LENGTH = 8  # tokens of a text
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


def llama():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **size, **ids, initializer_range=0.5)).eval()


def text(model, **options):
    """What the model writes, greedily: int64 tokens."""
    ids = PROMPT if "streamer" in options else PROMPT.repeat(2, 1)
    return model.generate(ids, max_new_tokens=LENGTH, do_sample=False, **options)[0, PROMPT.shape[1] :].tolist()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(two adapters of unlike ranks and layers, what the model writes under each)."""
    folder, rules = tmp_path_factory.mktemp("adapters"), {r"layers\.1\..*q_proj": 1, r"layers\.0\..*q_proj": 5}
    options = [{"rank": 4}, {"rank": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_map": rules}]
    adapters = []
    for seed, chosen in enumerate(options):
        model = dynrank.add_lora(llama(), **chosen)
        torch.manual_seed(seed)
        for _, layer in dynrank.lora_layers(model):
            nn.init.normal_(layer.lora_B, std=1.0)
        dynrank.save_adapter(model, folder / str(seed))
        adapters.append(dynrank.read_adapter(folder / str(seed)))
    expected = [text(dynrank.load_adapter(llama(), adapter)) for adapter in adapters]
    assert expected[0] != expected[1]
    return adapters, expected


@pytest.fixture
def model(two):
    return dynrank.load_adapter(llama(), two[0][0])


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


@contextmanager
def writers(model, count, **options):
    """Threads that generate without a pause; yields (number of the thread, text) as they come."""
    stop, texts, failures = threading.Event(), [], []

    def work(number):
        try:
            while not stop.is_set():
                texts.append((number, text(model, **options)))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield texts
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(("threads", "swaps"), [(1, 60), (3, 20)])
def test_every_text_is_written_by_one_adapter_or_the_other(model, two, threads, swaps):
    adapters, expected = two
    with writers(model, threads) as texts:
        for index in range(swaps):
            dynrank.swap_adapter(model, adapters[1 - index % 2])
            time.sleep(0.01)  # else the next swap waits before a text has begun
    written = [made for _, made in texts]
    assert len(written) >= swaps // 2
    assert all(made in expected for made in written)
    assert all(made in written for made in expected)
    assert text(pickle.loads(pickle.dumps(model))) == expected[0]


def test_texts_go_on_that_come_to_a_swap_before_it_knows_of_them(model, two, monkeypatch):
    """Between putting hooks in place and looking who generates, a text may come to a forward with the hook."""
    adapters, expected = two
    look = between_forwards._other_threads

    def slowly():
        time.sleep(0.005)
        return look()

    monkeypatch.setattr(between_forwards, "_other_threads", slowly)
    with writers(model, 2) as texts:
        for index in range(10):
            dynrank.swap_adapter(model, adapters[1 - index % 2])
            time.sleep(0.01)
    assert all(made in expected for _, made in texts)


class Wrapper(nn.Module):
    """A module with a loop of its own, as a LightningModule may have one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def generate(self, ids, max_new_tokens, do_sample, streamer):
        streamer.put(ids)
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, self.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            streamer.put(ids[:, -1])
        return ids


def swap_in_the_middle_of_a_text(model, adapter, call):
    """(the text during which a swap was asked for, whether the swap was over before it)."""
    halfway, go_on, done, texts = threading.Event(), threading.Event(), threading.Event(), []

    def pause(count):
        if count == LENGTH // 2:
            halfway.set()
            assert go_on.wait(20)

    def swap():
        dynrank.swap_adapter(model, adapter)
        done.set()

    streamer = Streamer(pause)
    threads = [threading.Thread(target=lambda: texts.append(text(call, streamer=streamer)))]
    threads.append(threading.Thread(target=swap))
    threads[0].start()
    assert halfway.wait(20)
    threads[1].start()
    early = done.wait(0.2)
    go_on.set()
    for thread in threads:
        thread.join(20)
    return texts[0], early


@pytest.mark.parametrize("entry", ["model", "wrapper", "part"])
def test_swap_waits_for_the_text_under_way(model, two, entry, tmp_path):
    """Also for one that a module around the model writes, or where a part of the model is what changes."""
    adapters, expected = two
    call, changed, adapter = model, model, adapters[1]
    if entry == "wrapper":
        call = Wrapper(model)
    elif entry == "part":
        changed, adapter = model.model, tmp_path / "part"
        dynrank.save_adapter(dynrank.load_adapter(llama(), adapters[1]).model, adapter)
    made, early = swap_in_the_middle_of_a_text(changed, adapter, call)
    assert not early
    assert made == expected[0]
    assert text(model) == expected[1]


def test_a_mixture_would_be_seen(model, two, monkeypatch):
    """Where forwards alone are waited for, the same text sees both adapters: the tests beside this one can fail."""
    monkeypatch.setattr(between_forwards, "_generations", lambda frame, ids: set())
    adapters, expected = two
    made, early = swap_in_the_middle_of_a_text(model, adapters[1], model)
    assert early
    assert made not in expected
    assert made[: LENGTH // 2] == expected[0][: LENGTH // 2]


def test_swap_does_not_starve_among_threads_that_generate(model, two):
    """Their texts overlap all the time, yet at most those are waited for that had begun."""
    adapters, expected = two
    model.generation_config.use_cache = False  # longer texts
    with writers(model, 3) as texts:
        deadline = time.monotonic() + 20
        while len({number for number, _ in texts}) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for index in range(4):
            before = len(texts)
            dynrank.swap_adapter(model, adapters[1 - index % 2])
            assert len(texts) - before <= 6  # the one under way of each, and one that it began while the swap set out
    assert all(made in expected for _, made in texts)


def test_a_text_that_an_exception_ended_is_not_waited_for(model, two):
    adapters, expected = two
    ended, leave = threading.Event(), threading.Event()

    def interrupt(count):
        raise KeyboardInterrupt

    def work():
        try:
            text(model, streamer=Streamer(interrupt))
        except KeyboardInterrupt:
            ended.set()
            leave.wait(20)  # the thread lives on

    thread = threading.Thread(target=work)
    thread.start()
    assert ended.wait(20)
    dynrank.swap_adapter(model, adapters[1])
    assert text(model) == expected[1]
    leave.set()
    thread.join(20)


def test_swap_within_the_models_own_generation_is_refused(model, two):
    adapters, expected = two
    with pytest.raises(RuntimeError, match="own forward or generate"):
        text(model, streamer=Streamer(lambda _: dynrank.swap_adapter(model, adapters[1])))
    assert text(model) == expected[0]


def test_swap_that_is_interrupted_while_it_waits_lets_all_go_on(model, two, monkeypatch):
    adapters, expected = two
    asked = []

    def interrupt(seconds):
        asked.append(seconds)
        raise KeyboardInterrupt

    with writers(model, 2) as texts:
        with monkeypatch.context() as patched:
            patched.setattr(between_forwards.time, "sleep", interrupt)
            for _ in range(50):
                try:
                    dynrank.swap_adapter(model, adapters[0])
                except KeyboardInterrupt:
                    break
        before = len(texts)
        deadline = time.monotonic() + 20
        while len(texts) < before + 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert asked
    assert all(made == expected[0] for _, made in texts)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nothing_of_a_text_is_kept_after_the_swap(model, two):
    halfway, go_on = threading.Event(), threading.Event()

    def pause(count):
        halfway.set()
        assert go_on.wait(20)

    kept = []

    def work():
        streamer = Streamer(pause)
        kept.append(weakref.ref(streamer))
        text(model, streamer=streamer)

    threads = [threading.Thread(target=work)]
    threads.append(threading.Thread(target=dynrank.swap_adapter, args=(model, two[0][1])))
    threads[0].start()
    assert halfway.wait(20)
    threads[1].start()
    time.sleep(0.1)
    go_on.set()
    for thread in threads:
        thread.join(20)
    gc.collect()
    assert kept[0]() is None
