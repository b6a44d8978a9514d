"""PEFT's layers with the fused op under DDP and FSDP2: two processes come to the gradients of one with both batches."""

from functools import partial
from pathlib import Path

import pytest
import torch
from ends import found, keep, of_pair
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import dynrank
from dynrank.layers import peft_op

# The dimensions are processes, examples and features.
X = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1))
# {way: how often the op runs in two passes through two layers}
WAYS = {"ddp": 4, "ddp, applied last": 4, "fsdp2": 4, "fsdp2, layers": 4, "fsdp2, layers, applied last": 0}
CALLS = []


def gradients(way, process):
    """(gradients of the second pass, how often the op ran)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    model = get_peft_model(net, LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False))
    if way != "alone" and "applied last" not in way:
        dynrank.apply_lora_kernel(model)
    called = model
    if "ddp" in way:
        called = DistributedDataParallel(model)
    elif "fsdp2" in way:
        mesh = init_device_mesh("cpu", (2,))
        for layer in [net[0], net[2]] if "layers" in way else []:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if "applied last" in way:
        dynrank.apply_lora_kernel(model)
    CALLS.clear()
    for _ in range(2):
        model.zero_grad()
        called(X.flatten(0, 1) if process is None else X[process]).square().mean().backward()
    grads = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert any(isinstance(grad, DTensor) for grad in grads.values()) == ("fsdp2" in way)
    return {n: grad.full_tensor() if isinstance(grad, DTensor) else grad for n, grad in grads.items()}, len(CALLS)


def main(place):
    op = peft_op.lora_linear
    peft_op.lora_linear = lambda *args: (CALLS.append(1), op(*args))[1]
    peft_op.may_pay = lambda *args: True
    peft_op.op_pays = lambda *args: True
    distributed.init_process_group("gloo")
    process = distributed.get_rank()
    keep({way: partial(gradients, way, process) for way in WAYS}, Path(place) / f"{process}.pt", {})
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process has found."""
    program = "import sys, test_peft_kernel; test_peft_kernel.main(sys.argv[1])"
    return of_pair(program, tmp_path_factory.mktemp("kernel"))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_two_processes_are_those_of_peft_in_one_with_both_batches(results, way):
    expected, _ = gradients("alone", None)
    for grads, calls in found(results, way):
        assert calls == WAYS[way]
        assert_close(grads, expected)
