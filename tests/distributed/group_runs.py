"""Four processes in two groups, each of which trains a model of its own meanwhile."""

from functools import partial
from pathlib import Path

import torch
from ends import keep
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dynrank
from dynrank.distributed.sharding import shard_frozen
from dynrank.driver.driver import RankDriver
from dynrank.driver.training import Training
from dynrank.schedules import How, Stage, auto
from dynrank.targets import Budget, GrowTo, Rank
from dynrank.triggers import At, Plateau, Run

# The dimensions are steps, examples and features.
X = torch.randn(14, 8, 6, generator=torch.Generator().manual_seed(1))
WIDE = [Stage(At(step=3), Budget(final_rank=3)), Stage(At(step=5), Rank(2)), Stage(At(step=8), GrowTo(4))]
NARROW = [Stage(Plateau("loss", patience=1, min_delta=0.9), Rank(3))]
NARROW += auto(0.5, share=0.6, at=0.7, how=How(check_monitor="loss"))
# For each group the width of its model, its steps, and its schedule: they change ranks, and validate, at other steps.
GROUPS = {"wide": (12, 10, WIDE), "narrow": (8, 14, NARROW)}


class Loop(Training):
    """Validates by the examples of this process."""

    def __init__(self, model, optimizer, examples):
        super().__init__(model, [optimizer])
        self.examples = examples

    def validate(self):
        with torch.no_grad():
            return {"loss": float((self.model(self.examples) - self.examples[:, :4]).square().mean())}


def parts(name, way, mesh):
    """(loop, the model as it is called, batches of this process) of a group."""
    width, *_ = GROUPS[name]
    torch.manual_seed(width)
    model = dynrank.add_lora(nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4)), rank=4, alpha=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if way == "ddp":
        model = DistributedDataParallel(model, process_group=mesh.get_group())
    elif way == "fsdp2":
        model = shard_frozen(model, mesh)
    mine = X if mesh is None else X[:, mesh.get_local_rank() :: mesh.size()]
    return Loop(model, optimizer, mine[0]), model, mine


def ended(name, way="alone", mesh=None):
    """What the loop of a group comes to; the processes of a mesh have its batches together."""
    _, steps, stages = GROUPS[name]
    loop, model, batches = parts(name, way, mesh)
    driver = RankDriver(stages)
    driver.start(loop, Run(steps))
    for x in batches[:steps]:
        driver.advance(loop)
        (model(x) - x[:, :4]).square().mean().backward()
        loop.optimizers[0].step()
        loop.step += 1
        driver.end_step(loop)
        loop.optimizers[0].zero_grad()
        if loop.step % 4 == 0:
            driver.validated(loop, loop.validate())
    driver.finish(loop)
    values = loop.model.state_dict()
    weights = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values.items()}
    history = [(event.step, [(layer.layer, layer.rank_after) for layer in event.layers]) for event in driver.history]
    return {"weights": weights, "history": history}


def main(place):
    distributed.init_process_group("gloo")
    process = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("groups", "members"))["members"]
    name = [*GROUPS][process // 2]
    checks = {way: partial(ended, name, way, mesh) for way in ("ddp", "fsdp2")}
    keep(checks, Path(place) / f"{process}.pt", {})
    # The other group may still need the connections.
    distributed.barrier()
    distributed.destroy_process_group()
