"""torch.compile through whole models: one graph, and one more after a change of rank, or none."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import dynrank
from dynrank.errors import ConfigurationError

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(force_parameter_static_shapes=True):  # torch's default; a capacity changes it
        yield
    torch._dynamo.reset()


def adapted(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, use_cache=False, **sizes))
    dynrank.add_lora(model, rank=8, **options)
    for _, layer in dynrank.lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def step(forward, model):
    """(loss, gradient of each factor), with the masks of one seed."""
    torch.manual_seed(5)
    model.zero_grad()
    loss = forward(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def test_one_graph_and_one_more_after_a_change_of_rank():
    model = adapted()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rank, graphs in ((8, 1), (3, 2)):
        if rank != 8:
            dynrank.resize(model, rank)
        expected = step(model, model)
        for _ in range(3):
            for got, wanted in zip(step(compiled, model), expected, strict=True):
                assert_close(got, wanted)
        assert counter.frame_count == graphs


def test_with_a_capacity_one_graph_serves_every_rank():
    model = copy.deepcopy(adapted(dropout=0.3, capacity=16, group=False))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    up = "model.layers.0.mlp.up_proj"
    for ranks in (8, 6, {up: 2}, 16, {up: 7}, 3):
        dynrank.resize(model, ranks, optimizers=[optimizer])
        expected = step(model, model)
        for got, wanted in zip(step(compiled, model), expected, strict=True):
            assert_close(got, wanted)
        optimizer.step()
    assert counter.frame_count == 1
    dynrank.resize(model, 1)
    assert_close(step(compiled, model), step(model, model))
    assert counter.frame_count == 2  # torch compiles for sizes of 1 by themselves


def test_capacity_bounds_the_rank():
    with pytest.raises(ConfigurationError, match=r"capacity must be at least the rank, 8, got 7; set lora.capacity"):
        adapted(capacity=7)
    model = adapted(capacity=12)
    with pytest.raises(ConfigurationError, match=r"between 1 and lora.capacity = 12, got 13"):
        dynrank.resize(model, 13)
    assert {layer.rank for _, layer in dynrank.lora_layers(copy.deepcopy(model))} == {8}
    with pytest.raises(ConfigurationError, match=r"lora.capacity = 12, got 13"):
        dynrank.resize(copy.deepcopy(model), 13)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")  # torch, within inductor
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    dynrank.add_lora(model, rank=8, dropout=0.3, target_modules=["0", "2"])
    for _, layer in dynrank.lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    x, results = torch.randn(10, 16), []
    for function in (model, torch.compile(model, fullgraph=True)):
        torch.manual_seed(5)
        model.zero_grad()
        with torch._inductor.config.patch(fallback_random=True):  # inductor has a generator of its own for the seeds
            y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for got, wanted in zip(*results, strict=True):
        assert_close(got, wanted, rtol=1e-4, atol=1e-5)
