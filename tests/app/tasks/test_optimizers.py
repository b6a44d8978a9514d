import sys
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import dynrank
from dynrank.app.tasks.optimizers import ELSEWHERE, make_optimizer
from dynrank.errors import ConfigurationError

VALUES = {"name": "AdamW", "lr": 0.1, "head_lr": 0.3, "weight_decay": 0.0, "warmup_steps": 10}
VALUES |= {"decay": "warmup_stable_decay", "decay_share": 0.25, "options": {}}


def rates(**values):
    made = make_optimizer([nn.Parameter(torch.ones(1))], [nn.Parameter(torch.ones(1))], 100, **{**VALUES, **values})
    optimizer = made["optimizer"]
    scheduler = made["lr_scheduler"]["scheduler"]
    history = []
    for _ in range(100):
        history.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return history


def test_stable_decay_warms_up_stays_and_falls():
    adapter = [rate for rate, _ in rates()]
    assert adapter[:11] == pytest.approx([0.01 * i for i in range(11)])
    assert adapter[10:75] == pytest.approx([0.1] * 65)
    assert adapter[75:] == sorted(adapter[75:], reverse=True)
    assert adapter[-1] < 0.01


def test_head_rate_keeps_its_proportion():
    assert all(head == pytest.approx(3 * adapter) for adapter, head in rates(decay="cosine"))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"name": "Adamw"}, "optimizer.name"),
        ({"name": "functional"}, "optimizer.name"),
        ({"options": {"momentum": 0.9}}, "momentum"),
        ({"lr": -1.0}, "learning rate"),
    ],
)
def test_unusable_value_is_refused(values, key):
    with pytest.raises(ConfigurationError, match=key):
        rates(**values)


@pytest.mark.parametrize("name", [*ELSEWHERE, "Adafactor", "Muon"])
def test_optimizers_of_this_and_other_packages_are_made_by_name(name):
    adapter, head = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    made = make_optimizer([adapter], [head], 100, **{**VALUES, "name": name, "warmup_steps": 0})
    assert type(made["optimizer"]).__name__ == name.rpartition(".")[2]
    assert [group["lr"] for group in made["optimizer"].param_groups] == [0.1, 0.3]


def test_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    name = "bitsandbytes.AdamW8bit"
    # Python refuses to import a module that is None here.
    monkeypatch.setitem(sys.modules, ELSEWHERE[name], None)
    with pytest.raises(ConfigurationError, match=rf"optimizer.name={name} .*pip install bitsandbytes"):
        rates(name=name)


SHAPES = ((4, 12), (12, 4), (5, 5), (1, 9), (7,), (4, 3, 1, 1))


def muon(adapter, head):
    values = {"name": "Muon", "lr": 0.01, "head_lr": 0.1, "weight_decay": 0.1, "warmup_steps": 0, "options": {}}
    return make_optimizer(adapter, head, 100, **values, decay="constant_with_warmup", decay_share=0.0)["optimizer"]


def parameters(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def steps(count, trained, *optimizers):
    """Steps with random gradients, alike at every call."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def test_muon_is_torchs_for_matrices_of_the_adapter_and_adamw_for_all_else():
    ours = parameters(*SHAPES, (3, 6), (3,))
    made = muon(ours[:6], ours[6:])
    twins = deepcopy(ours)
    of_matrices = torch.optim.Muon(twins[:4], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": twins[4:6]}, {"params": twins[6:], "lr": 0.1}]
    of_all_else = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    steps(5, ours, made)
    steps(5, twins, of_matrices, of_all_else)
    assert_close(ours, twins, rtol=0, atol=0)
    assert [{*made.state[p]} for p in ours[3:5]] == [{"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}]


def test_muon_goes_on_from_its_state_to_the_same_bits():
    ours = parameters(*SHAPES, (3,))
    made = muon(ours[:6], ours[6:])
    steps(3, ours, made)
    twins = deepcopy(ours)
    twin = muon(twins[:6], twins[6:])
    twin.load_state_dict(deepcopy(made.state_dict()))
    steps(3, ours, made)
    steps(3, twins, twin)
    assert_close(ours, twins, rtol=0, atol=0)


def test_muons_momentum_is_carried_through_a_change_of_rank():
    model = dynrank.add_lora(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), rank=4, alpha=8, target_modules=["0"])
    factors = dynrank.adapter_parameters(model)
    made = muon(factors, [*model[1].parameters()])
    steps(2, [*factors, *model[1].parameters()], made)
    dynrank.resize(model, 2, optimizers=[made])
    assert [p.shape for p in factors] == [made.state[p]["momentum_buffer"].shape for p in factors]
    assert all(made.state[p]["momentum_buffer"].any() for p in factors)
    steps(1, factors, made)
