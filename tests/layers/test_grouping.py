"""Layers that share a pass over x within one forward: found by name, always right, and nothing kept."""

import copy
import pickle
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from trained import updated
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import dynrank
from dynrank.distributed.sharding import shard_frozen
from dynrank.kernels import lora_linear, torch_backend
from dynrank.layers import grouping
from dynrank.run.config import compose, plain

NAMES = ("q_proj", "k_proj", "v_proj")
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Attention(nn.Module):
    """Reads x by three layers, k and v of fewer outputs."""

    def __init__(self, width=8):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, size) for size in (width, width // 2, width // 2))

    def forward(self, x):
        return torch.cat([self.q_proj(x).tanh(), self.k_proj(x) * self.v_proj(x)], dim=-1)


def adapted(group=True, make=Attention, ranks=(4, 2, 3), dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"rank_map": dict(zip(NAMES, ranks, strict=True)), "rank": 2, "alpha": 5} | options
    return updated(dynrank.add_lora(make().to(dtype), dtype=dtype, group=group, **options)).train()


@pytest.fixture
def passes(monkeypatch):
    """How many layers each pass over an x was opened for."""
    opened = []

    class Counted(lora_linear.SharedInput):
        def __init__(self, x, layers, *rest, **options):
            opened.append(len(layers))
            super().__init__(x, layers, *rest, **options)

    monkeypatch.setattr(grouping, "SharedInput", Counted)
    return opened


def call(model, x):
    return model(x)


def outcome(model, x=None, forward=call):
    """[y, gradient of x and of each factor]"""
    torch.manual_seed(7)
    leaf = None if x is None else x.detach().clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    y = forward(model, leaf)
    y.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), *([] if x is None else [leaf.grad]), *gradients]


def assert_same(one, other):
    for got, expected in zip(one, other, strict=True):
        assert_close(got, expected, rtol=1e-12, atol=1e-12)


def x_of(*batch, seed=1, dtype=torch.float64):
    return torch.randn(*batch, 8, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def both(x=None, prepare=lambda model: None, forward=call, **options):
    """What a grouped model gives, and the same model without groups."""
    results = []
    for group in (True, False):
        model = adapted(group, **options)
        prepare(model)
        results.append(outcome(model, x, forward))
    return results


def test_grouped_layers_share_the_mask_of_dropout():
    """Two layers of equal weights give one result through one mask, and two through masks of their own."""

    class Pair(Attention):
        def forward(self, x):
            return self.k_proj(x), self.v_proj(x)

    for group in (True, False):
        model = adapted(group, Pair, (2, 2, 2), torch.float32, dropout=0.5)
        model.v_proj.load_state_dict(model.k_proj.state_dict())
        # not to the bit: a product with all A may round one column otherwise than another
        assert torch.allclose(*model(x_of(5, dtype=torch.float32)), rtol=1e-6, atol=1e-6) is group


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("group", ["true", "false", None])
def test_one_key_turns_it_on_or_off_and_without_it_is_on_where_there_is_dropout(passes, group, dropout):
    keys = ["lora.rank=2", f"lora.dropout={dropout}", *([f"lora.group={group}"] if group else [])]
    dynrank.add_lora(Attention(), **plain(compose(keys).lora)).train()(x_of(5, dtype=torch.float32))
    assert passes == [3] * (group == "true" or (group is None and dropout > 0))


SIZES = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(num_key_value_heads=2, use_cache=False, **SIZES)
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
T5 = T5Config(vocab_size=20, dropout_rate=0, decoder_start_token_id=0, **T5)


@pytest.mark.parametrize(
    ("make", "opened"),
    [
        (lambda: LlamaForCausalLM(LLAMA), [3, 2] * 2),
        # self-attention and gated layer of encoder and decoder; cross-attention's q reads another x than k and v
        (lambda: T5ForConditionalGeneration(T5), [3, 2, 3, 3, 3, 2]),
    ],
    ids=["llama", "t5"],
)
def test_whole_model_is_what_it_is_without_groups(passes, make, opened):
    assert_same(*both(make=make, rank_map=None, forward=lambda model, _: model(input_ids=IDS, labels=IDS).loss))
    assert passes == opened


def test_members_are_the_layers_that_have_an_adapter(passes):
    model = dynrank.add_lora(BertModel(BertConfig(**SIZES)), rank=2, target_modules=["query", "value"], group=True)
    model(IDS)
    assert passes == [2] * 2


def after_q(model, action):
    """Does something to the model after the first layer's call."""

    def hook(*_):
        action()

    model.q_proj.register_forward_hook(hook)


def test_a_layer_that_is_frozen_within_the_forward_gives_what_it_gives_alone():
    assert_same(*both(x_of(5), prepare=lambda model: after_q(model, lambda: model.k_proj.requires_grad_(False))))


def test_x_that_is_changed_within_the_forward_is_another_x():
    results = []
    for group in (True, False):
        model, x = adapted(group), x_of(5)
        after_q(model, lambda x=x: x.mul_(2))
        # With gradients torch refuses the change of x, grouped or not.
        with torch.no_grad():
            results.append([model(x)])
    assert_same(*results)


def test_autocast_or_gradients_switched_within_the_forward():
    class Switching(Attention):
        def forward(self, x):
            with torch.no_grad():
                q = self.q_proj(x)
            k = self.k_proj(x)
            with torch.autocast("cpu", torch.bfloat16):
                return q, k, self.v_proj(x), self.q_proj(x)

    ys = adapted(make=Switching, dtype=torch.float32)(x_of(5, dtype=torch.float32))
    assert [y.requires_grad for y in ys] == [False, True, True, True]
    assert [y.dtype for y in ys] == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_layers_are_alone_outside_of_their_parents_forward_even_after_one_that_failed(passes):
    def fail():
        raise ZeroDivisionError

    model, alone, x = adapted(), adapted(False), x_of(5)
    after_q(model, fail)
    with pytest.raises(ZeroDivisionError):
        model(x)
    with torch.no_grad():
        for each in (model, alone):
            each.k_proj.lora_A.add_(1)
    assert_same([model.k_proj(x), model.v_proj(x)], [alone.k_proj(x), alone.v_proj(x)])
    assert passes == [3]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_nothing(dropout, reentrant):
    model = adapted(dropout=dropout)
    recomputed = outcome(model, x_of(5), forward=partial(checkpoint, use_reentrant=reentrant))
    assert all(map(torch.equal, recomputed, outcome(model, x_of(5))))


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_in_parts_that_are_checkpointed_apart_are_alone(passes, reentrant):
    """A part is computed again when the parent's forward is over, with the generator that it had then."""

    class Apart(Attention):
        def forward(self, x):
            parts = (lambda t, name=name: self.get_submodule(name)(t).tanh() for name in NAMES)
            return torch.cat([checkpoint(part, x, use_reentrant=reentrant) for part in parts], dim=-1)

    assert_same(*both(x_of(5), make=Apart, dropout=0.5))
    assert passes == []


def test_a_change_of_rank_is_followed(passes):
    model, x, ranks = adapted(), x_of(5), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for change in ({}, {"k_proj": 1}, {"q_proj": 6}, 2):
        dynrank.resize(model, change, optimizers=[optimizer])
        alone = copy.deepcopy(model)
        for name in NAMES:
            alone.get_submodule(name).shared_output = None
        assert_same(outcome(model, x), outcome(alone, x))
        ranks.append(tuple(layer.rank for _, layer in dynrank.lora_layers(model)))
        optimizer.step()
    assert ranks == [(4, 2, 3), (4, 1, 3), (6, 1, 3), (2, 2, 2)]
    assert passes == [3] * 4


def test_a_swapped_or_loaded_adapter_is_grouped_as_the_model_was_or_as_asked(passes, tmp_path):
    dynrank.save_adapter(adapted(), tmp_path / "adapter")
    expected = outcome(adapted(False), x_of(5))
    for group in (True, False):
        swapped = dynrank.swap_adapter(adapted(group, ranks=(1, 1, 1)), tmp_path / "adapter", dtype=torch.float64)
        loaded = Attention().double()
        loaded.load_state_dict({key.replace("base.", ""): value for key, value in swapped.state_dict().items()}, False)
        dynrank.load_adapter(loaded, tmp_path / "adapter", dtype=torch.float64, group=group)
        for model in (swapped, loaded):
            passes.clear()
            assert_same(outcome(model.train(), x_of(5)), expected)
            assert passes == [3] * group


def test_a_layer_that_is_merged_leaves_the_others_in(passes):
    model, alone = adapted(), adapted(False)
    for each in (model, alone):
        each.q_proj = each.q_proj.merge()
    assert_same(outcome(model, x_of(5)), outcome(alone, x_of(5)))
    model.k_proj = model.k_proj.merge()
    model(x_of(5))
    dynrank.merge(model)(x_of(5))
    assert passes == [2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_groups_its_own_layers(passes, copied):
    model = adapted()
    other = copied(model)
    with torch.no_grad():
        for name in NAMES:
            model.get_submodule(name).lora_A.zero_()
    assert_same(outcome(other, x_of(5)), outcome(adapted(False), x_of(5)))
    assert passes == [3]


def test_neither_x_nor_layers_are_kept_after_the_forward():
    model, source = adapted(), x_of(5).requires_grad_()
    x = source * 2
    gone, y = weakref.ref(x), model(x)
    del x
    y.sum().backward()
    assert gone() is None
    gone = weakref.ref(model)
    del model
    assert gone() is None


def test_threads_have_passes_of_their_own(passes):
    """Two threads run one model in turn, each on an x of its own, and on one x."""
    model, alone, turn = adapted(), adapted(False), threading.Barrier(2, timeout=20)
    after_q(model, turn.wait)
    for inputs in ([x_of(5), x_of(5, seed=2)], [x_of(5)] * 2):
        got = [None, None]

        def work(index, inputs=inputs, got=got):
            got[index] = model(inputs[index]).detach()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert_same(got, [alone(x).detach() for x in inputs])
    assert passes == [3] * 4


def test_inference_is_not_grouped(passes):
    model, x = adapted().eval(), x_of(5)
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model.train()(x_of(5))
    assert passes == []


def test_what_is_observed_is_what_is_observed_without_groups():
    seen = {}

    def observe(model):
        for name, layer in dynrank.lora_layers(model):
            layer.observe(lambda *pair, name=name: seen.setdefault(name, []).append(pair))

    both(x_of(5), prepare=observe)
    for name in NAMES:
        assert_same(*seen[name])


def test_layers_of_another_dtype_or_dropout_are_left_out(passes):
    model, x = adapted(dropout=0.5), x_of(5)
    model.k_proj.dropout.p = 0.1
    model(x)
    # The call of k ends the pass of q and v, so v opens another one.
    assert passes == [2, 2]
    passes.clear()
    for factor in ("lora_A", "lora_B"):
        parameter = model.q_proj.get_parameter(factor)
        parameter.data = parameter.data.float()
    model(x)
    assert passes == []


@pytest.mark.parametrize(("ranks", "sizes"), [((4, 2, 3), [3]), ((100, 20, 9), [])])
def test_triton_groups_ranks_whose_sum_it_serves(monkeypatch, passes, ranks, sizes):
    """Looked at up to the choice, with torch in Triton's place."""
    monkeypatch.setattr(grouping, "unsupported", lambda x, rank: None if rank <= 128 else "too high")
    monkeypatch.setattr(lora_linear, "products_of", lambda backend, x, rank: torch_backend)
    adapted(make=partial(Attention, 128), ranks=ranks, backend="triton")(torch.randn(5, 128).double())
    assert passes == sizes


def test_a_compiled_model_is_one_graph_and_computes_the_same(passes):
    torch._dynamo.reset()
    model, x = adapted(), x_of(5)
    expected = outcome(model, x)
    passes.clear()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        assert_same(outcome(model, x, forward=lambda _, leaf: compiled(leaf)), expected)
    assert counter.frame_count == 1
    assert passes == []
    torch._dynamo.reset()


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("wrapped", ["ddp", "sharded together", "sharded each by itself"])
def test_wrapped_models_compute_the_same(one_process, passes, wrapped):
    """Where FSDP2 gathers a whole block its weights are plain tensors within, and layers share."""
    expected, model = outcome(adapted(False), x_of(5)), adapted()
    forward = model
    if wrapped == "ddp":
        forward = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    elif wrapped == "sharded together":
        shard_frozen(model, one_process, blocks=[])
    else:
        factors = {p for p in model.parameters() if p.requires_grad}
        for name in NAMES:
            fully_shard(model.get_submodule(name), mesh=one_process, ignored_params=factors)
    for _ in range(2):
        assert_same(outcome(model, x_of(5), forward=lambda _, leaf: forward(leaf)), expected)
    assert passes == [3, 3] or wrapped == "sharded each by itself"
