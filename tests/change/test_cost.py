"""What a change costs: bytes that torch allocates, and exchanges between processes."""

import gc

import torch
from torch import nn

import dynrank
from dynrank.distributed import processes
from dynrank.driver.driver import RankDriver
from dynrank.driver.training import Training
from dynrank.schedules import How, Stage
from dynrank.targets import Budget
from dynrank.triggers import At, Run

SIZE = 1024
RANK = 128
# Bytes of four adapters, 4 MiB, and of Adam's moments, 8 MiB.
STATE = 12 * 2**20


class Loop(Training):
    def __init__(self):
        torch.manual_seed(0)
        model = dynrank.add_lora(nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(4))), rank=RANK, alpha=RANK)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
        super().__init__(model, [optimizer])
        model(torch.randn(8, SIZE)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def validate(self):
        return {"val/loss": 1.0}


def peak(call):
    """The most bytes that ``call`` holds at once in addition to those before it."""
    # What an earlier call left in a cycle may not be freed, and so subtracted, in this one.
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def due(**how):
    """(a driver whose change is due, its loop)."""
    loop = Loop()
    driver = RankDriver(Stage(At(step=1), Budget(share=0.5), how=How(**how)))
    driver.start(loop, Run(9))
    loop.step = 1
    return driver, loop


def peak_of_change(**how):
    driver, loop = due(**how)
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


def test_change_in_several_processes_is_one_exchange_after_their_comparison(monkeypatch):
    driver, loop = due()
    sent = []

    def gather(values, value, group):
        sent.append("digests")
        values[:] = [value] * len(values)

    def broadcast(objects, src, group):
        sent.append("the change")

    monkeypatch.setattr(processes, "process_count", lambda group: 2)
    monkeypatch.setattr(processes, "process_index", lambda group: 0)
    monkeypatch.setattr(processes.distributed, "all_gather_object", gather)
    monkeypatch.setattr(processes.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(processes.distributed, "broadcast", lambda tensor, src, group: sent.append(tensor.shape))
    driver.advance(loop)
    assert len(driver.history) == 1
    assert sent[:2] == ["digests", "the change"]
    # Its tensors follow: the factors, and Adam's two moments and count of each.
    assert len(sent[2:]) == 4 * 2 * (1 + 3)
