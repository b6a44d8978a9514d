"""Loops whose model and optimizer plain DDP, Lightning Fabric or accelerate has wrapped, in one process or in two."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trained import drive

import dynrank
from dynrank.distributed.sharding import shard_frozen
from dynrank.driver.driver import RankDriver
from dynrank.driver.training import Training
from dynrank.schedules import Stage
from dynrank.targets import Budget, GrowTo, Rank
from dynrank.triggers import At, Run

# The dimensions are steps, examples and features.
X = torch.randn(10, 8, 6, generator=torch.Generator().manual_seed(1))


def plain(model, optimizer):
    if not torch.distributed.is_initialized():
        return model, optimizer, torch.Tensor.backward
    # A group of its own, which DDP could not pickle; and a hook that keeps tensors of the shapes of gradients. At this
    # rank it averages exactly.
    group = torch.distributed.new_group()
    wrapped = DistributedDataParallel(model, process_group=group)
    state = PowerSGDState(group, matrix_approximation_rank=6, start_powerSGD_iter=2, min_compression_rate=0.1)
    wrapped.register_comm_hook(state, powerSGD_hook)
    return wrapped, optimizer, torch.Tensor.backward


def fabric(model, optimizer):
    several = torch.distributed.is_initialized()
    made = Fabric(accelerator="cpu", devices=2 if several else 1, strategy="ddp" if several else "auto")
    made.launch()
    return *made.setup(model, optimizer), made.backward


def accelerate(model, optimizer):
    made = Accelerator(cpu=True)
    return *made.prepare(model, optimizer), made.backward


def shard_parts(model, mesh=None):
    """Each layer alone is gathered, as a block of a transformer would be."""
    return shard_frozen(model, mesh, blocks=[layer.module for _, layer in dynrank.lora_layers(model)])


def fabric_fsdp2(model, optimizer):
    def sharded(module, mesh):
        return shard_parts(module, mesh["data_parallel"])

    strategy = ModelParallelStrategy(sharded, data_parallel_size=2, tensor_parallel_size=1)
    made = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    made.launch()
    return made.setup_module(model), made.setup_optimizers(optimizer), made.backward


def accelerator_of_fsdp2():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))


def accelerate_fsdp2(model, optimizer):
    made = accelerator_of_fsdp2()
    return *made.prepare(shard_parts(model), optimizer), made.backward


WAYS = {"plain": plain, "fabric": fabric, "accelerate": accelerate}
# These need two processes.
SHARDED = {"fabric, fsdp2": fabric_fsdp2, "accelerate, fsdp2": accelerate_fsdp2}


def gradients(way, process=0):
    """The gradients after a backward of a model that has the ranks of a checkpoint, which DDP wraps before or after."""

    def made(rank):
        torch.manual_seed(0)
        return dynrank.add_lora(nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6)), rank=rank)

    saved = made(2).state_dict()
    model = made(4)
    if way == "loaded, then wrapped":
        model.load_state_dict(saved)
    wrapped = DistributedDataParallel(model)
    if way == "wrapped, then loaded":
        model.load_state_dict(saved)
        optimizer = torch.optim.SGD(dynrank.adapter_parameters(model))
        RankDriver([]).start(Training(wrapped, [optimizer]), Run(9))
    elif way == "wrapped, then resized":
        dynrank.resize(wrapped, 2, optimizers=())
    elif way == "frozen when it is resized":
        # DDP goes on to average what is trained again later.
        model.requires_grad_(False)
        dynrank.resize(wrapped, 2, optimizers=())
        for factor in dynrank.adapter_parameters(model):
            factor.requires_grad_(True)
    # A cut and a file have other factors of the same update.
    with torch.no_grad():
        for number, factor in enumerate(dynrank.adapter_parameters(model)):
            factor.copy_(torch.arange(factor.numel()).view_as(factor).sin() + number)
    wrapped(X[process]).square().mean().backward()
    return [factor.grad for factor in dynrank.adapter_parameters(model)]


class Table(nn.Module):
    """A trained table with sparse gradients below a net with LoRA."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = dynrank.add_lora(nn.Sequential(nn.Linear(6, 4)), rank=2)
        self.table = nn.Embedding(9, 6, sparse=True)

    def forward(self, ids):
        return self.net(self.table(ids))


def sparse_gradients(process):
    """The gradients beside a table, after a driver has started."""
    model = Table()
    wrapped = DistributedDataParallel(model)
    factors = dynrank.adapter_parameters(model)
    RankDriver([]).start(Training(wrapped, [torch.optim.AdamW(factors)]), Run(9))
    wrapped(torch.tensor([process, 3])).square().mean().backward()
    return [factor.grad for factor in factors] + [model.table.weight.grad.to_dense()]


LOADED = ("loaded, then wrapped", "wrapped, then loaded", "wrapped, then resized", "frozen when it is resized")


def ended(way, process=0, processes=1):
    """What a loop comes to whose ranks fall in a pool, fall alike and rise."""
    torch.manual_seed(0)
    model = dynrank.add_lora(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)), rank=4, alpha=4)
    inside = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    stages = [Stage(At(step=4), Budget(final_rank=3)), Stage(At(step=6), Rank(2))]
    wrapped, optimizer, backward = (WAYS | SHARDED)[way](model, inside)
    batches = iter(X[:, process::processes])

    def loss():
        x = next(batches)
        return (wrapped(x) - x[:, :4]).square().mean()

    stages.append(Stage(At(step=8), GrowTo(4)))
    driver = drive(stages, Training(wrapped, [optimizer]), len(X), loss, backward)
    assert [(event.step, event.layers[0].layer) for event in driver.history] == [(4, "0"), (6, "0"), (8, "0")]
    values = model.state_dict()
    assert any(isinstance(value, DTensor) for value in values.values()) == (way in SHARDED)
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values.items()}
