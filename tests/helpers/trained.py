"""Adapters as if trained, and trained by a schedule in a plain loop."""

import torch
from torch import nn

import dynrank
from dynrank.driver.driver import RankDriver
from dynrank.triggers import Run, Trigger


def updated(model, std=1.0):
    """``model`` whose layers have an update: the factors that began at zero are random."""
    for factor in dynrank.adapter_parameters(model):
        if not factor.any():
            nn.init.normal_(factor, std=std)
    return model


def ranks(model):
    """The set of the ranks of its layers."""
    return {layer.rank for _, layer in dynrank.lora_layers(model)}


def watched(driver):
    """What a ``driver`` lets its only trigger observe from here on: [(step, *values)]."""
    (trigger,) = [stage.when for stage in driver.stages if isinstance(stage.when, Trigger)]
    seen = []
    observe = trigger.observe
    trigger.observe = lambda *values: seen.append(values) or observe(*values)
    return seen


def drive(schedule, loop, steps, loss, backward=torch.Tensor.backward):
    """The driver that has taken ``loop`` (a Training) through so many steps on ``loss()``."""
    driver = RankDriver(schedule)
    driver.start(loop, Run(steps))
    while loop.step < steps:
        driver.advance(loop)
        backward(loss())
        for optimizer in loop.optimizers:
            optimizer.step()
        loop.step += 1
        driver.end_step(loop)
        for optimizer in loop.optimizers:
            optimizer.zero_grad()
    driver.finish(loop)
    return driver
