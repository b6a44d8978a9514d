"""Ranks change in runs of every setting: what the Trainer ends with is what a plain loop with resize ends with."""

import contextlib

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import dynrank
from dynrank.callbacks import RankScheduler
from dynrank.errors import ConfigurationError
from dynrank.schedules import Stage
from dynrank.targets import GrowTo, Rank
from dynrank.triggers import At

CHANGES = {4: 3, 8: 5}
STAGES = [Stage(At(step=4), Rank(3)), Stage(At(step=8), GrowTo(5))]
STEPS = 12


def without_dropout(module_class):
    module = module_class()
    module.net[1].p = 0.0
    return module


def loop(module, data, *, clip=None, dtype=None, autocast=False):
    """The same run without Lightning."""
    if dtype is not None and not autocast:
        module.to(dtype)
    (optimizer,), (schedule,) = module.configure_optimizers()
    trained = [p for p in module.parameters() if p.requires_grad]
    loader, _ = data()
    batches = [batch for _ in range(2) for batch in loader]
    for step, (x, y) in enumerate(batches[:STEPS]):
        if step in CHANGES:
            generator = torch.Generator().manual_seed(step)
            dynrank.resize(module, CHANGES[step], optimizers=[optimizer], generator=generator)
        optimizer.zero_grad()
        if dtype is not None and not autocast:
            x = x.to(dtype)
            y = y.to(dtype)
        with torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext():
            loss = nn.functional.mse_loss(module.net(x), y)
        loss.backward()
        if clip is not None:
            clip(trained)
        optimizer.step()
        schedule["scheduler"].step()
    return module


# Runs in float64, with several batches a step and clipped by norm, are those of the oracle.
SETTINGS = {
    "clipping by value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"clip": lambda p: nn.utils.clip_grad_value_(p, 0.01)},
    ),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {"dtype": torch.bfloat16, "autocast": True}),
    "bf16-true": ({"precision": "bf16-true"}, {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_run_ends_where_a_plain_loop_ends(regression, fit, setting):
    options, of_loop = SETTINGS[setting]
    module = without_dropout(regression[0])
    fit(RankScheduler(list(STAGES)), module=module, max_steps=STEPS, **options)
    expected = loop(without_dropout(regression[0]), regression[1], **of_loop)
    assert [layer.rank for _, layer in dynrank.lora_layers(module)] == [5, 5]
    for name, value in expected.named_parameters():
        assert module.get_parameter(name).dtype == value.dtype
        assert_close(module.get_parameter(name), value, msg=name)


def test_adapters_in_float16_are_refused(fit):
    with pytest.raises(ConfigurationError, match="16-true.*bf16-true"):
        fit(RankScheduler(list(STAGES)), precision="16-true")


def test_compiled_model_is_compiled_for_every_rank_that_it_gets():
    """torch keeps 8 versions of a function; after that it would silently run eagerly."""
    ranks_compiled = []

    def backend(graph, inputs):
        ranks_compiled.append(len(layer.lora_A))
        return graph.forward

    layer = dynrank.add_lora(nn.Sequential(nn.Linear(12, 12)), rank=1)[0]
    compiled = torch.compile(layer, backend=backend)
    with torch.no_grad():
        for rank in range(1, 12):
            dynrank.resize(layer, rank)
            nn.init.normal_(layer.lora_B)
            x = torch.randn(2, 12)
            assert_close(compiled(x), layer.base(x) + layer.scaling * x @ layer.lora_A.mT @ layer.lora_B.mT)
    assert ranks_compiled == list(range(1, 12))
