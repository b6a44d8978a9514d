"""DeepSpeed's flat partitions, where one tensor stands for them; test_deepspeed.py has the real ones."""

import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import dynrank
from dynrank.distributed.zero import ZeroOptimizer, ZeroTensors
from dynrank.distributed.zero_checks import END, FIRST, check_config
from dynrank.driver.learning_rates import LearningRates
from dynrank.errors import ConfigurationError
from dynrank.importance.importance import Importance
from dynrank.importance.step_gradients import StepsOfAll
from dynrank.importance.zero_importance import ZeroImportance

X = torch.randn(9, 8, 6, generator=torch.Generator().manual_seed(1))


def model():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 6))
    return dynrank.add_lora(net, rank=3)


class Engine:
    """One process that trains a flat copy of the factors, with some numbers before and behind each, as ZeRO-2 does."""

    device = "cpu"

    def __init__(self, net):
        self.factors = dynrank.adapter_parameters(net)
        places = []
        end = 5
        for factor in self.factors:
            places.append(slice(end, end + factor.numel()))
            end += factor.numel() + 2
        self.places = places
        # What the forward pass reads, of which the factors are views; a step is made in a copy.
        read = torch.randn(end)
        for factor, place in zip(self.factors, places, strict=True):
            read[place] = factor.detach().flatten()
            factor.data = read[place].view_as(factor)
        self.flat = torch.nn.Parameter(read.clone())
        inner = torch.optim.AdamW([self.flat], lr=1e-2)
        self.optimizer = SimpleNamespace(
            optimizer=inner,
            bit16_groups=[self.factors],
            bit16_groups_flat=[read],
            single_partition_of_fp32_groups=[self.flat],
        )

    def step(self):
        self.flat.grad = torch.ones_like(self.flat)
        for factor, place in zip(self.factors, self.places, strict=True):
            self.flat.grad[place] = factor.grad.flatten()
        self.optimizer.optimizer.step()
        self.flat.grad = None
        with torch.no_grad():
            for factor, place in zip(self.factors, self.places, strict=True):
                factor.copy_(self.flat[place].view_as(factor))


def test_importance_of_flat_partitions_is_that_of_whole_factors():
    whole = model()
    expected = Importance(dict(dynrank.lora_layers(whole)))
    optimizer = torch.optim.AdamW(dynrank.adapter_parameters(whole), lr=1e-2)
    steps = StepsOfAll(expected, [optimizer], dynrank.adapter_parameters(whole))
    net = model()
    engine = Engine(net)
    tensors = ZeroTensors(engine, dynrank.adapter_parameters(net))
    importance = ZeroImportance(dict(dynrank.lora_layers(net)), tensors, torch.device("cpu"))
    for number, x in enumerate(X):
        for each in (whole, net):
            each.zero_grad()
            (each(x) - x.roll(1, -1)).square().mean().backward()
        optimizer.step()
        steps.end_step()
        engine.step()
        importance.end_step()
        if number == 4:
            expected.forget_last_update()
            importance.forget_last_update()
    for name, layer in importance.of_layers().items():
        assert_close(layer, expected.of_layers()[name], rtol=1e-5, atol=1e-9)
        assert layer.value
    importance.remove()
    # Nothing of it is left beside the optimizer's own state.
    assert engine.optimizer.optimizer.state[engine.flat].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_whole_parameters_and_moments_are_read_and_written():
    net = model()
    engine = Engine(net)
    for factor in engine.factors:
        factor.grad = torch.randn_like(factor)
    engine.step()
    tensors = ZeroTensors(engine, dynrank.adapter_parameters(net))
    before = engine.flat.detach().clone()
    for value, factor in zip(tensors.whole(), engine.factors, strict=True):
        assert torch.equal(value, factor)
    halves = [value / 2 for value in tensors.whole("exp_avg")]
    tensors.write_state("exp_avg", halves)
    assert all(map(torch.equal, tensors.whole("exp_avg"), halves))
    between = torch.ones_like(engine.flat, dtype=torch.bool)
    for place in engine.places:
        between[place] = False
    assert torch.equal(engine.flat[between], before[between])


def test_factor_reaches_the_optimizer_that_steps_in_its_steps_alone():
    engine = Engine(model())
    inner = engine.optimizer.optimizer
    taken = []
    LearningRates(ZeroOptimizer(inner, [engine.factors]), engine.factors, 4.0)
    inner.register_step_pre_hook(lambda inner, *_: taken.append(inner.param_groups[0]["lr"]))
    inner.step()
    assert taken == [4e-2]
    assert inner.param_groups == [{**inner.param_groups[0], "lr": 1e-2, "params": [engine.flat]}]


FINE = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}


@pytest.fixture
def version(monkeypatch):
    def use(version):
        monkeypatch.setattr(metadata, "version", lambda _: version)

    use("0.19.8")
    return use


def test_usual_settings_are_taken(version):
    check_config(FINE)
    gathers = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    check_config(FINE | {"zero_optimization": {**gathers, "offload_param": {"device": "cpu"}}})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_optimization": {"stage": 0}}, "set 1, 2 or 3"),
        ({}, "stage=None: set 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3}}, "without stage3_gather.*: set it to true"),
        (FINE | {"fp16": {"enabled": True}}, "fp16=.*set bf16, or neither"),
        (FINE | {"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}}, "ZeRO\\+\\+"),
        (FINE | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "set cpu or none"),
        (FINE | {"tensor_parallel": {"autotp_size": 2}}, "autotp_size=2: leave it out"),
    ],
)
def test_settings_that_were_not_tried_are_refused_by_name(settings, words, version):
    with pytest.raises(ConfigurationError, match=words):
        check_config(settings)


@pytest.mark.parametrize("other", ["0.17.6", "0.18.3", "0.20.0"])
def test_versions_that_were_not_tried_are_refused(other, version):
    version(other)
    with pytest.raises(
        ConfigurationError, match=rf"deepspeed {other} is installed; install 'deepspeed>=0\.18\.4,<0\.20'"
    ):
        check_config(FINE)


def test_versions_that_were_tried_are_those_of_the_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    first, end = (".".join(map(str, numbers)) for numbers in (FIRST, END))
    assert project["optional-dependencies"]["deepspeed"] == [f"deepspeed>={first},<{end}"]
