"""A run in bfloat16 ends where a plain loop with resize ends; a compiled model is compiled for every rank."""

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


def loop(module, data):
    """The same run without Lightning."""
    module.to(torch.bfloat16)
    (optimizer,), (schedule,) = module.configure_optimizers()
    loader, _ = data()
    batches = [batch for _ in range(2) for batch in loader]
    for step, (x, y) in enumerate(batches[:STEPS]):
        if step in CHANGES:
            generator = torch.Generator().manual_seed(step)
            dynrank.resize(module, CHANGES[step], optimizers=[optimizer], generator=generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(module.net(x.to(torch.bfloat16)), y.to(torch.bfloat16)).backward()
        optimizer.step()
        schedule["scheduler"].step()
    return module


# Runs in float64, with several batches a step and clipped by norm, are those of the oracle.
def test_run_in_bfloat16_ends_where_a_plain_loop_ends(regression, fit):
    module = without_dropout(regression[0])
    fit(RankScheduler(list(STAGES)), module=module, max_steps=STEPS, precision="bf16-true")
    expected = loop(without_dropout(regression[0]), regression[1])
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

    layer = dynrank.add_lora(nn.Sequential(nn.Linear(12, 12)), rank=1, alpha=1)[0]
    compiled = torch.compile(layer, backend=backend)
    with torch.no_grad():
        for rank in range(1, 10):
            dynrank.resize(layer, rank, optimizers=())
            nn.init.normal_(layer.lora_B)
            x = torch.randn(2, 12)
            assert_close(compiled(x), layer.base(x) + layer.scaling * x @ layer.lora_A.mT @ layer.lora_B.mT)
    assert ranks_compiled == list(range(1, 10))
