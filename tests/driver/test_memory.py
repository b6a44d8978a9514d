"""A change copies adapter and optimizer only where a check may undo it, counted in bytes that torch allocates."""

import torch
from torch import nn

import dynrank
from dynrank.driver.driver import RankDriver
from dynrank.driver.training import Training
from dynrank.schedules import How, Stage
from dynrank.targets import Budget
from dynrank.triggers import At, Run

# Of 4 layers, in MiB: adapters of 4 with Adam's moments of 8.
SIZE, RANK, STATE = 1024, 128, 12 * 2**20


class Loop(Training):
    def __init__(self):
        torch.manual_seed(0)
        model = dynrank.add_lora(nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(4))), rank=RANK)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
        super().__init__(model, [optimizer])
        model(torch.randn(8, SIZE)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def validate(self):
        return {"val/loss": 1.0}


def peak(call):
    """The most bytes that ``call`` holds at once in addition to those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def peak_of_change(**how):
    loop, driver = Loop(), RankDriver(Stage(At(step=1), Budget(share=0.5), how=How(**how)))
    driver.start(loop, Run(9))
    loop.step = 1
    most = peak(lambda: driver.advance(loop))
    assert len(driver.history) == 1
    return most


def test_change_without_a_check_needs_no_more_memory_than_resize():
    loop = Loop()
    alone = peak(lambda: dynrank.resize(loop.model, RANK // 2, optimizers=loop.optimizers))
    assert STATE / 2 < alone < STATE
    changed = peak_of_change()
    assert changed <= 1.1 * alone
    # A check needs the copy from which the change is undone.
    assert peak_of_change(max_regression=1.0) > changed + 0.9 * STATE
    print({"resize": alone / 2**20, "change": changed / 2**20})
