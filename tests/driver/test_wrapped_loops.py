"""The driver in loops whose model and optimizer plain DDP, Lightning Fabric or accelerate has wrapped."""

from pathlib import Path

import forked
import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trained import drive

import dynrank
from dynrank.driver.training import Training
from dynrank.schedules import How, Stage
from dynrank.targets import GrowTo, Rank
from dynrank.triggers import At

# The dimensions are steps, examples and features.
X = torch.randn(10, 8, 6, generator=torch.Generator().manual_seed(1))


def plain(model, optimizer):
    several = torch.distributed.is_initialized()
    return DistributedDataParallel(model) if several else model, optimizer, torch.Tensor.backward


def fabric(model, optimizer):
    several = torch.distributed.is_initialized()
    made = Fabric(accelerator="cpu", devices=2 if several else 1, strategy="ddp" if several else "auto")
    made.launch()
    return *made.setup(model, optimizer), made.backward


def accelerate(model, optimizer):
    made = Accelerator(cpu=True)
    return *made.prepare(model, optimizer), made.backward


WAYS = {"plain": plain, "fabric": fabric, "accelerate": accelerate}


def ended(way, process=0, processes=1):
    """What a loop comes to whose ranks fall by gates, fall by weight and rise."""
    torch.manual_seed(0)
    model = dynrank.add_lora(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)), rank=4)
    inside = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    stages = [Stage(At(step=4), Rank(3), how=How(metric="gates", window=2)), Stage(At(step=6), Rank(2))]
    wrapped, optimizer, backward = WAYS[way](model, inside)
    batches = iter(X[:, process::processes])

    def loss():
        x = next(batches)
        return (wrapped(x) - x[:, :4]).square().mean()

    stages.append(Stage(At(step=8), GrowTo(4)))
    driver = drive(stages, Training(wrapped, [optimizer]), len(X), loss, backward)
    assert [(event.step, event.layers[0].layer) for event in driver.history] == [(4, "0"), (6, "0"), (8, "0")]
    return model.state_dict()


PROGRAM = """
import os, sys
import torch
sys.path.insert(0, sys.argv[1])
from test_wrapped_loops import WAYS, ended

torch.distributed.init_process_group("gloo")
process = int(os.environ["RANK"])
torch.save({way: ended(way, process, 2) for way in WAYS}, f"{process}.pt")
"""


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    started = forked.pair(PROGRAM, Path(__file__).parent, cwd=folder)
    assert forked.end(started) == [0, 0], forked.printed(folder)
    return [torch.load(folder / f"{process}.pt") for process in (0, 1)]


@pytest.mark.filterwarnings("ignore:.*torch.distributed|.*CPU")
@pytest.mark.parametrize("way", WAYS)
def test_wrapped_loop_ends_where_a_plain_one_does(way, in_two):
    expected, (first, second) = ended("plain"), (found[way] for found in in_two)
    for name, value in ended(way).items():
        assert torch.equal(value, expected[name]), name
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-5)
