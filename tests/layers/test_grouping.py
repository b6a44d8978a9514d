"""Layers that share a pass over x: found by name, always right, and nothing kept."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import dynrank
from dynrank.distributed.sharding import shard_frozen
from dynrank.kernels import backends, grouped_lora_linear, lora_linear, torch_backend
from dynrank.layers import grouping
from dynrank.run.config import compose, plain

NAMES = ("q_proj", "k_proj", "v_proj")
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Attention(nn.Module):
    """Reads x by three layers, k and v of fewer outputs."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x, other=None):
        other = x if other is None else other
        return torch.cat([self.q_proj(x).tanh(), self.k_proj(other) * self.v_proj(other)], dim=-1)


def attention(group=True, ranks=(4, 2, 3), dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = Attention().to(dtype)
    pattern = dict(zip(NAMES, ranks, strict=True))
    dynrank.add_lora(model, rank=2, alpha=5, rank_map=pattern, dtype=dtype, group=group, **options)
    for _, layer in dynrank.lora_layers(model):
        nn.init.normal_(layer.lora_B)
    return model.train()


@pytest.fixture
def passes(monkeypatch):
    """How many layers each pass over an x was opened for."""
    opened = []
    original = grouped_lora_linear.SharedInput.__init__

    def counted(self, x, members, *rest, **options):
        opened.append(len(members))
        original(self, x, members, *rest, **options)

    monkeypatch.setattr(grouped_lora_linear.SharedInput, "__init__", counted)
    return opened


def outcome(model, *inputs, forward=None):
    """[y, gradient of each input and factor]"""
    torch.manual_seed(7)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    model.zero_grad(set_to_none=True)
    y = (model if forward is None else forward)(*leaves)
    y.square().sum().backward()
    return [y.detach(), *(x.grad for x in leaves), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(one, other):
    for got, expected in zip(one, other, strict=True):
        assert_close(got, expected, rtol=1e-12, atol=1e-12)


def x_of(*batch, seed=1, dtype=torch.float64):
    return torch.randn(*batch, 8, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def nothing_pending():
    return grouping._slot.pending is None


@pytest.mark.parametrize("batch", [(5,), (2, 3)])
def test_grouped_layers_compute_what_they_compute_alone(passes, batch):
    grouped, alone = outcome(attention(), x_of(*batch)), outcome(attention(group=False), x_of(*batch))
    assert passes == [3]
    assert_same(grouped, alone)


def test_grouped_layers_share_the_mask_of_dropout():
    """Two layers of equal weights give one result through one mask, and two through masks of their own."""
    for group in (True, False):
        model = attention(group, ranks=(2, 2, 2), dropout=0.5)
        model.v_proj.load_state_dict(model.k_proj.state_dict())
        x = x_of(5)
        model.q_proj(x)
        # not to the bit: a product with all A may round one column otherwise than another
        assert torch.allclose(model.k_proj(x), model.v_proj(x), rtol=1e-12, atol=1e-12) is group


@pytest.mark.parametrize("group", ["true", "false"])
def test_one_key_turns_it_on(passes, group):
    lora = plain(compose([f"lora.group={group}", "lora.rank=2"]).lora)
    dynrank.add_lora(Attention(), **lora)(x_of(5, dtype=torch.float32))
    assert passes == [3] * (group == "true")


def test_it_is_off_unless_asked_for(passes):
    dynrank.add_lora(Attention(), rank=2)(x_of(5, dtype=torch.float32))
    assert not compose().lora.group
    assert passes == []


@pytest.mark.parametrize("sizes", [{"num_key_value_heads": 2}, {}])
def test_whole_model_is_what_it_is_without_groups(passes, sizes):
    results = []
    for group in (True, False):
        torch.manual_seed(0)
        config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=20, use_cache=False, **config, **sizes)).double()
        dynrank.add_lora(model, rank=4, dtype=torch.float64, group=group)
        for _, layer in dynrank.lora_layers(model):
            nn.init.normal_(layer.lora_B, std=0.1)
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert passes == [3, 2] * 2
    assert_same(*results)


@pytest.mark.parametrize("target_modules", ["all-linear", ["query", "value"]])
def test_members_are_the_layers_that_have_an_adapter(passes, target_modules):
    config = BertConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = dynrank.add_lora(BertModel(config), rank=2, target_modules=target_modules, group=True)
    model(IDS)
    assert passes == [3 if target_modules == "all-linear" else 2]


def test_layers_that_read_another_x_share_it_among_themselves(passes):
    inputs = x_of(5), x_of(5, seed=2)
    grouped, alone = outcome(attention(), *inputs), outcome(attention(group=False), *inputs)
    assert passes == [3, 3]
    assert_same(grouped, alone)


def test_cross_attention_of_a_whole_model():
    results = []
    for group in (True, False):
        torch.manual_seed(0)
        sizes = {
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "num_layers": 1,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        }
        model = T5ForConditionalGeneration(T5Config(vocab_size=20, dropout_rate=0.0, decoder_start_token_id=0, **sizes))
        dynrank.add_lora(model.double(), rank=4, dtype=torch.float64, group=group)
        for _, layer in dynrank.lora_layers(model):
            nn.init.normal_(layer.lora_B, std=0.1)
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert_same(*results)


def test_x_that_is_changed_between_the_calls_is_another_x():
    results = []
    for group in (True, False):
        model = attention(group)
        with torch.no_grad():  # with gradients torch refuses it, grouped or not
            x = x_of(5)
            ys = [model.q_proj(x)]
            x.mul_(2)
            ys += [model.k_proj(x), model.v_proj(x)]
        results.append(ys)
    assert_same(*results)


@pytest.mark.parametrize("change", ["step", "resize", "scaling", "merge", "weight", "eval", "freeze"])
def test_a_layer_that_is_changed_between_the_calls_does_not_get_what_was_made_before(change):
    results = []
    for group in (True, False):
        model, x = attention(group, dropout=0.5 if change == "eval" else 0.0), x_of(5)
        model.q_proj(x)
        layer = model.k_proj
        if change == "step":
            with torch.no_grad():
                layer.lora_A.add_(1)
        elif change == "resize":
            dynrank.resize(model, {"k_proj": 1})
        elif change == "scaling":
            layer.scaling *= 2
        elif change == "merge":
            layer.merge()
        elif change == "weight":
            layer.base.weight = nn.Parameter(2 * layer.base.weight, requires_grad=False)
        elif change == "eval":
            layer.eval()
        else:
            model.requires_grad_(False)
        results.append([layer(x)])
        assert results[-1][0].requires_grad is (change not in ("merge", "freeze"))
    assert_same(*results)


def test_a_backward_between_the_calls():
    results = []
    for group in (True, False):
        model, x = attention(group), x_of(5)
        for name in NAMES:  # each with a graph of its own, as without groups
            model.get_submodule(name)(x).sum().backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    assert_same(*results)


def test_autocast_or_gradients_switched_between_the_calls():
    model, x = attention(dtype=torch.float32), x_of(5, dtype=torch.float32)
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert model.v_proj(x).dtype == torch.bfloat16
        assert model.k_proj(x).dtype == torch.bfloat16
    assert model.v_proj(x).dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_nothing(dropout, reentrant):
    model = attention(dropout=dropout)
    recomputed = outcome(model, x_of(5), forward=lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert all(map(torch.equal, recomputed, outcome(model, x_of(5))))


def test_layers_in_parts_that_are_checkpointed_apart():
    """What a part saves must be saved within it, or its recomputation would not find it."""
    results = []
    for group in (True, False):
        model = attention(group)

        def forward(x, model=model):
            parts = (lambda t, name=name: model.get_submodule(name)(t).tanh() for name in NAMES)
            return torch.cat([checkpoint(part, x, use_reentrant=False) for part in parts], dim=-1)

        results.append(outcome(model, x_of(5), forward=forward))
    assert_same(*results)


def test_a_change_of_rank_is_followed(passes):
    model, x, ranks = attention(), x_of(5), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for change in (None, {"k_proj": 1}, {"q_proj": 6}, 2):
        if change is not None:
            dynrank.resize(model, change, optimizers=[optimizer])
        alone = copy.deepcopy(model)
        for name in NAMES:
            alone.get_submodule(name)._group = None
        assert_same(outcome(model, x), outcome(alone, x))
        ranks.append(tuple(layer.rank for _, layer in dynrank.lora_layers(model)))
        optimizer.step()
    assert ranks == [(4, 2, 3), (4, 1, 3), (6, 1, 3), (2, 2, 2)]
    assert passes == [3] * 4


def test_a_swapped_adapter_is_grouped_as_the_model_was(passes, tmp_path):
    dynrank.save_adapter(attention(), tmp_path / "adapter")
    for group in (True, False):
        passes.clear()
        model = dynrank.swap_adapter(attention(group, ranks=(1, 1, 1)), tmp_path / "adapter", dtype=torch.float64)
        assert_same(outcome(model.train(), x_of(5)), outcome(attention(False), x_of(5)))
        assert passes == [3] * group


def test_a_loaded_adapter_is_grouped_where_asked_for(passes, tmp_path):
    dynrank.save_adapter(attention(), tmp_path / "adapter")
    torch.manual_seed(0)
    model = dynrank.load_adapter(Attention().double(), tmp_path / "adapter", dtype=torch.float64, group=True)
    model.train()(x_of(5))
    assert passes == [3]


def test_a_layer_that_is_merged_or_taken_out_leaves_the_others_in(passes):
    model, alone = attention(), attention(False)
    for each in (model, alone):
        each.q_proj.merge()
    assert_same(outcome(model, x_of(5)), outcome(alone, x_of(5)))
    assert passes == [2]
    model.k_proj.merge()
    assert_close(model(x_of(5)), attention(False)(x_of(5)))
    assert passes == [2]
    out, model.q_proj = model.q_proj, model.q_proj.base
    model.k_proj.unmerge()
    model(x_of(5))
    assert passes == [2, 2]
    out.unmerge()
    assert_close(out(x_of(5)), attention(False).q_proj(x_of(5)))
    assert nothing_pending()
    dynrank.merge(model)(x_of(5))
    assert passes == [2, 2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_groups_of_its_own(passes, copied):
    model = attention()
    model.q_proj(x_of(5))  # pending, and no part of the copy
    other = copied(model)
    passes.clear()
    with torch.no_grad():
        for name in NAMES:
            model.get_submodule(name).lora_A.zero_()
    assert_same(outcome(other, x_of(5)), outcome(attention(False), x_of(5)))
    assert passes == [3]
    assert other.q_proj._group is other.k_proj._group is not model.q_proj._group
    assert other.q_proj._group.members() == [other.q_proj, other.k_proj, other.v_proj]


def test_a_layer_that_is_copied_without_its_module_is_alone(passes):
    model, x = attention(), x_of(5)
    alone = copy.deepcopy(model.k_proj)
    model.q_proj(x)
    assert_close(alone(x), model.k_proj(x))
    assert alone._group.members() == []
    assert passes == [3, 3]  # the copy's call has ended the first


def test_layers_are_not_kept_alive():
    model = attention()
    gone = [weakref.ref(layer) for _, layer in dynrank.lora_layers(model)]
    model(x_of(5)).sum().backward()
    gc.disable()
    try:
        dynrank.merge(model)
        assert not any(ref() for ref in gone)
        model = attention()
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_nothing_is_kept_after_the_last_layer():
    model, source = attention(), x_of(5).requires_grad_()
    x = source * 2
    gone, y = weakref.ref(x), model(x)
    assert nothing_pending()
    del x
    y.sum().backward()
    assert gone() is None


def test_what_is_not_asked_for_is_dropped_by_the_next_call():
    model, x = attention(), x_of(5) * 2
    model.q_proj(x)
    gone = weakref.ref(x)
    del x
    attention()(x_of(5))
    assert gone() is None
    assert nothing_pending()


def test_threads_have_passes_of_their_own(passes):
    """Two threads call the layers of one model in turn, each on an x of its own, and on one x."""
    model, alone, turn = attention(), attention(False), threading.Barrier(2, timeout=20)
    for inputs in ([x_of(5), x_of(5, seed=2)], [x_of(5)] * 2):
        got = [[], []]

        def work(index, inputs=inputs, got=got):
            for name in NAMES:
                turn.wait()
                got[index].append(model.get_submodule(name)(inputs[index]).detach())

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for x, ys in zip(inputs, got, strict=True):
            assert_same(ys, [alone.get_submodule(name)(x).detach() for name in NAMES])
    assert passes == [3] * 4


def test_inference_is_not_grouped(passes):
    model, x = attention().eval(), x_of(5)
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model.train()(x_of(5))
    assert passes == []


def test_what_is_observed_is_what_is_observed_without_groups():
    seen = []
    for group in (True, False):
        model, here = attention(group, dropout=0.0), {}
        stops = [
            layer.observe(lambda z, dz, name=name, here=here: here.update({name: (z, dz)}))
            for name, layer in dynrank.lora_layers(model)
        ]
        outcome(model, x_of(5))
        for stop in stops:
            stop()
        seen.append([tensor for name in NAMES for tensor in here[name]])
    assert_same(*seen)


def test_layers_of_another_dtype_or_dropout_are_left_out(passes):
    model, x = attention(dropout=0.5), x_of(5)
    model.k_proj.dropout.p = 0.1
    model(x)
    assert passes == [2, 2]  # k ends the pass of q and v
    passes.clear()
    model.q_proj.lora_A.data = model.q_proj.lora_A.data.float()
    model.q_proj.lora_B.data = model.q_proj.lora_B.data.float()
    model(x)
    assert passes == []


@pytest.mark.parametrize(("ranks", "sizes"), [((4, 2, 3), [3]), ((100, 20, 9), [])])
def test_triton_groups_ranks_whose_sum_it_serves(monkeypatch, passes, ranks, sizes):
    """Looked at up to the choice, with torch in Triton's place."""
    monkeypatch.setattr(backends.triton_launch, "serves", lambda x, rank: None if rank <= 128 else "too high")
    monkeypatch.setattr(grouping, "serves", backends.triton_launch.serves)
    for module in (grouped_lora_linear, lora_linear):
        monkeypatch.setattr(module, "products_of", lambda backend: torch_backend)
    model = nn.Module()
    for name in NAMES:
        model.add_module(name, nn.Linear(128, 128))
    dynrank.add_lora(model, rank=1, rank_map=dict(zip(NAMES, ranks, strict=True)), backend="triton", group=True)
    x = torch.randn(5, 128)
    for name in NAMES:
        model.get_submodule(name)(x)
    assert passes == sizes


def test_saved_bytes_are_those_of_the_layers_alone():
    def saved(model):
        storages = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = x_of(64).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ys = [layer(x) for _, layer in dynrank.lora_layers(model)]
        del ys
        return sum(size for pointer, size in storages.items() if pointer not in own)

    assert saved(attention(dropout=0.5)) <= saved(attention(False, dropout=0.5))


def test_a_compiled_model_is_one_graph_and_computes_the_same(passes):
    torch._dynamo.reset()
    model, x = attention(), x_of(5)
    expected = outcome(model, x)
    passes.clear()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        assert_same(outcome(model, x, forward=compiled), expected)
    assert counter.frame_count == 1
    assert passes == []
    torch._dynamo.reset()


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_ddp_changes_nothing(one_process):
    plain_results, model = outcome(attention(), x_of(5)), attention()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    assert_same(outcome(model, x_of(5), forward=wrapped), plain_results)


def test_layers_whose_weights_are_gathered_together_share(one_process, passes):
    """FSDP2: inside the block that is gathered the weights are plain tensors."""
    model = attention()
    shard_frozen(model, one_process, blocks=[])
    assert_same(outcome(model, x_of(5)), outcome(attention(False), x_of(5)))
    assert passes == [3]


def test_layers_that_are_sharded_each_by_itself(one_process):
    model = attention()
    factors = {p for p in model.parameters() if p.requires_grad}
    for name in NAMES:
        fully_shard(model.get_submodule(name), mesh=one_process, ignored_params=factors)
    for _ in range(2):
        assert_same(outcome(model, x_of(5)), outcome(attention(False), x_of(5)))
